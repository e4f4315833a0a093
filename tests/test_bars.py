"""What the bars learn, and how a trained model spends its budget; one graph for a step: `python -m pytest
tests/test_bars.py`."""
import random

import pytest
import torch
from torch.nn import functional as F

from test_tinybubbles import (KINDS, random_model, read_in_chunks, spent, split, texts_to_recall, tokens,
                              train_to_recall)
from tinybubbles import NEVER_MEASURED, quota
from train import measure_bars


def bars(model):
    return torch.stack([fork.bar.clone() for fork in model.forks.values()])


def test_measured_bars_leave_no_choice_to_rounding():
    """Where one score comes again and again, the measured bar is that score: chunks must still agree with the whole."""
    for seed in range(12):
        model, idx = random_model(seed, fork_layers=(0, 2)), tokens(seed, B=3, T=24, vocab_size=2)
        measure_bars(model, idx, [1.25, 1.5])
        chunked = read_in_chunks(model, idx, split(random.Random(seed), 24), budget=1.5)
        assert (chunked - model(idx, budget=1.5)[0]).abs().max() < 2e-5


def test_measuring_bars_keeps_nothing_for_a_backward_pass():
    """Once it did, and at eight streams a token a model that had trained well did not fit into memory."""
    model, kept = random_model(0), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda nothing: nothing):
        measure_bars(model, tokens(0), [1.5])
        assert not kept
        model(tokens(0))
    assert kept


