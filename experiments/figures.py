"""
The pictures of the README: python experiments/figures.py --figure method    (entropy, attention, budgets, placement)

method: what the fork layers of tinybubbles.py do with the scores of the README's worked example. entropy and attention
look at a trained checkpoint, entropy at that of a plain GPT too; budgets and placement draw what compare.py found. The
numbers of a picture stand beside it, as JSON.
"""
import json
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments.compare import GPT, interval, less  # noqa: E402
from tasks.text import Text  # noqa: E402
from tinybubbles import Config, Fork, Streams  # noqa: E402
from tools.files import load_checkpoint, make_folder  # noqa: E402
from tools.pictures import count_streams  # noqa: E402
from tools.program import choose_device, knob, or_refuse, read_flags, refuse  # noqa: E402
from train import Settings as TrainSettings  # noqa: E402

TOKENS, BUDGET, BAR = "abcd", 1.5, 0.5
SCORES = [  # (fork, keep) probabilities of every stream; originals are always kept
    [(.7, 1), (.9, 1), (.6, 1), (.8, 1)],                             # at the first fork layer: a b c d
    [(.3, .8), (.4, 1), (.2, 1), (.2, .1), (.3, 1), (.8, 1)],         # at the second: a' a b c' c d
]
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]                 # Okabe and Ito's, safe for colour-blind readers


def worked_example():
    """[(tok, P, parents)] after the embedding and after each fork layer, lists over streams; a parent is
    (stream of the row before, forked from it rather than kept)."""
    x, tok, logp = torch.zeros(1, 4, 2), torch.arange(4)[None], torch.zeros(1, 4)
    rows, first = [(tok[0].tolist(), [1.0] * 4, None)], torch.ones(1, 1, dtype=torch.int64)
    for scores in SCORES:
        fork = Fork(Config(n_embd=2, n_head=1, budget=BUDGET)).eval()
        fork.bar.fill_(math.log(BAR))
        torch.nn.init.constant_(fork.embedding, 100)
        fork.score.forward = lambda x: torch.tensor([scores]).logit().clamp(max=50)
        x = torch.arange(x.size(1)).float().view(1, -1, 1).expand(-1, -1, 2)      # each stream carries its own number
        streams = Streams(tok, logp, 4, first, torch.ones(2), None, 0)
        x, tok, logp = fork(x, streams, BUDGET, first - 1, None)
        parents = [(int(number) % 100, number >= 100) for number in x[0, :, 0].tolist()]
        rows.append((tok[0].tolist(), logp[0].exp().tolist(), parents))
    return rows


def positions(tok):
    """The streams' fractional positions k - p/q."""
    count = [tok.count(t) for t in tok]
    return [t + 1 - (tok.index(t) + tok.count(t) - 1 - i) / count[i] for i, t in enumerate(tok)]


