"""
The pictures of the pages: python experiments/figures.py --figure method    (every flag: --help)

method: what the fork layers of tinybubbles.py do with the scores of the README's worked example. entropy, kinds and
attention look at a trained checkpoint, entropy at that of a plain GPT too; rivals, budgets, placement and sizes draw
what compare.py found. The numbers of a picture stand beside it, as JSON.
"""
import json
import math
import os
import platform
import string
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
from experiments.compare import ARMS, GPT, QUESTION, interval, less, read_results  # noqa: E402
from tasks.text import Text  # noqa: E402
from tinybubbles import Config, Fork, Streams  # noqa: E402
from tools.files import best_or_last, load_checkpoint, make_folder, write_picture, write_text  # noqa: E402
from tools.pictures import count_streams  # noqa: E402
from tools.program import choose_device, knob, or_refuse, read_flags, refuse, run_program  # noqa: E402
from train import Settings as TrainSettings  # noqa: E402

TOKENS, BUDGET, BAR = "abcd", 1.5, 0.5
SCORES = [  # of each stream that comes to a fork layer: of its new fork, and of itself; an original's own is always 1
    [(.7, 1), (.9, 1), (.6, 1), (.8, 1)],                             # at the first fork layer: a b c d
    [(.9, .8), (.4, 1), (.2, 1), (.2, .1), (.3, 1), (.8, 1)],         # at the second: a' a b c' c d
]
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]                 # Okabe and Ito's, safe for colour-blind readers
INK = "#333333"


def worked_example():
    """The streams of the README's example after the embedding and after each fork layer: levels (owner, P, parents),
    three lists over streams. A parent is (the number of a stream one level below, was it forked, not kept?)."""
    owner, logp = torch.arange(4)[None], torch.zeros(1, 4)
    levels = [(owner[0].tolist(), [1.0] * 4, None)]
    seen = torch.zeros(1, 1, dtype=torch.int64)
    for scores in SCORES:
        fork = Fork(Config(n_embd=2, n_head=1, budget=BUDGET)).eval()
        fork.bar.fill_(math.log(BAR))
        fork.score.forward = lambda x: torch.tensor([scores]).logit().clamp(max=50)
        # Each stream carries its own number, and to a new fork's 100 is added.
        torch.nn.init.constant_(fork.embedding, 100)
        x = torch.arange(len(scores)).float().view(1, -1, 1).expand(-1, -1, 2)
        streams = Streams(owner, logp, 4, seen, torch.ones(1))
        x, owner, logp = fork(x, streams, BUDGET, seen, False)
        parents = [(int(number) % 100, number >= 100) for number in x[0, :, 0].tolist()]
        levels.append((owner[0].tolist(), logp[0].exp().tolist(), parents))
    return levels


def fates(levels, number):
    """What becomes of the extras at fork layer `number`, counted from 1: lines of text for each stream that comes."""
    (owner, P, _), survivors, lines = levels[number - 1], levels[number][2], []
    for j, (fork_score, own_score) in enumerate(SCORES[number - 1]):
        fork = fate("fork", P[j] * fork_score, (j, True) in survivors)
        stay = fate("stay", P[j] * own_score, (j, False) in survivors)
        lines.append([fork] if is_original(owner, j) else [stay, fork])
    return lines


def fate(verb, P, survives):
    """What becomes of one extra: it survives, there is no room for it, or it does not reach the bar."""
    if survives:
        return f"{verb}s, {P:.2g}"
    return f"{verb} {P:.2g}: full" if P >= BAR else f"{verb} {P:.2g} < {BAR}"


def is_original(owner, i):
    """Is stream i the last one of its token?"""
    return i + 1 == len(owner) or owner[i + 1] != owner[i]


def positions(owner):
    """The streams' fractional positions t - p/q."""
    count = [owner.count(t) for t in owner]
    return [t + 1 - (owner.index(t) + owner.count(t) - 1 - i) / count[i] for i, t in enumerate(owner)]


# In the picture, level i begins at height 1.5 i; its streams run from there up to the fork layer or the merge.
LEVEL, FORK_LAYER, MERGE = 1.5, 0.85, 0.8


