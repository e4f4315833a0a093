"""What the model refuses, and how it generates: `python -m pytest tests/test_generation.py`."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from test_tinybubbles import SMALL, random_model, tokens
from tinybubbles import Config, Tinybubbles

# -- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [
    dict(vocab_size=0), dict(vocab_size=2.5), dict(block_size=-1), dict(n_layer=True), dict(n_embd=15), dict(n_head=0),
    dict(n_embd=6, n_head=2), dict(fork_layers=(4,)), dict(fork_layers=(-1,)), dict(fork_layers=(1, 1)),
    dict(fork_layers=(1.0,)), dict(fork_layers=1), dict(budget=0.99), dict(budget=math.nan), dict(budget=math.inf),
    dict(budget="2"), dict(bar_budgets=(0.5,)), dict(dropout=1.1), dict(dropout=-0.1),
    dict(dropout=math.nan), dict(dropout="x"), dict(bar_budgets=None)], ids=str)
def test_a_bad_configuration_is_refused_in_one_sentence_that_names_it(bad):
    with pytest.raises(ValueError) as error:
        Tinybubbles(Config(**{**SMALL, **bad}))
    assert any(name.rstrip("s") in str(error.value) for name in (*bad, "budget")) and "\n" not in str(error.value)


def test_a_configuration_survives_a_round_trip_through_plain_values():
    config = Config(fork_layers=[3, 1])
    assert Config(**dataclasses.asdict(config)) == config and config.fork_layers == (1, 3)


def assert_refused(model, sentence, idx, targets=None, budget=None, cache=None):
    with pytest.raises(ValueError, match=sentence) as error:
        model(idx, targets, budget=budget, cache=cache)
    assert "\n" not in str(error.value)


def test_bad_calls_are_refused_and_leave_the_cache_alone():
    model, idx = random_model(0), tokens(0)
    used = model.new_cache(2)
    model(idx, cache=used)
    filled = used.filled.clone()
    for cache, too_long in ((None, tokens(0, T=25)), (used, tokens(0, T=13))):
        for budget in (0.5, math.nan, math.inf, "2"):
            assert_refused(model, "budget", idx, budget=budget, cache=cache)
        for bad in (idx[0], idx[:, :0], idx[:0], too_long):           # one axis, no tokens, no rows, more than fits
            assert_refused(model, "idx must be .* block_size", bad, cache=cache)
        for targets in (idx[:, 1:], idx[:1], idx[0]):
            assert_refused(model, "targets", idx, targets, cache=cache)
    longer = random_model(0, block_size=48)                           # its caches have more room than this one
    assert_refused(longer, "idx must be .* from 1 to 12", tokens(0, T=13), cache=used)
    for rows in (tokens(0, B=1), tokens(0, B=3)):
        assert_refused(model, "for 2 rows .* new_cache", rows, cache=used)
    assert_refused(model, "budgets up to 2, .* new_cache", idx, budget=3.0, cache=used)
    assert used.length == 12 and torch.equal(used.filled, filled) and filled[0].tolist() == [[12], [12]]
    for budget in (0.5, math.nan, math.inf, "2"):
        with pytest.raises(ValueError, match="budget"):
            model.new_cache(2, budget)


def test_a_call_that_fails_in_any_block_leaves_the_cache_as_it_was(monkeypatch):
    """Out of memory, or Ctrl-C: the same call again gives the right logits."""
    model, idx = random_model(3), tokens(3)
    full, cache = model(idx)[0], model.new_cache(2)
    model(idx[:, :5], cache=cache)
    for block in model.blocks:
        with monkeypatch.context() as patch:
            patch.setattr(block.mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(idx[:, 5:9], cache=cache)
        assert cache.length == 5
    with pytest.raises(IndexError):
        model(idx[:, 5:9], idx[:, 5:9] + 300, cache=cache)            # targets that are no tokens
    parts = [model(idx[:, 5:9], cache=cache)[0], model(idx[:, 9:], cache=cache)[0]]
    assert (torch.cat(parts, 1) - full[:, 5:]).abs().max() < 2e-5


@pytest.mark.parametrize("before, after", [(True, False), (False, True)])
def test_a_cache_may_be_made_in_one_precision_and_used_in_another(before, after):
    model, idx = random_model(0), tokens(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=before):
        cache = model.new_cache(2)
        model(idx[:, :6], cache=cache)
    with torch.autocast("cpu", torch.bfloat16, enabled=after):
        logits, _ = model(idx[:, 6:], cache=cache)
    assert (logits - model(idx)[0][:, 6:]).abs().max() < 0.1 * logits.abs().max()


@pytest.mark.parametrize("budget", [np.float32(2), np.float64(2), np.int64(2), 2])
def test_a_budget_may_be_any_kind_of_number(budget):
    model, idx = random_model(0, budget=3.0), tokens(0)
    logits = model(idx, budget=2.0)[0]
    assert torch.equal(model(idx, budget=budget)[0], logits)
    assert (model(idx, budget=budget, cache=model.new_cache(2, budget))[0] - logits).abs().max() < 2e-5
    assert Config(budget=budget, bar_budgets=(budget,)) == Config(budget=2.0, bar_budgets=(2.0,))


# -- generation ------------------------------------------------------------------------------------------------------

def test_greedy_generation_is_the_argmax_of_full_forwards_even_past_block_size():
    model, out = random_model(2), tokens(2, B=3, T=5)
    generated = model.generate(out, 60, temperature=0, budget=1.5)
    window = 0                                                        # where the cached context begins
    while out.size(1) < 65:
        if out.size(1) - window > 24:
            window = out.size(1) - (24 // 2 + 1)
        out = torch.cat((out, model(out[:, window:], budget=1.5)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, out)


def test_generation_costs_about_two_tokens_read_per_token_however_long(monkeypatch):
    model, read = random_model(2), []
    forward = model.read
    monkeypatch.setattr(model, "read", lambda idx, *rest: read.append(idx.size(1)) or forward(idx, *rest))
    assert model.generate(tokens(0, T=100), 500).shape == (2, 600)
    assert read[0] == 24 and sum(read) < 2.2 * 500


def test_sampling_follows_the_distribution_and_its_seed():
    model, idx = random_model(4), tokens(4, B=1, T=4).expand(4000, 4)

    def draw(seed, temperature=1.0, top_k=None):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(idx, 1, temperature=temperature, top_k=top_k, generator=generator)[:, -1]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    p = model(idx[:1])[0][0, -1].softmax(-1)
    assert (draw(0).bincount(minlength=11) / 4000 - p).abs().max() < 0.04
    squared = p.square() / p.square().sum()
    assert (draw(0, temperature=0.5).bincount(minlength=11) / 4000 - squared).abs().max() < 0.04
    assert set(draw(0, top_k=3).tolist()) <= set(p.topk(3).indices.tolist())
    for greedy in (dict(temperature=0), dict(top_k=1), dict(temperature=1e-46)):
        assert (draw(0, **greedy) == p.argmax()).all()
    assert torch.equal(draw(0, top_k=0), draw(0)) and torch.equal(draw(0, top_k=99), draw(0))
    assert draw(0, temperature=1e30).bincount(minlength=11).min() > 250


def test_sampling_while_training_leaves_the_bars_alone():
    model = random_model(4).train()
    before = [fork.bar.clone() for fork in model.forks.values()]
    model.generate(tokens(4), 9)
    assert all(torch.equal(fork.bar, bar) for fork, bar in zip(model.forks.values(), before, strict=True))
    model(tokens(4))                                                  # and a forward pass that trains moves them
    assert not any(torch.equal(fork.bar, bar) for fork, bar in zip(model.forks.values(), before, strict=True))


def test_generation_edges():
    model, idx = random_model(4, block_size=1), tokens(4, B=1, T=3)
    assert model.generate(idx, 4).shape == (1, 7) and torch.equal(model.generate(idx, 0), idx)
    shown = []
    assert torch.equal(model.generate(idx, 4, temperature=0, show=shown.append)[:, 3:], torch.cat(shown, dim=1))
    for bad in (dict(temperature=-1), dict(temperature=math.nan), dict(top_k=-1)):
        with pytest.raises(ValueError):
            model.generate(idx, 1, **bad)
    with pytest.raises(ValueError, match="idx"):
        model.generate(idx[:, :0], 1)