def draw_method(path):
    """The worked example of the README as a picture."""
    rows = worked_example()
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    heights = [0, 1.5, 3]
    for level, (tok, P, parents) in enumerate(rows):
        x, y = positions(tok), heights[level]
        axes.axhspan(y + 0.28, y + 0.62, color="#eeeeee", zorder=0)
        axes.text(0.02, y + 0.45, ("block 0", "block 1", "block 2")[level], va="center", fontsize=10, color="#333333")
        for i, t in enumerate(tok):
            original = i + 1 == len(tok) or tok[i + 1] != t
            top = y + 0.9 if level < 2 else y + 0.8
            axes.plot([x[i]] * 2, [y, top], color=COLORS[t], linewidth=1 + 4 * P[i], alpha=0.35 + 0.65 * P[i], zorder=1)
            face, ink = (COLORS[t], "white") if original else ("white", COLORS[t])
            axes.scatter(x[i], y, s=330, color=face, edgecolor=COLORS[t], linewidth=2, zorder=3)
            axes.text(x[i], y, TOKENS[t] + ("" if original else "\u2032"), color=ink, fontsize=12, ha="center",
                      va="center", zorder=4)
            if level:
                axes.text(x[i] + 0.11, y - 0.04, f"P {P[i]:.2g}", fontsize=8, color="#333333", va="center")
        if parents is not None:
            draw_fork(axes, rows[level - 1][0], tok, parents, heights[level - 1] + 0.9, y)
    for t, letter in enumerate(TOKENS):
        last = [p for p, owner in zip(positions(rows[-1][0]), rows[-1][0]) if owner == t]
        for p in last:
            axes.plot([p, t + 1], [heights[-1] + 0.8, heights[-1] + 1.25], color=COLORS[t], linewidth=2, zorder=1)
        axes.text(t + 1, heights[-1] + 1.36, f"p(next | {TOKENS[:t + 1]})", ha="center", va="bottom", fontsize=10)
    for y, text in ((1.2, "fork layer"), (2.7, "fork layer"), (4.02, "merge")):
        axes.text(0.02, y, text, va="center", fontsize=10, fontweight="bold", color="#333333")
    axes.set(xlim=(0, 4.5), ylim=(-0.45, 4.65), yticks=[], xticks=[0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4])
    axes.set_xlabel("rotary position")
    axes.set_title(f"Four tokens at a budget of {BUDGET} streams per token: a and c fork; then a keeps its fork, c's "
                   "is deleted, and d forks", fontsize=11)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def draw_fork(axes, old, new, parents, bottom, top):
    """The lines of one fork layer: kept (solid), forked (dashed), deleted (a cross)."""
    before, after = positions(old), positions(new)
    for i, (j, forked) in enumerate(parents):
        axes.plot([before[j], after[i]], [bottom, top - 0.13], color=COLORS[new[i]], linewidth=1.5, zorder=2,
                  linestyle="--" if forked else "-")
    for j in set(range(len(old))) - {j for j, forked in parents if not forked}:
        axes.scatter(before[j], bottom, marker="x", s=90, color="#222222", linewidth=2.5, zorder=5)
        axes.text(before[j] + 0.09, bottom + 0.06, "deleted", fontsize=8.5, color="#222222")


# -- a trained model --------------------------------------------------------------------------------------------------

def over_windows(statistic, *arrays):
    """The statistic of the arrays (windows, ...) and its 95 % interval over 500 draws of windows: (3,) or (3, n)."""
    rng, n = np.random.default_rng(0), len(arrays[0])
    drawn = [statistic(*(a[rows] for a in arrays)) for rows in rng.integers(n, size=(500, n))]
    return np.stack([statistic(*arrays), *np.nanpercentile(drawn, (2.5, 97.5), axis=0)])


def ranks(values):
    """Ranks of values (n,); equal values share the mean of theirs."""
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count + 1) / 2)[index]


def spearman(a, b):
    """Spearman's rank correlation of a and b, of any one shape."""
    return np.corrcoef(ranks(a.ravel()), ranks(b.ravel()))[0, 1]


@torch.no_grad()
def entropy(model, gpt, idx, budget):
    """Streams in the last block against the entropy of the prediction, this model's and a plain GPT's: for each rho,
    and by tenths of the tokens mean entropy and mean streams, with intervals."""
    parts = [[], [], []]
    for row in idx.split(1):
        streams = []
        own, of_gpt = model(row, budget=budget, streams=streams)[0], gpt(row)[0]
        parts[0].append(count_streams(streams)[-1].numpy())
        for part, log_probs in zip(parts[1:], (own, of_gpt)):
            part.append(-(log_probs.exp() * log_probs).sum(-1)[0].cpu().numpy())
    count, found = np.stack(parts[0]), {}
    for name, part in (("this model's", parts[1]), ("a plain GPT's", parts[2])):
        H = np.stack(part)                                            # (windows, T)
        tenth = np.searchsorted(np.quantile(H, np.arange(1, 10) / 10), H)
        mean = lambda count, tenth: np.array([count[tenth == i].mean() for i in range(10)])
        found[name] = dict(rho=over_windows(spearman, count, H).tolist(), entropy=mean(H, tenth).tolist(),
                           streams=over_windows(mean, count, tenth).T.tolist())
    return found


