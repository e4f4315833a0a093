"""The fast paths against the slow obvious twin and each other: `python -m pytest tests/test_fast.py`."""
import math
import random
import shutil

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tinybubbles
from test_tinybubbles import LargestTensor, oracle, random_model, tokens
from tinybubbles import Cache, count_at_least, quota, select_causal, select_next


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()                                             # it keeps eight of one function at most


# -- the head in chunks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("merge", ["probability", "residual"])
def test_a_chunked_head_gives_the_same_loss_and_gradients_and_never_holds_all_logits(merge, monkeypatch):
    gradients, largest = {}, {}
    for chunk in (2**25, 11 * 7):
        monkeypatch.setattr(tinybubbles, "CHUNK", chunk)
        model, idx, targets = random_model(0, merge=merge, vocab_size=500), tokens(0), tokens(1)
        targets[0, :5] = -1
        with LargestTensor() as seen:
            model(idx, targets)[1].backward()
        gradients[chunk] = [p.grad for p in model.parameters()]
        largest[chunk] = seen.bytes
    for whole, chunked in zip(*gradients.values()):
        assert torch.allclose(whole, chunked, atol=1e-5)
    assert largest[2**25] == 4 * 500 * 24 * (2 if merge == "probability" else 1) and largest[11 * 7] <= 4 * 500 * 16


# -- one token at a time ---------------------------------------------------------------------------------------------

def test_one_token_after_the_other_selects_what_all_at_once_do():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        T, budget = 12, (1, 1.3, 2, 3.5)[seed % 4]
        score = torch.randint(9, (3, T, 6), generator=generator).float()             # ties among them
        score = score.masked_fill(torch.rand(3, T, 6, generator=generator) < 0.3, -math.inf)
        t, used = torch.arange(1, T + 1), torch.randint(3, (3, 1), generator=generator)
        allowed, tok = quota(budget, t) - t, torch.arange(T).repeat_interleave(6).expand(3, -1)
        admitted, used_after = select_causal(score.flatten(1), tok, allowed, torch.empty(3, 0), used)
        for i in range(T):
            one, used = select_next(score[:, i], allowed[i:i + 1], score[:, :i].flatten(1), used)
            assert torch.equal(one, admitted[:, 6 * i:6 * i + 6]) and torch.equal(used, used_after[:, i:i + 1])


def test_few_are_counted_as_many_are():
    seen, values = torch.randint(50, (4, 300)).float(), torch.randint(50, (4, 40)).float()
    few = [count_at_least(seen, part) for part in values.split(8, dim=1)]
    assert torch.equal(count_at_least(seen, values), torch.cat(few, dim=1))


def memory(cache):
    return [t.data_ptr() for t in (*cache.kv.values(), *cache.count.values(), *sum(cache.extras.values(), ()))]


@pytest.mark.parametrize("merge", ["probability", "residual"])
def test_a_fixed_cache_decodes_the_full_forward_and_its_memory_never_moves(merge):
    for seed in range(12):
        model = random_model(seed, merge=merge, fork_layers=((1, 2), (0, 1, 3), (2,), ())[seed % 4],
                             form=("paper", "ours")[seed // 4 % 2])
        idx, budget, first = tokens(seed, B=3, T=20), (1, 1.25, 2, 3)[seed % 3], random.Random(seed).randint(1, 15)
        cache, streams, full = Cache(), [], []
        parts = [model(idx[:, :first], budget=budget, cache=cache)[0]]
        cache.fix(20, budget)
        before = memory(cache)
        parts += [model(one, budget=budget, cache=cache, streams=streams)[0] for one in idx[:, first:].split(1, 1)]
        assert (torch.cat(parts, 1) - model(idx, budget=budget, streams=full)[0]).abs().max() < 2e-5
        assert memory(cache) == before and cache.length == 20
        last = torch.cat([tok for tok, _ in streams[model.config.n_layer - 1::model.config.n_layer]], 1)
        assert [row[row >= 0].tolist() for row in last] == [row[row >= first].tolist() for row in full[-1][0]]


def test_a_fixed_cache_takes_one_token_at_a_time():
    model, cache = random_model(0), Cache()
    model(tokens(0, T=4), cache=cache)
    cache.fix(20, 2.0)
    with pytest.raises(ValueError, match="1 <= T <= 1"):
        model(tokens(0, T=2), cache=cache)


def test_a_step_of_a_fixed_cache_waits_for_no_data_and_stays_on_its_device():
    """The device `meta` has shapes and no data: to wait for data, or to mix it with the CPU's tensors, is an error."""
    model, cache = random_model(0), Cache()
    model(tokens(0, T=4), cache=cache)
    cache.fix(12, 2.0)
    cache.length, state = cache.length.to("meta"), (cache.kv, cache.count)
    for tensors in state:
        tensors.update({l: t.to("meta") for l, t in tensors.items()})
    cache.extras = {l: tuple(t.to("meta") for t in pair) for l, pair in cache.extras.items()}
    assert model.to("meta")(torch.zeros(2, 1, dtype=torch.long, device="meta"), cache=cache)[0].shape == (2, 1, 11)


def test_compiled_generation_is_generation_and_compiles_once(monkeypatch):
    """Greedy, past block_size, so with several caches; traced without a break, run by the eager backend."""
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph, mode, compiled=torch.compile: compiled(
        model, fullgraph=fullgraph, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    model, idx, streams = random_model(2), tokens(2, B=3, T=5), []
    expected = model.generate(idx, 40, temperature=0, budget=1.5)
    assert torch.equal(model.generate(idx, 40, temperature=0, budget=1.5, compile=True), expected)
    assert len(graphs) == 1
    assert len(list(model.generate_steps(idx, 3, streams=streams, compile=True))) == 3 and len(streams) == 3 * 4


# -- compiled, flash, bfloat16 ---------------------------------------------------------------------------------------

def test_the_gradient_of_the_compiled_training_step_is_the_models():
    """One graph forward and one backward, traced ahead of time, run by PyTorch's own operations."""
    model, idx, gradients = random_model(0, n_layer=2, fork_layers=(0, 1)), tokens(0), []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(idx, idx)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, and this machine has none")
def test_the_compiled_step_of_a_fixed_cache_is_the_models_equations():
    model, idx, cache = random_model(0, n_layer=2, fork_layers=(1,)), tokens(0, B=1, T=9), Cache()
    step = torch.compile(model, fullgraph=True)
    expected = oracle(model, idx[0].tolist(), 2.0, "causal")[0]
    with torch.no_grad():
        parts = [model(idx[:, :4], cache=cache)[0]]
        cache.fix(9, 2.0)
        parts += [step(one, cache=cache)[0] for one in idx[:, 4:].split(1, 1)]
    assert np.abs(torch.cat(parts, 1)[0].numpy() - expected).max() < 5e-5


def test_the_score_channel_needs_no_other_kernel_than_flash_attention():
    model, idx = random_model(0), tokens(0)
    expected = model(idx, idx)[1].item()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss = model(idx, idx)[1]
        loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_bfloat16_decodes_close_to_float32():
    for seed in range(4):
        model, idx, cache = random_model(seed, n_embd=32), tokens(seed, T=20), Cache()
        with torch.autocast("cpu", torch.bfloat16):
            logits = torch.cat([model(one, cache=cache)[0] for one in idx.split(1, 1)], 1)
        assert cache.kv[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
        assert (logits - model(idx)[0]).abs().mean() < 0.1
