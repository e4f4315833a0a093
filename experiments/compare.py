"""
Every rival in one table: python experiments/compare.py --preset cpu        (or smoke, long, gpu)

Trains every arm on the same batches, first at every learning rate of one grid with the first seed, then at its best one
with the others; skips what is done already (a JSON file a run), and starts nothing once --minutes are over. Then counts
the FLOPs of decoding real text and measures the time, the arms taking turns. Writes compare_PRESET.json, .md and .png:
the loss of each arm where every prediction comes from a step of its own, against the FLOPs of a generated token, at
every value of its dial (streams, copies, pauses, iterations), whatever is done by then, and what is missing.
"""
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from experiments import ablate, bench, peers, peers_latent  # noqa: E402
from tasks.plays import shakespeare  # noqa: E402
from tinybubbles import Cache, Config, Tinybubbles  # noqa: E402
from tools.program import choose_device, knob, read_flags, refuse, write_atomically  # noqa: E402

CLOCKED, STEPS = 64, 4       # tokens generated, and training steps, in a turn of the clock


@dataclass
class Preset:
    """How much of it: flags of train.py for every arm, the sweep's learning rates in the order tried (a run's last rate
    is a twentieth of its highest), seeds, runs at a time, minutes after which none starts, turns of the clock; the arms
    that "all" stands for, () = all there are; and whether every arm begins as recurrent depth does."""
    flags: str
    rates: tuple
    seeds: tuple
    processes: int
    minutes: float
    rounds: int
    arms: tuple = ()
    large_start: bool = False


PRESETS = {
    "smoke": Preset("--device cpu --block_size 16 --n_layer 3 --n_head 2 --n_embd 16 --fork_layers 1,2 --batch_size 4 "
                    "--max_iters 10 --warmup_iters 2 --eval_iters 2", (4e-3, 8e-3), (0, 1), 2, 5, 1),
    "cpu": Preset("--device cpu --block_size 64 --n_layer 4 --n_head 4 --n_embd 64 --fork_layers 1,2 --batch_size 8 "
                  "--max_iters 400 --warmup_iters 40 --eval_iters 16", (8e-3, 4e-3, 2e-3), (0, 1, 2), 2, 50, 5),
    "long": Preset("--device cpu --block_size 64 --n_layer 4 --n_head 4 --n_embd 64 --fork_layers 1,2 --batch_size 8 "
                   "--max_iters 2000 --warmup_iters 100 --eval_iters 16", (8e-3, 4e-3, 2e-3), (0, 1, 2), 2, 60, 5,
                   ("plain GPT", "deeper GPT", "copy-2, mean", "recurrent depth", "bubbles, random selection",
                    "bubbles, r = 2", "bubbles, r = 4"), large_start=True),
    "gpu": Preset("--device cuda --block_size 256 --n_layer 6 --n_head 6 --n_embd 384 --fork_layers 2,4 "
                  "--batch_size 32 --max_iters 500 --warmup_iters 50 --eval_iters 4", (2e-3, 4e-3, 1e-3), (0, 1, 2), 8,
                  17, 3),
}


# -- the arms ---------------------------------------------------------------------------------------------------------

@dataclass
class Arm:
    """A model, how it is trained, and its dial: what `budget` means to it. Arms of one curve are joined in the figure.

    flags: of train.py, after the preset's; {deep}: blocks that make a GPT's FLOPs those of bubbles at r = 2. dials:
    budgets to evaluate; the first is the table's, and its loss chooses the learning rate. build: the model of a Config.
    cached: False if later tokens change earlier ones, so that every step reads all anew. large_start: with the matrices
    of recurrent depth, in every preset."""
    curve: str
    flags: str
    dials: tuple
    build: object = Tinybubbles
    cached: bool = True
    large_start: bool = False


