"""
What makes extra streams pay: python experiments/ablate.py --task lookup        (or lookup-deep, kinship, plays, ...)

Trains every arm with every seed on the same batches, a process for each core, skips what is done already (one JSON file
a run), and writes experiments/results/ablate_TASK.json, .md and .png: the mean loss of each arm, and its difference to
the plain GPT's, paired over seeds, with a 95 % interval. An arm is flags of train.py and, where those don't reach, a
`Variant`, which changes one thing in the model or its training. The tasks plays-10m and plays-30m want a GPU.
"""
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from tasks import Task, by_grade  # noqa: E402
from tasks.plays import shakespeare  # noqa: E402
from tinybubbles import (MIN_SCORE, PADDING, Block, CausalSelfAttention, Fork, Tinybubbles,  # noqa: E402
                         logsumexp_per_token, rotate, sum_per_token)
from tools.program import knob, read_flags, refuse  # noqa: E402

LOOKUP = "--dataset lookup --block_size 48 --n_head 1 --n_embd 16 --budget 2 --min_lr 5e-4 "
KINSHIP = ("--dataset kinship --block_size 84 --n_layer 4 --n_head 4 --n_embd 64 --fork_layers 1,2 --batch_size 32 "
           "--learning_rate 1e-3 --min_lr 1e-4 --eval_iters 32 --budget 2 ")
PLAYS = ("--dataset shakespeare --block_size 64 --n_layer 4 --n_head 4 --n_embd 64 --fork_layers 1,2 --batch_size 8 "
         "--learning_rate 4e-3 --eval_iters 100 --budget 2 ")
GPU = ("--dataset shakespeare --block_size 256 --batch_size 64 --learning_rate 1e-3 --min_lr 1e-4 --max_iters 2000 "
       "--dropout 0.2 --eval_iters 50 --budget 2 --device cuda ")
TASKS = {   # train.py's flags; every arm adds its own
    "lookup": LOOKUP + "--n_layer 1 --fork_layers 0 --max_iters 3000 --batch_size 16 --learning_rate 4e-3 "
                       "--eval_iters 64",
    "lookup-deep": LOOKUP + "--n_layer 2 --fork_layers 0,1 --max_iters 1500 --batch_size 32 --learning_rate 1e-2 "
                            "--eval_iters 32",
    "kinship": KINSHIP + "--max_iters 2500",
    "plays": PLAYS + "--max_iters 2000",
    "plays-long": PLAYS + "--max_iters 8000",
    "plays-10m": GPU + "--n_layer 6 --n_head 6 --n_embd 384 --fork_layers 2,4",
    "plays-30m": GPU + "--n_layer 8 --n_head 8 --n_embd 512 --fork_layers 3,5",
}
DEEP = {"lookup": 2, "lookup-deep": 4, "kinship": 7, "plays": 7, "plays-long": 7, "plays-10m": 10, "plays-30m": 13}


@dataclass
class Variant:
    """What an arm changes that is no flag of train.py. The defaults change nothing."""
    copies: bool = False      # no scores: every fork layer doubles all streams, if the budget allows (copy-N)
    originals: str = ""       # faded; kept: P = 1; normalised: P of a token's streams sums to 1; "": as --form says
    logits: str = ""          # log P in attention: divided by sqrt(d), undivided, or none; "": as --form says
    share: bool = False       # a token's streams share its attention: each one's logit less the log of their number
    margin: float = -1.0      # of old forks in the selection; -1: as --form says
    values: bool = True       # attention's values times P
    writes: bool = True       # residual writes times P
    merge: str = ""           # residual merge: original takes that stream alone; mean divides by the sum of P
    select: str = ""          # random; or noisy: Gumbel noise of scale 1 on the scores while training
    straight: bool = False    # straight-through: survivors are multiplied by 1 whose gradient is P's
    temperature: float = 1.0  # divides the scorers' logits
    keep_bias: float = 0.0    # added to the keep logit
    fork_bias: float = 0.0    # added to the fork logit
    large: bool = False       # the fork embedding starts as the paper's, 1 / sqrt(n_embd), rather than 0.02
    scorer_lr: float = 1.0    # the scorers' learning rate, times the others'
    grow: bool = False        # budget 1 for the first quarter of training, growing to its own over the second


