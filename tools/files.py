"""Files: whole or not at all, the folder of a run, and checkpoints."""
import contextlib
import csv
import dataclasses
import errno
import json
import os
import zipfile
from pathlib import Path

import torch

from tinybubbles import Config, PaperTinybubbles, Tinybubbles
from tools.program import first_line, refuse, say

try:
    import fcntl
except ImportError:                                                   # Windows: two runs in one folder are not noticed
    fcntl = None

NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
RUN_FILES = "ckpt.pt", "best.pt", "log.csv"


def write_atomically(path, write):
    """Have `write(file)` fill a new file beside `path`, then put it in its place: whoever looks sees all or nothing,
    after a crash too. If that fails, it is a refusal, and what was there stays."""
    if os.path.exists(path) and not os.path.isfile(path):
        refuse(f"{path} is not a file that can be replaced; name another one")
    os.replace(write_beside(path, write), path)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_picture(path, figure, dpi):
    """Write a figure of matplotlib as a file of the kind that its name ends with, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi))


def write_beside(path, write):
    """Have `write(file)` fill a scratch file of this process beside `path`, down to the disk. Returns its path."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(scratch, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        disk = error.__context__ if isinstance(error, RuntimeError) else error       # torch.save's own hides the disk's
        reason = getattr(disk, "strerror", None) or first_line(error)
        refuse(f"{path} cannot be written ({reason}), and what was there is kept; {remedy(disk, path.parent)}, then go on")
    return scratch


def remedy(error, folder):
    """What to do about an error while a file in this folder was written."""
    return "make room" if getattr(error, "errno", None) in NO_ROOM else f"see to the folder {folder}"


def read_json(path):
    """What a JSON file says, or a refusal."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        refuse(f"{path} cannot be read as JSON ({error}); remove it, or put the whole file back")


def make_folder(path, flag):
    """Make the folder that a flag names, if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"{flag} {str(path)!r} cannot be written to ({error.strerror}); name another folder")


# -- the folder of a run ----------------------------------------------------------------------------------------------

class RunFolder:
    """The folder of a run, of which one process writes ckpt.pt, best.pt and log.csv. A run that starts over leaves the
    files of the older one in place until its own first checkpoint is written."""

    def __init__(self, path, columns, step, start_over=False):
        """step: the step that the run goes on from, or None for a new run."""
        self.path, self.log, self.ckpt = path, path / "log.csv", path / "ckpt.pt"
        make_folder(path, "--out_dir")
        self.lock()
        try:
            self.begin(columns, step, start_over)
        except BaseException:                                         # in a notebook the process goes on
            self.lock_file.close()
            raise

    def begin(self, columns, step, start_over):
        """Begin a new log.csv, or go on with the old one; refuse to replace a run that nobody has asked to replace."""
        self.remove_scratch()                                         # of runs that were killed while they wrote
        holds_a_run = self.ckpt.exists() or (self.path / "best.pt").exists()
        if holds_a_run and step is None and not start_over:
            refuse(f"--out_dir {self.path} holds a run: go on with it by --resume, name another --out_dir, or replace it "
                   "by --start_over")
        self.replaces_a_run = holds_a_run and step is None
        where = self.path / f"log.csv.{os.getpid()}.new" if self.replaces_a_run else self.log
        rows = self.rows_up_to(step, columns) if step is not None else []
        text = "".join(",".join(row) + "\n" for row in [columns, *rows])
        write_text(where, text)
        self.open_log(where, columns)

    def lock(self):
        """Refuse if another run has this folder. The lock goes when this process does, however it ends."""
        try:
            self.lock_file = open(self.path / ".lock", "w")
        except OSError as error:
            refuse(f"--out_dir {str(self.path)!r} cannot be written to ({error.strerror}); name another folder")
        try:
            if fcntl:
                fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(f"--out_dir {self.path} is in use by another run; wait for it, or name another folder")
        except OSError:
            pass                                                      # some network drives have no locks

    def remove_scratch(self):
        """Remove the scratch files, of which only the run that has the folder writes any."""
        for name in RUN_FILES:
            for scratch in self.path.glob(f"{name}.*.new"):
                scratch.unlink()

    def rows_up_to(self, step, columns):
        """The whole rows of log.csv up to a step. A file that is not as train.py wrote it is set aside."""
        text = self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""
        header, *rows = [line.split(",") for line in text.splitlines()] or [[]]
        if text and header != list(columns):
            aside = next(name for i in range(1000) if not (name := self.path / f"log-{i}.csv").exists())
            os.replace(self.log, aside)
            say(f"{self.log} is not as train.py wrote it; it is kept as {aside}, and a new one begins")
            return []
        return [row for row in rows if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= step]

    def open_log(self, path, columns):
        self.log_file = open(path, "a", buffering=1, newline="")
        self.columns = columns

    def write_row(self, row):
        """Add a row, a dict, to log.csv."""
        csv.DictWriter(self.log_file, self.columns, lineterminator="\n").writerow(row)

    def save(self, checkpoint, is_best):
        """Write a checkpoint, a dict, as ckpt.pt, and as best.pt too if it is the best so far. Both are whole beside
        the old ones before the first is put in place."""
        names = ["best.pt", "ckpt.pt"] if is_best else ["ckpt.pt"]
        scratch = [write_beside(self.path / name, lambda file: torch.save(checkpoint, file)) for name in names]
        for written, name in zip(scratch, names):
            os.replace(written, self.path / name)
        if self.replaces_a_run:
            if not is_best:
                (self.path / "best.pt").unlink(missing_ok=True)
            self.log_file.close()
            os.replace(self.log_file.name, self.log)
            self.open_log(self.log, self.columns)
            self.replaces_a_run = False

    def close(self):
        """Let another run have the folder."""
        with contextlib.suppress(OSError):                            # a full disk, of which it has been told
            self.log_file.close()
        self.remove_scratch()
        self.lock_file.close()


# -- checkpoints ------------------------------------------------------------------------------------------------------

def make_model(config, paper):
    """The model that --paper chooses."""
    return PaperTinybubbles(config) if paper else Tinybubbles(config)


def best_or_last(folder):
    """The path of a run's best.pt, or of its ckpt.pt if it has no best one, as the runs of compare.py."""
    best, last = Path(folder) / "best.pt", Path(folder) / "ckpt.pt"
    return best if os.path.exists(best) else last


def load_checkpoint(path, device, settings_class=None, flag="--out_dir"):
    """A checkpoint that train.py wrote, a dict, and its model; or a refusal, also if its settings are not those of
    `settings_class`. No code inside the file is run. flag: what names its folder."""
    if not os.path.isfile(path):
        refuse(f"there is no checkpoint {path}; run train.py first, or name its folder with {flag}")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"{damaged} inside it is damaged")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        for part in ("optimizers", "step", "vocabulary", "fingerprint", "batches", "val_loss", "best_val_loss"):
            checkpoint[part]                                          # a KeyError, if it is not there
        for part, kind in (("config", Config), ("settings", settings_class)):
            if kind and checkpoint[part].keys() != {f.name for f in dataclasses.fields(kind)}:
                raise ValueError(f"its {part} are another version's")
        model = make_model(Config(**checkpoint["config"]), checkpoint["settings"]["paper"]).to(device)
        model.load_state_dict(checkpoint["model"])
        if checkpoint["vocabulary"] is None and model.config.vocab_size != 256:
            raise ValueError(f"its {model.config.vocab_size} tokens are not bytes")
    except Exception as error:                                        # whatever can be wrong with a file
        refuse(f"{path} is not a checkpoint of this train.py ({first_line(error)}); train again or name another {flag}")
    return checkpoint, model
