"""
Draw README's pictures: python experiments/figures.py --figure method        (or attention, entropy, decoding, budgets)

method: the worked example of README and test_tinybubbles.py, its streams chosen by tinybubbles.Fork itself. The others
are measured on windows of the validation text, with checkpoints of train.py, and write their numbers beside it:
attention: of originals to their own forks, and to other streams, by block (the paper's figure 4)
entropy:   streams of a token against the entropy of the prediction there, by this model and by a plain GPT (figure 5)
decoding:  loss by position, teacher-forced and as generated, under both rules (figure 6)
budgets:   loss at budgets from 1 to 4, trained at one budget and at several
(The bubble map is sample.py's: python sample.py --plot bubbles.png)
"""
import json
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments.ablate import Variant, originals, vary  # noqa: E402
from experiments.decode_loss import measure, nats, validation_windows  # noqa: E402
from tinybubbles import Config, Fork, sum_per_token  # noqa: E402
from tools.program import choose_device, knob, read_flags, refuse  # noqa: E402
from train import load_checkpoint  # noqa: E402

TOKENS, BUDGET = "abcd", 1.5
SCORES = [  # (fork, keep) probabilities of every stream; originals are always kept
    [(.2, 1), (.9, 1), (.6, 1), (.7, 1)],                             # at the first fork layer: a b c d
    [(.4, .8), (.6, 1), (.5, 1), (.2, .1), (.4, 1), (.8, 1)],         # at the second: a' a b c' c d
]
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]                 # Okabe and Ito's, safe for colour-blind readers


def worked_example():
    """[(tok, P, parents)] after the embedding and after each fork layer, lists over streams; a parent is
    (stream of the row before, forked from it rather than kept)."""
    x, tok, logp = torch.zeros(1, 4, 2), torch.arange(4)[None], torch.zeros(1, 4)
    rows = [(tok[0].tolist(), [1.0] * 4, None)]
    for scores in SCORES:
        fork = Fork(Config(n_embd=2, n_head=1), 1)
        torch.nn.init.constant_(fork.embedding, 100)
        fork.scores = lambda x, logp, original: (logp.unsqueeze(-1) + torch.tensor([scores]).log()).unbind(-1)
        x = torch.arange(x.size(1)).float().view(1, -1, 1).expand(-1, -1, 2)      # each stream carries its own number
        x, tok, logp = fork(x, tok, logp, 4, BUDGET, "causal", None)
        parents = [(int(number) % 100, number >= 100) for number in x[0, :, 0].tolist()]
        rows.append((tok[0].tolist(), logp[0].exp().tolist(), parents))
    return rows


def positions(tok):
    """The streams' fractional positions k - p/q."""
    count = [tok.count(t) for t in tok]
    return [t + 1 - (tok.index(t) + tok.count(t) - 1 - i) / count[i] for i, t in enumerate(tok)]


def draw_method(path):
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


# -- attention of originals to their forks ----------------------------------------------------------------------------

@torch.no_grad()
def attention(models, x, y, s):
    """{block: {what originals attend to: weight by head}}: of originals that have forks, the weight of one stream of
    each kind, averaged over the streams of the kind, then over originals."""
    model, streams, weights = models["out_dir"], [], {}
    vary(model, Variant())                                            # changes nothing, but keeps queries and keys
    model(x, budget=s.budget, streams=streams)
    for l, (tok, _) in enumerate(streams):
        if l < min(model.config.fork_layers):
            continue
        q, k = model.blocks[l].attn.qk
        N, query, key, own = tok.size(1), tok.unsqueeze(2), tok.unsqueeze(1), originals(tok)
        future = torch.ones(N, N, dtype=torch.bool, device=tok.device).triu(1)
        weight = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).masked_fill(future, -math.inf).softmax(-1)
        kinds = {"a fork of its own": (query == key) & ~own.unsqueeze(1), "itself": torch.eye(N).bool().to(x.device),
                 "a stream of the token before": query == key + 1, "another earlier stream": query > key + 1}
        kinds = {kind: mask & (key >= 0) & ~future for kind, mask in kinds.items()}              # (B, N, N) each
        all_kinds = own & (tok >= 0) & torch.stack([mask.any(-1) for mask in kinds.values()]).all(0)     # (B, N)
        weights[f"block {l}"] = {
            kind: ((weight * mask.unsqueeze(1)).sum(-1) / mask.sum(-1).clamp(min=1).unsqueeze(1)
                   ).transpose(1, 2)[all_kinds].mean(0).tolist() for kind, mask in kinds.items()}
    return weights


def draw_attention(result, figure, note):
    axes, colors = figure.subplots(), dict(zip(next(iter(result.values())), COLORS))
    for b, (block, kinds) in enumerate(result.items()):
        for i, (kind, heads) in enumerate(kinds.items()):
            place = b + (i - 1.5) * 0.2
            axes.bar(place, np.mean(heads), 0.18, color=colors[kind], label=kind if b == 0 else None)
            axes.plot([place] * len(heads), heads, "o", color="#222222", markersize=3)
            axes.text(place, 0.02, f"{np.mean(heads):.3f}", ha="center", va="bottom", color="white", fontsize=8,
                      rotation=90, transform=axes.get_xaxis_transform())
    axes.set_xticks(range(len(result)), list(result))
    axes.set_yscale("log")
    axes.set_ylabel("attention of an original to one such stream")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.supxlabel(f"bars: means over heads; dots: heads. {note}", fontsize=9)


