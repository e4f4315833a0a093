"""The benchmark: `python -m pytest tests/test_bench.py`."""
import json
import re

import torch
from torch.nn import functional as F

from experiments import bench
from programs import exits
from test_tinybubbles import plain_gpt, tokens
from tinybubbles import Config


def test_the_rival_is_a_textbook_gpt_with_or_without_its_cache():
    torch.manual_seed(0)
    config, idx = Config(vocab_size=11, block_size=24, n_layer=3, n_head=2, n_embd=16, fork_layers=()), tokens(0)
    gpt = bench.GPT(config)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    twin = torch.nn.Module()                                          # the same weights by the model's names
    names = {re.sub(r"(\d)\.(qkv|proj)", r"\1.attn.\2", name): p for name, p in gpt.named_parameters()}
    twin.named_parameters, twin.config = names.items, config
    full, kv = gpt(idx), torch.zeros(3, 2, 2, 2, 24, 8)
    steps = [gpt(idx[:, t:t + 1], kv=kv, seen=t) for t in range(12)]
    assert (torch.cat(steps, 1) - full).abs().max() < 2e-5
    assert (plain_gpt(twin, idx) - full).abs().max() < 2e-5
    assert torch.allclose(gpt(idx, idx), F.nll_loss(full.flatten(0, 1), idx.flatten()))


def test_rows_are_measured_once_and_a_table_is_written(tmp_path, capsys):
    flags = ["--preset", "smoke", "--results", str(tmp_path)]
    bench.main(flags)
    rows = json.loads((tmp_path / "bench-smoke.json").read_text())
    assert [row["kind"] for row in rows] == ["step", "token"] and all(row["ratio"] > 0 for row in rows)
    assert rows[1]["operations"] > rows[1]["gpt_operations"] > 50
    bench.main(flags)
    assert json.loads((tmp_path / "bench-smoke.json").read_text()) == rows
    assert (tmp_path / "bench-smoke.md").read_text().count("\n| ") == 2
    assert (tmp_path / "bench-smoke.png").stat().st_size > 10_000
    assert "--preset" in exits(capsys, bench.main, ["--preset", "none"]).err