OURS, PAPER, AUTHORS = "--form ours ", "--form paper ", "--form paper --merge residual "
ARMS = {   # name: (flags, variant)
    "plain GPT": ("--fork_layers none", Variant()),
    "GPT of as many FLOPs": ("--fork_layers none --n_layer {deep}", Variant()),      # but for attention's longer rows
    "copy-2": ("--merge residual --budget 2", Variant(copies=True)),
    "bubbles": (OURS, Variant()),
    "paper's form": (PAPER, Variant()),
    "authors' code": (AUTHORS, Variant()),
    "bubbles, margin 0": (OURS, Variant(margin=0.0)),
    "bubbles, old forks first, then random": (OURS, Variant(select="random")),
    "bubbles, random selection": (OURS, Variant(select="random", margin=0.0)),
    "bubbles, no attenuation": (OURS, Variant(logits="none", values=False, writes=False)),
    "bubbles, probability merge": (OURS + "--merge probability", Variant()),
    "bubbles, log P divided": (OURS, Variant(logits="divided")),
    "bubbles, P normalised": (OURS, Variant(originals="normalised")),
    "authors' code, margin 2": (AUTHORS, Variant(margin=2.0)),
    "paper's form, no forks (r = 1)": (PAPER + "--budget 1", Variant()),
    "paper's form, originals kept": (PAPER, Variant(originals="kept")),
    "authors' code, log P undivided": (AUTHORS, Variant(logits="undivided")),
    "paper's form, keep bias +4": (PAPER, Variant(keep_bias=4.0)),
    "copy-2, probability merge": ("--merge probability --budget 2", Variant(copies=True)),
    "copy-4": ("--merge residual --budget 4", Variant(copies=True)),
    "bubbles, budget grown from 1": (OURS, Variant(grow=True)),
    "bubbles, topk": (OURS + "--routing topk", Variant()),
    "bubbles, noisy selection": (OURS, Variant(select="noisy")),
    "bubbles, log P not in attention": (OURS, Variant(logits="none")),
    "bubbles, values not scaled": (OURS, Variant(values=False)),
    "bubbles, writes not scaled": (OURS, Variant(writes=False)),
    "bubbles, writes and values not scaled": (OURS, Variant(writes=False, values=False)),
    "bubbles, streams share attention": (OURS, Variant(share=True)),
    "bubbles, straight-through": (OURS, Variant(straight=True)),
    "bubbles, temperature 4": (OURS, Variant(temperature=4.0)),
    "bubbles, temperature 1/4": (OURS, Variant(temperature=0.25)),
    "bubbles, margin 4": (OURS, Variant(margin=4.0)),
    "bubbles, mean merge": (OURS, Variant(merge="mean")),
    "bubbles, original alone predicts": (OURS, Variant(merge="original")),
    "copy-2, large fork embedding": ("--merge residual --budget 2", Variant(copies=True, large=True)),
    "bubbles, large fork embedding": (OURS, Variant(large=True)),
    "bubbles, large fork embedding, P near 1 at first": (OURS, Variant(large=True, fork_bias=3.0, keep_bias=3.0)),
    "bubbles, r = 1.5, random selection": (OURS + "--budget 1.5", Variant(select="random")),
    "bubbles, r = 1.5, P near 1 at first": (OURS + "--budget 1.5", Variant(fork_bias=3.0, keep_bias=3.0)),
    "bubbles, fork bias -2": (OURS, Variant(fork_bias=-2.0)),
    "bubbles, fork bias +2": (OURS, Variant(fork_bias=2.0)),
    "bubbles, P near 1 at first": (OURS, Variant(fork_bias=3.0, keep_bias=3.0)),
    "bubbles, P near 1 at first, writes not scaled": (OURS, Variant(fork_bias=3.0, keep_bias=3.0, writes=False)),
    "bubbles, scorers' learning rate / 10": (OURS, Variant(scorer_lr=0.1)),
}
ARMS |= {"bubbles, " + name: (OURS + flags, Variant()) for name, flags in {
    "r = 1.25": "--budget 1.25", "r = 1.5": "--budget 1.5", "r = 4": "--budget 4", "elastic": "--budget 1,1.25,1.5,2",
    "one fork layer": "--fork_layers {first}"}.items()}
MAIN = ["plain GPT", "copy-2", "bubbles", "paper's form", "authors' code", "bubbles, large fork embedding",
        "bubbles, P near 1 at first", "bubbles, large fork embedding, P near 1 at first", "bubbles, r = 1.5",
        "bubbles, r = 1.5, random selection"]


# -- the variants -----------------------------------------------------------------------------------------------------

