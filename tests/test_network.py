"""The network around the forks: a plain GPT, loss, gradient, start, dropout: `python -m pytest tests/test_network.py`."""
import math

import pytest
import torch
from torch.nn import functional as F

from test_tinybubbles import KINDS, log_probs, random_model, tokens
from tinybubbles import Config, PaperTinybubbles, Tinybubbles


def plain_gpt(model, idx):
    """A textbook GPT, with complex numbers for rotary positions, from the same weights."""
    w, c = dict(model.named_parameters()), model.config
    B, T = idx.shape
    d = c.n_embd // c.n_head
    turn = torch.polar(torch.ones(T, d // 2), torch.outer(torch.arange(1.0, T + 1),
                                                          10000.0 ** (-torch.arange(d // 2) * 2 / d)))
    spin = lambda x: torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turn).transpose(-1, -2).flatten(-2)
    norm = lambda x, name: F.layer_norm(x, (c.n_embd,), w[name + ".weight"])
    x = w["wte.weight"][idx]
    for l in range(c.n_layer):
        b = f"blocks.{l}."
        q, k, v = (F.linear(norm(x, b + "ln_1"), m).view(B, T, c.n_head, d).transpose(1, 2)
                   for m in w[b + "attn.qkv.weight"].chunk(3))
        logits = spin(q) @ spin(k).transpose(-1, -2) / math.sqrt(d)
        y = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).flatten(2), w[b + "attn.proj.weight"])
        hidden = F.gelu(F.linear(norm(x, b + "ln_2"), w[b + "mlp.fc.weight"]), approximate="tanh")
        x = x + F.linear(hidden, w[b + "mlp.proj.weight"])
    return F.linear(norm(x, "ln_f"), w["wte.weight"]).log_softmax(-1)


@KINDS
def test_no_fork_layers_is_a_plain_gpt(kind):
    model, idx = random_model(7, kind, fork_layers=()), tokens(7)
    for budget in (None, 3):
        assert (log_probs(model, idx, budget=budget) - plain_gpt(model, idx)).abs().max() < 2e-5


@KINDS
def test_gradient_reaches_every_parameter(kind):
    model = random_model(8, kind)
    model(tokens(8), tokens(9), budget=1.5)[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any(), name


@KINDS
def test_the_loss_is_the_mean_cross_entropy_of_the_targets_that_count(kind):
    model, idx, targets = random_model(8, kind), tokens(8), tokens(9)
    targets[0, :5] = -1
    logits, loss = model(idx, targets, budget=1.5)
    assert logits.shape == (2, 12, 11) and logits.dtype == torch.float32
    assert torch.equal(logits, model(idx, budget=1.5)[0])
    mine = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert loss.item() == pytest.approx(-mine[targets != -1].mean().item(), abs=1e-5)
    assert model(idx, torch.full_like(idx, -1))[1] == 0               # nothing to predict is not a NaN
    with pytest.raises((IndexError, RuntimeError)):
        model(idx, torch.full_like(idx, -2))                          # no other negative number is a target
    with pytest.raises(ValueError, match="shape"):
        model(idx, targets[:, :-1])


def test_the_gradient_is_the_slope_of_the_loss():
    model, idx, targets, step = random_model(10), tokens(10), tokens(11), 1e-3
    model(idx, targets)[1].backward()
    for name in ("forks.1.score.weight", "forks.2.embedding", "blocks.1.attn.qkv.weight", "wte.weight"):
        p = model.get_parameter(name)
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        losses = []
        for shift in (step, -2 * step, step):
            p.data += shift * direction
            losses.append(model(idx, targets)[1].item())
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx((p.grad * direction).sum().item(), abs=2e-3)


def test_the_start_scales_with_the_width():
    model = Tinybubbles(Config(n_layer=2, n_embd=256, fork_layers=(1,)))
    matrix, added, embedding = math.sqrt(2 / 5 / 256), math.sqrt(1 / 5 / 256 / 2), 1 / 16
    expected = {"wte.weight": matrix, "attn.qkv.weight": matrix, "attn.proj.weight": added, "mlp.fc.weight": matrix,
                "mlp.proj.weight": added, "score.weight": matrix, "embedding": embedding}
    for name, p in model.named_parameters():
        std = next((s for n, s in expected.items() if name.endswith(n)), 0.0)
        assert p.std().item() == pytest.approx(std, rel=0.2) and (std > 0 or (p == 1).all()), name


def test_no_other_merge_is_taken():
    with pytest.raises(ValueError, match="nonsense"):
        PaperTinybubbles(Config(), merge="nonsense")


def test_dropout_acts_in_training_only():
    model, idx = random_model(0, dropout=0.5), tokens(0)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