def draw_entropy(found, axes):
    for (name, line), color, marker in zip(found.items(), COLORS, "os"):
        mean, low, high = np.array(line["streams"]).T
        axes.errorbar(line["entropy"], mean, (mean - low, high - mean), color=color, marker=marker, capsize=3,
                      label="{}: \u03c1 = {:.3f} ({:.3f} to {:.3f})".format(name, *line["rho"]))
    axes.set(xlabel="entropy of the prediction, nats; tenths of the tokens", ylabel="streams per token, last block")


@torch.no_grad()
def attention(model, idx, budget):
    """In each block after the first fork layer: the mean attention that an original which has forks pays to one of
    them, to the original of the token before, and to a stream of an earlier token; with intervals."""
    real, sums = F.scaled_dot_product_attention, []                   # (windows, blocks, 3 targets, sum and number)
    for row in idx.split(1):
        weights, streams, look = [], [], []

        def seen(q, k, v, **how):
            later = torch.ones(q.size(2), k.size(2), device=q.device).triu(1).bool()
            logits = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(later, -math.inf)
            weights.append(logits.softmax(-1).mean((0, 1)))           # (N, N), the mean over heads
            return real(q, k, v, **how)
        with mock.patch.object(F, "scaled_dot_product_attention", seen):
            model(row, budget=budget, streams=streams)
        for l in range(min(model.config.fork_layers), model.config.n_layer):
            tok, there = streams[l][0][0], streams[l][0][0] >= 0
            original = there & (tok != F.pad(tok[1:], (0, 1), value=-2))
            asks = original & (torch.bincount(tok[there], minlength=len(tok))[tok.clamp(min=0)] > 1)
            query, key = tok[:, None], tok[None]
            targets = (query == key) & ~original, (query == key + 1) & original, (query > key) & there
            pairs = [target & asks[:, None] for target in targets]
            look.append([[weights[l][pair].sum().item(), pair.sum().item()] for pair in pairs])
        sums.append(look)
    mean = lambda sums: sums.sum(0)[..., 0] / np.maximum(1, sums.sum(0)[..., 1])
    found, names = over_windows(mean, np.array(sums)), ("its own fork", "the token before", "an earlier stream")
    return {f"block {l}": {name: found[:, i, j].tolist() for j, name in enumerate(names)}
            for i, l in enumerate(range(min(model.config.fork_layers), model.config.n_layer))}


def draw_attention(found, axes):
    for j, name in enumerate(next(iter(found.values()))):
        mean, low, high = np.array([block[name] for block in found.values()]).T
        axes.bar(np.arange(len(found)) + 0.27 * (j - 1), mean, 0.25, yerr=(mean - low, high - mean), capsize=3,
                 color=COLORS[j], label=f"to {name}")
    axes.set_xticks(range(len(found)), found)
    axes.set_ylabel("attention of an original with forks\nto one such stream")


def budgets(runs):
    """At each budget the loss of bubbles less the plain GPT's, from compare.py's runs: mean and half its interval."""
    last, found = list(runs[0]["loss"])[-1], {}
    for arm in ("bubbles, r = 2", "bubbles, elastic"):
        dials = next((run["loss"][last] for run in runs if run["arm"] == arm), {})
        found[arm] = {r: interval(less(runs, arm, GPT, last, r)) for r in sorted(dials, key=float)}
    return found


def draw_budgets(found, axes):
    axes.axhline(0, color="black", linewidth=1)
    for (name, line), color, marker in zip(found.items(), COLORS, "os"):
        mean, half = np.array(list(line.values())).reshape(-1, 2).T
        axes.errorbar(list(map(float, line)), mean, half, color=color, marker=marker, capsize=3, label=name)
    axes.set(xlabel="budget at inference, streams per token", ylabel="loss less a plain GPT's, nats (lower is better)")


