"""Where the default form departs from the paper's, and what follows: `python -m pytest tests/test_form.py`."""
import pytest
import torch
from torch.nn import functional as F

from tinybubbles import MARGIN, Config, Tinybubbles


def fresh(form, scorers=1.0):
    """A model as training finds it, its scorers' weights multiplied."""
    torch.manual_seed(0)
    model = Tinybubbles(Config(block_size=64, n_layer=3, n_head=2, n_embd=64, fork_layers=(0, 1), form=form))
    for fork in model.forks.values():
        fork.score.weight.data.mul_(scorers)
    return model


def text():
    return torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(1))


def old_forks_kept(margin):
    """The share of the first fork layer's forks that outlive the second, at r = 2: every token has one to lose."""
    model, kept = fresh("ours"), []
    fork = model.forks["1"]
    fork.margin = margin
    select = fork.select
    fork.select = lambda score, *rest: kept.append((score[:, 1::2].isfinite(), select(score, *rest))) or kept[-1][1]
    model(text())
    old, chosen = kept[0]
    return (chosen[:, 1::2] & old).sum().item() / old.sum().item()


def test_without_a_margin_new_forks_replace_the_old_ones_and_with_it_they_do_not():
    """A cumulative score only falls: an old fork's was multiplied twice, a new fork's of an original once."""
    assert old_forks_kept(0.0) < 0.05 and old_forks_kept(MARGIN) > 0.95


def test_at_budget_1_the_default_form_is_a_gpt_that_its_scorers_cannot_change_and_the_papers_is_not():
    for form, same in (("ours", True), ("paper", False)):
        losses = [fresh(form, scorers)(text(), text(), budget=1)[1].item() for scorers in (0.0, 100.0)]
        assert (losses[0] == losses[1]) == same


@pytest.mark.parametrize("form", ["ours", "paper"])
def test_a_fork_whose_p_ends_leaves_attention_in_the_default_form_and_holds_a_share_in_the_papers(form):
    """A fork beside its original, equal keys, P = e^-20: its share of the original's attention, d = 32."""
    model = fresh(form)
    attn, x = model.blocks[0].attn, torch.zeros(1, 2, 64)
    seen = []
    attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, lambda q, k, v, **rest: (
        seen.append((q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).softmax(-1)[0, 0, 1, 0].item()) or v)
    try:
        P, channel = torch.ones(1, 2, 1), model.score_channel(torch.tensor([[-20.0, 0.0]]))
        attn(x, P, channel, (torch.ones(1, 1, 2, 16), torch.zeros(1, 1, 2, 16)), None)
    finally:
        F.scaled_dot_product_attention = attention
    expected = torch.tensor([-20.0 / (1 if form == "ours" else 32 ** 0.5), 0.0]).softmax(0)[0].item()
    assert seen[0] == pytest.approx(expected, rel=1e-4) and (seen[0] < 1e-8 if form == "ours" else seen[0] > 0.02)


def test_a_fork_starts_as_its_token_in_the_default_form_and_as_any_other_fork_in_the_papers():
    """The cosine between what a block first reads of the forks of two different tokens, after its LayerNorm."""
    cosines = {}
    for form in ("ours", "paper"):
        model = fresh(form)
        forks = F.layer_norm(model.wte.weight[:50] + model.forks["0"].embedding, (64,))
        cosines[form] = (forks @ forks.T / 64)[~torch.eye(50, dtype=torch.bool)].mean().item()
    assert cosines["ours"] < 0.7 and cosines["paper"] > 0.9


def test_each_form_brings_its_merge_and_a_merge_can_be_asked_for():
    merges = [Config(form=form, merge=merge).merge for form in ("ours", "paper") for merge in ("", "residual")]
    assert merges == ["residual", "residual", "probability", "residual"] and Config().form == "ours"