def draw_method(path):
    """The worked example of the README as a picture."""
    levels = worked_example()
    figure, axes = plt.subplots(figsize=(10, 6.8), layout="constrained", facecolor="white")
    for number, (owner, P, _) in enumerate(levels):
        bottom = LEVEL * number
        draw_streams(axes, owner, P, bottom, bottom + (FORK_LAYER if number < 2 else MERGE))
        axes.axhspan(bottom + 0.28, bottom + 0.6, color="#eeeeee", zorder=0)
        axes.text(0.02, bottom + 0.44, f"block {number}", va="center", fontsize=10, color=INK)
        if number > 0:
            draw_fork_layer(axes, levels, number)
    draw_merge(axes, levels[-1][0], LEVEL * 2 + MERGE)
    axes.set(xlim=(0, 4.6), ylim=(-0.3, 4.6), yticks=[], xticks=[0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4])
    axes.set_xlabel("rotary position")
    axes.set_title(f"Four tokens at a budget of {BUDGET} streams per token and a bar of {BAR}: a and c fork; then "
                   "a\u2032 stays, c\u2032 is deleted, and d forks", fontsize=11)
    figure.supxlabel(f"A fork, new or old, survives if its P reaches the bar, {BAR}, and the quota is not full: "
                     f"ceil({BUDGET} t) streams for the first t tokens.\nStreams are served from left to right, each "
                     "before its own new fork: so a\u2032 stays, although its fork has the higher P. A line is as "
                     "thick as its P.",
                     fontsize=10, color=INK)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    write_picture(path, figure, dpi=130)
    plt.close(figure)


def draw_streams(axes, owner, P, bottom, top):
    """One level: each stream as a disc with its name and its P, a ring for a fork, and a line as strong as its P."""
    for i, (t, x) in enumerate(zip(owner, positions(owner))):
        original, color = is_original(owner, i), COLORS[t]
        axes.plot([x, x], [bottom, top], color=color, linewidth=1 + 4 * P[i], alpha=0.35 + 0.65 * P[i], zorder=1)
        axes.scatter(x, bottom, s=330, color=color if original else "white", edgecolor=color, linewidth=2, zorder=3)
        axes.text(x, bottom, TOKENS[t] if original else TOKENS[t] + "\u2032", color="white" if original else color,
                  fontsize=12, ha="center", va="center", zorder=4)
        if bottom > 0:
            axes.text(x + 0.1, bottom - 0.03, f"P {P[i]:.2g}", fontsize=9, color=INK, va="center")


def draw_fork_layer(axes, levels, number):
    """One fork layer: what stays (solid), what is forked (dashed), what is deleted (a cross); and why, in words."""
    (old, _, _), (new, _, parents) = levels[number - 1:number + 1]
    bottom, top = LEVEL * (number - 1) + FORK_LAYER, LEVEL * number - 0.12
    before, after = positions(old), positions(new)
    axes.text(0.02, (bottom + top) / 2, "fork layer", va="center", fontsize=10, fontweight="bold", color=INK)
    for i, (j, forked) in enumerate(parents):
        axes.plot([before[j], after[i]], [bottom, top], "--" if forked else "-", color=COLORS[new[i]], zorder=2)
    for j, lines in enumerate(fates(levels, number)):
        if (j, False) not in parents:
            axes.scatter(before[j], bottom, marker="x", s=90, color="#222222", linewidth=2.5, zorder=5)
            lines = ["deleted", *lines]
        axes.text(before[j] + 0.04, bottom + 0.03, "\n".join(lines), fontsize=9, color=INK, va="bottom")


def draw_merge(axes, owner, bottom):
    axes.text(0.02, bottom + 0.22, "merge", va="center", fontsize=10, fontweight="bold", color=INK)
    for x, t in zip(positions(owner), owner):
        axes.plot([x, t + 1], [bottom, bottom + 0.45], color=COLORS[t], linewidth=2, zorder=1)
    for t in range(len(TOKENS)):
        axes.text(t + 1, bottom + 0.5, f"p(next | {TOKENS[:t + 1]})", ha="center", va="bottom", fontsize=10)


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
    with np.errstate(invalid="ignore"):                               # NaN, if all are equal
        return np.corrcoef(ranks(a.ravel()), ranks(b.ravel()))[0, 1]