def normalised(logp, tok, T):
    """logp (B, N) less a constant for each token, so that the P of its streams sum to 1."""
    total = logsumexp_per_token(logp, tok, T).gather(1, tok.clamp(min=0))            # (B, N)
    return torch.where(tok < 0, logp, logp - total)


class VariantFork(Fork):
    """A fork layer with a Variant's scores and selection."""

    def forward(self, x, tok, logp, T, budget, routing, cache):
        if self.variant.copies:
            if 2 * x.size(1) > budget * T:
                return x, tok, logp
            x = torch.stack((x + self.embedding, x), 2).flatten(1, 2)                # (B, 2N, D)
            return x, tok.repeat_interleave(2, 1), logp.repeat_interleave(2, 1)
        x, tok, logp = super().forward(x, tok, logp, T, budget, routing, cache)
        if self.variant.straight:
            P = logp.exp().unsqueeze(-1)
            x = x * (1 + P - P.detach())
        if self.variant.originals == "normalised":
            logp = normalised(logp, tok, T)
        if self.variant.share:
            logp.log_count = sum_per_token(torch.ones_like(logp), tok, T).gather(1, tok.clamp(min=0)).log()   # (B, N)
        return x, tok, logp

    def scores(self, x, logp, original):
        v = self.variant
        a = (self.ln(x).float().unsqueeze(-2) * self.score.weight.float()).sum(-1)   # (B, N, 2)
        a = a / v.temperature + a.new_tensor((v.fork_bias, v.keep_bias))
        fork, keep = F.logsigmoid(a).clamp(min=MIN_SCORE).unbind(-1)
        if (v.originals or ("faded" if self.fades_originals else "kept")) != "faded":
            keep = keep.masked_fill(original, 0.0)
        return logp + fork, logp + keep

    def ranking(self, fork, keep, original, tok):
        if self.variant.select == "random":
            fork, keep = torch.rand(*fork.shape, 2, device=fork.device).unbind(-1)
        elif self.variant.select == "noisy" and self.training:
            both = torch.stack((fork, keep), -1)
            fork, keep = (both - torch.empty_like(both).exponential_().log()).unbind(-1)
        return super().ranking(fork, keep, original, tok)


class VariantAttention(CausalSelfAttention):
    """Attention with its values times what the block says, and its queries and keys in reach."""

    def forward(self, x, P, channel, rotation, append_kv):
        self.read = x.detach(), channel, rotation
        return super().forward(x, self.P, channel, rotation, append_kv)

    @property
    def qk(self):
        """Queries and keys (B, H, N, d) of the last forward pass."""
        (x, channel, rotation), B, N = self.read, *self.read[0].shape[:2]
        qk = rotate(self.qkv(x).view(B, N, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)[:2], *rotation)
        qk[..., -1] = channel
        return qk.detach()


class VariantBlock(Block):
    """A block whose values and writes are scaled by P, or not."""

    def forward(self, x, P, channel, rotation, append_kv):
        one = torch.ones_like(P)
        self.attn.P = P if self.variant.values else one
        self.out = super().forward(x, P if self.variant.writes else one, channel, rotation, append_kv)
        return self.out                                                              # kept for `look`


