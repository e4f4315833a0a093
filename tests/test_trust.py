"""What careful people expect of train.py and sample.py: runs that resume exactly, files that survive, several
processes, other data: `python -m pytest tests/test_trust.py`."""
import io
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import train
from programs import ROOT, TINY, Code, checkpoint, exits, python, sampled
from tasks.text import Text, decoder, encode
from tools.files import RunFolder
from tools.program import read_flags

FLAGS = [*TINY, *("--max_iters 24 --eval_interval 6 --eval_iters 2 --log_interval 4 --dropout 0.1 --budget 1,1.5,2 "
                  "--dataset text.txt").split()]
VERSE = "Tomorrow, and tomorrow, and tomorrow,\nCreeps in this petty pace from day to day \u2014\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a text in it, and the usual handlers of signals, which are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(VERSE * 20, "utf-8")
    torch.set_num_threads(1)
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}    # nohup ignores some
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def train_here(*flags):
    train.main([*FLAGS, *flags])


def go_on(*flags):
    train.main(["--resume", "--device", "cpu", *flags])


def before_step(monkeypatch, number, act):
    """Have `act(trainer)` called when that many steps are done, before the next one."""
    step = train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, "train_step", lambda self: (self.step == number and act(self), step(self))[1])


def send(*numbers):
    """An act that sends signals to this process."""
    return lambda trainer: [os.kill(os.getpid(), number) for number in numbers]


def same(a, b):
    """Whether two checkpoint values are the same to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(one, other):
    """Two folders hold the same weights, optimiser state and log, but for its clock's columns."""
    for name in ("ckpt.pt", "best.pt"):
        a, b = (checkpoint(f"{out}/{name}") for out in (one, other))
        for key in ("model", "optimizers", "step", "val_loss", "best_val_loss"):
            assert same(a[key], b[key]), (name, key)
    columns = [i for i, name in enumerate(train.LOG_COLUMNS) if name not in ("ms_per_step", "tokens_per_s")]
    logs = [[[line.split(",")[i] for i in columns] for line in Path(out, "log.csv").read_text().splitlines()]
            for out in (one, other)]
    assert logs[0] == logs[1]


# -- interrupted runs ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("numbers, flags", [
    ([signal.SIGINT], ""), ([signal.SIGTERM] * 2, "--optimizer adamw"),
    ([signal.SIGHUP] * 2, "--gradient_accumulation_steps 2")])
def test_a_run_that_is_asked_to_stop_saves_says_how_to_resume_and_ends_as_if_it_had_not(numbers, flags, monkeypatch, capfd):
    """A launcher and its scheduler send SIGTERM, a closing terminal and its shell SIGHUP, both twice at times."""
    train_here("--out_dir", "whole", *flags.split())
    before = [signal.getsignal(number) for number in numbers]
    before_step(monkeypatch, 9, send(*numbers))
    train_here("--out_dir", "cut", *flags.split())
    assert [signal.getsignal(number) for number in numbers] == before and checkpoint("cut/ckpt.pt")["step"] == 10
    said = capfd.readouterr()
    assert re.fullmatch(r"\nstopping as soon as .*\n", said.err)
    again = re.search(r"stopped after 10 steps; to go on: python train.py (.*)", said.out).group(1)
    train.main(again.split())
    assert_same_run("whole", "cut")


def test_a_hangup_that_is_ignored_when_the_run_begins_is_ignored_to_its_end(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)                      # what nohup does
    before_step(monkeypatch, 9, send(signal.SIGHUP))
    train_here()
    assert checkpoint()["step"] == 24


def test_an_evaluation_stops_at_once_when_asked_and_is_made_up_for(monkeypatch, capfd):
    many = "--eval_iters", "20"
    train_here("--out_dir", "whole", *many)
    capfd.readouterr()
    batch, seen = Text.val_batch, []

    def val_batch(self, i):
        seen.append(i)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, i)

    before_step(monkeypatch, 11, lambda trainer: monkeypatch.setattr(Text, "val_batch", val_batch))
    train_here("--out_dir", "cut", *many)
    said = capfd.readouterr()
    assert seen == [0, 1, 2, 3] and said.err.startswith("\nstopping") and "stopped after 12 steps" in said.out
    assert checkpoint("cut/ckpt.pt")["val_loss"] is None
    monkeypatch.setattr(Text, "val_batch", batch)
    go_on("--out_dir", "cut")
    assert_same_run("whole", "cut")


