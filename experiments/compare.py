"""
Bubbles beside their rivals: python experiments/compare.py --preset smoke        (every preset: --help)

Every arm of a preset is trained on the same batches: at each learning rate of its grid with the first seed, at the best
two of them with three seeds, and at the better of these with all. A run leaves a JSON file in --runs and is not made
again; one that was stopped goes on from its last checkpoint. Then PRESET.json, .md and .png are written to --results,
of whatever is done by then: validation loss, its paired difference to the plain GPT, and FLOPs as PyTorch counts them.
What PRESET.json already says is kept: to add an arm or a seed, only that is trained.

An arm is a line of ON_PLAYS or ON_URNS: flags of train.py, the budgets it is evaluated at, and a class of rivals.py at
the most.
"""
import dataclasses
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import zlib
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import rivals  # noqa: E402
from tasks.text import make_data  # noqa: E402
from tinybubbles import PaperTinybubbles, Tinybubbles  # noqa: E402
from tools.files import make_folder, read_json, write_atomically, write_picture, write_text  # noqa: E402
from tools.program import first_line, knob, read_flags, refuse, run_program, say  # noqa: E402
from train import Settings as TrainSettings  # noqa: E402
from train import Trainer  # noqa: E402


@dataclasses.dataclass
class Arm:
    """flags: of train.py, after the preset's; {deeper}, {wider}: the preset's. budgets: to evaluate; the first decides
    the learning rate. make: the model of a Config, if not Tinybubbles."""
    flags: str
    budgets: tuple = (2,)
    make: object = Tinybubbles


GPT, PLAIN = "plain GPT", "--fork_layers none "
ON_PLAYS = {
    GPT: Arm(PLAIN, (1,)),
    "deeper GPT": Arm(PLAIN + "--n_layer {deeper}", (1,)),
    "wider GPT": Arm(PLAIN + "--n_embd {wider}", (1,)),
    "copy-2": Arm(PLAIN, (2,), rivals.Copies),
    "forked once": Arm("--fork_layers 2", (2,)),  # with one fork layer, r = 2 has room for a fork of every token
    "random selection": Arm("", (2,), rivals.RandomSelection),
    "bubbles, r = 2": Arm("", (2, 1, 1.5, 4)),
    "bubbles, r = 4": Arm("--budget 4", (4,)),
    "bubbles, elastic": Arm("--budget 1,1.5,2,4", (2, 1, 1.5, 4)),
    "the paper's model": Arm("--paper", (2,), PaperTinybubbles),
    "the authors' code": Arm("--paper", (2,), lambda config: PaperTinybubbles(config, merge="residual")),
    "pauses": Arm(PLAIN, (2,), rivals.Pauses),
    "random pauses": Arm(PLAIN, (2, 1, 4), rivals.RandomPauses),
    "recurrent depth": Arm(PLAIN + "--budget 4", (4, 1, 2, 8), rivals.RecurrentDepth),
    "PonderLM-2": Arm(PLAIN, (2,), rivals.PonderLM2),
    "PonderLM-3": Arm(PLAIN + "--budget 4", (4, 1, 2), rivals.PonderLM3),
}
ON_URNS = {
    "bubbles, r = 1.5": Arm("--budget 1.5", (1.5,)),
    "the paper's model, r = 1.5": Arm("--paper --budget 1.5", (1.5,), PaperTinybubbles),
    "by hand": Arm("--budget 1.5", (1.5,), rivals.Hand),
    "mixture by hand": Arm("--budget 1.5", (1.5,), rivals.HandMixture),
    "mixture, r = 1.5": Arm("--budget 1.5", (1.5, 4), rivals.Mixture),
    "mixture, random": Arm("--budget 1.5", (1.5, 4), rivals.RandomMixture),
    "mixture, two budgets": Arm("--budget 1.5,4", (1.5, 4), rivals.Mixture),
    "mixture, fading noise": Arm("--budget 1.5", (1.5, 4), rivals.FadingNoise),
    "mixture, random first": Arm("--budget 1.5", (1.5, 4), rivals.RandomFirst),
    "mixture, charge": Arm("--budget 1.5", (1.5, 4), rivals.Charged),
    "mixture, charge, sure": Arm("--budget 1.5", (1.5, 4), rivals.SureCharged),
    "mixture, charge, sure, floor": Arm("--budget 1.5", (1.5, 4), rivals.Floor),
}
ARMS = ON_PLAYS | ON_URNS
COLORS = {GPT: "#000000", "deeper GPT": "#000000", "wider GPT": "#000000",
          "copy-2": "#e69f00", "pauses": "#009e73",
          "recurrent depth": "#cc79a7", "PonderLM-2": "#d55e00", "PonderLM-3": "#d55e00",
          "bubbles, r = 4": "#0072b2", "bubbles, r = 2": "#56b4e9", "bubbles, elastic": "#003a6b"}