NONE, LAST, MEAN = "--fork_layers none ", partial(peers.Copies, merge="last"), partial(peers.Copies, merge="mean")
ARMS = {
    "plain GPT": Arm("GPT", NONE, (1,)),
    "deeper GPT": Arm("GPT", NONE + "--n_layer {deep}", (1,)),
    "plain GPT, large start": Arm("GPT, large start", NONE, (1,), large_start=True),
    "copy-2, last": Arm("copies, last", NONE + "--budget 2", (2,), LAST),
    "copy-4, last": Arm("copies, last", NONE + "--budget 4", (4,), LAST),
    "copy-2, mean": Arm("copies, mean", NONE + "--budget 2", (2,), MEAN),
    "copy-4, mean": Arm("copies, mean", NONE + "--budget 4", (4,), MEAN),
    "pauses, 1 a token": Arm("pauses", NONE + "--budget 2", (2,), peers.Pauses),
    "pauses, 3 a token": Arm("pauses", NONE + "--budget 4", (4,), peers.Pauses),
    "random pauses": Arm("random pauses", NONE + "--budget 2", (2, 1, 4), peers.RandomPauses),
    "recurrent depth": Arm("recurrent depth", NONE + "--budget 4", (4, 1, 2, 8, 16), peers_latent.RecurrentDepth),
    "PonderLM-2": Arm("PonderLM-2", NONE + "--budget 2", (2,), peers_latent.PonderLM2),
    "PonderLM-3": Arm("PonderLM-3", NONE + "--budget 4", (4, 1, 2, 3), peers_latent.PonderLM3),
    "bubbles, random selection": Arm(
        "bubbles, random selection", "--budget 2", (2, 1, 1.5, 4),
        lambda config: peers.random_selection(Tinybubbles(config), torch.initial_seed())),
    "bubbles, no attenuation": Arm("bubbles, no attenuation", "--budget 2", (2, 1, 1.5, 4),
                                   lambda config: peers.no_attenuation(Tinybubbles(config))),
    "bubbles, r = 1.5": Arm("bubbles", "--budget 1.5", (1.5,)),
    "bubbles, r = 2": Arm("bubbles", "--budget 2", (2,)),
    "bubbles, r = 2, large start": Arm("bubbles, large start", "--budget 2", (2,), large_start=True),
    "bubbles, r = 4": Arm("bubbles", "--budget 4", (4,)),
    "bubbles, elastic": Arm("bubbles, elastic", "--budget 1,1.5,2,3,4", (2, 1, 1.5, 3, 4)),
    "bubbles, topk": Arm("bubbles, topk", "--budget 2 --routing topk", (2,), cached=False),
    "bubbles, paper": Arm("bubbles, paper", "--budget 2 --routing topk --form paper", (2, 1, 4), cached=False),
}
BASE = "plain GPT"
CURVES = {   # Okabe and Ito's colours, safe for colour-blind readers; a marker and a line each
    "GPT": ("#000000", "o-"), "copies, last": ("#e69f00", "<-"), "copies, mean": ("#e69f00", ">--"),
    "pauses": ("#009e73", "P-"), "random pauses": ("#009e73", "X--"), "recurrent depth": ("#cc79a7", "*-"),
    "PonderLM-2": ("#d55e00", "^-"), "PonderLM-3": ("#d55e00", "v--"), "bubbles": ("#0072b2", "s-"),
    "bubbles, elastic": ("#0072b2", "D--"), "bubbles, random selection": ("#56b4e9", "^-"),
    "bubbles, no attenuation": ("#56b4e9", "v--"), "bubbles, topk": ("#56b4e9", "o-"),
    "bubbles, paper": ("#56b4e9", "D:"), "GPT, large start": ("#000000", "x-"),
    "bubbles, large start": ("#0072b2", "x-")}


# -- FLOPs: matmuls, a multiply and an add each -----------------------------------------------------------------------

def forward_flops(model, T, budget):
    """Of a forward over T tokens of one row, attention in full."""
    if hasattr(model, "forward_flops"):
        return model.forward_flops(T, budget)
    c = model.config
    heads = bench.counts_of(c, T, budget)[-1] - T if c.merge == "probability" else 0
    return bench.flops(c, T, budget) + 2 * heads * c.n_embd * c.vocab_size


def train_flops(model, T, budgets):
    """Of a training step on T tokens of one row: a forward, and twice that backward; the mean over the budgets."""
    if hasattr(model, "train_flops"):
        return model.train_flops(T)
    return 3 * sum(forward_flops(model, T, budget) for budget in budgets) / len(budgets)


