"""The harness of experiments/compare.py: `python -m pytest tests/test_compare.py`."""
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import compare, linux
from experiments.compare import GPT, Job, in_processes, interval
from programs import ROOT, VERSE, a_run, exits
from test_tinybubbles import random_model, tokens
from tinybubbles import PaperTinybubbles
from train import Trainer


def in_this_process(s, work, jobs):
    for job in jobs:
        work(job)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The smoke preset, run whole in this process."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("data").mkdir()
        Path("data/shakespeare.txt").write_text(VERSE * 40, "utf-8")
        patch.setattr("tasks.plays.TEXT_SHA256", hashlib.sha256((VERSE * 40).encode()).hexdigest())
        patch.setattr(compare, "in_processes", in_this_process)
        compare.main(["--results", "results"])
        yield json.loads(Path("results/smoke.json").read_text())


def test_every_arm_is_trained_with_every_seed_on_the_same_batches(results):
    arms = compare.PRESETS["smoke"].arms
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [(arm, seed) for arm in arms for seed in (0, 1)]
    assert results["missing"] == [] and all(set(run["loss"]) == {"5", "10"} for run in results["runs"])
    for run in results["runs"]:
        assert 4 < run["loss"]["10"][f"{compare.ARMS[run['arm']].budgets[0]:g}"] < 6 and run["parameters"] > 10_000


def test_the_loss_is_that_of_the_saved_model(results):
    job = Job("smoke", "copy-2", 4e-3, 1, "out-compare")
    trainer = job.trainer()
    assert trainer.step == 10
    trainer.model.eval()
    assert trainer.evaluate(2.0) == pytest.approx(job.done()["loss"]["10"]["2"], abs=1e-6)


def test_a_second_call_makes_no_run_again_and_one_that_sums_up_makes_none(results, monkeypatch):
    monkeypatch.setattr(compare, "train", lambda job: pytest.fail("a run was made"))
    compare.main(["--results", "again"])
    assert json.loads(Path("again/smoke.json").read_text())["runs"] == results["runs"]
    Path("some").mkdir()
    Path("some/smoke.json").write_text(json.dumps(dict(results, runs=results["runs"][:3])))
    compare.main(["--results", "some", "--runs", "not-yet", "--train", "false"])
    some = json.loads(Path("some/smoke.json").read_text())
    assert some["runs"] == results["runs"][:3]
    assert some["missing"] == ["bubbles, r = 2", "the paper's model", "copy-2, seed 1"]


def test_what_the_results_say_is_kept_where_no_run_is(results, monkeypatch):
    """A clone has the results alone: with one run struck out, that one is made, and it says what it said."""
    told = json.loads(Path("results/smoke.json").read_text())
    lost = told["runs"].pop()
    Path("kept").mkdir()
    Path("kept/smoke.json").write_text(json.dumps(told))
    made, train = [], compare.train
    monkeypatch.setattr(compare, "train", lambda job: made.append((job.arm, job.seed)) or train(job))
    compare.main(["--results", "kept", "--runs", "none-yet"])
    again = json.loads(Path("kept/smoke.json").read_text())
    assert made == [(lost["arm"], lost["seed"])] and again["runs"] == results["runs"]
    assert again["measured"]["copy-2"] == told["measured"]["copy-2"]              # no checkpoint of it was there


@pytest.mark.parametrize("at", (3, 7), ids=("before its first mark", "after it"))
def test_a_stopped_run_goes_on_exactly(results, monkeypatch, at):
    job, step = Job("smoke", "bubbles, r = 2", 4e-3, 0, f"stopped at {at}"), Trainer.train_step
    Path(job.folder).mkdir()

    def stop(trainer):
        if trainer.step == at:
            job.path().with_suffix("").mkdir(exist_ok=True)
            torch.save(trainer.checkpoint(), job.path().with_suffix("") / "ckpt.pt")
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", stop)
        compare.train(job)
    assert not job.done()
    compare.train(job)
    whole = next(run for run in results["runs"] if run["arm"] == job.arm and run["seed"] == 0)
    assert job.done()["loss"] == whole["loss"]


