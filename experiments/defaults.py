"""
The default run of train.py beside the same run with no fork layers, in the paper's form, and with its top-k rule:
python experiments/defaults.py

Trains what is not trained yet (a few minutes each), measures every checkpoint with decode_loss.py, and writes
experiments/results/defaults.json and defaults.md.
"""
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.program import knob, read_flags  # noqa: E402

ARMS = {"bubbles (the default)": [], "plain GPT (no fork layers)": ["--fork_layers", "none"],
        "the paper's form": ["--form", "paper"], "the paper's form, topk": ["--form", "paper", "--routing", "topk"]}
KEYS = ["causal, teacher-forced", "causal, cached, token by token", "topk, teacher-forced",
        "topk, token by token, recomputed"]


@dataclass
class Settings:
    seeds: tuple = knob((0, 1, 2), "seeds of each arm", "ints")
    runs: str = knob("out-defaults", "where the runs go")
    dataset: str = knob("shakespeare", "as train.py's")
    results: str = knob(str(ROOT / "experiments" / "results"), "where defaults.json and defaults.md go")
    windows: int = knob(64, "validation windows to decode", low=1)
    flags: str = knob("", "more flags for every run of train.py, in quotes")


def python(script, *flags):
    """Run a script of this repository to its end; returns what it printed."""
    return subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, stdout=subprocess.PIPE,
                          text=True, encoding="utf-8").stdout


def measure(s, arm, seed):
    """Train one arm with one seed, unless that was done before, and measure it."""
    out = Path(s.runs) / f"{list(ARMS).index(arm)}-{seed}"
    if not (out / "loss.png").exists():                               # the last thing that a run writes
        python("train.py", "--dataset", s.dataset, *s.flags.split(), "--seed", seed, "--out_dir", out, *ARMS[arm])
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    losses = json.loads(python("experiments/decode_loss.py", "--dataset", s.dataset, "--windows", s.windows,
                               "--out_dir", out, "--json"))
    return dict(arm=arm, seed=seed, steps=checkpoint["step"], val_loss=checkpoint["val_loss"],
                parameters=sum(w.numel() for w in checkpoint["model"].values()), **losses)


def spread(values):
    """Mean, and lowest to highest."""
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def table(runs, seeds):
    """The losses of each arm as Markdown."""
    header = ["trained as", "parameters", "validation loss", *KEYS]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for arm in ARMS:
        mine = [run for run in runs if run["arm"] == arm]
        cells = [f"{mine[0]['parameters']:,}", *(spread([run[key] for run in mine]) for key in ["val_loss", *KEYS])]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    one, worst = runs[0], max(run["largest difference of a cached log-probability"] for run in runs)
    lines += ["", f"Nats per byte, mean (lowest to highest) over seeds {', '.join(map(str, seeds))}, after "
              f"{one['steps']} steps. Validation loss: over train.py's evaluation windows. The other columns: over "
              f"{one['windows']} windows of {one['block_size']} bytes. The largest difference between a cached "
              f"log-probability and the full forward's is {worst:.1e}. Machine: {one['device']}, {one['processor']}, "
              f"{os.cpu_count()} cores, torch {one['torch']}."]
    return "\n".join(lines) + "\n"


def main(argv):
    s, runs = read_flags(Settings, argv, __doc__.strip().splitlines()[0]), []
    for seed in s.seeds:
        for arm in ARMS:
            runs.append(measure(s, arm, seed))
            print(f"{arm}, seed {seed}: {runs[-1]['val_loss']:.4f}", flush=True)
    results = Path(s.results)
    results.mkdir(parents=True, exist_ok=True)
    (results / "defaults.json").write_text(json.dumps(runs, indent=1) + "\n")
    (results / "defaults.md").write_text(table(runs, s.seeds))
    print(table(runs, s.seeds))


if __name__ == "__main__":
    main(sys.argv[1:])