def stream_flops(config, new, held):
    """Of a token's step in a cache: `new` streams of it in each block, which then holds `held` in all."""
    D, heads = config.n_embd, int(new[-1]) if config.merge == "probability" else 1
    return sum(24 * int(n) * D * D + 4 * int(n * S) * D for n, S in zip(new, held)) + 2 * heads * D * config.vocab_size


def decode_flops(model, T, budget, cached):
    """Of reading T tokens one by one, if bubbles use the whole budget: they may use less."""
    if not cached:
        return sum(forward_flops(model, t, budget) for t in range(1, T + 1))
    if hasattr(model, "decode_flops"):
        return model.decode_flops(T, budget)
    held = [np.array(bench.counts_of(model.config, t, budget)) for t in range(T + 1)]
    return sum(stream_flops(model.config, held[t + 1] - held[t], held[t + 1]) for t in range(T))


def deep(flags):
    """Blocks of the plain GPT whose FLOPs per token are nearest to those of bubbles at r = 2, for flags of train.py."""
    s = read_flags(train.Settings, flags.split(), "")
    c = Config(block_size=s.block_size, n_layer=s.n_layer, n_head=s.n_head, n_embd=s.n_embd, fork_layers=s.fork_layers)
    goal = bench.flops(c, s.block_size, 2.0)
    plain = lambda L: bench.flops(replace(c, n_layer=L, fork_layers=()), s.block_size, 1.0)
    return min(range(s.n_layer, 4 * s.n_layer + 1), key=lambda L: abs(plain(L) - goal))


# -- one run ----------------------------------------------------------------------------------------------------------

def base_flags(s):
    """train.py's flags of every run."""
    return f"{PRESETS[s.preset].flags} --dataset {s.dataset}"


def flags_of(s, arm, rate, seed):
    """train.py's flags of one run, a list; later ones win."""
    base = base_flags(s)
    own = f"{ARMS[arm].flags.format(deep=deep(base))} --learning_rate {rate} --min_lr {rate / 20} --seed {seed}"
    return f"{base} {own}".split()


def prepare(s, arm, rate, seed, out):
    """The Trainer of one run, with the arm's model."""
    trainer = train.Trainer(read_flags(train.Settings, [*flags_of(s, arm, rate, seed), "--out_dir", str(out)], ""))
    torch.manual_seed(seed)
    model = ARMS[arm].build(trainer.model.config)
    if (PRESETS[s.preset].large_start or ARMS[arm].large_start) and arm != "recurrent depth":   # begins so itself
        peers.scale_start(model, model.config.n_layer)
    model.to(trainer.device)
    trainer.model = trainer.compiled = trainer.parallel = model
    trainer.optimizer = train.make_optimizer(model, trainer.s, trainer.device)
    return trainer


def windows(trainer):
    """idx and targets (B, T) of all the evaluation batches."""
    batches = zip(*(trainer.data.val_batch(i) for i in range(trainer.s.eval_iters)))
    return [torch.from_numpy(np.concatenate(parts)).to(trainer.device) for parts in batches]


@torch.no_grad()
def decode(trainer, idx, budget, cached, start=0):
    """Read idx (B, T), after `start` tokens in one chunk, one by one from a cache, or else all anew for each: log p of
    the token that follows each of these, (B, T - start, V)."""
    model, steps, cache = trainer.model, [], None
    if cached:
        cache = model.new_cache() if hasattr(model, "new_cache") else Cache()
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.half):
        if cached and start:
            model(idx[:, :start], budget=budget, cache=cache)
        for t in range(start, idx.size(1)):
            read = idx[:, t:t + 1] if cached else idx[:, :t + 1]
            steps.append(model(read, budget=budget, cache=cache)[0][:, -1:])
    return torch.cat(steps, 1)


@torch.no_grad()
def losses(trainer, arm, dial):
    """Validation loss at a dial's value, in nats per target, on the same windows: teacher-forced, all tokens in one
    forward; and autoregressive, each prediction from a step of its own."""
    idx, targets = windows(trainer)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.half):
        whole = trainer.model(idx, targets, budget=float(dial))[1].item()
    log_probs = decode(trainer, idx, float(dial), ARMS[arm].cached)
    return dict(teacher_forced=whole, autoregressive=-log_probs.gather(-1, targets.unsqueeze(-1)).mean().item())