class VariantModel(Tinybubbles):
    """The model with a Variant's log P in attention, and its merge."""

    def score_channel(self, logp):
        ones, own = super().score_channel(logp)                                      # (B, 1, N) each
        root, padding = math.sqrt(self.config.n_embd // self.config.n_head), (logp <= PADDING).unsqueeze(1)
        scale = {"divided": 1.0, "undivided": root, "none": 0.0}
        if self.variant.logits:
            own = (logp * scale[self.variant.logits]).unsqueeze(1)
        if hasattr(logp, "log_count"):
            own = own - root * logp.log_count.unsqueeze(1)
        return torch.stack((ones, torch.where(padding, PADDING, own)))

    def merge_residual(self, x, tok, logp, T, targets):
        if self.variant.merge == "original":
            logp = torch.where(originals(tok), 0.0, PADDING)
        elif self.variant.merge == "mean":
            logp = normalised(logp, tok, T)
        return super().merge_residual(x, tok, logp, T, targets)


def originals(tok):
    """Which streams (B, N) are the originals of their tokens."""
    return tok != F.pad(tok[:, 1:], (0, 1), value=-1)


def vary(model, variant):
    """Make every part of the model that a Variant can change look at `variant`; with no fork layers there is none."""
    kinds = {Fork: VariantFork, CausalSelfAttention: VariantAttention, Block: VariantBlock, Tinybubbles: VariantModel}
    for module in list(model.modules()) if model.config.fork_layers else []:
        if type(module) in kinds:
            module.__class__, module.variant = kinds[type(module)], variant
    for fork in model.forks.values():
        fork.margin = fork.margin if variant.margin == -1 else variant.margin
        if variant.large:
            fork.embedding.data.mul_(model.config.n_embd ** -0.5 / 0.02)


# -- what a trained model does with its streams -----------------------------------------------------------------------

@torch.no_grad()
def read(trainer, i):
    """Run validation batch i: tok and logp of the last block's streams (B, N), and each token's streams (B, T)."""
    idx, streams = torch.from_numpy(trainer.data.val_batch(i)[0]).to(trainer.device), []
    trainer.model(idx, streams=streams)
    tok, logp = streams[-1]
    return tok, logp, sum_per_token((tok >= 0).long(), tok, idx.size(1))


@torch.no_grad()
def look(trainer):
    """Means over four validation batches, in the last block: P of originals and of forks; the cosine between a fork and
    its original; and how many times more attention an original pays to a fork of its own than to another stream."""
    block, sums = trainer.model.blocks[-1], np.zeros(5)
    for i in range(4):
        tok, logp, _ = read(trainer, i)
        original, real, (q, k) = originals(tok), tok >= 0, block.attn.qk
        fork, N = real & ~original, tok.size(1)
        query, key = tok.unsqueeze(-1), tok.unsqueeze(-2)
        slot = (query == key).long().cumsum(-1).argmax(-1, keepdim=True)                          # of the original
        cosine = F.cosine_similarity(block.out, block.out.gather(1, slot.expand_as(block.out)), dim=-1)
        future = torch.ones(N, N, dtype=torch.bool, device=tok.device).triu(1)
        logits = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).masked_fill(future, -math.inf)
        weight = logits.softmax(-1).mean(1)                                                       # (B, N, N)
        own = (query == key) & fork.unsqueeze(-2) & original.unsqueeze(-1)
        other = (query > key) & real.unsqueeze(-2) & own.any(-1, keepdim=True)
        P = logp.exp()
        sums += [float(x) for x in (P[original & real].mean(), P[fork].mean(), cosine[fork].mean(), weight[own].mean(),
                                    weight[other].mean())]
    P_original, P_fork, cosine, own, other = sums / 4
    return dict(P_original=P_original, P_fork=P_fork, cosine=cosine, attention_to_own_forks=own / other)


# -- runs -------------------------------------------------------------------------------------------------------------

def flags_of(task, arm, more=""):
    """train.py's flags of an arm, a list; later ones win."""
    first = re.search(r"--fork_layers (\d+)", TASKS[task]).group(1)
    return f"{TASKS[task]} {ARMS[arm][0].format(deep=DEEP[task], first=first)} {more}".split()


def prepare(task, arm, seed, out, more=""):
    """The Trainer of one run: settings, model and optimizer as the arm wants them."""
    settings = read_flags(train.Settings, ["--device", "cpu", *flags_of(task, arm, more), "--seed", str(seed),
                                           "--out_dir", str(out)], "")
    trainer, variant = train.Trainer(settings), ARMS[arm][1]
    vary(trainer.model, variant)
    return trainer, variant


def train_step(trainer, variant, step):
    """One step of train.py's, with the Variant's budget and its scorers' learning rate."""
    model, steps = trainer.model, trainer.s.max_iters
    if variant.grow:
        trainer.s.budget = (1 + min(1.0, max(0.0, 4 * step / steps - 1)) * (model.config.budget - 1),)
    scorers = [fork.score.weight for fork in model.forks.values()]
    before = [w.detach().clone() for w in scorers]
    loss, _ = trainer.train_step(step)
    for w, old in zip(scorers, before):
        w.data.lerp_(old, 1 - variant.scorer_lr)        # AdamW's step is proportional to the learning rate
    return loss


def scorer_share(model):
    """The scorers' share of the gradient's norm, 0 to 1."""
    squares = {name: float(p.grad.square().sum()) for name, p in model.named_parameters() if p.grad is not None}
    scorers = sum(value for name, value in squares.items() if name.endswith("score.weight"))
    return math.sqrt(scorers / sum(squares.values()))