# -- streams against entropy ------------------------------------------------------------------------------------------

def ranks(values):
    """Ranks of values (n,), from 0; equal values share the mean of theirs."""
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count + 1) / 2)[index]


def spearman(a, b):
    """Spearman's rank correlation of a and b (n,); NaN if one of them is constant."""
    a, b = ranks(a) - (len(a) - 1) / 2, ranks(b) - (len(b) - 1) / 2
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / norm if norm else math.nan


def bootstrap(statistic, samples, *arrays):
    """The statistic of the arrays (windows, T), flattened, and its 95 % interval over resampled windows."""
    rng, n = np.random.default_rng(0), len(arrays[0])
    drawn = [statistic(*(a[rows].ravel() for a in arrays)) for rows in rng.integers(n, size=(samples, n))]
    return [statistic(*(a.ravel() for a in arrays)), *np.percentile(drawn, (2.5, 97.5)).tolist()]


@torch.no_grad()
def entropy(models, x, y, s):
    """{budget: {whose entropy: rho with its interval, and by tenths of the entropy its mean and the streams' mean with
    its interval}}."""
    result, trained = {}, models["out_dir"].config.budget
    for budget in sorted({1.5, s.budget or trained}):
        streams, lines = [], {}
        result[f"r = {budget:g}" + ", as trained" * (budget == trained)] = lines
        own, gpt = models["out_dir"](x, budget=budget, streams=streams)[0], models["gpt_dir"](x)[0]
        tok = streams[-1][0]
        count = sum_per_token((tok >= 0).long(), tok, x.size(1)).double().cpu().numpy()          # (B, T)
        for name, logits in (("this model's", own), ("a plain GPT's", gpt)):
            H = -(logits.double().exp() * logits).sum(-1).cpu().numpy()                           # (B, T)
            tenth = np.searchsorted(np.quantile(H, np.linspace(0.1, 0.9, 9)), H)
            bins = [bootstrap(lambda c, t: c[t == i].sum() / max(1, (t == i).sum()), 500, count, tenth)
                    for i in range(10)]
            lines[name] = dict(rho=bootstrap(spearman, 500, count, H), streams=bins,
                               entropy=[H[tenth == i].mean() for i in range(10)])
    return result


def draw_entropy(result, figure, note):
    for axes, (budget, lines) in zip(figure.subplots(1, len(result), squeeze=False)[0], result.items()):
        for (name, line), color, marker in zip(lines.items(), COLORS, "os"):
            mean, low, high = np.array(line["streams"]).T
            rho = "\u03c1 = {:.3f} ({:.3f} to {:.3f})".format(*line["rho"])
            axes.errorbar(line["entropy"], mean, (mean - low, high - mean), color=color, marker=marker, capsize=3,
                          label=f"{name}: {rho}")
        axes.set(xlabel="entropy of the prediction, nats", ylabel="streams per token, last block", title=budget)
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08))
    figure.supxlabel("tenths of the tokens by entropy, and Spearman's \u03c1; 95 % intervals over windows. " + note,
                     fontsize=9)


# -- teacher-forced and generated -------------------------------------------------------------------------------------

def decoding(models, x, y, s):
    """{model: {way of reading: loss by position}}, with the half width of the 95 % interval of its difference to the
    teacher-forced one of the rule that the model was trained with."""
    result, bins = {}, np.array_split(np.arange(x.size(1)), 8)
    for folder in ("out_dir", "topk_dir"):
        model = models[folder]
        losses, _ = measure(model, x, y, s.budget)
        losses = {way: np.stack([loss.cpu().numpy()[:, at].mean(1) for at in bins], 1) for way, loss in losses.items()}
        base = losses[model.config.routing + ", teacher-forced"]                                  # (windows, 8)
        result[f"trained with {model.config.routing}"] = {
            way: dict(mean=loss.mean(), position=[at.mean() + 1 for at in bins], loss=loss.mean(0).tolist(),
                      less=(loss - base).mean(0).tolist(), half=half_width(loss - base))
            for way, loss in losses.items()}
    return result


def half_width(values):
    """Half the width of the 95 % interval of the mean of values (windows, n), over windows (normal): n numbers."""
    return (1.96 * values.std(0, ddof=1) / math.sqrt(len(values))).tolist()