def test_a_training_forward_moves_the_bar_of_its_budget_to_what_r_less_one_extras_per_token_reach():
    model, idx = random_model(0, fork_layers=(1,)), tokens(0, B=4, T=24)
    fork, at, seen = model.forks["1"], 2, []
    assert fork.budgets[at] == 1.5
    fork.bar.fill_(NEVER_MEASURED)
    model.train()(idx, budget=1.5)
    assert (fork.bar != NEVER_MEASURED).nonzero().tolist() == [[at]]                # no other budget was measured
    hook = fork.score.register_forward_hook(lambda layer, x, a: seen.append(F.logsigmoid(a[..., 0])))
    model.eval()(idx, budget=1.5)
    assert (seen[0] >= fork.bar[at]).sum() == (1.5 - 1) * idx.numel()               # the first time it went all the way
    before = fork.bar[at].item()
    model.train()(tokens(1, B=4, T=24), budget=1.5)
    hook.remove()
    reached = seen[1].flatten().sort(descending=True).values[idx.numel() // 2 - 1].item() - 1e-3
    assert reached != before and fork.bar[at].item() == pytest.approx(before + 0.1 * (reached - before))


def test_a_batch_is_chosen_from_by_the_bar_of_the_batches_before_it():
    """So that no choice leaks from a token to an earlier one through the bar of their own batch."""
    model, idx, before, after = random_model(0).train(), tokens(0), [], []
    other = torch.cat((idx[:, :6], tokens(7)[:, 6:]), 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model(idx, trace=before)
    model.load_state_dict(state)
    model(other, trace=after)
    count = lambda owner: F.one_hot(owner + 1, 13).sum(1)[:, 1:7]
    assert all(torch.equal(count(a[0]), count(b[0])) for a, b in zip(before, after))


def test_nothing_but_training_moves_a_bar():
    """Validation without eval(), sampling and cached reading in train mode, with gradients on: none may."""
    model, idx = random_model(0).train(), tokens(0)
    before = bars(model)
    with torch.no_grad():
        model(idx, idx)
    model.generate(idx, 9)
    model(idx, cache=model.new_cache(2))
    model.eval()(idx, idx)
    assert torch.equal(bars(model), before)
    model.train()(idx, idx)
    assert not torch.equal(bars(model), before)


def test_a_budget_that_was_not_measured_takes_the_next_higher_bar_that_was():
    """Of 1.5, 1.75 and 2.0, of which 2.0 alone was measured, and 1.75 is measured later."""
    model, idx = random_model(0, fork_layers=(1,)), tokens(0, B=4, T=24)
    fork = model.forks["1"]
    assert fork.budgets[2:5].tolist() == [1.5, 1.75, 2.0]

    def owners(budget):
        trace = []
        model(idx, budget=budget, trace=trace)
        return trace[-1][0]
    fork.bar.fill_(NEVER_MEASURED)
    all_wanted = owners(1.5)                                          # then the quota alone decides: it is spent at once
    assert (all_wanted >= 0).sum() == 1.5 * idx.numel()
    fork.bar[4] = -0.7
    low = owners(1.5)
    fork.bar[2:5] = -0.7
    assert torch.equal(owners(1.5), low) and not torch.equal(low, all_wanted)
    fork.bar[2:4] = NEVER_MEASURED
    measure_bars(model, idx, [1.75])
    assert fork.bar[3] not in (-0.7, NEVER_MEASURED) and fork.bar[2] == NEVER_MEASURED
    between = owners(1.6)
    fork.bar[2], fork.bar[4] = 0.0, 0.0                               # neither a lower budget's nor one above the next
    assert torch.equal(owners(1.6), between)


def test_the_budgets_of_bars_travel_with_them():
    """A state dict of another grid, as long as ours: each budget must find its own bar, not another budget's."""
    grids = [(1.0, 1.3, 1.5, 2.0, 4.0), (1.0, 1.5, 2.0, 3.0, 4.0)]
    one, other = (random_model(0, bar_budgets=grid) for grid in grids)
    for fork in one.forks.values():
        fork.bar.copy_(torch.tensor([-0.1, -0.3, -0.5, -2.0, -4.0]))
    other.load_state_dict(one.state_dict())
    for budget in (1.3, 1.5, 2.0, 3.0):
        assert torch.equal(one(tokens(0), budget=budget)[0], other(tokens(0), budget=budget)[0])


def test_a_budget_beyond_all_forks_spends_them_all_whatever_other_bars_are():
    model, idx, trace = random_model(0, fork_layers=(0, 1, 2, 3), budget=20.0), tokens(0, B=4, T=24), []
    for fork in model.forks.values():
        fork.bar.fill_(NEVER_MEASURED)
    for _ in range(40):
        model.train()(idx)
    measure_bars(model.eval(), idx, [8.0])
    model(idx, trace=trace)
    assert trace[-1][0].size(1) == 16 * 24 and (trace[-1][0] >= 0).all()


@pytest.mark.parametrize("fork_layers, budgets", [
    ((1,), (2.0,)), ((1, 2), (2.0,)), ((0, 1, 2), (2.0,)), ((1, 2), (1.0, 1.5, 2.0, 4.0))], ids=str)
def test_a_trained_model_spends_what_it_is_asked_to(fork_layers, budgets):
    model = train_to_recall(fork_layers, budgets)
    measure_bars(model, torch.cat([texts_to_recall(64)[0] for _ in range(4)]),
                 [r for r in model.config.bar_budgets if r not in budgets])
    for r in [1 + i / 4 for i in range(13)] + [1.1, 1.3, 2.7]:
        possible = min(r, 2 ** len(fork_layers))
        assert 0.87 * possible <= spent(model, r) <= quota(possible, 31) / 31, (r, spent(model, r))


def test_a_loop_in_nanogpts_style_with_accumulation_keeps_the_budget():
    """Eight batches a step: each moves the bars a little, and none sends them astray."""
    model = train_to_recall((1, 2), (2.0,), steps=60, accumulation=8, batch=64)
    assert bars(model)[:, 4].min() >= -40 and bars(model)[:, 4].max() < 0            # -40: all extras are wanted
    assert 0.87 * 2 <= spent(model, 2.0) <= 2


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
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step = torch.compile(lambda idx: model(idx, idx, budget=1.5)[1], backend="eager", fullgraph=True)
    loss = step(idx).item()
    after = bars(model)
    model.load_state_dict(state)
    assert loss == pytest.approx(model(idx, idx, budget=1.5)[1].item(), abs=1e-6)
    assert torch.allclose(after, bars(model), atol=1e-6)              # the compiled step moved them as well


@pytest.mark.parametrize("forks, T", [((1, 2), 24), (range(6), 8)], ids=["two forks", "more forks than tokens"])
def test_every_step_of_decoding_is_the_same_one_graph(forks, T):
    model, idx, graphs = random_model(2, n_layer=6, fork_layers=forks, block_size=T).eval(), tokens(2, T=T), []
    torch._dynamo.reset()
    read = torch.compile(model.read, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    cache, full = model.new_cache(2, budget=1.5), model(idx, budget=1.5)[0]
    with torch.no_grad():
        model(idx[:, :3], cache=cache, budget=1.5)
        for t in range(3, T):
            logits, stream_counts = read(idx[:, t:t + 1], 1.5, cache, None)
            cache.commit(stream_counts, 1)
            assert (logits - full[:, t:t + 1]).abs().max() < 2e-5
    assert len(graphs) == 1