@dataclasses.dataclass
class Preset:
    """What it is for, in words; flags of train.py for every arm; the arms; how many seeds, from 0; the learning rates to
    try; the steps to evaluate after, the last one being the run's end."""
    says: str
    flags: str
    arms: tuple
    seeds: int
    rates: tuple
    marks: tuple
    deeper: int = 7       # blocks of a GPT of as many FLOPs as bubbles at r = 2
    wider: int = 88       # the same, as its width
    true_batches: int = 40  # of the validation, how many the paper's model reads token by token
    beside: str = "bubbles, r = 2"  # the other arm that the table's differences are to


QUESTION = GPT, "bubbles, r = 2", "random selection"  # whether forks pay, and whether it matters where they are
LINUX = "--dataset data/linux.txt"  # of which no run reads more than a third
SMALL = "--device cpu --block_size 64 --n_layer 4 --n_head 4 --n_embd 64 --fork_layers 1,2 --batch_size 8"
PRESETS = {
    "smoke": Preset("a quick try",
                    "--device cpu --block_size 16 --n_layer 3 --n_head 2 --n_embd 16 --fork_layers 1,2 --batch_size 2 "
                    "--warmup_iters 2 --eval_iters 2", (GPT, "copy-2", "bubbles, r = 2", "the paper's model"), 2,
                    (4e-3,), (5, 10)),
    "default": Preset("README's default run", "--device cpu", (GPT, "bubbles, r = 2"), 5, (8e-3,), (3000,)),
    "text": Preset("all rivals on the plays", SMALL,
                   (GPT, "deeper GPT", "wider GPT", "copy-2", "random selection", "bubbles, r = 2",
                    "bubbles, r = 4", "bubbles, elastic", "the paper's model", "pauses", "recurrent depth",
                    "PonderLM-2", "PonderLM-3"), 10, (8e-3, 16e-3, 32e-3), (2000,)),
    "long": Preset("does the gain grow with training",
                   "--device cpu --optimizer adamw --block_size 64 --n_layer 4 --n_head 4 --n_embd 48 "
                   "--fork_layers 1,2 --batch_size 4",
                   (GPT, "deeper GPT", "copy-2", "recurrent depth", "bubbles, r = 2"), 5, (2e-3,),
                   (2000, 5000, 10000, 20000, 40000)),
    "selection": Preset("do forks find the tokens that need them",
                        "--device cpu --optimizer adamw --dataset urns --block_size 16 --n_layer 2 --n_head 1 "
                        "--n_embd 8 --fork_layers 0,1 --batch_size 32", (GPT, "deeper GPT", "wider GPT", *ON_URNS), 10,
                        (16e-3, 8e-3, 32e-3), (100, 500, 1000, 2000, 4000), deeper=4, wider=10,
                        beside="mixture, random"),
    "scale": Preset("14M parameters, needs a GPU and data/linux.txt",
                    f"--device cuda {LINUX} --compile --block_size 512 --n_layer 8 --n_head 6 --n_embd 384 "
                    "--fork_layers 2,4,6 --batch_size 32",
                    (*QUESTION, "copy-2", "forked once", "bubbles, r = 4", "the authors' code"), 4, (8e-3,), (1860,),
                    true_batches=4),
    # Each of these reads 20 tokens for each of its parameters.
    "size-0.2M": Preset("needs data/linux.txt",
                        f"--device cpu {LINUX} --block_size 128 --n_layer 4 --n_head 4 --n_embd 64 --fork_layers 1,2 "
                        "--batch_size 16", QUESTION, 10, (16e-3,), (2100,)),
    "size-0.8M": Preset("needs data/linux.txt",
                        f"--device cpu {LINUX} --block_size 128 --n_layer 4 --n_head 4 --n_embd 128 --fork_layers 1,2 "
                        "--batch_size 16", QUESTION, 10, (8e-3,), (8000,)),
    "size-3M": Preset("needs a GPU and data/linux.txt",
                      f"--device cuda {LINUX} --compile --block_size 128 --n_layer 6 --n_head 4 --n_embd 208 "
                      "--fork_layers 1,3,4 --batch_size 128", QUESTION, 10, (8e-3,), (3900,)),
}


