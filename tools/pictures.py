"""Pictures: the loss of a run, and the streams of a text, drawn or as shades on a terminal."""
import os
import sys
from pathlib import Path

import numpy as np
import torch

from tools.files import write_picture

os.environ["MPLBACKEND"] = "Agg"                                             # pictures are files, in a notebook too
SHADES = "", "30;48;5;189", "30;48;5;111", "97;48;5;26", "97;48;5;17"     # a terminal's: 1, 2, 3, 4, 5 or more streams
ROW, MOST = 72, 720                                                        # tokens in a row of the picture, and in all


def draw_loss(log, picture):
    """Draw log.csv as loss.png."""
    from matplotlib.figure import Figure
    rows = np.atleast_1d(np.genfromtxt(log, delimiter=",", names=True))           # no number: NaN
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("train_loss", dict(color="#6baed6")), ("val_loss", dict(color="#d95f02", marker="o"))):
        given = rows[~np.isnan(rows[key])]
        axes.plot(given["step"], given[key], label=key.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.legend()
    write_picture(picture, figure, dpi=120)


def count_streams(trace):
    """How many streams each token of one row owns in each block, (L, T), from the trace of a forward pass."""
    first_token = trace[0][0][0, 0]
    return torch.stack([torch.bincount(owner[owner >= 0] - first_token) for owner, _ in trace]).cpu()


def count_deleted(x, streams, x_after, owner_after):
    """How many streams of each token of one row a fork layer deleted, (T,). x (1, N, D), which `streams` describes,
    came in, and x_after (1, N', D) went out. Nothing changes a stream that stays, so 8 of its channels identify it."""
    same_x = (x[:, :, None, :8] == x_after[:, None, :, :8]).all(-1)            # (1, N, N')
    same_owner = streams.owner.unsqueeze(2) == owner_after.unsqueeze(1)        # (1, N, N')
    is_deleted = streams.is_real & ~(same_x & same_owner).any(-1)              # (1, N)
    return torch.bincount(streams.owner[is_deleted], minlength=streams.T).cpu()


@torch.no_grad()
def read_bubbles(model, idx, budget):
    """Of each token of idx (1, T) in each block: the streams that it owns, and how many of its own were deleted just
    before that block, (2, L, T). Where a context ends, its last half is read again, as `generate` does."""
    lost = []                                                   # of each fork layer of a pass, in turn
    hooks = [fork.register_forward_hook(lambda fork, given, made: lost.append(count_deleted(*given[:2], *made[:2])))
             for fork in model.forks.values()]
    block_size, done, parts = model.config.block_size, 0, []
    while done < idx.size(1):
        begin, trace = max(0, done - block_size // 2), []
        tokens = idx[:, begin:begin + block_size]
        lost.clear()
        model(tokens, budget=budget, trace=trace)
        deleted = torch.zeros(model.config.n_layer, tokens.size(1), dtype=torch.long)
        for layer, count in zip(model.config.fork_layers, lost):
            deleted[layer] = count
        parts.append(torch.stack((count_streams(trace), deleted))[:, :, done - begin:])
        done = begin + block_size
    for hook in hooks:
        hook.remove()
    return torch.cat(parts, dim=2)


def shade(text, n):
    """The text, on a terminal that wants colours in the shade of n streams."""
    code = SHADES[min(n, len(SHADES)) - 1]
    if not (code and sys.stdout.isatty()) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return "\n".join(f"\33[{code}m{line}\33[0m" if line else "" for line in text.split("\n"))


def legend(counts):
    """What each shade means, and the share of the tokens that have it, given their streams, a list."""
    top = len(SHADES)
    share = torch.bincount(torch.tensor(counts).clamp(max=top), minlength=top + 1) / len(counts)
    return "streams: " + "  ".join(shade(f" {n}{' or more' * (n == top)} ", n) + f" {share[n]:.0%}"
                                   for n in range(1, top + 1) if share[n])


def draw_bubbles(counts, deleted, words, path, title):
    """Draw the streams and the deletions (L, T) of a text, whose T tokens are `words`, as a picture."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    (L, T), top = counts.shape, max(2, int(counts.max()))
    rows, below = -(-T // ROW), 0.35 + 0.08 * max(map(len, words))                   # inches
    height = 0.9 + rows * (0.2 * L + below)
    colors = ListedColormap(colormaps["Blues"](torch.linspace(0.1, 0.9, top).numpy()))
    figure = Figure((13, height), facecolor="white")
    for row in range(rows):
        bottom = height - 0.8 - (row + 1) * 0.2 * L - row * below
        axes = figure.add_axes((0.04, bottom / height, 0.95, 0.2 * L / height))
        at = slice(row * ROW, (row + 1) * ROW)
        axes.imshow(counts[:, at].numpy(), cmap=colors, vmin=1, vmax=top, aspect="auto", origin="lower")
        y, x = deleted[:, at].numpy().nonzero()
        cross, = axes.plot(x, y - 0.5, "x", color="#d62728", markersize=6, markeredgewidth=2, clip_on=False)
        axes.set(xlim=(-0.5, min(T, ROW) - 0.5), ylabel="block", yticks=range(0, L, max(1, L // 4)))
        axes.set_xticks(range(len(words[at])), words[at], family="monospace", rotation=90 * (max(map(len, words)) > 2))
        axes.tick_params(axis="x", length=0)
    boxes = [Rectangle((0, 0), 1, 1, color=colors(n)) for n in range(top)]
    names = [f"{n} stream{'s' * (n > 1)}" for n in range(1, top + 1)]
    figure.legend(boxes + [cross], names + ["deleted just before this block"], ncols=top + 1, frameon=False,
                  loc="upper center", bbox_to_anchor=(0.5, 1 - 0.3 / height))
    figure.suptitle(title, y=1 - 0.1 / height, va="top")
    write_picture(Path(path), figure, dpi=110)


def plot(path, model, tokens, words, budget):
    """Draw the bubbles of the first MOST of a text's tokens, which read as these words: two lists."""
    counts, deleted = read_bubbles(model, torch.tensor([tokens[:MOST]], device=model.wte.weight.device), budget)
    marks = {"\n": "\u21b5", "\t": "\u21e5"}
    words = [marks.get(word, word.strip()) if word.isprintable() or word in marks else "\ufffd" for word in words]
    words = [word.replace("$", r"\$") for word in words]                           # no mathematics
    title = (f"Streams of each token in each block at a budget of {budget or model.config.budget:g}, "
             f"{counts[-1].float().mean():.2f} in the last block")
    draw_bubbles(counts, deleted, words[:MOST], path, title + f" (the first {MOST} tokens)" * (len(tokens) > MOST))
    print(path)