def run(s, arm, rate, seed, path, deadline):
    """Train one arm at one learning rate with one seed in this process, on one thread, and write its weights and then
    its JSON, `path`. None if the deadline is over. A loss that isn't finite ends a run; its val_loss is None."""
    if time.time() > deadline:
        return None
    torch.set_num_threads(1)
    trainer, started, pending = prepare(s, arm, rate, seed, path.with_suffix("")), time.perf_counter(), []
    for step in range(trainer.s.max_iters):
        pending.append(trainer.train_step(step)[0])
        if step % 50 == 49 and not torch.stack(pending).isfinite().all():
            break
    trainer.model.eval()
    finite = torch.stack(pending).isfinite().all().item()
    dials = {f"{dial:g}": losses(trainer, arm, dial) for dial in ARMS[arm].dials if finite}
    result = dict(arm=arm, rate=rate, seed=seed, flags=" ".join(flags_of(s, arm, rate, seed)), dials=dials,
                  val_loss=dials[f"{ARMS[arm].dials[0]:g}"]["autoregressive"] if finite else None,
                  parameters=sum(p.numel() for p in trainer.model.parameters()), seconds=time.perf_counter() - started)
    shutil.rmtree(path.with_suffix(""))
    if seed == PRESETS[s.preset].seeds[0]:
        write_atomically(path.with_suffix(".pt"), partial(torch.save, trainer.model.state_dict()))
    write_atomically(path, lambda file: file.write(json.dumps(result).encode()))
    return result


def load(s, chosen, folder):
    """A Trainer with the weights of a run of the first seed, to measure."""
    job = chosen["arm"], chosen["rate"], chosen["seed"]
    path = path_of(folder, *job)
    trainer = prepare(s, *job, path.with_suffix(""))
    shutil.rmtree(path.with_suffix(""))
    trainer.model.load_state_dict(torch.load(path.with_suffix(".pt"), trainer.device, weights_only=True))
    return trainer


def count(s, chosen, folder):
    """FLOPs per token of a trained arm: of training; and for each value of its dial those counted while it decodes a
    validation window, and those of the formula."""
    torch.set_num_threads(1)
    trainer, arm = load(s, chosen, folder), ARMS[chosen["arm"]]
    model, idx = trainer.model.eval(), windows(trainer)[0][:1]
    T, inference = idx.size(1), {}
    for dial in arm.dials:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            decode(trainer, idx, float(dial), arm.cached)
        formula = decode_flops(model, T, float(dial), arm.cached)
        inference[f"{dial:g}"] = dict(counted=counter.get_total_flops() / T, formula=formula / T)
    return dict(arm=chosen["arm"], train=train_flops(model, T, trainer.s.budget) / T, inference=inference)


def clock(s, chosen, folder):
    """Seconds of a training step and of a generated token (one row, the last CLOCKED tokens of a window) of each arm at
    its own dial, and their medians as multiples of the plain GPT's; all take turns in this process."""
    torch.set_num_threads(1)
    trainers = {run["arm"]: load(s, run, folder) for run in sorted(chosen, key=lambda run: run["arm"] == BASE)}
    rounds, one = PRESETS[s.preset].rounds, trainers[BASE]
    idx = windows(one)[0][:1]
    start = max(0, idx.size(1) - CLOCKED)

    def generate(name):
        decode(trainers[name], idx, float(ARMS[name].dials[0]), ARMS[name].cached, start)

    def learn(name):
        for step in range(STEPS):
            trainers[name].train_step(step)

    for trainer in trainers.values():
        trainer.model.eval()
    token, token_ratio = bench.compare([partial(generate, name) for name in trainers], rounds, one.device)
    for trainer in trainers.values():
        trainer.model.train()
    step, step_ratio = bench.compare([partial(learn, name) for name in trainers], rounds, one.device)
    return {name: dict(token=token[i] / (idx.size(1) - start), token_ratio=token_ratio[i][0], step=step[i] / STEPS,
                       step_ratio=step_ratio[i][0]) for i, name in enumerate(trainers)}


# -- the tables and the figure ----------------------------------------------------------------------------------------

def best(runs, seed):
    """Of each arm, the run of the first seed whose rate gave the lowest loss: {arm: run}; none that is not finite."""
    sweep = sorted((run for run in runs if run["seed"] == seed and run["val_loss"] is not None),
                   key=lambda run: -run["val_loss"])
    found = {run["arm"]: run for run in sweep}
    return {arm: found[arm] for arm in ARMS if arm in found}