def start(*flags, **how):
    """A run in a process of its own."""
    return subprocess.Popen([sys.executable, *flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("waited for 30 s")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_goes_on_when_nobody_reads_what_it_prints_and_is_stopped_as_ever(stopped):
    run = start(ROOT / "train.py", *FLAGS, "--max_iters", "1000000" if stopped else "12")
    assert "parameters" in run.stdout.readline()
    run.stdout.close()                                                # as `head -1` does
    if stopped:
        wait_until(Path("out/ckpt.pt").exists)
        run.send_signal(signal.SIGINT)
    said = run.stderr.read()
    assert run.wait(30) == 0 and said.count("\n") == 2 * stopped and said.startswith("\nstopping" if stopped else "")
    saved, logged = checkpoint()["step"], Path("out/log.csv").read_text().splitlines()
    assert saved == 12 and logged[-1].startswith("12,") if not stopped else saved >= int(logged[-1].split(",")[0]) > 0
    assert stopped or Path("out/loss.png").exists()


def test_a_new_run_stopped_before_its_first_evaluation_leaves_no_older_best(monkeypatch):
    train_here()
    before_step(monkeypatch, 2, send(signal.SIGINT))
    train_here("--seed", "1", "--start_over")
    assert checkpoint()["step"] == 3 and not Path("out/best.pt").exists()
    go_on("--max_iters", "3")                                         # no step is left: it is evaluated all the same
    assert 0 < checkpoint()["val_loss"] == checkpoint("out/best.pt")["val_loss"] < math.inf


def test_the_first_step_whose_loss_is_not_finite_is_named(monkeypatch, capsys):
    step = train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, "train_step",
                        lambda self: (step(self)[0] * (math.nan if self.step > 9 else 1), torch.zeros(2, 16)))
    assert "the loss at step 9 is nan" in exits(capsys, train_here, code=1).err
    assert checkpoint()["step"] == 6


# -- what is in the folder is not lost ---------------------------------------------------------------------------------

def contents(folder="out"):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def killed(*flags):
    """Train in another process, which is killed before step 9."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            before_step(patch, 9, send(signal.SIGKILL))
            train_here(*flags)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_run_is_replaced_only_on_demand_and_only_by_a_checkpoint(monkeypatch, capsys):
    train_here()
    before, weights = contents(), checkpoint()["model"]
    said = exits(capsys, train_here, "--seed", "1").err
    assert all(flag in said for flag in ("--resume", "--out_dir", "--start_over")) and said.count("\n") == 1
    assert contents() == before
    killed("--start_over", "--seed", "1", "--eval_interval", "10")    # before its first checkpoint
    assert {name: contents()[name] for name in before} == before
    go_on()
    assert not list(Path("out").glob("*.new")) and same(checkpoint()["model"], weights)
    killed("--start_over", "--seed", "1")                             # after its checkpoint at step 6
    assert [line.split(",")[0] for line in Path("out/log.csv").read_text().splitlines()] == ["step", "4", "6", "8"]
    assert all(checkpoint(f"out/{name}.pt")["step"] == 6 for name in ("ckpt", "best"))
    go_on()                                                           # nothing that was killed has locked the folder
    train_here("--seed", "1", "--out_dir", "whole")
    assert_same_run("whole", "out")


def test_two_runs_cannot_have_one_folder_and_strange_files_stay(capsys):
    Path("out").mkdir()
    for name in ("ckpt.pt.1.new", "best.pt.22.new", "log.csv.1.new", "mine.new"):
        Path("out", name).touch()
    held = RunFolder(Path("out"), train.LOG_COLUMNS, None)
    assert sorted(contents()) == [".lock", "log.csv", "mine.new"]
    for flags in ((), ("--start_over",)):
        said = exits(capsys, train_here, *flags).err
        assert "out is in use by another run" in said and said.count("\n") == 1
    held.close()
    train_here("--max_iters", "1")


def test_a_log_that_another_program_has_saved_is_set_aside(capsys):
    train_here("--max_iters", "6")
    log = Path("out/log.csv")
    changed = log.read_text().replace(",", ";")
    log.write_text(changed)
    go_on("--max_iters", "8")
    assert Path("out/log-0.csv").read_text() == changed and "log-0.csv" in capsys.readouterr().out
    assert [line.split(",")[0] for line in log.read_text().splitlines()] == ["step", "8", "8"]


def test_a_run_resumes_with_its_data_wherever_that_is_and_with_no_other(capsys):
    Path("text.txt").write_bytes(os.urandom(500_000))
    train_here("--max_iters", "2")
    Path("d").mkdir()
    text = bytearray(Path("text.txt").rename("d/a.txt").read_bytes())
    go_on("--max_iters", "3", "--dataset", "d/a.txt")
    go_on("--max_iters", "4", "--dataset", "./d/a.txt")
    before = contents()
    for place in (0, 222_222, 499_999):
        other = text.copy()
        other[place] ^= 1
        Path("d/a.txt").write_bytes(other)
        said = exits(capsys, go_on, "--max_iters", "5").err
        assert "other data" in said and said.count("\n") == 1
    assert contents() == before


def test_learning_rates_stay_at_their_lowest_when_max_iters_is_raised(capsys):
    train_here("--max_iters", "12")
    capsys.readouterr()
    go_on("--max_iters", "20")
    assert "from step 12 on, where its decay ends, the learning rate stays at 8e-05" in (
        capsys.readouterr().out)
    rows = np.genfromtxt("out/log.csv", delimiter=",", names=True)
    assert rows["learning_rate"][rows["step"] > 12].tolist() == pytest.approx([8e-5, np.nan, 8e-5, np.nan], nan_ok=True)
    shown = exits(capsys, train.main, ["--help"], code=0).out.split()
    assert "raised later goes on at the lowest rate" in " ".join(shown)


def test_the_summary_names_a_loss_of_the_shortest_run_and_only_files_that_are_there(capsys):
    train_here("--max_iters", "3", "--log_interval", "1000")
    said = capsys.readouterr().out
    assert re.search(r"^train_loss: +\d+\.\d+$", said, re.M) and re.search(r"^best: +out/best.pt, ", said, re.M)
    Path("out/best.pt").unlink()
    go_on()
    said = capsys.readouterr().out
    assert re.search(r"^val_loss: +\d+\.\d+$", said, re.M) and "best.pt" not in said


def lose_folder(trainer):
    os.rename("out", "gone")


def lose_log(trainer):
    os.remove("out/log.csv")


@pytest.mark.parametrize("act, full", [(lose_folder, False), (lose_log, False), ("fsync", True), ("log", True)])
def test_a_folder_that_is_lost_or_full_is_told_in_one_sentence(act, full, monkeypatch, capsys):
    """A full disk, while a checkpoint or log.csv is written; a lost one, as by a network drive."""
    def fill(trainer):
        if act == "fsync":
            monkeypatch.setattr(os, "fsync", lambda file: os.write(os.open("/dev/full", os.O_WRONLY), b"."))
        else:
            folders[0].log_file = open("/dev/full", "a", buffering=1)

    folders, init = [], RunFolder.__init__
    monkeypatch.setattr(RunFolder, "__init__", lambda self, *a: (folders.append(self), init(self, *a))[1])
    before_step(monkeypatch, 9, fill if full else act)
    said = exits(capsys, train_here).err
    assert said.count("\n") == 1 and ("make room" in said) == full and "None" not in said, said
    assert any(word in said for word in ("No such file", "not found", "No space left"))


def test_a_file_that_cannot_be_used_at_the_start_is_named_and_no_run_is_to_be_resumed(monkeypatch, capsys):
    def fail(s):
        raise PermissionError(13, "Permission denied", "data/plays")
    monkeypatch.setattr(train, "make_data", fail)
    said = exits(capsys, train_here).err
    assert "data/plays cannot be used (Permission denied)" in said and "--resume" not in said and said.count("\n") == 1


@pytest.mark.parametrize("flags", ["--batch_size 100000000000", "--n_embd 1000000000 --n_head 1"])
def test_what_does_not_fit_into_memory_is_refused_and_a_lower_batch_size_advised(flags, capsys):
    said = exits(capsys, train_here, *flags.split()).err
    assert "more memory than there is" in said and "--batch_size" in said and said.count("\n") == 1


DRIVER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch._dynamo, matplotlib.pyplot, train           # all that a run would import
torch.set_num_threads(1)
flags, chance, kills, steps, train_step = sys.argv[2:], random.Random(0), 0, set(), train.Trainer.train_step

while True:
    seen, tell = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        train.Trainer.train_step = lambda self: (os.write(tell, b"."), train_step(self))[1]
        code = 1
        try:
            train.main(flags + ["--resume"] * os.path.exists("cut/ckpt.pt"))
            code = 0
        finally:
            os._exit(code)
    os.close(tell)
    if kills < 50 and len([os.read(seen, 1) for _ in range(chance.randint(1, 10))][-1]):
        time.sleep(chance.uniform(0, 0.03))               # in a step, an evaluation, or while a file is written
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        steps |= {train.load_checkpoint(train.Path(name), "cpu")[0]["step"] for name in ("cut/ckpt.pt", "cut/best.pt")
                  if os.path.exists(name)}
    else:
        print(kills, os.waitpid(child, 0)[1], len(steps))
        break
    os.close(seen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start a run at once")
def test_a_run_killed_at_50_random_moments_never_leaves_a_broken_file_and_ends_the_same():
    flags = [*FLAGS, *"--max_iters 300 --eval_interval 4 --eval_iters 1 --block_size 8 --fork_layers 1".split()]
    train.main([*flags, "--out_dir", "whole"])
    done = python("-c", DRIVER, ROOT, *flags, "--out_dir", "cut")
    kills, status, steps = map(int, done.stdout.split())
    assert (kills, status) == (50, 0) and steps >= 10, done.stdout + done.stderr       # it was killed all along the way
    assert_same_run("whole", "cut")
    assert sorted(p.name for p in Path("cut").iterdir()) == [".lock", "best.pt", "ckpt.pt", "log.csv", "loss.png"]


def test_a_finished_run_goes_on_when_max_iters_is_raised_and_contradictions_are_refused_by_name(capsys):
    train_here("--lr_decay_iters", "24")
    train.main("--resume --max_iters 30 --device cpu".split())
    assert checkpoint()["step"] == 30
    for flags, word in (("--n_layer 4", "--n_layer 4"), ("--seed 1", "--seed 1"), ("--budget 2", "--budget"),
                        ("--max_iters 29", "--max_iters 29"), ("--gradient_accumulation_steps 2", "batches per step"),
                        ("--out_dir nowhere", "nowhere")):
        assert word in exits(capsys, train.main, ["--resume", *flags.split()]).err
    train.main(["--resume"])                                          # nothing left to do: the summary again
    assert "steps:      30" in capsys.readouterr().out


def test_a_run_of_no_steps_is_logged_and_goes_on():
    train_here("--max_iters", "0")
    train.main("--resume --max_iters 1 --device cpu".split())
    assert [line.split(",")[0] for line in Path("out/log.csv").read_text().splitlines()] == ["step", "0", "1"]


def test_the_best_checkpoint_is_kept_and_sampled_unless_the_last_is_asked_for(monkeypatch, capsys):
    losses = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self, budget, stop: next(losses))
    train_here("--budget", "2")
    assert [checkpoint(f"out/{name}.pt")[key] for name in ("best", "ckpt") for key in ("step", "val_loss")] == [
        12, 1.0, 24, 4.0]
    sampled, load = [], train.load_checkpoint
    monkeypatch.setattr(sample, "load_checkpoint", lambda path, device: sampled.append(path.name) or load(path, device))
    for flags in ((), ("--checkpoint", "last")):
        sample.main(["--device", "cpu", "--max_new_tokens", "1", *flags])
    Path("out/best.pt").unlink()
    sample.main(["--device", "cpu", "--max_new_tokens", "1"])
    assert sampled == ["best.pt", "ckpt.pt", "ckpt.pt"]


def test_a_disk_that_fills_up_ends_the_run_with_one_sentence_and_the_old_checkpoint():
    """The largest size of a file is limited, so the second checkpoint is cut off while it is written."""
    train_here("--max_iters", "6")
    before = {name: Path("out", name).read_bytes() for name in ("ckpt.pt", "best.pt")}
    limit = len(before["ckpt.pt"]) // 2
    done = python(ROOT / "train.py", "--resume", "--max_iters", "12",
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be written (File too large)" in done.stderr and "make room" in done.stderr
    assert {name: Path("out", name).read_bytes() for name in before} == before
    assert not list(Path("out").glob("*.new"))


def test_a_damaged_checkpoint_is_refused_or_as_good_as_whole(capsys):
    """Cut at 100 places, one byte changed at 100: a sentence, or the very same weights."""
    train_here("--max_iters", "2")
    good, model, chance = Path("out/ckpt.pt").read_bytes(), checkpoint()["model"], random.Random(0)
    refusals = 0
    for i in range(200):
        place = chance.randrange(len(good))
        flipped = good[:place] + bytes([good[place] ^ 1 << chance.randrange(8)]) + good[place + 1:]
        Path("out/ckpt.pt").write_bytes(good[:place] if i % 2 else flipped)
        try:
            assert same(dict(train.load_checkpoint(Path("out/ckpt.pt"), "cpu")[0]["model"]), dict(model))
        except SystemExit as end:
            said, refusals = capsys.readouterr().err, refusals + 1
            assert end.code == 2 and said.count("\n") == 1 and "out/ckpt.pt is not a checkpoint" in said
    assert refusals > 150


# -- several processes -----------------------------------------------------------------------------------------------

def test_two_processes_train_as_one_with_twice_the_batches(monkeypatch):
    """At budgets at which no bar decides, as the bars of several processes are the first one's."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")                   # which the samples are not
    train_here("--gradient_accumulation_steps", "2", "--out_dir", "one", "--budget", "1,4")
    python(*"-m torch.distributed.run --standalone --nproc_per_node 2".split(), ROOT / "train.py", *FLAGS,
           "--out_dir", "two", "--budget", "1,4", check=True)
    one, two = (np.genfromtxt(f"{out}/log.csv", delimiter=",", names=True) for out in ("one", "two"))
    for column in ("train_loss", "val_loss", "streams_per_token"):
        np.testing.assert_allclose(one[column], two[column], atol=2e-4 if "loss" in column else 0.2)
    a, b = (checkpoint(f"{out}/ckpt.pt")["model"] for out in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a if not name.endswith(".bar"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the workers in /proc")
def test_several_processes_stop_at_the_next_step_whichever_of_them_is_asked():
    launch = "-m", *"torch.distributed.run --standalone --nproc_per_node 2".split(), ROOT / "train.py"
    for worker, flags in ((1, [*FLAGS, *"--log_interval 1000 --max_iters 1000000".split()]), (None, ["--resume"])):
        run, had = start(*launch, *flags), checkpoint()["step"] if Path("out").exists() else 0
        wait_until(lambda: Path("out/ckpt.pt").exists() and checkpoint()["step"] > had)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(run.pid if worker is None else int(children[worker]), signal.SIGTERM)
        said, errors = run.communicate(timeout=30)
        steps = int(re.search(r"stopped after (\d+) steps", said).group(1))
        assert checkpoint()["step"] == steps and 'train.py", line' not in errors, errors
        assert worker is None or run.returncode == 0


def test_the_batches_of_a_step_differ_from_each_other_and_the_dropout_repeats():
    train_here("--out_dir", "one", "--max_iters", "2")
    train_here("--out_dir", "again", "--max_iters", "2")
    train_here("--out_dir", "two", "--max_iters", "2", "--gradient_accumulation_steps", "2")
    weights = [checkpoint(f"{out}/ckpt.pt")["model"] for out in ("one", "again", "two")]
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def trainer(*flags):
    return train.Trainer(read_flags(train.Settings, [*FLAGS, *flags], ""))


def test_a_step_takes_the_learning_rate_of_its_place_in_the_schedule():
    one = trainer("--max_iters", "20", "--warmup_iters", "5")
    for step in (0, 3, 12, 19):
        one.step = step
        one.train_step()
        rate = train.get_lr(step, one.s)
        assert [{group["lr"] for group in optimizer.param_groups} for optimizer in one.optimizers] == [{rate}, {rate}]


def test_the_gradient_is_clipped_to_its_norm_and_not_at_all_at_0():
    norm = {}
    for clip in ("0", "0.01"):
        one = trainer("--grad_clip", clip)
        one.train_step()
        norm[clip] = torch.stack([p.grad.norm() for p in one.model.parameters()]).norm().item()
    assert norm["0"] > 0.02 and norm["0.01"] == pytest.approx(0.01, rel=1e-3)


def test_windows_are_drawn_from_the_first_token_to_the_last():
    data, ends = trainer().data, SimpleNamespace(integers=lambda high, size: np.array([0, high - 1]))
    idx, targets = data.train_batch(ends)
    assert (idx[0] == data.train[:16]).all() and (targets[1] == data.train[-16:]).all()


def test_dropout_differs_from_step_to_step_and_from_batch_to_batch(monkeypatch):
    """The same batch always, weights that stand still: only dropout can change the loss."""
    flags = "--dropout 0.5 --learning_rate 0 --budget 1".split()
    one, two = trainer(*flags), trainer(*flags, "--gradient_accumulation_steps", "2")
    batch = one.data.train_batch(np.random.default_rng(0))
    monkeypatch.setattr(Text, "train_batch", lambda self, rng: batch)
    losses = []
    for one.step in (0, 1, 0):
        losses.append(one.train_step()[0].item())
    assert losses[0] == losses[2] != losses[1]
    assert two.train_step()[0].item() != pytest.approx(losses[0], rel=1e-6)


# -- a folder of tokens ----------------------------------------------------------------------------------------------

def make_folder():
    """A folder as nanoGPT's prepare.py makes it, of characters, which are returned."""
    Path("mine").mkdir()
    chars = sorted(set(VERSE))
    stoi = {char: i for i, char in enumerate(chars)}
    for name, repeats in (("train", 20), ("val", 4)):
        np.array([stoi[char] for char in VERSE * repeats], dtype=np.uint16).tofile(f"mine/{name}.bin")
    meta = dict(vocab_size=len(chars), itos=dict(enumerate(chars)), stoi=stoi)
    Path("mine/meta.pkl").write_bytes(pickle.dumps(meta))
    return chars


def test_a_folder_of_nanogpts_trains_and_is_sampled_in_its_own_characters(capsys):
    chars = make_folder()
    train_here("--dataset", "mine", "--max_iters", "60")
    assert checkpoint()["config"]["vocab_size"] == len(chars)
    text = sampled(capsys, "--prompt", "pace \u2014", "--max_new_tokens", "30").split("\n" + "-" * 80)[0]
    assert text.startswith("pace \u2014") and set(text) <= set(chars) and len(text) == 36
    Path("latin").write_bytes(b"\xe9")
    for prompt, word in (("Zz", "'Z'"), ("FILE:latin", "UTF-8")):
        assert word in exits(capsys, sample.main, ["--prompt", prompt, "--device", "cpu"]).err


def test_a_run_that_cannot_start_on_a_folder_leaves_an_older_one_as_it_is(capsys):
    make_folder()
    train_here("--dataset", "mine", "--max_iters", "2")
    files = {p: p.read_bytes() for p in Path("out").iterdir()}
    tokens = np.fromfile("mine/val.bin", np.uint16)
    before = tokens[[77, 79]]
    tokens[[77, 79]] = 60000, 60001                                   # where no batch of so short a run looks
    tokens.tofile("mine/val.bin")
    assert "token 60000 at place 77," in exits(capsys, train_here, "--start_over", "--dataset", "mine").err
    tokens[[77, 79]] = before
    tokens.tofile("mine/val.bin")
    assert "--vocab_size must be above" in exits(capsys, train_here, "--start_over", "--dataset", "mine", "--vocab_size", "10").err
    meta = pickle.loads(Path("mine/meta.pkl").read_bytes())
    for last in (0, 1):                                               # words in another order; one more
        itos = dict(enumerate([*reversed(meta["itos"].values()), *"\u2020" * last]))
        Path("mine/meta.pkl").write_bytes(pickle.dumps(dict(itos=itos)))
        assert "vocabulary" in exits(capsys, train.main, "--resume --max_iters 4 --device cpu".split()).err
    assert files == {p: p.read_bytes() for p in Path("out").iterdir()}


def test_tokens_without_names_are_shown_and_prompted_as_numbers(capsys):
    chars = make_folder()
    Path("mine/meta.pkl").unlink()
    assert "--vocab_size 50304" in exits(capsys, train_here, "--dataset", "mine").err
    train_here("--dataset", "mine", "--vocab_size", str(len(chars)), "--max_iters", "2")
    assert re.match(r"3 1 (\d+ ){4}\n", sampled(capsys, "--prompt", "3 1", "--max_new_tokens", "4"))
    assert re.match(r"0 \d+ \n", sampled(capsys, "--max_new_tokens", "1"))
    for prompt in ("\n", "words", f"{len(chars)}", "-1"):
        said = exits(capsys, sample.main, [f"--prompt={prompt}", "--device", "cpu"]).err
        assert f"from 0 to {len(chars) - 1}" in said


@pytest.mark.parametrize("prompt, vocabulary, part", [("anna", ["ann", "na"], "'a'"), ("ab", ["a", "bc"], "'b'")])
def test_the_longest_string_of_a_vocabulary_is_taken_and_what_is_not_in_it_is_named(prompt, vocabulary, part, capsys):
    assert encode("annie\n ann?\u00e9".encode(), ["ann", "annie", "\n ", "?", "\u00e9"], 5) == [1, 2, 0, 3, 4]
    for words, size in ((vocabulary, len(vocabulary)), ([*vocabulary, part[1]], len(vocabulary))):
        said = exits(capsys, encode, prompt.encode(), words, size).err                # also one beyond --vocab_size
        assert f"holds {part}, which is not in" in said


@pytest.mark.parametrize("meta, word", [
    (pickle.dumps(Code()), "meta.pkl"), (b"junk", "meta.pkl"), (dict(stoi={}), "'itos'"), (dict(itos={}), "strings"),
    (dict(itos={0: "a", 2: "b"}), "meta.pkl"), (dict(itos={0: "\ud800"}), "surrogates"), (dict(itos={0: 7}), "strings"), ([1], "meta.pkl")])
def test_a_meta_that_is_not_nanogpts_is_refused_and_none_of_its_code_runs(meta, word, capsys):
    make_folder()
    Path("mine/meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta))
    said = exits(capsys, train_here, "--dataset", "mine").err
    assert word in said and said.count("\n") == 1 and not Path("code-was-run").exists()


@pytest.mark.parametrize("files, flags, word", [
    (dict(train=b"", val=b"12" * 99), "--vocab_size 99", "train.bin is empty"),
    (dict(train=b"123", val=b"12" * 99), "--vocab_size 99", "train.bin"),
    (dict(train=b"12" * 99, val=b"12" * 99), "", "--vocab_size 50304"),
    (dict(train=b"1" * 98, val=b"12"), "--vocab_size 99", "too few"),
    (dict(train=b"12" * 99), "--vocab_size 99", "val.bin"),
    (dict(train=b"12" * 99, val=b"12" * 99), "--vocab_size 12849", "token 12849 at place 0"),
    (dict(train=b"12\0\0" * 99, val=b"12\0\0" * 99), "--vocab_size 50304", "seem to hold uint32"),
    (dict(train=b"12\0\0" * 99 + b"1", val=b"12\0\0" * 99), "--vocab_size 70000", "train.bin")])
def test_a_folder_that_cannot_be_trained_on_is_refused(files, flags, word, capsys):
    Path("mine").mkdir()
    for name, contents in files.items():
        Path(f"mine/{name}.bin").write_bytes(contents)
    said = exits(capsys, train_here, "--dataset", "mine", *flags.split()).err
    assert word in said and said.count("\n") == 1, said


def test_the_place_of_a_token_outside_the_vocabulary_is_that_in_the_file(capsys):
    Path("mine").mkdir()
    for name, size in (("train", 5 * 2**20), ("val", 2**10)):
        tokens = np.zeros(size, np.uint16)
        tokens[[-3, -2]] = 300, 301
        tokens.tofile(f"mine/{name}.bin")
    said = exits(capsys, train_here, "--dataset", "mine", "--vocab_size", "300").err
    assert f"token 300 at place {5 * 2**20 - 3}," in said and not Path("out").exists()


def test_a_vocabulary_above_65536_is_read_as_uint32(capsys):
    Path("mine").mkdir()
    tokens = 65_000 + np.arange(1000, dtype=np.uint32)
    for name in ("train", "val"):
        tokens.tofile(f"mine/{name}.bin")
    train_here("--dataset", "mine", "--vocab_size", "66000", "--max_iters", "1")
    one = trainer("--dataset", "mine", "--vocab_size", "66000")
    assert (one.data.train == tokens).all() and one.data.val_batch(1)[1].max() == 65_999
    assert re.match(r"65999 \d+ ", sampled(capsys, "--prompt", "65999", "--max_new_tokens", "1"))
    said = exits(capsys, train_here, "--dataset", "mine", "--vocab_size", "65999", "--start_over").err
    assert "token 65999 at place 999," in said


def test_a_file_of_many_gigabytes_starts_at_once_in_little_memory():
    """8 GB of tokens, all 0, in a sparse file."""
    Path("big").mkdir()
    for name, size in (("train", 8 * 10 ** 9), ("val", 10 ** 9)):
        with open(f"big/{name}.bin", "wb") as file:
            file.truncate(size)
    code = ("import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import train; "
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; train.main(sys.argv[1:]); "
            "print('grew', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = python("-c", code, ROOT, *FLAGS, "--dataset", "big", "--vocab_size", "300", check=True)
    assert int(done.stdout.split("grew")[1]) < 300_000                # KiB


# -- where it runs -----------------------------------------------------------------------------------------------------

def test_what_a_notebook_and_a_scheduler_leave_in_the_environment_changes_nothing():
    left = dict(RANK="", WORLD_SIZE="", OMP_NUM_THREADS="1", MPLBACKEND="module://matplotlib_inline.backend_inline")
    done = subprocess.run([sys.executable, ROOT / "train.py", *FLAGS, "--max_iters", "2"], env=os.environ | left,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr and Path("out/loss.png").exists(), done.stderr


def test_python_without_docstrings_and_asserts_trains_too(monkeypatch, capsys):
    """python -OO, but not for torch, which takes half a minute to compile."""
    bare = ModuleType("bare")
    monkeypatch.setitem(sys.modules, "bare", bare)
    exec(compile((ROOT / "train.py").read_text("utf-8"), "train.py", "exec", optimize=2), bare.__dict__)
    assert bare.__doc__ is None and "--max_iters" in exits(capsys, bare.main, ["--help"], code=0).out
    bare.main([*FLAGS, "--max_iters", "2"])
    assert checkpoint()["step"] == 2


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "2"])
def test_a_lone_rank_or_world_size_starts_no_group(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert trainer().world == 1 and not torch.distributed.is_initialized()


def test_a_run_in_a_thread_prints_to_whatever_stands_for_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    thread = threading.Thread(target=train_here)
    thread.start()
    thread.join()
    assert "val_loss:" in sys.stdout.getvalue()


# -- sampling --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["--temperature 0", "--temperature 1e-30", "--temperature 1e30", "--top_k 1",
                                   "--top_k 1000", "--top_k 0", "--prompt O", "--max_new_tokens 0",
                                   "--max_new_tokens 200", "--prompt FILE:text.txt", "--budget 4", "--budget 1"])
def test_sampling_at_the_edges(flags, capsys):
    train_here("--max_iters", "2")
    assert re.search(r"\n-+\n\d+ tokens, .* streams per token at budget", sampled(capsys, *flags.split()))


def test_a_seed_gives_its_text_whatever_was_sampled_before(capsys):
    train_here("--max_iters", "2")
    line = "\n" + "-" * 80 + "\n"
    three = sampled(capsys, "--num_samples", "3", "--seed", "4").split(line)
    assert [sampled(capsys, "--seed", str(seed)).split(line)[0] for seed in (4, 5, 6)] == three[:3]
    assert three[0] != three[1]


def test_a_letter_of_several_bytes_is_shown_once_it_is_whole():
    show = decoder(None)
    assert [show(token) for token in "\u2014!".encode()] == ["", "", "\u2014", "!"]
    assert show(0xE2) == "" and show(None) == "\ufffd"