def test_the_papers_model_is_judged_on_the_path_that_it_generates(results, monkeypatch):
    run = results["runs"][-1]
    assert run["arm"] == "the paper's model" and run["loss"]["10"]["in one pass"] != run["loss"]["10"]["2"]
    trainer = Job("smoke", run["arm"], 4e-3, 1, "out-compare").trainer()
    batches, model = [trainer.data.val_batch(i) for i in range(2)], trainer.model.eval()
    idx, targets = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*batches))
    last = lambda t: targets[:, :t].masked_fill(torch.arange(t) < t - 1, -1)
    expected = np.mean([model(idx[:, :t], last(t), budget=2.0)[1].item() for t in range(1, 17)])
    assert run["loss"]["10"]["2"] == pytest.approx(expected, abs=1e-5)
    model, idx = random_model(0, PaperTinybubbles), tokens(0)
    each = torch.cat([model(idx[:, :t], budget=1.5)[0][:, -1:] for t in range(1, 13)], 1)
    assert torch.equal(compare.decode(model, idx, 1.5), each)


def test_the_interval_is_students(results):
    for n, t in ((2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (30, 2.0452)):
        values = np.random.default_rng(n).normal(size=n)
        mean, half = interval(list(values))
        assert mean == pytest.approx(values.mean())
        assert half == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), rel=1e-4)
    assert math.isnan(interval([1.0])[1])


def test_differences_are_paired_by_seed():
    run = lambda arm, seed, loss: dict(arm=arm, seed=seed, loss={"9": {"1": loss, "2": loss}})
    runs = [run(GPT, 0, 1.0), run(GPT, 1, 2.0), run("copy-2", 1, 1.5), run("copy-2", 0, 0.75), run("copy-2", 2, 9.0)]
    assert compare.less(runs, "copy-2", GPT, 9, "2") == [-0.25, -0.5]


def test_the_rate_is_the_better_with_three_seeds_of_the_two_best_with_one(tmp_path, monkeypatch):
    monkeypatch.setitem(compare.PRESETS, "mine", compare.Preset("", "", (GPT,), 5, (1e-3, 2e-3, 4e-3, 8e-3), (5,)))
    s = compare.Settings(preset="mine", runs=str(tmp_path), train=False)

    def finish(rate, *losses):
        for seed, loss in enumerate(losses):
            job = Job("mine", GPT, rate, seed, s.runs)
            job.path().write_text(json.dumps(a_run(job.arm, seed, {"5": {"1": loss}})))
    finish(1e-3, 0.5, 2.0, 2.0)
    finish(2e-3, 2.0)
    finish(4e-3, 1.0)
    choose = lambda: compare.choose_rates(s, [GPT], train=False)
    assert choose() == {}
    finish(8e-3, math.nan)
    assert choose() == {}
    finish(4e-3, 1.0, 1.0, 1.0)
    assert choose() == {GPT: 4e-3}


def fail_or_touch(job):
    if job.seed == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.seed == 1:
        raise RuntimeError("too large")
    Path(job.folder, str(job.seed)).touch()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capfd):
    jobs = [Job("smoke", GPT, 4e-3, seed, str(tmp_path)) for seed in range(3)]
    in_processes(compare.Settings(), fail_or_touch, jobs)
    assert (tmp_path / "2").exists()
    said = capfd.readouterr().err
    assert "plain GPT, rate 0.004, seed 1: failed (too large)" in said and "Traceback" not in said