def pareto(points):
    """Which of the points (cost, loss) no other one beats: as cheap and as good, and better in one of them; bools."""
    return [not any(c <= cost and l <= loss and (c, l) != (cost, loss) for c, l in points) for cost, loss in points]


def points_of(runs, flops):
    """A dict for every arm and value of its dial: FLOPs per generated token, losses of the seeds, and `front`, whether
    no other point is as cheap and as good."""
    points = []
    for arm in flops:
        mine = [run for run in runs if run["arm"] == arm]
        for dial, cost in flops[arm]["inference"].items():
            seeds = {key: [run["dials"][dial][key] for run in mine] for key in ("autoregressive", "teacher_forced")}
            points.append(dict(arm=arm, dial=float(dial), flops=cost["counted"], formula=cost["formula"], **seeds,
                               loss=float(np.mean(seeds["autoregressive"]))))
    for point, front in zip(points, pareto([(p["flops"], p["loss"]) for p in points])):
        point["front"] = front
    return points


def markdown(rows):
    """Rows, dicts of the same keys, as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows]) + "\n"


def spread(values):
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def arm_rows(runs, flops, times):
    """The first table: each arm at its own dial."""
    for arm in flops:
        mine, less = [run for run in runs if run["arm"] == arm], ablate.differences(runs, arm)
        one, own = mine[0], f"{ARMS[arm].dials[0]:g}"
        gaps = [run["dials"][own]["autoregressive"] - run["dials"][own]["teacher_forced"] for run in mine]
        yield {"arm": arm, "parameters": f"{one['parameters']:,}", "dial": own, "seeds": str(len(mine)),
               "loss (lowest to highest)": spread([run["val_loss"] for run in mine]),
               "less the GPT's": ablate.cell(less, "+") if less else "", "less teacher-forced": f"{np.mean(gaps):+.1e}",
               "training MFLOPs": f"{flops[arm]['train'] / 1e6:.3g}",
               "inference MFLOPs": f"{flops[arm]['inference'][own]['counted'] / 1e6:.3g}",
               "training step, times GPT's": f"{times[arm]['step_ratio']:.2f}",
               "token, times GPT's": f"{times[arm]['token_ratio']:.2f}"}


def dial_rows(points):
    """The second table: each arm at every value of its dial."""
    for p in points:
        yield {"arm": p["arm"], "dial": f"{p['dial']:g}", "inference MFLOPs": f"{p['flops'] / 1e6:.4g}",
               "by formula": f"{p['formula'] / 1e6:.4g}", "loss (lowest to highest)": spread(p["autoregressive"]),
               "teacher-forced": f"{np.mean(p['teacher_forced']):.3f}", "Pareto front": "yes" if p["front"] else ""}


def sweep_rows(runs, preset, arms):
    """The third table: the first seed's loss at each learning rate, the best in bold."""
    chosen, rates = best(runs, preset.seeds[0]), sorted(preset.rates)
    loss = {(run["arm"], run["rate"]): "not finite" if run["val_loss"] is None else f"{run['val_loss']:.3f}"
            for run in runs if run["seed"] == preset.seeds[0]}
    for arm in arms:
        rate = chosen[arm]["rate"] if arm in chosen else None
        texts = {r: loss.get((arm, r), "missing") for r in rates}
        yield {"arm": arm, **{f"{r:g}": f"**{text}**" if r == rate else text for r, text in texts.items()},
               "best at the grid's edge": "yes" if rate in (rates[0], rates[-1]) else ""}


NOTE = """Loss: nats per byte on {windows} validation windows of {T} tokens, every prediction from a step of its own:
decoded token by token from the cache, or with all tokens so far read anew where there is no exact cache (topk). Less
the GPT's: paired, same seed and same batches, ± half a 95 % interval (Student's t). Less teacher-forced: the same
windows, all tokens at once; 0 but for rounding if nothing looks ahead. FLOPs per token: matmuls, a multiply and an add
each; training by formula, inference as torch counts it while the first seed's model decodes one window, and by the
formula of a budget used in full. Times: medians of {rounds} turns in one process on one thread, the arms taking turns;
a token's at batch 1. Dial: bubbles' r, copies, positions of a token with its pauses or latent slots, iterations. Every
arm: {steps} steps of {batch} windows, the same batches; its learning rate is the best of the third table's with seed
{first}, whose run then counts as one of the seeds. Plain GPT: {blocks} blocks, width {width}, {heads} heads; deeper:
{deep} blocks, for as many FLOPs as bubbles at r = 2. Start: {start}. Machine: {machine}."""


