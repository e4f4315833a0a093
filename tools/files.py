"""Files: whole or not at all, checkpoints, and the log of a run."""
import contextlib
import csv
import dataclasses
import os
import zipfile

import torch

from tinybubbles import Config, PaperTinybubbles, Tinybubbles
from tools.program import refuse


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


def make_model(config, paper):
    """The model that --paper chooses."""
    return PaperTinybubbles(config) if paper else Tinybubbles(config)


def load_checkpoint(path, device, settings_class=None):
    """A checkpoint that train.py wrote, a dict, and its model; or a refusal, also if its settings are not those of
    `settings_class`. No code inside the file is run."""
    if not os.path.isfile(path):
        refuse(f"there is no checkpoint {path}; run train.py first, or name its folder with --out_dir")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"{damaged} inside it is damaged")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        for part, kind in (("config", Config), ("settings", settings_class)):
            if kind and checkpoint[part].keys() != {f.name for f in dataclasses.fields(kind)}:
                raise ValueError(f"its {part} are another version's")
        model = make_model(Config(**checkpoint["config"]), checkpoint["settings"]["paper"]).to(device)
        model.load_state_dict(checkpoint["model"])
        if checkpoint["vocabulary"] is None and model.config.vocab_size != 256:
            raise ValueError(f"its {model.config.vocab_size} tokens are not bytes")
    except Exception as error:                                        # whatever can be wrong with a file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        refuse(f"{path} is not a checkpoint of this train.py ({reason}); train again or name another --out_dir")
    return checkpoint, model


def make_folder(path, flag):
    """Make the folder that a flag names, if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"{flag} {str(path)!r} cannot be written to ({error.strerror}); name another folder")


def open_log(path, columns, start):
    """A csv.DictWriter at the end of `path`, of whose rows the whole ones of steps up to `start` are kept."""
    make_folder(path.parent, "--out_dir")
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    rows = [line.split(",") for line in text.splitlines()]
    rows = [row for row in rows if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= start]
    kept = "".join(",".join(row) + "\n" for row in [columns, *rows])
    write_atomically(path, lambda file: file.write(kept.encode()))
    return csv.DictWriter(open(path, "a", buffering=1, newline=""), columns, lineterminator="\n")