def draw_decoding(result, figure, note):
    axes = figure.subplots(1, 1 + len(result))
    styles = dict(zip(next(iter(result.values())), zip([*COLORS, "#56b4e9"], ("-", "--", "-", "--", ":"), "o^sDv")))
    for way, line in next(iter(result.values())).items():
        color, style, marker = styles[way]
        axes[0].plot(line["position"], line["loss"], style, color=color, marker=marker, markersize=4, label=way)
    axes[0].set(xlabel="token of the window", ylabel="loss, nats", title=next(iter(result)))
    for panel, (name, ways) in zip(axes[1:], result.items()):
        for way, line in ways.items():
            color, style, marker = styles[way]
            panel.errorbar(line["position"], line["less"], line["half"], color=color, linestyle=style, marker=marker,
                           markersize=4, capsize=2, linewidth=1)
        panel.set(xlabel="token of the window", ylabel="loss less that teacher-forced", title=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel("95 % intervals over windows, of paired differences. " + note, fontsize=9)


# -- budgets at inference ---------------------------------------------------------------------------------------------

@torch.no_grad()
def budgets(models, x, y, s):
    """{model: {budget: loss, its difference to the plain GPT's, and half its 95 % interval}}."""
    gpt, result = nats(models["gpt_dir"](x)[0], y).mean(1).cpu().numpy(), {}
    for folder in ("out_dir", "elastic_dir"):
        model, lines = models[folder], {}
        for r in (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0):
            loss = nats(model(x, budget=r)[0], y).mean(1).cpu().numpy()
            lines[r] = dict(loss=loss.mean(), less=(loss - gpt).mean(), half=half_width((loss - gpt)[:, None])[0])
        result[trained_at(model)] = lines
    return result


def trained_at(model):
    return "trained at r = " + ", ".join(f"{r:g}" for r in model.trained_budgets)


def draw_budgets(result, figure, note):
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=1)
    for i, ((name, lines), color, marker) in enumerate(zip(result.items(), COLORS, "os")):
        r, rows = np.array(list(lines), dtype=float), list(lines.values())
        axes.errorbar(r + 0.02 * i, [row["less"] for row in rows], [row["half"] for row in rows], color=color,
                      marker=marker, capsize=3, label=name)
    axes.set(xlabel="budget at inference, streams per token", ylabel="loss less a plain GPT's, nats (lower is better)")
    axes.legend(frameon=False)
    figure.supxlabel("95 % intervals over windows, of paired differences. " + note, fontsize=9)


# -- main -------------------------------------------------------------------------------------------------------------

FIGURES = {   # name: its measurement, its drawing, size in inches, the checkpoints that it reads
    "attention": (attention, draw_attention, (7, 4.5), ("out_dir",)),
    "entropy": (entropy, draw_entropy, (9, 4.5), ("out_dir", "gpt_dir")),
    "decoding": (decoding, draw_decoding, (13, 4.8), ("out_dir", "topk_dir")),
    "budgets": (budgets, draw_budgets, (7, 4.5), ("out_dir", "elastic_dir", "gpt_dir")),
}


@dataclass
class Settings:
    figure: str = knob("method", "method, " + ", ".join(FIGURES))
    out_dir: str = knob("out", "the run of train.py with its default flags")
    gpt_dir: str = knob("out-gpt", "a run of train.py --fork_layers none, of the same data")
    topk_dir: str = knob("out-topk", "a run of train.py --form paper --routing topk")
    elastic_dir: str = knob("out-elastic", "a run of train.py --budget 1,1.5,2,3,4")
    dataset: str = knob("shakespeare", "the text that they were trained on")
    windows: int = knob(64, "validation windows, spread evenly", low=2)
    budget: float = knob(None, "streams per token; default: as trained", "float", low=1)
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    results: str = knob(str(ROOT / "experiments" / "results"), "where the picture and its numbers go")


def load(folder, device):
    """The model of a run of train.py."""
    checkpoint, model = load_checkpoint(Path(folder) / "ckpt.pt", device)
    model.trained_budgets = checkpoint["settings"]["budget"]
    return model.eval()


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    results = Path(s.results)
    if s.figure not in ("method", *FIGURES):
        refuse(f"--figure must be method, {', '.join(FIGURES)}, not {s.figure!r}")
    results.mkdir(parents=True, exist_ok=True)
    picture = results / f"{s.figure}.png"
    if s.figure == "method":
        draw_method(picture)
    else:
        measurement, draw, size, folders = FIGURES[s.figure]
        device = choose_device(s.device)
        models = {name: load(getattr(s, name), device) for name in folders}
        x, y = validation_windows(s.dataset, models["out_dir"], s.windows)
        numbers = measurement(models, x, y, s)
        note = f"{x.size(0)} windows of {x.size(1)} tokens, one checkpoint each"
        picture.with_suffix(".json").write_text(json.dumps(dict(
            windows=x.size(0), tokens=x.size(1), torch=torch.__version__, machine=f"{device}, {platform.machine()}, "
            f"{os.cpu_count()} cores", numbers=numbers), indent=1, default=float) + "\n")
        figure = plt.figure(figsize=size, layout="constrained", facecolor="white")
        draw(numbers, figure, note)
        figure.savefig(picture, dpi=130)
    print(picture)


if __name__ == "__main__":
    main(sys.argv[1:])