def note(s):
    """What the tables are of."""
    preset, settings = PRESETS[s.preset], read_flags(train.Settings, base_flags(s).split(), "")
    cuda = settings.device == "cuda"
    machine = (f"{torch.cuda.get_device_name() if cuda else platform.machine()}, {os.cpu_count()} cores, "
               f"{s.processes or preset.processes} runs at a time, {'bfloat16' if cuda else 'float32'}, torch "
               f"{torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}")
    return NOTE.format(windows=settings.eval_iters * settings.batch_size, T=settings.block_size, rounds=preset.rounds,
                       steps=settings.max_iters, batch=settings.batch_size, first=preset.seeds[0], machine=machine,
                       blocks=settings.n_layer, width=settings.n_embd, heads=settings.n_head,
                       start="recurrent depth's, N(0, 2/5D), for every arm" if preset.large_start else "the arm's own",
                       deep=deep(base_flags(s))).replace("\n", " ")


def draw(points, title, path):
    """Loss against FLOPs per generated token, a curve for each arm or family over its dial."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 6.5), layout="constrained", facecolor="white")
    axes, costs = figure.subplots(), [p["flops"] / 1e6 for p in points]
    own = [max(p["autoregressive"]) for p in points if p["dial"] == ARMS[p["arm"]].dials[0]]
    for curve, (color, style) in CURVES.items():
        mine = sorted((p for p in points if ARMS[p["arm"]].curve == curve), key=lambda p: p["flops"])
        if mine:
            y = np.array([p["loss"] for p in mine])
            ends = np.array([(min(p["autoregressive"]), max(p["autoregressive"])) for p in mine]).T
            axes.errorbar([p["flops"] / 1e6 for p in mine], y, np.abs(ends - y), fmt=style, color=color, capsize=3,
                          markersize=7, linewidth=1.5, elinewidth=1, alpha=0.9, label=curve)
    front = sorted((p["flops"] / 1e6, p["loss"]) for p in points if p["front"])
    axes.step(*zip(*front), "o:", where="post", color="#666666", markerfacecolor="none", markersize=15, zorder=0,
              label="Pareto front")
    low, high = min(min(p["autoregressive"]) for p in points), max(own)
    top = high + 0.2 * (high - low) + 0.01                            # a dial turned too far would flatten the rest
    above = sum(p["loss"] > top for p in points)
    title += f" (points above the frame, in the table: {above})" * (above > 0)
    axes.set(xscale="log", ylim=(low - 0.05 * (top - low), top), title=title,
             xlabel="MFLOPs per generated token (a multiply and an add each)",
             ylabel="validation loss, token by token (nats per byte)\nmean of the seeds; bars: lowest to highest")
    ticks = [m * 10.0 ** k for k in range(-4, 6) for m in (1, 2, 3, 5, 7) if min(costs) / 1.5 < m * 10.0 ** k
             < 1.5 * max(costs)]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=120)


# -- main -------------------------------------------------------------------------------------------------------------

@dataclass
class Settings:
    preset: str = knob("cpu", ", ".join(PRESETS))
    arms: str = knob("all", "all of the preset, or some names, separated by ;")
    dataset: str = knob("shakespeare", "train.py's")
    minutes: float = knob(None, "after which no run starts; default: the preset's", "float", low=0)
    processes: int = knob(None, "runs at a time; default: the preset's", "int", low=1)
    runs: str = knob("out-compare", "where the runs' JSON files and weights go")
    results: str = knob(str(ROOT / "experiments" / "results"), "where compare_PRESET.json, .md and .png go")


def check(s):
    """The names of the arms, the plain GPT among them; refuses presets, arms and devices that aren't there."""
    if s.preset not in PRESETS:
        refuse(f"--preset must be one of {', '.join(PRESETS)}, not {s.preset!r}")
    every = PRESETS[s.preset].arms or ARMS
    names = [BASE, *(every if s.arms == "all" else map(str.strip, s.arms.split(";")))]
    for name in names:
        if name not in ARMS:
            refuse(f"--arms: there is no arm {name!r}; there are: {'; '.join(ARMS)}")
    choose_device(read_flags(train.Settings, PRESETS[s.preset].flags.split(), "").device)
    return list(dict.fromkeys(names))


