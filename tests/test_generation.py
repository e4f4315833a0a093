"""What the model refuses, and how it generates: `python -m pytest tests/test_generation.py`."""
import dataclasses
import math

import pytest
import torch

from test_tinybubbles import SMALL, random_model, tokens
from tinybubbles import Cache, Config, Tinybubbles

# -- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [
    dict(vocab_size=0), dict(vocab_size=2.5), dict(block_size=-1), dict(n_layer=True), dict(n_embd=15), dict(n_head=0),
    dict(n_embd=6, n_head=2), dict(fork_layers=(4,)), dict(fork_layers=(-1,)), dict(fork_layers=(1, 1)),
    dict(budget=0.99), dict(budget=math.nan), dict(budget=math.inf),
    dict(budget="2"), dict(bars=(0.5,)), dict(dropout=1.1), dict(dropout=-0.1)], ids=str)
def test_a_bad_configuration_is_refused_in_one_sentence_that_names_it(bad):
    with pytest.raises(ValueError) as error:
        Tinybubbles(Config(**{**SMALL, **bad}))
    assert any(name.rstrip("s") in str(error.value) for name in (*bad, "budget")) and "\n" not in str(error.value)


def test_a_configuration_survives_a_round_trip_through_plain_values():
    config = Config(fork_layers=[3, 1])
    assert Config(**dataclasses.asdict(config)) == config and config.fork_layers == (1, 3)


def test_bad_calls_are_refused_and_leave_the_cache_alone():
    model, idx, cache = random_model(0), tokens(0), Cache()
    model(idx, cache=cache)
    for args, message in (((idx, dict(budget=0.5)), "budget"), ((idx, dict(budget=3.0, cache=cache)), "new Cache"),
                          ((idx[:1], dict(cache=cache)), "new Cache"), ((idx[0], {}), "idx"), ((idx[:, :0], {}), "idx"),
                          ((tokens(0, T=13), dict(cache=cache)), "block_size"), ((tokens(0, T=25), {}), "block_size")):
        with pytest.raises(ValueError, match=message):
            model(args[0], **args[1])
    assert cache.length == 12 and cache.held[0].tolist() == [[12], [12]]


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
    draw = lambda seed, **kw: model.generate(idx, 1, generator=torch.Generator().manual_seed(seed), **kw)[:, -1]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    p = model(idx[:1])[0][0, -1].exp()
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
    model.generate(tokens(4), 9)
    assert all((fork.error == 0).all() for fork in model.forks.values())


def test_generation_edges():
    model, idx = random_model(4, block_size=1), tokens(4, B=1, T=3)
    assert model.generate(idx, 4).shape == (1, 7) and torch.equal(model.generate(idx, 0), idx)
    shown = []
    assert torch.equal(model.generate(idx, 4, temperature=0, show=shown.append)[:, 3:], torch.cat(shown, dim=1))
    for bad in (dict(temperature=-1), dict(temperature=math.nan), dict(top_k=-1)):
        with pytest.raises(AssertionError):
            model.generate(idx, 1, **bad)
    with pytest.raises(ValueError, match="idx"):
        model.generate(idx[:, :0], 1)
