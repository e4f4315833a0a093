"""The comparison of all rivals: `python -m pytest tests/test_compare.py`."""
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from experiments import bench, compare
from tinybubbles import Cache, Config, Tinybubbles
from tools.program import read_flags

ARMS = "copy-2, last; bubbles, r = 1.5; bubbles, topk"


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs the smoke preset on a small text in a temporary folder, in this process; returns its JSON, and its table."""
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda processes, context: ThreadPoolExecutor(1))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    (tmp_path / "text.txt").write_text("O for a Muse of fire, that would ascend the brightest heaven\n" * 60)

    def go(*flags, arms=ARMS):
        compare.main(["--preset", "smoke", "--arms", arms, "--dataset", str(tmp_path / "text.txt"), "--runs",
                      str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *flags])
        file = tmp_path / "results" / "compare_smoke.json"
        assert file.with_suffix(".png").stat().st_size > 10_000
        return json.loads(file.read_text()), file.with_suffix(".md").read_text("utf-8")
    return go


def model(arm):
    """The arm's untrained model, at 16 wide, and text for it (1, 16)."""
    flags = read_flags(train.Settings, compare.ARMS[arm].flags.format(deep=4).split(), "")
    layers = () if flags.fork_layers == () else (0, 1)
    torch.manual_seed(0)
    m = compare.ARMS[arm].build(Config(block_size=16, n_layer=3, n_head=2, n_embd=16, fork_layers=layers,
                                       form=flags.form, budget=max(flags.budget), routing=flags.routing))
    for fork in getattr(m, "forks", {}).values():
        fork.score.weight.data.mul_(50)                               # streams come and go
    return m.eval(), torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(1))


def counted(function):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


class Reader:
    """What `decode` needs of a Trainer."""
    device, half = torch.device("cpu"), False

    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize("arm", compare.ARMS)
def test_a_training_step_waits_for_no_data_and_stays_on_its_device(arm):
    """The device `meta` has shapes and no data: to wait for data, or to mix it with the CPU's tensors, is an error."""
    m, idx = (part.to("meta") for part in model(arm))
    m.train()(idx, idx)[1].backward()
    assert m.wte.weight.grad.is_meta