def placement(runs):
    """Of each mixture and the plain GPT after each mark, from compare.py's runs on urns: how many streams a hard token
    has more than an easy one, the sum of its P, and the nats by which it misses the least loss, with half intervals."""
    found = {}
    for arm in dict.fromkeys(run["arm"] for run in runs if run["arm"] == GPT or "mixture" in run["arm"]):
        for step in runs[0]["grade"]:
            miss, streams, P = np.array([run["grade"][step] for run in runs if run["arm"] == arm]).swapaxes(0, 1)
            found.setdefault(arm, {})[step] = [interval(values) for values in (
                streams[:, 1] - streams[:, 0], P[:, 1], miss[:, 1])]
    return found


def draw_placement(found, axes):
    names = ("streams of a hard token less an easy one's", "sum of the P of a hard token's streams",
             "hard tokens' loss, nats above the least possible")
    for i, (panel, name) in enumerate(zip(axes, names)):
        for j, (arm, line) in enumerate(found.items()):
            mean, half = np.array([point[i] for point in line.values()]).T
            steps, color = list(map(int, line)), plt.get_cmap("tab10")(j)
            panel.plot(steps, mean, marker="o", markersize=4, color=color, label=arm)
            panel.fill_between(steps, mean - half, mean + half, color=color, alpha=0.12)
        panel.set(xscale="log", xlabel="step", ylabel=name)


DRAW = dict(entropy=draw_entropy, attention=draw_attention, budgets=draw_budgets, placement=draw_placement)
OF_RUNS = dict(budgets=("text", budgets), placement=("selection", placement))


@dataclass
class Settings:
    figure: str = knob("method", "method, " + ", ".join(DRAW), choices=("method", *DRAW))
    out_dir: str = knob("out", "a run of train.py with forks, for entropy and attention")
    gpt_dir: str = knob("out-gpt", "a run of train.py --fork_layers none, for entropy")
    budget: float = knob(1.5, "streams per token, for entropy and attention", low=1)
    windows: int = knob(64, "validation windows, for entropy and attention", low=2)
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    results: str = knob(str(ROOT / "experiments" / "results"), "where pictures and numbers go; compare.py's are there")


def measure(s):
    """The numbers of a figure, and a sentence about them."""
    if s.figure in OF_RUNS:
        preset, read = OF_RUNS[s.figure]
        path = Path(s.results) / f"{preset}.json"
        if not path.exists():
            refuse(f"there is no {path}; run compare.py --preset {preset} first, or name its folder with --results")
        runs = json.loads(path.read_text())["runs"]
        return read(runs), f"{len({run['seed'] for run in runs})} paired seeds, 95 % intervals"
    device = choose_device(s.device)
    load = lambda folder: load_checkpoint(Path(folder) / "best.pt", device)
    checkpoint, model = load(s.out_dir)
    data = Text(TrainSettings(**checkpoint["settings"] | dict(eval_iters=1, batch_size=s.windows)))
    idx, note = torch.from_numpy(data.val_batch(0)[0]).to(device), f"{s.windows} validation windows, 95 % intervals"
    note = f"one checkpoint at a budget of {s.budget:g}; {note} over windows"
    if not model.config.fork_layers:
        refuse(f"--out_dir {s.out_dir} holds a model without fork layers; name one with forks")
    if s.figure == "attention":
        return attention(model.eval(), idx, s.budget), note
    gpt = load(s.gpt_dir)[1].eval()
    return or_refuse(lambda: entropy(model.eval(), gpt, idx, s.budget)), note


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    path = Path(s.results) / f"{s.figure}.png"
    make_folder(path.parent, "--results")
    if s.figure == "method":
        draw_method(path)
    else:
        found, note = measure(s)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__}"
        whole = dict(about=note, machine=machine, found=found)
        path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
        panels = 3 if s.figure == "placement" else 1
        figure = plt.figure(figsize=(5 + 3 * panels, 4.5), layout="constrained", facecolor="white")
        axes = figure.subplots(1, panels)
        DRAW[s.figure](found, axes)
        beside = dict(loc="center left", bbox_to_anchor=(1, 0.5)) if panels > 1 else {}
        figure.axes[-1].legend(frameon=False, fontsize=9, **beside)
        figure.supxlabel(note, fontsize=9)
        figure.savefig(path, dpi=130)
        plt.close(figure)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