@pytest.mark.skipif(os.name != "posix", reason="there are no process groups")
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_whoever_stops_the_program_stops_its_runs(tmp_path, number):
    command = [sys.executable, ROOT / "experiments/compare.py", "--preset", "selection", "--arms", GPT, "--processes", "1",
               "--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    program = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("runs/*/ckpt.pt")):
        assert program.poll() is None
        time.sleep(0.1)
    program.send_signal(number)
    said = program.communicate()[1]
    assert program.returncode == 1 and said == "stopped; what is done is kept, and the same command goes on\n"
    with pytest.raises(ProcessLookupError):                           # soon nobody of its group is left
        for _ in range(100):
            os.killpg(program.pid, 0)
            time.sleep(0.1)


def test_only_the_arms_that_are_asked_for_are_trained_and_all_are_summed_up(results, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(compare, "train_all", lambda s, some: jobs.extend(some))
    compare.main(["--results", "asked", "--arms", "copy-2; bubbles, r = 2"])
    assert {job.arm for job in jobs} == {"copy-2", "bubbles, r = 2"}
    assert json.loads(Path("asked/smoke.json").read_text())["runs"] == results["runs"]
    assert "no arm 'copy-3'; it has plain GPT; copy-2; " in exits(capsys, compare.main, ["--arms", "copy-3"]).err
    said = exits(capsys, compare.main, ["--arms", "copy-2", "--runs", "no-gpt", "--results", "no-gpt"]).err
    assert "--arms lacks the plain GPT" in said and list(Path("no-gpt").iterdir()) == []


def test_flops_are_counted_for_every_arm_and_drawn(results):
    found = results["measured"]
    assert found["copy-2"]["flops"]["2"] > 1.7 * found[GPT]["flops"]["1"]
    assert found["copy-2"]["train_flops"] > 1.7 * found[GPT]["train_flops"]
    assert found["the paper's model"]["flops"]["2"] > 4 * found["bubbles, r = 2"]["flops"]["2"]  # it reads all anew
    table = Path("results/smoke.md").read_text("utf-8")
    assert "| copy-2 | 2 | 2 | 0.004 |" in table and "after | 5 steps | 10 steps |" in table and "seeds 0 to 1" in table
    runs = [dict(run, loss={"10": run["loss"]["10"]}) for run in results["runs"]]
    compare.draw(Path("results/pareto.png"), runs, found, (10,))
    for name in ("smoke", "pareto"):
        assert Path(f"results/{name}.png").stat().st_size > 10_000


def test_what_another_call_adds_meanwhile_is_kept(results, monkeypatch):
    whole = Path("results/smoke.json").read_text()
    Path("both").mkdir()
    monkeypatch.setattr(compare, "train_all", lambda s, jobs: Path("both/smoke.json").write_text(whole))
    compare.main(["--results", "both", "--arms", f"{GPT}; copy-2"])
    assert json.loads(Path("both/smoke.json").read_text())["runs"] == results["runs"]


def test_a_run_whose_json_is_lost_is_made_again(results):
    job = Job("smoke", "copy-2", 4e-3, 0, "out-compare")
    run = job.path().read_text()
    assert job.trained() and not (job.path().with_suffix("") / "ckpt.pt").exists()      # train.py must not go on with it
    for change in (lambda run: run["loss"].pop("5"), lambda run: run["loss"]["10"].pop("2")):
        less = json.loads(run)
        change(less)
        job.path().write_text(json.dumps(less))
        assert not job.done()
        compare.train(job)
        assert job.done()["loss"] == json.loads(run)["loss"]
    job.path().unlink()
    compare.train(job)
    assert job.done()["loss"] == json.loads(run)["loss"]
    job.path().write_text(run)


def test_results_are_never_lost(results, capsys):
    """Not to other flags, not to other runs, not to a damaged file, not to runs that are not there."""
    whole = json.loads(Path("results/smoke.json").read_text())
    whole["runs"][0]["loss"]["10"]["1"] += 1
    Path("theirs").mkdir()
    Path("theirs/smoke.json").write_text(json.dumps(whole))
    said = exits(capsys, compare.main, ["--results", "theirs", "--train", "false"]).err
    assert "tell of one run differently" in said and said.count("\n") == 1
    assert json.loads(Path("theirs/smoke.json").read_text()) == whole
    assert Job("smoke", GPT, 4e-3, 0, "out-compare").done() == results["runs"][0]
    whole = json.loads(Path("results/smoke.json").read_text())
    whole["runs"][0]["flags"] += " --dropout 0.1"
    Path("other").mkdir()
    for text, word in ((json.dumps(whole), "other flags"), ('{"runs": [', "cannot be read as JSON")):
        Path("other/smoke.json").write_text(text)
        said = exits(capsys, compare.main, ["--results", "other", "--train", "false"]).err
        assert word in said and said.count("\n") == 1 and Path("other/smoke.json").read_text() == text
    said = exits(capsys, compare.main, ["--results", "none", "--runs", "no-runs", "--train", "false"]).err
    assert "nothing to compare with" in said and not list(Path("none").iterdir())
    for change in (lambda run: run["loss"].pop("10"), lambda run: run.update(seed=7), lambda run: run.update(arm="pauses")):
        whole = json.loads(Path("results/smoke.json").read_text())
        change(whole["runs"][5])
        before = json.dumps(whole)
        Path("other/smoke.json").write_text(before)
        said = exits(capsys, compare.main, ["--results", "other", "--runs", "no-runs", "--train", "false"]).err
        assert said.count("\n") == 1 and Path("other/smoke.json").read_text() == before
        shutil.rmtree("no-runs")


@pytest.mark.parametrize("text", ("[]", "null", "{}", '{"loss": []}', '{"loss": {"10": {"2": 5}}}', '{"runs": 3}',
                                  '{"runs": [{}], "measured": {}}', '{"runs": [], "measured": []}'))
def test_a_file_of_another_form_is_refused(results, capsys, text):
    for path in (Path("odd/smoke.json"), Job("smoke", GPT, 4e-3, 0, "odd-runs").path()):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        said = exits(capsys, compare.main, ["--results", "odd", "--runs", "odd-runs", "--train", "false"]).err
        assert said.count("\n") == 1 and f"{path} is not as" in said
        path.unlink()


def test_every_arm_of_every_preset_can_be_made(tmp_path, results):
    for preset, p in compare.PRESETS.items():
        for arm in p.arms:
            job = Job(preset if preset == "selection" else "smoke", arm, 1e-3, 0, str(tmp_path))
            with torch.no_grad():
                trainer = job.trainer()
                for budget in compare.ARMS[arm].budgets:
                    assert math.isfinite(trainer.loss(trainer.model, trainer.data.val_batch(0), budget).item())


def test_linuxs_source_is_chosen_and_shuffled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    contents = {f"linux-6.1/{name}": text for name, text in {
        "a.c": b"a\n" * 90_000, "b/b.h": b"b\n" * 90_000, "b/c.S": b"c\n" * 90_000,
        "d.rst": b"d\n" * 90_000, "e.txt": b"e\n" * 90_000, "f.c": b"f\n" * 90_000, "long.c": b"g\n" * 100_001,
        "umlaut.c": "\u00fc".encode() * 80_000, "picture.svg": b"h" * 99, "Makefile": b"i" * 99,
        "drivers/gpu/drm/amd/include/j.h": b"j\n" * 90_000}.items()}
    with tarfile.open("linux.tar.xz", "w:xz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    linux.main(["--tarball", "linux.tar.xz", "--megabytes", "1"])
    text = Path("data/linux.txt").read_bytes()
    assert len(text) == 6 * 180_000 and sorted(text[::180_000]) == list(b"abcdef") and text[::180_000] != b"abcdef"
    assert hashlib.sha256(text).hexdigest() in capsys.readouterr().out
    Path("cut.tar.xz").write_bytes(Path("linux.tar.xz").read_bytes()[:-99])
    for flags, word in (("linux.tar.xz --megabytes 2 --out new", "1,080,000 bytes"), ("nowhere --out new", "No such file"),
                        ("cut.tar.xz --out new", "cut."), ("linux.tar.xz --out data", "--out data is there already"),
                        ("linux.tar.xz", "--out data/linux.txt is there already")):
        said = exits(capsys, linux.main, ["--tarball", *flags.split()]).err
        assert word in said and said.count("\n") == 1
    assert Path("data/linux.txt").read_bytes() == text and not Path("new").exists()


def test_bad_presets_are_refused(capsys):
    assert "argument --preset" in exits(capsys, compare.main, ["--preset", "none"]).err


def test_a_preset_that_this_machine_cannot_train_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for preset, word in (("scale", "--preset scale needs a GPU"), ("size-0.2M", "--preset size-0.2M needs data/linux.txt")):
        said = exits(capsys, compare.main, ["--preset", preset, "--results", "results"]).err
        assert word in said and said.count("\n") == 1
    assert list(Path("results").iterdir()) == []