def test_every_arm_of_the_long_preset_and_those_of_a_large_start_begin_alike(monkeypatch, tmp_path):
    """Matrices begin as N(0, 2 / 5D), those that write to streams as N(0, 1 / 5DL), L the blocks that run."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("O for a Muse of fire, that would ascend the brightest heaven\n" * 60)
    s, cpu = (compare.Settings(preset=preset, dataset="text.txt") for preset in ("long", "cpu"))
    assert compare.check(s) == list(compare.PRESETS["long"].arms)
    large = [(cpu, arm) for arm in ("plain GPT, large start", "bubbles, r = 2, large start")]
    for s, arm in [*((s, arm) for arm in compare.check(s)), *large]:
        built = compare.prepare(s, arm, 1e-3, 0, "out").model
        for name, p in built.named_parameters():
            if p.dim() == 2 and "forks" not in name:
                runs = dict.fromkeys(compare.ARMS, built.config.n_layer) | {"recurrent depth": 2 + 4 * 2}
                std = (2 / 5 / 64) ** 0.5 / (2 * runs[arm]) ** (name.endswith("proj.weight") / 2)
                assert p.std().item() == pytest.approx(std, rel=0.05), (arm, name)


def test_a_smoke_run_writes_everything_and_a_second_one_trains_nothing(go, monkeypatch):
    result, text = go()
    assert len(result["runs"]) == 4 * 3 and not result["missing"] and "Missing" not in text
    for arm in ("plain GPT", *ARMS.split("; ")):
        assert f"| {arm} |" in text and result["times"][arm]["token"] > 0 and result["times"][arm]["step"] > 0
    assert result["times"]["plain GPT"]["token_ratio"] == result["times"]["plain GPT"]["step_ratio"] == 1
    for run in result["runs"]:
        first = run["dials"][f"{compare.ARMS[run['arm']].dials[0]:g}"]
        assert run["val_loss"] == first["autoregressive"] and 0 < run["val_loss"] < math.log(256) + 0.5
        exact = compare.ARMS[run["arm"]].cached
        assert not exact or abs(first["autoregressive"] - first["teacher_forced"]) < 1e-5
    for arm in ("plain GPT", "copy-2, last"):           # nothing in them depends on the text
        assert all(dial["counted"] == dial["formula"] for dial in result["flops"][arm]["inference"].values())
    monkeypatch.setattr(compare, "run", lambda *args: pytest.fail("trained again"))
    again, _ = go()
    assert again["runs"] == result["runs"] and again["points"] == result["points"]


def test_nothing_starts_after_the_deadline_and_what_is_missing_is_named(go, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        go("--minutes", "0", arms="plain GPT")
    assert error.value.code == 2 and "plain GPT" in capsys.readouterr().err
    go(arms="plain GPT")
    lost = next(path for path in (tmp_path / "runs" / "smoke").glob("plain_gpt_*_1.json"))
    lost.unlink()
    result, text = go("--minutes", "0", arms="plain GPT")
    assert [m.startswith("plain GPT (rate") and m.endswith("seed 1)") for m in result["missing"]] == [True]
    assert f"Missing: {result['missing'][0]}." in text and not lost.exists()


def test_a_run_made_by_other_flags_is_not_taken_for_done(go, tmp_path, monkeypatch):
    go(arms="plain GPT")
    preset = compare.PRESETS["smoke"]
    monkeypatch.setitem(compare.PRESETS, "smoke", compare.replace(preset, flags=preset.flags + " --max_iters 3"))
    result, text = go("--minutes", "5", arms="plain GPT")
    assert len(result["runs"]) == 3 and "3 steps" in text and all("--max_iters 3" in r["flags"] for r in result["runs"])


def test_a_loss_that_is_not_finite_is_never_chosen(go, monkeypatch):
    step = train.Trainer.train_step

    def broken(trainer, number):
        loss, tok = step(trainer, number)
        return loss * (math.nan if trainer.s.learning_rate == 8e-3 else 1), tok
    monkeypatch.setattr(train.Trainer, "train_step", broken)
    result, text = go(arms="plain GPT")
    assert [run["val_loss"] is None for run in result["runs"]] == [False, True, False]
    assert "| plain GPT | **" in text and "| not finite |" in text


def test_the_sweep_picks_the_lowest_loss_of_the_first_seed():
    runs = [dict(arm=arm, rate=rate, seed=seed, val_loss=loss) for arm, rate, seed, loss in (
        ("plain GPT", 1, 0, 2.0), ("plain GPT", 2, 0, 1.5), ("plain GPT", 3, 0, 1.7), ("plain GPT", 3, 1, 1.0),
        ("deeper GPT", 1, 0, None), ("deeper GPT", 2, 0, 3.0))]
    assert {arm: run["rate"] for arm, run in compare.best(runs, 0).items()} == {"plain GPT": 2, "deeper GPT": 2}


def test_the_pareto_front_is_what_no_point_beats():
    points = [(1, 5.0), (2, 4.0), (2, 4.5), (3, 4.0), (4, 3.0), (5, 3.5), (1, 5.0)]
    assert compare.pareto(points) == [True, True, False, False, True, False, True]


@pytest.mark.parametrize("arm", [arm for arm in compare.ARMS if "GPT" in arm or "bubbles" in arm])
def test_flops_of_training_bubbles_are_those_that_torch_counts(arm):
    m, idx = model(arm)
    m.train()
    budgets = [float(dial) for dial in compare.ARMS[arm].dials]
    seen = [counted(lambda: m(idx, idx, budget=budget)[1].backward()) for budget in budgets]
    assert compare.train_flops(m, 16, budgets) == pytest.approx(sum(seen) / len(seen), rel=1e-12)
    assert all(3 * compare.forward_flops(m, 16, budget) == flops for budget, flops in zip(budgets, seen))


@pytest.mark.parametrize("arm", compare.ARMS)
def test_flops_of_decoding_are_those_that_torch_counts(arm):
    """Of every arm: bubbles, if cached, may leave some of the budget unused, but at r = 1 and 4 there's no choice."""
    m, idx = model(arm)
    for dial in map(float, compare.ARMS[arm].dials[:2]):
        seen = counted(lambda: compare.decode(Reader(m), idx[:, :6], dial, compare.ARMS[arm].cached))
        formula = compare.decode_flops(m, 6, dial, compare.ARMS[arm].cached)
        free = arm.startswith("bubbles") and compare.ARMS[arm].cached and dial not in (1, 4)
        assert 0.6 * formula < seen <= 1.05 * formula if free else seen == formula


