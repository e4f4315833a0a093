"""The benchmark: `python -m pytest tests/test_bench.py`."""
import json
import re

import pytest
import torch
from torch.nn import functional as F

from experiments import bench
from programs import exits
from test_network import plain_gpt
from test_tinybubbles import tokens
from tinybubbles import Config


def test_the_rival_is_a_textbook_gpt_with_or_without_its_cache():
    torch.manual_seed(0)
    config, idx = Config(vocab_size=11, block_size=24, n_layer=3, n_head=2, n_embd=16, fork_layers=()), tokens(0)
    gpt = bench.GPT(config)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    full, loss = gpt(idx)
    assert loss is None

    twin = torch.nn.Module()                                          # the same weights by the model's names
    names = {re.sub(r"(\d)\.(qkv|proj)", r"\1.attn.\2", name): p for name, p in gpt.named_parameters()}
    twin.named_parameters, twin.config = names.items, config
    assert (plain_gpt(twin, idx) - full.log_softmax(-1)).abs().max() < 2e-5

    for seen in (int, lambda t: torch.tensor([t])):                   # over what is filled, and over the whole room
        kv = torch.zeros(3, 2, 2, 2, 24, 8)
        steps = [gpt(idx[:, t:t + 1], kv=kv, seen=seen(t))[0] for t in range(12)]
        assert (torch.cat(steps, 1) - full).abs().max() < 2e-5

    logits, loss = gpt(idx, idx)
    assert torch.equal(logits, full) and torch.allclose(loss, F.cross_entropy(full.flatten(0, 1), idx.flatten()))


def test_the_rival_computes_as_many_positions_in_each_block_as_bubbles_do(monkeypatch):
    config, computed = Config(n_layer=4, n_head=2, n_embd=16, fork_layers=(1, 3), budget=2.5), []
    counts = bench.positions_per_block(config, 12)
    assert counts == [12, 24, 24, 30]
    attend = F.scaled_dot_product_attention

    def look(q, k, v, attn_mask, is_causal, dropout_p=0.0):
        computed.append(q.size(2))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    gpt, idx = bench.GPT(config, counts), tokens(0)
    bench.Tinybubbles(config)(idx)
    assert gpt(idx)[0].shape == (2, 12, 256) and computed == counts + counts


def test_attention_written_out_is_the_kernels():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (4, 9, 9))
    mask = torch.randn(2, 1, 4, 9).masked_fill(torch.ones(4, 9).triu(6).bool(), -torch.inf)
    for given in (None, mask, mask > -torch.inf):
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
        assert (bench.plain_attention(q, k, v, given) - fused).abs().max() < 1e-5


def test_rows_are_measured_once_and_a_table_is_written(tmp_path, capsys):
    flags = ["--preset", "smoke", "--results", str(tmp_path)]
    bench.main(flags)
    rows = json.loads((tmp_path / "bench-smoke.json").read_text())
    assert [row["kind"] for row in rows] == ["muon", "step", "token", "token"]
    assert rows[0]["beside_adamw"] > 0 and all(row["ratio"] > 0 for row in rows[1:])
    assert all(row["operations"] > row["gpt_operations"] > 50 and row["as_many"] > 0 for row in rows[2:])
    bench.main(flags)
    assert json.loads((tmp_path / "bench-smoke.json").read_text()) == rows
    assert (tmp_path / "bench-smoke.md").read_text().count("\n| ") == 4
    assert (tmp_path / "bench-smoke.png").stat().st_size > 10_000
    assert "--preset" in exits(capsys, bench.main, ["--preset", "none"]).err


@pytest.mark.parametrize("text", ('{"a": 1}', "[3]", '[{"kind": "step"}]', "null"))
def test_rows_of_another_form_are_refused(tmp_path, capsys, text):
    path = tmp_path / "bench-smoke.json"
    path.write_text(text)
    said = exits(capsys, bench.main, ["--preset", "smoke", "--results", str(tmp_path)]).err
    assert f"{path} is not as bench.py writes it" in said and said.count("\n") == 1 and path.read_text() == text
