"""What the suites share that run the programs."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--block_size 16 --n_layer 3 --n_head 2 --n_embd 16 --fork_layers 1,2 --batch_size 2 --max_iters 4 "
        "--eval_interval 2 --eval_iters 1 --log_interval 1 --warmup_iters 1 --device cpu").split()
VERSE = "O for a Muse of fire, that would ascend\nThe brightest heaven of invention \u2014\n"


class Code:
    """Whoever unpickles one runs code, which leaves a file."""
    def __reduce__(self):
        return Path.touch, (Path("code-was-run"),)


def python(*command, **how):
    """A process of its own, of one thread, that has ended: its stdout, stderr and returncode."""
    return subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8",
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def printed(capsys, module, *flags):
    """What a module's main prints in this process, as starting another takes longer."""
    capsys.readouterr()
    module.main([*flags])
    return capsys.readouterr().out


def sampled(capsys, *flags):
    return printed(capsys, sample, "--device", "cpu", "--max_new_tokens", "40", *flags)


def exits(capsys, call, *args, code=2):
    """What a call prints, out and err, that must end the program with this exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*args)
    assert end.value.code == code
    return capsys.readouterr()


def checkpoint(name="out/ckpt.pt"):
    return torch.load(name, weights_only=True)


def a_run(arm, seed, loss, parameters=500):
    """What compare.py writes of a run."""
    return dict(arm=arm, seed=seed, loss=loss, parameters=parameters, rate=1e-3, flags="", optimizer="", commit="", machine="")