@dataclasses.dataclass
class Job:
    """One run: a preset's arm at a learning rate with a seed."""
    preset: str
    arm: str
    rate: float
    seed: int
    folder: str

    def flags(self):
        p = PRESETS[self.preset]
        own = ARMS[self.arm].flags.format(deeper=p.deeper, wider=p.wider)
        return (f"{p.flags} {own} --max_iters {p.marks[-1]} --learning_rate {self.rate} "
                f"--seed {self.seed}")

    def __str__(self):
        return f"{self.arm}, rate {self.rate:g}, seed {self.seed}"

    def path(self):
        """Of its JSON; two presets whose flags agree share a run."""
        name = "".join(c if c.isalnum() else "_" for c in self.arm)
        return Path(self.folder) / f"{name}_{self.seed}_{zlib.crc32(self.flags().encode()):08x}.json"

    def lacks(self):
        """The marks at which the run's JSON lacks the loss at a budget, in their order."""
        loss = read_run(self.path())["loss"] if self.path().exists() else {}
        budgets = {f"{budget:g}" for budget in ARMS[self.arm].budgets}
        return [mark for mark in PRESETS[self.preset].marks if not budgets <= loss.get(str(mark), {}).keys()]

    def done(self):
        """What the run's JSON says, if it is whole."""
        return None if self.lacks() else read_run(self.path())

    def flops_path(self):
        return self.path().with_suffix("") / "flops.json"

    def checkpoint_path(self):
        """A rival's has a name of its own: for train.py and sample.py it is no checkpoint."""
        is_theirs = ARMS[self.arm].make in (Tinybubbles, PaperTinybubbles)
        return self.path().with_suffix("") / ("ckpt.pt" if is_theirs else "rival.pt")

    def trained(self):
        """Whether a checkpoint is there: of a run that another machine made, only the JSON is."""
        return self.checkpoint_path().exists()

    def trainer(self, anew=False):
        """The Trainer, at the run's last checkpoint, or at the run's beginning."""
        s = read_flags(TrainSettings, [*self.flags().split(), "--out_dir", str(self.path().with_suffix(""))], "")
        saved = None if anew or not self.trained() else torch.load(self.checkpoint_path(), s.device, weights_only=True)
        return Trainer(s, saved, lambda config, paper: ARMS[self.arm].make(config))


def read_run(path):
    """What a run's JSON says, or a refusal."""
    run = read_json(path)
    if not is_run(run):
        refuse(f"{path} is not as compare.py writes the JSON of a run; remove it, and the run is made again")
    return run


def is_run(run):
    """Whether this has what every run has."""
    try:
        numbers = [run["seed"], run["rate"], run["parameters"], *(x for at in run["loss"].values() for x in at.values())]
        texts = [run[name] for name in ("arm", "flags", "optimizer", "commit", "machine")]
    except (AttributeError, KeyError, TypeError):
        return False
    return all(isinstance(x, (int, float)) for x in numbers) and all(isinstance(text, str) for text in texts)


def read_results(path):
    """What a PRESET.json says, or a refusal."""
    whole = read_json(path)
    good = isinstance(whole, dict) and isinstance(whole.get("measured"), dict) and isinstance(whole.get("runs"), list)
    if not (good and all(is_run(run) and run["loss"] for run in whole["runs"])):
        refuse(f"{path} is not as compare.py writes it; remove it, or put the whole file back")
    return whole