@torch.no_grad()
def read_windows(model, idx, budget=None):
    """Of each token of idx (windows, T): its streams in the last block, and the entropy of the prediction after it, in
    nats; (windows, T) both."""
    counts, entropies = [], []
    for row in idx.split(1):
        trace = []
        log_probs = model(row, budget=budget, trace=trace)[0][0].log_softmax(-1)      # (T, V)
        counts.append(count_streams(trace)[-1].numpy())
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).cpu().numpy())
    return np.stack(counts), np.stack(entropies)


def mean_of_each(values, group, groups):
    """The mean of the values in each of the groups, which are numbered from 0; NaN of an empty group."""
    with np.errstate(invalid="ignore"):
        return np.bincount(group.ravel(), values.ravel(), groups) / np.bincount(group.ravel(), minlength=groups)


def streams_by_entropy(count, H):
    """How the streams of tokens go with their entropies H, (windows, T) both: the rank correlation rho, and of tenths of
    the tokens, sorted by entropy, the mean entropy and the mean number of streams; with intervals."""
    tenth = np.searchsorted(np.quantile(H, np.arange(1, 10) / 10), H)
    streams = over_windows(lambda count, tenth: mean_of_each(count, tenth, 10), count, tenth)
    return dict(rho=over_windows(spearman, count, H).tolist(), entropy=mean_of_each(H, tenth, 10).tolist(),
                streams=streams.T.tolist())


def entropy(model, gpt, idx, budget):
    """How streams go with the entropy of the prediction, this model's and a plain GPT's."""
    count, H = read_windows(model, idx, budget)
    return {"this model's": streams_by_entropy(count, H),
            "a plain GPT's": streams_by_entropy(count, read_windows(gpt, idx)[1])}


def draw_entropy(found, axes):
    for (name, line), color, marker in zip(found.items(), COLORS, "os"):
        mean, low, high = np.array(line["streams"]).T
        axes.errorbar(line["entropy"], mean, (mean - low, high - mean), color=color, marker=marker, capsize=3,
                      label="{}: rank correlation {:.2f} ({:.2f} to {:.2f})".format(name, *line["rho"]))
    axes.set(xlabel="entropy of the prediction, nats (each point is a tenth of the tokens)",
             ylabel="streams per token, last block")


KINDS = dict(  # of bytes
    tab=b"\t", newline=b"\n", blank=b" ", underscore=b"_", letter=string.ascii_letters.encode(),
    digit=string.digits.encode(), other=b"")


def kinds(model, idx, budgets):
    """At each budget: the mean number of streams of each kind of byte that occurs, with intervals; and streams by
    entropy."""
    table = np.full(256, len(KINDS) - 1)
    for number, members in enumerate(KINDS.values()):
        table[list(members)] = number
    occurring, kind = np.unique(table[idx.cpu().numpy()], return_inverse=True)
    kind, names, found = kind.reshape(idx.shape), [list(KINDS)[number] for number in occurring], {}
    for budget in budgets:
        count, H = read_windows(model, idx, budget)
        streams = over_windows(lambda count, kind: mean_of_each(count, kind, len(names)), count, kind)
        found[f"budget {budget:g}"] = streams_by_entropy(count, H) | dict(kinds=dict(zip(names, streams.T.tolist())))
    return found


def draw_kinds(found, panels):
    for i, (budget, line) in enumerate(found.items()):
        mean, low, high = np.array(list(line["kinds"].values())).T
        panels[0].bar(np.arange(len(mean)) + 0.4 * i - 0.2, mean, 0.38, yerr=(mean - low, high - mean), capsize=3,
                      color=COLORS[i], label=budget)
    panels[0].set_xticks(range(len(mean)), line["kinds"], rotation=30)
    panels[0].set(xlabel="kind of byte", ylabel="streams per token, last block")
    draw_entropy(found, panels[1])


@torch.no_grad()
def attention(model, idx, budget):
    """In each block after the first fork layer: the mean attention that an original which has forks pays to one of
    them, to the original of the token before, and to a stream of an earlier token; with intervals."""
    names, sums = ("its own fork", "the token before", "a stream of any earlier token"), []
    blocks = range(min(model.config.fork_layers), model.config.n_layer)
    for row in idx.split(1):
        weights, trace = attention_weights(model, row, budget)
        sums.append([sum_by_target(weights[layer], trace[layer][0][0]) for layer in blocks])
    mean = lambda sums: sums.sum(0)[..., 0] / np.maximum(1, sums.sum(0)[..., 1])
    found = over_windows(mean, np.array(sums))                        # (3, blocks, targets)
    return {f"block {layer}": {name: found[:, i, j].tolist() for j, name in enumerate(names)}
            for i, layer in enumerate(blocks)}


