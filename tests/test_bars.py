"""What the bars learn, and how a trained model spends its budget; one graph for a step: `python -m pytest
tests/test_bars.py`."""
import random

import pytest
import torch
from torch.nn import functional as F

from test_tinybubbles import KINDS, random_model, read_in_chunks, split, tokens
from tinybubbles import NO_BAR, Cache, Config, Tinybubbles, quota
from train import measure_bars


def test_measured_bars_leave_no_choice_to_rounding():
    """Where one score comes again and again, the measured bar is that score: chunks must still agree with the whole."""
    for seed in range(12):
        model, idx = random_model(seed, fork_layers=(0, 2)), tokens(seed, B=3, T=24, vocab_size=2)
        measure_bars(model, [idx], [1.25, 1.5])
        chunked = read_in_chunks(model, idx, split(random.Random(seed), 24), budget=1.5)
        assert (chunked - model(idx, budget=1.5)[0]).abs().max() < 2e-5


def test_bars_follow_the_score_that_r_less_one_extras_per_token_reach():
    model, idx = random_model(0, fork_layers=(1,)), tokens(0, B=4, T=24)
    fork = model.forks["1"]
    fork.bar.fill_(NO_BAR)
    model.train()(idx, budget=1.5)
    model.update_bars()
    at, seen = fork.budgets.index(1.5), []
    assert [i for i, bar in enumerate(fork.bar) if bar != NO_BAR] == [at]           # the others' were not measured
    hook = fork.score.register_forward_hook(lambda layer, x, a: seen.append(F.logsigmoid(a[..., 0])))
    model.eval()(idx, budget=1.5)
    hook.remove()
    assert (seen[0] >= fork.bar[at]).sum() == (1.5 - 1) * idx.numel()
    first = fork.bar[at].clone()
    model.train()(tokens(1, B=4, T=24), budget=1.5)
    error = fork.error[at].clone()
    model.update_bars()
    assert error != 0 and fork.bar[at] == pytest.approx((first + 0.1 * error).item())
    model.eval()(idx, budget=1.5)
    assert (fork.error == 0).all()                                                  # only training measures


def test_a_budget_beyond_all_forks_spends_them_all_whatever_other_bars_are():
    model, idx, streams = random_model(0, fork_layers=(0, 1, 2, 3), budget=20.0), tokens(0, B=4, T=24), []
    for fork in model.forks.values():
        fork.bar.fill_(NO_BAR)
    for _ in range(40):
        model.train()(idx)
        model.update_bars()
    measure_bars(model.eval(), [idx], [8.0])
    model(idx, streams=streams)
    assert streams[-1][0].size(1) == 16 * 24 and (streams[-1][0] >= 0).all()


def train_to_recall(fork_layers, budgets, steps=200):
    """A model trained on 8 random symbols, four times over, with the budgets in turn; and a maker of such texts."""
    torch.manual_seed(0)
    model = Tinybubbles(Config(vocab_size=16, block_size=31, n_layer=3, n_head=2, n_embd=48, fork_layers=fork_layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    text = lambda B: torch.randint(16, (B, 8)).repeat(1, 4)
    for step in range(steps):
        idx = text(16)
        loss = model(idx[:, :-1], idx[:, 1:].index_fill(1, torch.arange(7), -1), budget=budgets[step % len(budgets)])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_bars()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 40, (steps - step) / (steps / 2))
    measure_bars(model, [text(64)[:, :-1] for _ in range(4)], [r for r in model.config.bars if r not in budgets])
    return model.eval(), text


@pytest.mark.parametrize("fork_layers", [(1,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("budgets", [(2.0,), (1.0, 1.5, 2.0, 4.0)], ids=["fixed", "elastic"])
def test_a_trained_model_recalls_and_spends_what_it_is_asked_to(fork_layers, budgets):
    model, text = train_to_recall(fork_layers, budgets)
    idx, spent = text(128), []
    assert (model(idx[:, :-1])[0][:, 7:].argmax(-1) == idx[:, 8:]).float().mean() > 0.98
    for r in [1 + i / 4 for i in range(13)]:
        streams, possible = [], min(r, 2 ** len(fork_layers))
        model(idx[:, :-1], budget=r, streams=streams)
        spent.append(((streams[-1][0] >= 0).sum() / idx[:, :-1].numel()).item())
        assert 0.9 * possible <= spent[-1] <= quota(possible, 31) / 31, (r, spent)


def test_training_attends_without_a_mask_tensor(monkeypatch):
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **kw: calls.append((len(args), kw)) or attention(*args, **kw))
    random_model(0)(tokens(0), tokens(1))[1].backward()
    assert len(calls) == 4
    assert all(n == 3 and kw["is_causal"] and kw["attn_mask"] is None for n, kw in calls)


@KINDS
def test_a_training_step_is_one_graph_whose_shapes_wait_for_no_data(kind):
    model, idx = random_model(0, kind).train(), tokens(0)
    step = torch.compile(lambda idx: model(idx, idx, budget=1.5)[1], backend="eager", fullgraph=True)
    assert step(idx).item() == pytest.approx(model(idx, idx, budget=1.5)[1].item(), abs=1e-6)


@pytest.mark.parametrize("forks, T", [((1, 2), 24), (range(6), 8)], ids=["two forks", "more forks than tokens"])
def test_every_step_of_decoding_is_the_same_one_graph(forks, T):
    model, idx, graphs = random_model(2, n_layer=6, fork_layers=forks, block_size=T).eval(), tokens(2, T=T), []
    torch._dynamo.reset()
    compiled = torch.compile(lambda idx, budget, cache: model.read(idx, None, budget, cache, None), fullgraph=True,
                             backend=lambda graph, _: graphs.append(graph) or graph.forward)
    cache, full = Cache(), model(idx, budget=1.5)[0]
    with torch.no_grad():
        model(idx[:, :3], cache=cache, budget=1.5)
        for t in range(3, T):
            logits = compiled(idx[:, t:t + 1], model.check(idx[:, t:t + 1], 1.5, cache), cache)
            assert (logits - full[:, t:t + 1]).abs().max() < 2e-5
    assert len(graphs) == 1