def machine(device):
    """This machine, in words."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
    return f"{platform.machine()}, {name}, PyTorch {torch.__version__}, Python {platform.python_version()}"


def commit():
    """The commit of the code that runs here: git's word, or where there is no git the environment's COMMIT."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or os.environ.get("COMMIT", "unknown")


# -- one run ----------------------------------------------------------------------------------------------------------

def train(job):
    """Make the run, in this process, on one thread."""
    torch.set_num_threads(1)
    trainer, path, marks = job.trainer(), job.path(), PRESETS[job.preset].marks
    if trainer.step > job.lacks()[0]:                                 # its checkpoint is beyond what has to be measured
        trainer = job.trainer(anew=True)
    run = dict(arm=job.arm, rate=job.rate, seed=job.seed, flags=job.flags(), loss={},
               parameters=sum(p.numel() for p in trainer.model.parameters()), optimizer=trainer.s.optimizer,
               commit=commit(), machine=machine(trainer.device))
    run = read_run(path) if path.exists() else run
    while True:
        step = trainer.step
        if step in marks:
            trainer.model.eval()
            run["loss"][str(step)] = losses(trainer, ARMS[job.arm], PRESETS[job.preset].true_batches)
            if hasattr(trainer.data, "grade"):
                grade = trainer.data.grade(trainer.model, float(ARMS[job.arm].budgets[0]), trainer.device)
                run.setdefault("grade", {})[str(step)] = grade.tolist()
            trainer.model.train()
            write_text(path, json.dumps(run))
        if step % 1000 == 0 or step == marks[-1]:
            path.with_suffix("").mkdir(exist_ok=True)
            write_atomically(job.checkpoint_path(), lambda file: torch.save(trainer.checkpoint(), file))
        if step == marks[-1]:
            told = ", ".join(f"{budget}: {loss:.4f}" for budget, loss in run["loss"][str(step)].items())
            return say(f"{job}: validation loss at budget {told}")
        trainer.train_step()


@torch.no_grad()
def losses(trainer, arm, true_batches):
    """Validation loss at each of the arm's budgets, in nats per target, each prediction made from the tokens before it
    alone. If later tokens change earlier ones, "in one pass" is the loss that all tokens in one forward pass have, and
    what a prediction from the tokens before it costs more is measured on this many batches."""
    trainer.measure_other_bars()
    found = {f"{budget:g}": trainer.evaluate(float(budget)) for budget in arm.budgets}
    if trainer.model.causal:
        return found
    more = {budget: cost_of_the_true_path(trainer, float(budget), true_batches) for budget in arm.budgets}
    return {"in one pass": found[f"{arm.budgets[0]:g}"],
            **{f"{budget:g}": found[f"{budget:g}"] + more[budget] for budget in arm.budgets}}


def cost_of_the_true_path(trainer, budget, batches):
    """How much higher the loss is if each token is predicted as the model generates it."""
    total, n = 0.0, min(batches, trainer.s.eval_iters)
    for batch in map(trainer.data.val_batch, range(n)):
        idx, targets = (torch.from_numpy(tokens).to(trainer.device) for tokens in batch)
        with trainer.autocast():
            logits = decode(trainer.model, idx, budget)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        total -= trainer.loss(trainer.model, batch, budget).item()
    return total / n


# -- FLOPs of trained models ------------------------------------------------------------------------------------------

@torch.no_grad()
def decode(model, idx, budget):
    """Read idx (B, T) token by token as `generate` does: logits (B, T, V)."""
    cache, parts = model.new_cache(len(idx), budget) if model.causal else None, []
    for t in range(idx.size(1)):
        read = idx[:, t:t + 1] if model.causal else idx[:, :t + 1]
        parts.append(model(read, budget=budget, cache=cache)[0][:, -1:])
    return torch.cat(parts, 1)