def attention_weights(model, row, budget):
    """When the model reads a row (1, T): each block's attention weights (N, N), a mean over heads; and the trace."""
    attend, weights, trace = F.scaled_dot_product_attention, [], []

    def look(q, k, v, attn_mask, is_causal, dropout_p):
        is_later = torch.ones(q.size(2), k.size(2), device=q.device).triu(1).bool()
        logits = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(is_later, -math.inf)
        weights.append(logits.softmax(-1).mean((0, 1)))
        return attend(q, k, v, attn_mask, dropout_p, is_causal)
    with mock.patch.object(F, "scaled_dot_product_attention", look):
        model(row, budget=budget, trace=trace)
    return weights, trace


def sum_by_target(weights, owner):
    """Of the weights (N, N) with which originals that have forks attend to each of the three targets, the sum and the
    number: [[sum, number], ...]. owner (N,)"""
    is_real = owner >= 0
    is_original = is_real & (owner != F.pad(owner[1:], (0, 1), value=-2))
    has_forks = torch.bincount(owner[is_real], minlength=len(owner))[owner.clamp(min=0)] > 1
    asks, query, key = (is_original & has_forks)[:, None], owner[:, None], owner[None]
    targets = (query == key) & ~is_original, (query == key + 1) & is_original, (query > key) & is_real
    return [[weights[asks & target].sum().item(), (asks & target).sum().item()] for target in targets]


def draw_attention(found, axes):
    for j, name in enumerate(next(iter(found.values()))):
        mean, low, high = np.array([block[name] for block in found.values()]).T
        axes.bar(np.arange(len(found)) + 0.27 * (j - 1), mean, 0.25, yerr=(mean - low, high - mean), capsize=3,
                 color=COLORS[j], label=f"to {name}")
    axes.set_xticks(range(len(found)), found)
    axes.set_ylabel("attention of an original with forks\nto one such stream")


SHOWN = GPT, "deeper GPT", "wider GPT", "copy-2", "bubbles, r = 2", "bubbles, r = 4", "recurrent depth", "PonderLM-2"


def last_mark(runs):
    return list(runs[0]["loss"])[-1]


def rivals(text):
    """Of the arms SHOWN: FLOPs of a generated token as multiples of the plain GPT's, and the loss less the plain GPT's,
    from what compare.py found: mean and half its interval."""
    runs, measured = text["runs"], text["measured"]
    last, flops = last_mark(runs), lambda arm: list(measured[arm]["flops"].values())[0]
    return {arm: [flops(arm) / flops(GPT), *interval(less(runs, arm, GPT, last, f"{ARMS[arm].budgets[0]:g}"))]
            for arm in SHOWN if arm in measured}


def draw_rivals(found, axes):
    axes.axhline(0, color="black", linewidth=1)
    for arm, (flops, mean, half) in found.items():
        color = COLORS[1] if "bubbles" in arm else COLORS[0] if arm == "PonderLM-2" else "#555555"
        axes.errorbar(flops, mean, half, color=color, marker="o", capsize=3)
        below = arm in ("wider GPT", "PonderLM-2")                    # above their intervals are others
        axes.annotate(arm, (flops, mean - half if below else mean + half), (0, -4 if below else 4), ha="center",
                      va="top" if below else "bottom", textcoords="offset points", color=color, fontsize=9)
    axes.margins(x=0.2, y=0.1)
    axes.set(xlabel="FLOPs of a generated token, times the plain GPT's",
             ylabel="loss less the plain GPT's, nats per byte (lower is better)")


def sizes(*presets):
    """The loss of the arms that fork less the plain GPT's, by its number of parameters, from what compare.py found at
    each size: mean and half its interval."""
    found = {}
    for runs in (preset["runs"] for preset in presets):
        n_params = next(run["parameters"] for run in runs if run["arm"] == GPT)
        for arm in QUESTION[1:]:
            gains = less(runs, arm, GPT, last_mark(runs), f"{ARMS[arm].budgets[0]:g}")
            if gains:
                found.setdefault(arm, {})[n_params] = interval(gains)
    return found


