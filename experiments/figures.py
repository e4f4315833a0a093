"""
The picture of the method in the README: python experiments/figures.py

It draws what the fork layers of tinybubbles.py do with the scores of the README's worked example.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tinybubbles import Config, Fork, Streams  # noqa: E402
from tools.program import knob, read_flags  # noqa: E402

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


@dataclass
class Settings:
    results: str = knob(str(ROOT / "experiments" / "results"), "where method.png goes")


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    path = Path(s.results) / "method.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_method(path)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