def count_flops(function):
    """FLOPs of the matrix products of a call, a multiply and an add each."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def measure(job):
    """Leave in the folder of a run that is done the FLOPs per token: of training (forward and backward, the mean of 8
    steps), and of generating at each of its arm's budgets."""
    torch.set_num_threads(1)
    trainer = job.trainer()
    model, T = trainer.model.eval(), trainer.data.T
    idx = torch.from_numpy(trainer.data.val_batch(0)[0][:1]).to(trainer.device)
    flops = {f"{budget:g}": count_flops(lambda: decode(model, idx, float(budget))) / T
             for budget in ARMS[job.arm].budgets}
    model.train()
    trainer.parallel = trainer.model                                  # what is compiled cannot be counted
    trainer.optimizers = []                                           # their share depends on the batch's size
    trainer.s.batch_size = 1
    eight_steps = count_flops(lambda: [trainer.train_step() for _ in range(8)])
    write_text(job.flops_path(), json.dumps(dict(flops=flops, train_flops=eight_steps / 8 / T)))


# -- statistics, table, picture ---------------------------------------------------------------------------------------

def interval(values):
    """Mean, and half the width of its 95 % interval by Student's t, for any number of values; NaN for one."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    angle = np.linspace(0, math.pi / 2, 1_000_001)                    # t = sqrt(n - 1) tan(angle)
    area = np.cumsum(np.cos(angle) ** (n - 2))
    t = math.sqrt(n - 1) * math.tan(angle[np.searchsorted(area, 0.95 * area[-1])])
    return float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(n)


def show(values, sign=""):
    mean, half = interval(values)
    return f"{mean:{sign}.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def by_seed(runs, arm, mark, budget):
    """The arm's loss at a budget after `mark` steps, {seed: loss}."""
    return {run["seed"]: run["loss"][str(mark)][budget] for run in runs if run["arm"] == arm}


def less(runs, arm, other, mark, budget):
    """Loss of the arm at a budget less that of another at its own first, of each seed that both have: a list."""
    mine, theirs = by_seed(runs, arm, mark, budget), by_seed(runs, other, mark, f"{ARMS[other].budgets[0]:g}")
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def write_table(path, runs, found, marks, beside, about):
    """A row for each arm and budget, after the last step; the differences after each mark; and what a task graded."""
    arms, first = list(dict.fromkeys(run["arm"] for run in runs)), lambda arm: f"{ARMS[arm].budgets[0]:g}"
    lines = table_lines("", "budget", "seeds", "rate", "parameters", "training MFLOPs per token",
                        "MFLOPs of a generated token", "loss", "less the plain GPT's", f"less that of {beside}")
    for arm in arms:
        one, m = next(run for run in runs if run["arm"] == arm), found.get(arm, {})
        for budget in one["loss"][str(marks[-1])]:
            loss = list(by_seed(runs, arm, marks[-1], budget).values())
            pairs = [less(runs, arm, other, marks[-1], budget) for other in (GPT, beside)]
            lines.append(row(arm, budget, len(loss), f"{one['rate']:g}", f"{one['parameters']:,}",
                             f"{m['train_flops'] / 1e6:.2f}" if m and budget == first(arm) else "",
                             f"{m['flops'][budget] / 1e6:.2f}" if budget in m.get("flops", {}) else "",
                             show(loss), *(show(pair, "+") if pair and any(pair) else "" for pair in pairs)))
    if len(marks) > 1:
        lines += ["", *table_lines("less the plain GPT's, after", *(f"{mark:,} steps" for mark in marks))]
        lines += [row(arm, *(show(less(runs, arm, GPT, mark, first(arm)), "+") for mark in marks))
                  for arm in arms if arm != GPT]
    graded = [arm for arm in arms if any("grade" in run for run in runs if run["arm"] == arm)]
    if graded:
        names = [f"{kind} tokens: {name}" for name in ("nats above the least", "streams", "sum of their P")
                 for kind in ("easy", "hard")]
        lines += ["", *table_lines("", *names)]
    for arm in graded:
        grades = np.array([run["grade"][str(marks[-1])] for run in runs if run["arm"] == arm])    # (seeds, 3, 2)
        lines.append(row(arm, *map(show, grades.reshape(len(grades), -1).T)))
    write_text(path, "\n".join([*lines, "", about]) + "\n")


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def table_lines(*titles):
    """The head of a Markdown table."""
    return [row(*titles), "|" + "---|" * len(titles)]