def draw_sizes(found, axes):
    axes.axhline(0, color="black", linewidth=1)
    for (arm, line), color, marker in zip(found.items(), COLORS, "os"):
        mean, half = np.array(list(line.values())).T
        axes.errorbar(list(line), mean, half, color=color, marker=marker, capsize=3, label=arm)
    axes.set(xscale="log", xlabel="parameters", ylabel="loss less a plain GPT's, nats per byte (lower is better)")


def budgets(text):
    """At each budget the loss of bubbles less the plain GPT's, from what compare.py found: mean and half its interval."""
    runs, found = text["runs"], {}
    for arm in ("bubbles, r = 2", "bubbles, elastic"):
        dials = next((run["loss"][last_mark(runs)] for run in runs if run["arm"] == arm), {})
        found[arm] = {r: interval(less(runs, arm, GPT, last_mark(runs), r)) for r in sorted(dials, key=float)}
    return found


def draw_budgets(found, axes):
    axes.axhline(0, color="black", linewidth=1)
    names = "trained at 2", "trained at 1, 1.5, 2, 4 in turns"
    for line, name, color, marker in zip(found.values(), names, COLORS, "os"):
        mean, half = np.array(list(line.values())).reshape(-1, 2).T
        axes.errorbar(list(map(float, line)), mean, half, color=color, marker=marker, capsize=3, label=name)
    axes.set(xlabel="budget at inference, streams per token",
             ylabel="loss less a plain GPT's, nats per byte (lower is better)")


PLACED = {GPT: "plain GPT", "mixture by hand": "put by hand, mixed",
          "mixture, r = 1.5": "learned from the loss alone, mixed", "mixture, charge, sure, floor": "taught, mixed"}


def placement(selection):
    """Of the arms PLACED after each mark, from what compare.py found on urns: how many streams a hard token has more
    than an easy one, the sum of its P, and the nats by which it misses the least loss, with half intervals."""
    runs, found = selection["runs"], {}
    for arm in sorted({run["arm"] for run in runs} & PLACED.keys(), key=list(PLACED).index):
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
            steps = list(map(int, line))
            panel.plot(steps, mean, marker="o", markersize=4, color=COLORS[j], label=PLACED[arm])
            panel.fill_between(steps, mean - half, mean + half, color=COLORS[j], alpha=0.12)
        panel.set(xscale="log", xlabel="step", ylabel=name)
        panel.set_xticks(steps, map(str, steps))
        panel.set_xticks([], minor=True)


DRAW = dict(rivals=draw_rivals, entropy=draw_entropy, kinds=draw_kinds, attention=draw_attention, budgets=draw_budgets,
            placement=draw_placement, sizes=draw_sizes)
PANELS = dict(kinds=2, placement=3)
OF_PRESETS = dict(rivals=(rivals, "the plays, 0.2M parameters", "text"),
                  budgets=(budgets, "the plays, 0.2M parameters", "text"),
                  placement=(placement, "the task urns", "selection"),
                  sizes=(sizes, "Linux's source", "size-0.2M", "size-0.8M", "size-3M", "scale"))


@dataclass
class Settings:
    figure: str = knob("method", "method: README's worked example; entropy, kinds, attention: of a trained checkpoint; "
                       f"{', '.join(OF_PRESETS)}: of what compare.py found", choices=("method", *DRAW))
    out_dir: str = knob("out", "a run of train.py with forks, for entropy, kinds and attention")
    gpt_dir: str = knob("out-gpt", "a run of train.py --fork_layers none, for entropy")
    budget: tuple = knob((1.5,), "streams per token, for entropy and attention; several for kinds", "floats", low=1)
    windows: int = knob(64, "validation windows, for entropy, kinds and attention; at most all that there are", low=2)
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    results: str = knob(str(ROOT / "experiments" / "results"), "where pictures and numbers go; compare.py's are there")


