"""
One checkpoint's loss five ways, on the same validation windows: python experiments/decode_loss.py

Teacher-forced under the causal rule; decoded token by token from a cache, which must agree; teacher-forced under the
paper's top-k rule, whose choices see later tokens; and top-k as it would really generate: each prediction from a
forward over the tokens up to it alone, recomputed from scratch, its budget scaled to them, or not: as many streams as
the whole window may have. Prints a table, or JSON with --json.
"""
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks.text import load_data  # noqa: E402
from tinybubbles import Cache, quota  # noqa: E402
from tools.program import choose_device, knob, read_flags, refuse  # noqa: E402
from train import load_checkpoint  # noqa: E402


@dataclass
class Settings:
    out_dir: str = knob("out", "the folder of ckpt.pt")
    dataset: str = knob("shakespeare", "the text that it was trained on")
    windows: int = knob(64, "validation windows of block_size tokens, spread evenly", low=1)
    budget: float = knob(None, "streams per token; default: as trained", "float", low=1)
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    json: bool = knob(False, "print JSON instead of a table")


def nats(logits, y):
    """Negative log-probability (B, T) of the targets y (B, T) under logits (B, T, V)."""
    return -logits.double().gather(-1, y.unsqueeze(-1)).squeeze(-1)


def validation_windows(dataset, model, windows):
    """Windows of a text's validation part, as long as a context, spread evenly, and their targets: (B, T) each."""
    size, words, device = model.config.block_size, model.config.vocab_size, model.wte.weight.device
    _, data = load_data(dataset, size)
    starts = np.linspace(0, len(data) - size - 1, windows).astype(np.int64)
    tokens = torch.from_numpy(np.stack([data[start:start + size + 1] for start in starts]).astype(np.int64)).to(device)
    if tokens.max() >= words:
        refuse(f"--dataset {dataset} has a token {tokens.max()}, the model {words}; name its own")
    return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def measure(model, x, y, budget):
    """The losses in nats of every token, {way: (B, T)}, and the largest difference of a cached log-probability from a
    full one."""
    T, budget = x.size(1), budget or model.config.budget
    full, cache = model(x, budget=budget, routing="causal")[0], Cache()
    cached = torch.cat([model(token, budget=budget, routing="causal", cache=cache)[0] for token in x.split(1, 1)], 1)
    ways = {"causal, teacher-forced": full, "causal, cached, token by token": cached,
            "topk, teacher-forced": model(x, budget=budget, routing="topk")[0]}
    for name, scale in (("recomputed", lambda t: budget), ("budget not scaled", lambda t: quota(budget, T) / t)):
        prefixes = [model(x[:, :t], budget=scale(t), routing="topk")[0][:, -1:] for t in range(1, T + 1)]
        ways["topk, token by token, " + name] = torch.cat(prefixes, 1)
    return {name: nats(logits, y) for name, logits in ways.items()}, (cached - full).abs().max().item()


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    device = choose_device(s.device)
    model = load_checkpoint(Path(s.out_dir) / "ckpt.pt", device)[1].eval()
    x, y = validation_windows(s.dataset, model, s.windows)
    losses, difference = measure(model, x, y, s.budget)
    losses = {name: values.mean().item() for name, values in losses.items()}
    losses["largest difference of a cached log-probability"] = difference
    machine = dict(device=str(device), processor=platform.machine(), torch=torch.__version__)
    settings = dict(windows=s.windows, block_size=model.config.block_size, budget=s.budget or model.config.budget)
    if s.json:
        print(json.dumps({**losses, **settings, **machine}, indent=1))
        return
    for name, value in losses.items():
        print(f"{name:48s}{value:.3g}" if "largest" in name else f"{name:48s}{value:.6f}")
    print(*(f"{key} {value}" for key, value in (settings | machine).items()), sep=", ")


if __name__ == "__main__":
    main(sys.argv[1:])