def curves(runs, found, marks):
    """The paired difference to the plain GPT, of every curve: {name: [(x, mean, half its interval)]}. With one mark, x
    is the MFLOPs of a generated token, and a curve has a point for each budget; with several, x is the mark."""
    points = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        first = f"{ARMS[arm].budgets[0]:g}"
        if len(marks) > 1:
            points[arm] = [(mark, *interval(less(runs, arm, GPT, mark, first))) for mark in marks]
        elif arm in found:
            points[arm] = [(flops / 1e6, *interval(less(runs, arm, GPT, marks[-1], budget)))
                           for budget, flops in found[arm]["flops"].items()]
    return points


def draw(path, runs, found, marks):
    """Draw the curves, with their 95 % intervals."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator
    figure = Figure(figsize=(8, 5.5), layout="constrained", facecolor="white")
    axes, shapes, over_steps = figure.subplots(), iter("osD^v<>Ph*Xp" * 3), len(marks) > 1
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    for name, points in curves(runs, found, marks).items():
        x, y, half = np.array(sorted(points)).T
        style = dict(color=COLORS.get(name), marker=next(shapes), markersize=6, label=name)
        if over_steps:
            color = axes.plot(x, y, **style)[0].get_color()
            axes.fill_between(x, y - half, y + half, color=color, alpha=0.08)
        else:
            axes.errorbar(x, y, yerr=np.nan_to_num(half), capsize=3, linewidth=1, **style)
    axes.set(xscale="log", xlabel="step" if over_steps else "MFLOPs of a generated token",
             ylabel="validation loss less the plain GPT's (nats)")
    axes.xaxis.set_major_locator(FixedLocator(marks) if over_steps else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    note = "95 % intervals" if any(run["seed"] for run in runs) else "one seed"
    if not over_steps:
        squeeze_far_losses(axes)
        note += "; the points of a curve are its budgets; beyond ±0.03 the scale is logarithmic"
    figure.supxlabel(note, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    write_picture(path, figure, dpi=120)


def squeeze_far_losses(axes):
    """Make the y axis logarithmic where it is far from 0: a bad arm must not flatten the others."""
    axes.set_yscale("symlog", linthresh=0.03, linscale=2)
    low, high = axes.get_ylim()
    axes.set_yticks([-0.1, -0.03, -0.02, -0.01, 0, 0.01, 0.02, 0.03, 0.1, 0.3, 1], minor=False)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:+g}" if y else "0")
    axes.set_ylim(low, 1.5 * high)


# -- all of it --------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    preset: str = knob("smoke", "; ".join(f"{name}: {p.says}, {len(p.arms)} arms, {p.seeds} seeds, {p.marks[-1]} steps"
                                          for name, p in PRESETS.items()), choices=PRESETS)
    runs: str = knob("out-compare", "where runs go, to be continued or summed up")
    results: str = knob(str(ROOT / "experiments" / "results"), "where the table, its JSON and the picture go; what is "
                        "there is not made again")
    processes: int = knob(os.cpu_count(), "runs at a time, on one thread each", low=1)
    train: bool = knob(True, "false: sum up what is done")
    arms: str = knob(None, "train these arms of the preset alone, with ; between them (a wrong name lists all); default: "
                     "all", "str")


def in_processes(s, work, jobs):
    """Do `work` with each job in a process of its own, some at a time, and all of them end with this one. If one fails,
    the others go on."""
    waiting, running = list(jobs), {}
    spawn = multiprocessing.get_context("spawn")
    try:
        while waiting or running:
            while waiting and len(running) < s.processes:
                process = spawn.Process(target=try_job, args=(work, waiting.pop(0)))
                before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends the others
                process.start()
                signal.signal(signal.SIGINT, before)
                running[process.sentinel] = process
            for sentinel in wait(running):
                running.pop(sentinel).join()
    finally:
        for process in running.values():
            process.terminate()


def try_job(work, job):
    """In the process of a job: do it, or say in one sentence why it cannot be done."""
    try:
        work(job)
    except Exception as error:                                        # a damaged checkpoint, memory, a full disk
        refuse(f"{job}: failed ({first_line(error)}); if it is damaged, remove {job.path().with_suffix('')} and {job.path()}")


def train_all(s, jobs):
    """Make the runs that are not done."""
    in_processes(s, train, [job for job in jobs if not job.done()])


def choose_rates(s, arms, train):
    """The learning rate of each arm, as far as its runs are made: of the preset's rates the best two with one seed, of
    these the better one with three. train: whether to make them."""
    p = PRESETS[s.preset]
    rates = {arm: p.rates for arm in arms}
    for seeds, keep in ((1, 2), (min(3, p.seeds), 1)):
        jobs = {arm: [[Job(s.preset, arm, rate, seed, s.runs) for seed in range(seeds)] for rate in rates[arm]]
                for arm in rates}
        if train:
            train_all(s, [job for of_arm in jobs.values() for of_rate in of_arm for job in of_rate])
        rates = {arm: best_rates(of_arm)[:keep] for arm, of_arm in jobs.items()
                 if all(job.done() for of_rate in of_arm for job in of_rate)}
    return {arm: best for arm, (best,) in rates.items()}


def best_rates(jobs):
    """Of an arm's jobs, a list for each rate: the rates, the one of the lowest mean loss first."""
    last = lambda job: list(job.done()["loss"].values())[-1][f"{ARMS[job.arm].budgets[0]:g}"]
    means = [np.mean([last(job) for job in of_rate]) for of_rate in jobs]
    return tuple(jobs[i][0].rate for i in np.argsort(means))          # NaN comes last