def measure(s):
    """The numbers of a figure, and a sentence about them."""
    if s.figure in OF_PRESETS:
        read, text, *presets = OF_PRESETS[s.figure]
        paths = [Path(s.results) / f"{preset}.json" for preset in presets]
        results = [read_results(path) for path in paths if path.exists()]
        if not results:
            refuse(f"there is no {paths[0]}; run compare.py --preset {presets[0]} first, or name its folder with "
                   "--results")
        try:
            found = read(*results)
        except (LookupError, ValueError, StopIteration):              # an arm, a mark or a grade is not there
            found = {}
        if not (found and all(found.values())):
            refuse(f"{' and '.join(map(str, paths))} lack what the figure {s.figure} shows; run compare.py --preset "
                   f"{presets[0]} to its end, or name another folder with --results")
        arms = [[run["arm"] for run in preset["runs"] if run["arm"] != GPT] for preset in results]
        seeds = [of_preset.count(arm) for of_preset in arms for arm in of_preset]
        return found, f"{text}; {' to '.join(map(str, sorted({min(seeds), max(seeds)})))} paired seeds, 95 % intervals"
    most = 3 if s.figure == "kinds" else 1
    if len(s.budget) > most:
        refuse(f"--figure {s.figure} shows {most} --budget at most, not {len(s.budget)}; leave out some")
    device = choose_device(s.device)
    load = lambda folder, flag: load_checkpoint(best_or_last(folder), device, flag=flag)
    checkpoint, model = load(s.out_dir, "--out_dir")
    if checkpoint["settings"]["dataset"] == "urns":
        refuse(f"--out_dir {s.out_dir} holds a model of the task urns; name one of a text")
    settings = TrainSettings(**checkpoint["settings"] | dict(eval_iters=1))
    if settings.dataset != "shakespeare" and not Path(settings.dataset).exists():
        refuse(f"--out_dir {s.out_dir} was trained on {settings.dataset}, which is not here; call this where it was "
               "trained")
    data = Text(settings)
    if data.fingerprint() != checkpoint["fingerprint"]:
        refuse(f"--out_dir {s.out_dir} was trained on other data than {settings.dataset} holds now; put the old one back")
    settings.batch_size = min(s.windows, len(data.val) // data.T)     # for intervals, windows must not overlap
    idx = torch.from_numpy(data.val_batch(0)[0]).to(device)
    note = f"{settings.batch_size} validation windows, 95 % intervals"
    note = f"one checkpoint at a budget of {' and '.join(f'{budget:g}' for budget in s.budget)}; {note} over windows"
    if not model.config.fork_layers:
        refuse(f"--out_dir {s.out_dir} holds a model without fork layers; name one with forks")
    model.eval()
    if s.figure == "kinds":
        if checkpoint["vocabulary"] is not None:
            refuse(f"--out_dir {s.out_dir} holds a model whose tokens are not bytes; name one of a text")
        return kinds(model, idx, s.budget), note
    if s.figure == "attention":
        return attention(model, idx, s.budget[0]), note
    gpt_checkpoint, gpt = load(s.gpt_dir, "--gpt_dir")
    gpt.eval()
    if gpt.config.fork_layers:
        refuse(f"--gpt_dir {s.gpt_dir} holds a model with fork layers; name a run of train.py --fork_layers none")
    if gpt_checkpoint["fingerprint"] != checkpoint["fingerprint"] or gpt.config.block_size < model.config.block_size:
        refuse(f"--gpt_dir {s.gpt_dir} holds a model of other data or of a lower --block_size than --out_dir's; train one "
               "with the same")
    return or_refuse(lambda: entropy(model, gpt, idx, s.budget[0])), note


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
        panels = PANELS.get(s.figure, 1)
        figure = plt.figure(figsize=(5 + 3 * panels, 4.5), layout="constrained", facecolor="white")
        axes = figure.subplots(1, panels)
        DRAW[s.figure](found, axes)
        if s.figure != "rivals":                                      # whose points have their names beside them
            figure.axes[0 if s.figure == "placement" else -1].legend(frameon=False, fontsize=9)
        figure.supxlabel(note, fontsize=9)
        write_picture(path, figure, dpi=130)
        write_text(path.with_suffix(".json"), json.dumps(whole, indent=1) + "\n")
        plt.close(figure)
    print(path)


if __name__ == "__main__":
    run_program(main, "stopped")