def run(task, arm, seed, path, more):
    """Train one arm with one seed in this process, on one thread, and write its JSON to `path`."""
    torch.set_num_threads(1)
    trainer, variant = prepare(task, arm, seed, path.with_suffix(""), more)
    model, steps, started = trainer.model, trainer.s.max_iters, time.perf_counter()
    flips, gradient, forks = [], [], bool(model.config.fork_layers) and not variant.copies
    for step in range(steps):
        watched = forks and step % max(1, steps // 20) == 0
        before = read(trainer, 0)[2] if watched else None
        train.check_finite(float(train_step(trainer, variant, step)), step)
        if watched:
            flips.append((before != read(trainer, 0)[2]).float().mean().item())
            gradient.append(scorer_share(model))
    model.eval()
    budget = model.config.budget
    result = dict(task=task, arm=arm, seed=seed, flags=" ".join(flags_of(task, arm, more)), variant=asdict(variant),
                  steps=steps, parameters=sum(p.numel() for p in model.parameters()), val_loss=trainer.evaluate(budget),
                  streams=float(np.mean([read(trainer, i)[2].float().mean() for i in range(4)])), flips=flips,
                  scorer_gradient=gradient, seconds=time.perf_counter() - started, torch=torch.__version__,
                  machine=torch.cuda.get_device_name() if trainer.device.type == "cuda" else
                  f"{platform.machine()}, {os.cpu_count()} cores, 1 thread per run")
    if model.config.fork_layers:
        result.update(look(trainer))
    if isinstance(trainer.data, Task):
        rows, grade = by_grade(trainer.data, model, budget, trainer.device).tolist(), trainer.data.maker.GRADE
        result |= {f"{name}_by_{grade}": row for name, row in zip(("accuracy", "streams"), rows)}
    shutil.rmtree(path.with_suffix(""))
    path.write_text(json.dumps(result) + "\n")
    return result


# -- the table and the figure -----------------------------------------------------------------------------------------

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)    # Student's t, two-sided 95 %, 1 to 9 degrees


def interval(values):
    """Mean and half the width of its 95 % interval (Student's t; up to 10 values; NaN for one)."""
    n = len(values)
    return float(np.mean(values)), T95[n - 2] * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def differences(runs, arm, base="plain GPT"):
    """Validation loss of the arm less that of the base arm, seed by seed; nothing for the base itself."""
    loss = {run["seed"]: run["val_loss"] for run in runs if run["arm"] == base != arm}
    return [run["val_loss"] - loss[run["seed"]] for run in runs if run["arm"] == arm and run["seed"] in loss]