def recall(s):
    """What PRESET.json says: its runs return to --runs, if they are not there. Returns each arm's rate, what was measured
    of it, and the paths of the runs."""
    path, rates, paths = Path(s.results) / f"{s.preset}.json", {}, set()
    told = read_results(path) if path.exists() else dict(runs=[], measured={})
    for run in told["runs"]:
        if run["arm"] not in PRESETS[s.preset].arms:
            refuse(f"{path} holds runs of {run['arm']}, which is no arm of the preset {s.preset} any more; name another "
                   "folder with --results")
        job = Job(s.preset, run["arm"], run["rate"], run["seed"], s.runs)
        if job.flags() != run["flags"]:
            refuse(f"{path} holds runs that were made with other flags, as {run['flags']!r}; name another folder with "
                   "--results")
        rates[job.arm] = job.rate
        paths.add(job.path())
        if job.done() not in (None, run):
            refuse(f"{job.path()} and {path} tell of one run differently; name another folder with --results or --runs")
        write_text(job.path(), json.dumps(run))
    return rates, told["measured"], paths


def a_run_a_line(whole):
    """JSON of a dictionary, with a line for each entry of a list or a dictionary in it."""
    def lines(value):
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()) + "\n}"
        if isinstance(value, list):
            return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        return json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {lines(value)}" for key, value in whole.items()) + "\n}\n"


def describe(p, runs):
    """What the numbers of a preset's runs are, and how they were made."""
    rates = f"learning rate {p.rates[0]:g}" if len(p.rates) == 1 else (
        f"of the learning rates {', '.join(f'{rate:g}' for rate in p.rates)} the two best with seed 0, of these the "
        "better one with seeds 0 to 2")
    made = {f"by {run['optimizer']} with commit {run['commit']} on {run['machine']}" for run in runs}
    return (f"Nats per target, ± half a 95 % interval over seeds 0 to {max(run['seed'] for run in runs)} (Student's t); "
            f"differences are paired: same seed, same batches. {p.marks[-1]} steps, `{p.flags}`; {rates}. FLOPs as "
            f"PyTorch counts them, empty room in caches included. Trained {' and '.join(sorted(made))}.")