@pytest.mark.parametrize("form", ["ours", "paper"])
def test_flops_of_a_token_follow_from_its_streams(form):
    torch.manual_seed(0)
    m = Tinybubbles(Config(block_size=16, n_layer=3, n_head=2, n_embd=16, fork_layers=(1, 2), form=form))
    cache, total = Cache(), 0
    idx, held = torch.randint(256, (1, 16)), np.zeros(3, dtype=int)
    with torch.no_grad():
        for token in idx.split(1, 1):
            streams = []
            m(token, budget=1.5, cache=cache, streams=streams)
            new = np.array([(tok >= 0).sum().item() for tok, _ in streams])
            held += new
            total += compare.stream_flops(m.config, new, held)
    assert total == counted(lambda: compare.decode(Reader(m), idx, 1.5, True))


def test_decoding_predicts_every_token_from_those_before_it_alone():
    for arm, start in (("bubbles, r = 2", 0), ("bubbles, r = 2", 5), ("bubbles, paper", 5), ("copy-2, mean", 3)):
        m, idx = model(arm)
        log_probs = compare.decode(Reader(m), idx, 2.0, compare.ARMS[arm].cached, start)
        anew = torch.cat([m(idx[:, :t], budget=2.0)[0][:, -1:] for t in range(start + 1, 17)], 1)
        assert (log_probs - anew).abs().max() < 2e-5
    m, idx = model("bubbles, paper")                                  # there, all tokens at once is another matter
    assert (compare.decode(Reader(m), idx, 2.0, False) - m(idx, budget=2.0)[0]).abs().max() > 1e-3


def test_the_deeper_gpt_has_the_flops_of_bubbles():
    for name, preset in compare.PRESETS.items():
        s = read_flags(train.Settings, preset.flags.split(), "")
        size = dict(block_size=s.block_size, n_head=s.n_head, n_embd=s.n_embd)
        bubbles = bench.flops(Config(n_layer=s.n_layer, fork_layers=s.fork_layers, **size), s.block_size, 2.0)
        blocks = compare.deep(preset.flags)
        deeper, block = (bench.flops(Config(n_layer=n, fork_layers=(), **size), s.block_size, 1.0)
                         for n in (blocks, blocks - 1))
        assert blocks > s.n_layer and abs(deeper - bubbles) <= (deeper - block) / 2 + 1, name


@pytest.mark.parametrize("flags, named", [("--preset huge", "huge"), ("--arms nothing", "nothing"),
                                          ("--minutes -1", "-1"), ("--processes 0", "0")])
def test_bad_flags_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main(flags.split())
    assert error.value.code == 2 and named in capsys.readouterr().err


def test_every_arm_has_a_curve_and_a_dial_it_was_trained_at():
    for name, arm in compare.ARMS.items():
        settings = read_flags(train.Settings, arm.flags.format(deep=9).split(), "")
        assert arm.curve in compare.CURVES and (arm.dials[0] in settings.budget or "GPT" in name)