def cell(values, sign=""):
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def mean_of(runs, key, form=".2f"):
    """The mean over runs of run[key], a number, a list by grade, or a list over training (its second half counts)."""
    values = [run[key] for run in runs if run.get(key)]
    if key in ("flips", "scorer_gradient"):
        values = [np.mean(value[len(value) // 2:]) for value in values]
    return " ".join(f"{x:{form}}" for x in np.atleast_1d(np.mean(values, 0))) if values else ""


COLUMNS = {"right, by {}": "accuracy_by_{}", "streams": "streams", "of queries, by {}": "streams_by_{}",
           "P of originals": "P_original", "P of forks": "P_fork", "cosine to original": "cosine",
           "attention to own forks": "attention_to_own_forks"}


NOTE = """Loss: nats per target over train.py's evaluation batches, at the budget trained (the highest, if several);
± half a 95 % interval over seeds (Student's t). The difference is paired: same seed, same batches. In the last block
of the trained model: P, the cosine of a fork's output and its original's, and the attention that an original pays to a
fork of its own over that to a stream of another token. In the second half of training: tokens whose number of streams
one step changes, and the scorers' share of the gradient's norm.""".replace("\n", " ")


def summaries(runs):
    """A dict of table cells for each arm that has runs."""
    grade = "hops" if "accuracy_by_hops" in runs[0] else "m"
    for arm in ARMS:
        mine = [run for run in runs if run["arm"] == arm]
        if mine:
            less, less_bubbles = differences(runs, arm), differences(runs, arm, "bubbles")
            yield {"arm": arm, "seeds": str(len(mine)), "loss": cell([run["val_loss"] for run in mine]),
                   "less the GPT's": cell(less, "+") if less else "",
                   "less bubbles'": cell(less_bubbles, "+") if less_bubbles else "",
                   **{name.format(grade): mean_of(mine, key.format(grade)) for name, key in COLUMNS.items()},
                   "tokens changed by a step": mean_of(mine, "flips", ".1%"),
                   "scorers' gradient": mean_of(mine, "scorer_gradient", ".1%")}


def table(runs):
    """The runs of one task as Markdown."""
    rows, one = list(summaries(runs)), runs[0]
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    seeds = sorted({run["seed"] for run in runs})
    lines += ["", f"Task {one['task']}, {one['steps']} steps, seeds {seeds[0]} to {seeds[-1]}. {NOTE} "
              f"Machine: {one['machine']}, torch {one['torch']}."]
    return "\n".join(lines) + "\n"


def draw(runs, path):
    """Every arm's difference to the plain GPT: a dot a seed, a bar for the 95 % interval."""
    from matplotlib.figure import Figure
    arms = [arm for arm in ARMS if differences(runs, arm)]
    figure = Figure(figsize=(8, 1.1 + 0.26 * len(arms)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for y, arm in enumerate(reversed(arms)):
        values = differences(runs, arm)
        mean, half = interval(values)
        color = "#0072b2" if mean + half < 0 else "#d55e00" if mean - half > 0 else "#666666"
        axes.plot(values, [y] * len(values), "o", color=color, markersize=3, alpha=0.5)
        axes.errorbar(mean, y, xerr=None if math.isnan(half) else half, fmt="D", color=color, markersize=5, capsize=3)
    axes.set_yticks(range(len(arms)), reversed(arms))
    axes.set_ylim(-0.7, len(arms) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{runs[0]['task']}: validation loss less the plain GPT's, nats (left is better)\n"
                    "dots: seeds; bars: 95 % intervals of the mean")
    figure.savefig(path, dpi=130)


# -- main -------------------------------------------------------------------------------------------------------------

@dataclass
class Settings:
    task: str = knob("lookup", ", ".join(TASKS))
    seeds: tuple = knob((0, 1, 2, 3, 4), "seeds of each arm, ten at most", "ints", low=0)
    arms: str = knob("main", "main (ten of them), all, or some names, separated by ;")
    runs: str = knob("out-ablate", "where the runs' JSON files go")
    results: str = knob(str(ROOT / "experiments" / "results"), "where ablate_TASK.json, .md and .png go")
    flags: str = knob("", "more flags for every run of train.py, in quotes")
    processes: int = knob(os.cpu_count(), "runs at a time, one thread each", low=1)


def check(s):
    """The names of the arms to run; refuses tasks, arms and seeds that aren't there."""
    if s.task not in TASKS:
        refuse(f"--task must be one of {', '.join(TASKS)}, not {s.task!r}")
    if not 1 <= len(set(s.seeds)) <= 10 or len(set(s.seeds)) < len(s.seeds):
        refuse(f"--seeds must name one to ten seeds, each once, not {','.join(map(str, s.seeds))}")
    names = dict(main=MAIN, all=list(ARMS)).get(s.arms) or [name.strip() for name in s.arms.split(";")]
    for name in names:
        if name not in ARMS:
            refuse(f"--arms: there is no arm {name!r}; there are: {'; '.join(ARMS)}")
    return names


def finished(path, s):
    """The run whose JSON is at `path`, if it was made by this task's and arm's present flags; else None."""
    if path.exists():
        run = json.loads(path.read_text())
        if run["arm"] in ARMS and run["flags"] == " ".join(flags_of(s.task, run["arm"], s.flags)):
            return run


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    arms, folder, results = check(s), Path(s.runs) / s.task, Path(s.results)
    folder.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    if "shakespeare" in TASKS[s.task]:
        shakespeare(Path("data") / "shakespeare.txt")          # once, before several processes want it
    jobs = [(arm, seed, folder / f"{re.sub('[^a-z0-9+-]+', '_', arm.lower())}_{seed}.json") for seed in s.seeds
            for arm in arms]
    with ProcessPoolExecutor(s.processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run, s.task, arm, seed, path, s.flags) for arm, seed, path in jobs
                   if not finished(path, s)]
        for done in as_completed(waiting):
            print(f"{done.result()['arm']}, seed {done.result()['seed']}: {done.result()['val_loss']:.4f}", flush=True)
    runs = [result for path in sorted(folder.glob("*.json")) if (result := finished(path, s))]
    (results / f"ablate_{s.task}.json").write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    (results / f"ablate_{s.task}.md").write_text(table(runs), encoding="utf-8")
    draw(runs, results / f"ablate_{s.task}.png")
    print(table(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