def asked_arms(s):
    """The preset's arms that --arms names: all of them, if it is not given."""
    arms = PRESETS[s.preset].arms
    asked = arms if s.arms is None else [arm.strip() for arm in s.arms.split(";")]
    for arm in asked:
        if arm not in arms:
            refuse(f"--arms: the preset {s.preset} has no arm {arm!r}; it has {'; '.join(arms)}")
    return asked


def make_ready(s):
    """Fetch the data, before several processes want it; refuse a preset for which this machine lacks something."""
    settings = read_flags(TrainSettings, PRESETS[s.preset].flags.split(), "")
    if settings.device == "cuda" and not torch.cuda.is_available():
        refuse(f"--preset {s.preset} needs a GPU with CUDA to train; name another preset, or sum up by --train false")
    if settings.dataset == "data/linux.txt" and not Path(settings.dataset).exists():
        refuse(f"--preset {s.preset} needs {settings.dataset}; make it with experiments/linux.py")
    make_data(settings)


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    results = Path(s.results)
    make_folder(Path(s.runs), "--runs")
    make_folder(results, "--results")
    asked = asked_arms(s)
    if s.train:
        make_ready(s)
    rates, _, _ = recall(s)
    if s.train and GPT not in asked and GPT not in rates | choose_rates(s, [GPT], False):
        refuse(f"--arms lacks the {GPT}, of which no run is done, so there would be nothing to compare with; add it")
    rates |= choose_rates(s, [arm for arm in asked if arm not in rates], s.train)
    if s.train:
        train_all(s, jobs_of(s, asked, rates))
    sum_up(s, rates)
    undone = [arm for arm in asked if arm not in rates] + [job for job in jobs_of(s, asked, rates) if not job.done()]
    if s.train and undone:
        raise SystemExit(f"some of what was asked for failed, as said above; the rest is in {results}")


def jobs_of(s, arms, rates):
    """The jobs of these arms, as far as they have a rate, seed by seed."""
    return [Job(s.preset, arm, rates[arm], seed, s.runs) for seed in range(PRESETS[s.preset].seeds) for arm in arms
            if arm in rates]


def sum_up(s, rates):
    """Write PRESET.json, .md and .png of what is done. rates: of the arms that were asked for."""
    p, results = PRESETS[s.preset], Path(s.results)
    told_rates, found, told = recall(s)                               # anew: another call may have added to it
    rates = rates | told_rates
    rates |= choose_rates(s, [arm for arm in p.arms if arm not in rates], False)
    jobs = jobs_of(s, p.arms, rates)
    done = [job for job in jobs if job.done()]
    if GPT not in {job.arm for job in done}:
        refuse(f"no run of the {GPT} is done in --runs {s.runs}, so there is nothing to compare with; train it first")
    if lost := told - {job.path() for job in done}:
        refuse(f"{results / s.preset}.json holds runs that are not whole in --runs {s.runs} or not of the preset, as "
               f"{min(lost).name}; nothing is written; train them, or name another folder with --results")
    runs = sorted((job.done() for job in done), key=lambda run: p.arms.index(run["arm"]))
    to_measure = {job.arm: job for job in reversed(done) if job.trained() and job.arm not in found}
    in_processes(s, measure, to_measure.values())
    found |= {arm: read_json(job.flops_path()) for arm, job in to_measure.items() if job.flops_path().exists()}
    about = describe(p, runs)
    missing = [arm for arm in p.arms if arm not in rates]
    missing += [f"{job.arm}, seed {job.seed}" for job in jobs if job not in done]
    whole = dict(about=about, missing=missing, runs=runs, measured=found)
    write_text(results / f"{s.preset}.json", a_run_a_line(whole))
    write_table(results / f"{s.preset}.md", runs, found, p.marks, p.beside, about)
    draw(results / f"{s.preset}.png", runs, found, p.marks)
    print((results / f"{s.preset}.md").read_text(encoding="utf-8"))


def interrupt(number, frame):
    signal.signal(number, signal.SIG_IGN)                             # `timeout` sends it twice
    raise KeyboardInterrupt


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):                                # these end the runs as Ctrl-C does
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), interrupt)
    run_program(main, "stopped; what is done is kept, and the same command goes on")
