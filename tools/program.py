"""
What every program here shares: its flags, which are the fields of a dataclass, how it refuses what it cannot do, what
it prints, how it is stopped, and the device and the processes that it runs on.
"""
import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist


def refuse(message, code=2):
    """End the program with one sentence and this exit code."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def check_finite(loss, step, folder):
    """Return the loss; if it is NaN or infinite, end the program with exit code 1. folder: of the run's checkpoints."""
    if not math.isfinite(loss):
        kept = Path(folder) / "ckpt.pt"
        refuse(f"the loss at step {step} is {loss}; {f'{kept} is kept' if kept.exists() else 'nothing was saved yet'}; "
               "start a new run with a lower --learning_rate", code=1)
    return loss


def first_line(error):
    """The first sentence of what an error says, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]


def or_refuse(make):
    """What `make` returns; its ValueError, one sentence, is a refusal."""
    try:
        return make()
    except ValueError as error:
        refuse(str(error))


TOO_LARGE = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "array is too big",
             "Maximum allowed size exceeded")


def refuse_if_too_large(error, remedy):
    """End the program with one sentence if the error is PyTorch's or NumPy's way of saying that memory is short."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in TOO_LARGE):
        refuse(f"this needs more memory than there is; try {remedy}")


KINDS = {  # how each kind of flag is read, and what to say if it cannot be
    "int": (int, "a whole number"), "float": (float, "a number"), "str": (str, "text"),
    "bool": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "ints": (lambda text: tuple(map(int, text.split(","))) if text != "none" else (), "numbers like 1,2, or none"),
    "floats": (lambda text: tuple(map(float, text.split(","))), "a number, or several like 1,2.5"),
}


def knob(default, help, kind=None, low=None, below=None, alias=None, choices=None):
    """A field of a settings dataclass, which is also a flag: its kind, its lowest value, what it must be below (where it
    has a lowest value), another name, all its values."""
    kind = kind or type(default).__name__
    below = below or (2**63 if kind.startswith("int") else math.inf)
    metadata = dict(help=help, kind=kind, low=low, below=below, alias=alias, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


def read_value(f, text):
    """The value of the flag for the dataclass field `f`."""
    (parse, meaning), low, below = KINDS[f.metadata["kind"]], f.metadata["low"], f.metadata["below"]
    try:
        value = parse(text)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}") from None
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(f.metadata['choices'])}")
    for number in value if isinstance(value, tuple) else [value]:
        if low is not None and not low <= number < below:
            limit = {math.inf: "finite", 2**63: "below 2^63"}.get(below, f"below {below}")
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and {limit}")
    return value


def as_typed(value):
    """A setting as one types it: a tuple's numbers with commas between them."""
    return (",".join(f"{x:g}" for x in value) or "none") if isinstance(value, tuple) else value


def read_flags(settings_class, argv, description, base=None):
    """Read the flags of a settings dataclass: --key value or --key=value, _ or - in key. Bad ones are refused. What no
    flag says is taken from `base`, a dict, else from the dataclass."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = refuse
    for arg in argv:
        if arg.endswith("=--"):                                       # which argparse would take for no value at all
            refuse(f"argument {arg[:-3]}: -- cannot be a value; leave it out")
    for f in dataclasses.fields(settings_class):
        names = dict.fromkeys(("--" + f.name, "--" + f.name.replace("_", "-"), "--" + (f.metadata["alias"] or f.name)))
        default = argparse.SUPPRESS if f.default is None else f.default
        default = as_typed(default)
        implied = dict(nargs="?", const=True) if f.metadata["kind"] == "bool" else {}
        parser.add_argument(*names, dest=f.name, help=f.metadata["help"], metavar=f.metadata["kind"].upper(),
                            type=lambda text, f=f: read_value(f, text), default=default, **implied)
    return settings_class(**vars(parser.parse_args(argv, argparse.Namespace(**base or {}))))


def choose_device(name):
    """The torch.device called `name`, if this machine has it; else a refusal."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        zero = torch.zeros(1, device=name)
        zero.item()                                                   # of meta there is none
        return zero.device
    except Exception:                                                 # each kind of device has its own
        refuse(f"--device {name} is not on this machine; try --device cpu")


def join_processes(device):
    """(rank, number of processes, device) as torchrun has started them; else (0, 1, device), which a RANK or a WORLD_SIZE
    that something else has left in the environment does not change."""
    if not all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return 0, 1, device
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def wait_for_all():
    """Go on when all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def in_turn(make, rank, world):
    """What `make` returns in this process, one process after the other."""
    for turn in range(world):
        if turn == rank:
            made = make()
        if world > 1:
            dist.barrier()
    return made


def say(text):
    """Print a line. Where nobody reads any more (a closed pipe, a closed terminal) it is lost, and nothing else is."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


def show_all_characters():
    """A sample may hold characters that the terminal's encoding lacks: they become question marks."""
    if hasattr(sys.stdout, "reconfigure"):                            # a notebook's stdout has no encoding
        sys.stdout.reconfigure(errors="replace")


def run_program(main, stopped):
    """Call `main` with the flags of the command line. Ctrl-C ends the program with the sentence `stopped`; so does
    output that cannot be printed, or quietly, if its reader has left."""
    show_all_characters()
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(stopped) from None
    except OSError as error:                                          # of stdout, as files have refusals of their own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            refuse(f"the output cannot be printed ({error.strerror}); make room where it goes")


class Stop:
    """Whether somebody asks the program to stop: by Ctrl-C, by SIGTERM, or by closing its terminal (SIGHUP, unless it is
    ignored, as under nohup). It is used as `with Stop() as stop`. A second Ctrl-C ends the program at once. A
    second SIGTERM or SIGHUP does not: both a launcher and a scheduler may send one, or a terminal and its shell."""

    def __init__(self):
        self.asked, self.before = False, {}

    def __enter__(self):
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        if threading.current_thread() is threading.main_thread():     # no other thread may set a handler
            for number in (getattr(signal, name) for name in names):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):      # None: not set from Python
                    self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        if self.asked:
            return
        self.asked = True
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(OSError):                            # not print, which may be at work just now
            os.write(2, b"\nstopping as soon as this step is done and saved; Ctrl-C stops at once\n")

    def agreed(self):
        """Whether any process was asked. All processes must call this together; it does not wait for a GPU."""
        if not dist.is_initialized():
            return self.asked
        asked = torch.tensor(float(self.asked))
        dist.all_reduce(asked)
        return asked.item() > 0
