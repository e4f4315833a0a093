"""The benchmark: `python -m pytest tests/test_bench.py`."""
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import bench  # noqa: E402
from test_tinybubbles import random_model, tokens  # noqa: E402
from tinybubbles import Config, Tinybubbles  # noqa: E402


def test_flops_are_those_that_torch_counts():
    for T, budget, layers in ((8, 1.0, (0, 1)), (12, 1.5, (0, 1)), (12, 2.0, (1, 2)), (16, 4.0, (1, 2)), (16, 2.0, ())):
        config = Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50, fork_layers=layers)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            Tinybubbles(config)(tokens(0, B=1, T=T), budget=budget)
        assert counter.get_total_flops() == bench.flops(config, T, budget)


def test_the_rival_is_the_plain_gpt_with_and_without_a_cache():
    model = random_model(0, fork_layers=())
    rival, idx = bench.GPT(model.config), tokens(0, B=2, T=12)
    rival.load_state_dict(model.state_dict())
    kv = torch.empty(4, 2, 2, 2, 24, 8)
    parts = [rival(idx[:, :7], kv=kv)] + [rival(idx[:, t:t + 1], kv=kv, start=t) for t in range(7, 12)]
    for logits in (rival(idx), torch.cat(parts, 1)):
        assert (logits.log_softmax(-1) - model(idx)[0]).abs().max() < 2e-5


def test_the_rival_computes_as_many_positions_as_there_are_streams():
    model, idx, seen = random_model(0), tokens(0, T=12), []
    rival = bench.GPT(model.config)
    for block in rival.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(out.size(1)))
    streams = []
    model(idx, budget=1.5, streams=streams)
    counts = bench.counts_of(model.config, 12, 1.5)
    rival(idx, counts=counts)
    assert seen == counts == [tok.size(1) for tok, _ in streams] == [12, 18, 18, 18]


def test_slopes_are_exponents():
    assert bench.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_a_smoke_run_writes_its_table_and_numbers_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    arguments = ["--preset", "smoke", "--device", "cpu", "--results", str(tmp_path), "--resume"]
    read = lambda: json.loads((tmp_path / "bench_smoke.json").read_text())["rows"]
    with monkeypatch.context() as patch:
        clock = iter(range(0, 10**6, 50))                             # each look at the clock, 50 seconds later
        patch.setattr(bench.time, "monotonic", lambda: next(clock))
        bench.main([*arguments, "--minutes", "3"])
    first = read()
    assert 0 < len(first) < len(bench.plans(bench.PRESETS["smoke"])) and "to go on" in capsys.readouterr().out
    bench.main(arguments)
    rows = read()
    assert rows[:len(first)] == first and len(rows) == len(bench.plans(bench.PRESETS["smoke"]))
    assert {row["what"] for row in rows if "over" not in row} == set(bench.RIVALS) - {"decoding a token, compiled"}
    assert all(row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2] for row in rows if "over" not in row)
    assert all(row["memory"] >= 1 for row in rows if row["what"] == "decoding a token")
    assert (tmp_path / "bench_smoke.md").read_text().startswith("| what") and (tmp_path / "bench_smoke.png").exists()
    assert "| probability merge |" in capsys.readouterr().out


def test_a_row_that_fails_is_a_row_of_the_table(monkeypatch):
    monkeypatch.setattr(bench, "compare", lambda *args: torch.zeros(2) @ torch.zeros(3))
    plan = bench.plans(bench.PRESETS["smoke"])[0]
    row = bench.Bench(bench.PRESETS["smoke"], torch.device("cpu")).measure(plan)
    assert plan.items() <= row.items() and "size" in row["error"]
    assert f"**failed: {row['error']}**" in bench.table([row])


def test_an_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        bench.main(["--preset", "huge"])
    assert error.value.code == 2 and "huge" in capsys.readouterr().err