def path_of(folder, arm, rate, seed):
    return folder / f"{re.sub('[^a-z0-9.=+-]+', '_', arm.lower())}_{rate:g}_{seed}.json"


def finished(s, folder, jobs):
    """The runs of these jobs (arm, rate, seed) that are done, and were made by the present flags and dials."""
    paths = [path_of(folder, *job) for job in jobs]
    runs = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [run for run in runs if run["flags"] == " ".join(flags_of(s, run["arm"], run["rate"], run["seed"]))
            and (not run["dials"] or list(run["dials"]) == [f"{dial:g}" for dial in ARMS[run["arm"]].dials])]


def train_all(s, pool, folder, jobs, deadline):
    """Do the jobs that are not done; return the runs of all that are by then."""
    done = [(run["arm"], run["rate"], run["seed"]) for run in finished(s, folder, jobs)]
    waiting = [pool.submit(run, s, *job, path_of(folder, *job), deadline) for job in jobs if job not in done]
    for future in as_completed(waiting):
        if result := future.result():
            print("{arm}, rate {rate:g}, seed {seed}: {val_loss} in {seconds:.0f} s".format(**result), flush=True)
    return finished(s, folder, jobs)


def write(s, arms, runs, missing, flops, times):
    """The results of whatever is done."""
    preset, chosen = PRESETS[s.preset], best(runs, PRESETS[s.preset].seeds[0])
    tuned = [run for run in runs if run["arm"] in flops and run["rate"] == chosen[run["arm"]]["rate"]
             and run["val_loss"] is not None]
    points, path = points_of(tuned, flops), Path(s.results) / f"compare_{s.preset}.json"
    tables = [arm_rows(tuned, flops, times), dial_rows(points), sweep_rows(runs, preset, arms)]
    text = "\n".join(markdown(list(table)) for table in tables) + f"\n{note(s)}\n"
    if missing:
        text += "\nMissing: " + "; ".join(missing) + ".\n"
    everything = dict(preset=s.preset, sizes=asdict(preset), note=note(s), missing=missing, runs=runs,
                      flops=flops, times=times, points=points)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(everything, indent=1) + "\n").encode()))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(points, f"compare.py --preset {s.preset}", path.with_suffix(".png"))
    print(text)


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    arms, preset, folder = check(s), PRESETS[s.preset], Path(s.runs) / s.preset
    deadline = time.time() + 60 * (preset.minutes if s.minutes is None else s.minutes)
    folder.mkdir(parents=True, exist_ok=True)
    if s.dataset == "shakespeare":
        shakespeare(Path("data") / "shakespeare.txt")          # once, before several processes want it
    first, sweep = preset.seeds[0], [(arm, rate, preset.seeds[0]) for rate in preset.rates for arm in arms]
    with ProcessPoolExecutor(s.processes or preset.processes, multiprocessing.get_context("spawn")) as pool:
        runs = train_all(s, pool, folder, sweep, deadline)
        chosen = best(runs, first)
        more = [(arm, chosen[arm]["rate"], seed) for seed in preset.seeds[1:] for arm in arms if arm in chosen]
        runs += train_all(s, pool, folder, more, deadline)
        if BASE not in chosen:
            refuse(f"no run of the {BASE} is done; give it more --minutes")
        flops = {row["arm"]: row for row in pool.map(partial(count, s, folder=folder), chosen.values())}
    done = {(run["arm"], run["rate"], run["seed"]) for run in runs}
    missing = [f"{arm} (rate {rate:g}, seed {seed})" for arm, rate, seed in sweep + more
               if (arm, rate, seed) not in done]
    missing += [f"{arm} (seed {seed})" for arm in arms if arm not in chosen for seed in preset.seeds[1:]]
    write(s, arms, runs, missing, flops, clock(s, list(chosen.values()), folder))


if __name__ == "__main__":
    main(sys.argv[1:])
