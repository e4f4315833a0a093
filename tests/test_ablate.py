"""The ablation: `python -m pytest tests/test_ablate.py`."""
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import ablate  # noqa: E402
import train  # noqa: E402
from ablate import ARMS, Variant  # noqa: E402
from tinybubbles import Config, Tinybubbles, logsumexp_per_token  # noqa: E402
from tools.program import read_flags  # noqa: E402

CONFIG = Config(vocab_size=11, block_size=16, n_layer=3, n_head=2, n_embd=16, fork_layers=(0, 1), form="paper",
                merge="residual")


def model(variant, **changes):
    """A model of random weights, its scorers' large enough that P varies, with a Variant or (None) as it is."""
    torch.manual_seed(0)
    m = Tinybubbles(replace(CONFIG, **changes))
    for fork in m.forks.values():
        fork.score.weight.data.mul_(50)
    if variant:
        ablate.vary(m, variant)
    return m


def tokens():
    return torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(1))


def streams_of(m, **call):
    """tok and P of the last block's streams."""
    streams = []
    m(tokens(), streams=streams, **call)
    tok, logp = streams[-1]
    return tok, logp.exp() * (tok >= 0)


@pytest.mark.parametrize("form", ["ours", "paper"])
@pytest.mark.parametrize("merge", ["probability", "residual"])
@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_the_default_variant_changes_nothing(form, merge, routing):
    losses = []
    for variant in (None, Variant()):
        m = model(variant, form=form, merge=merge, routing=routing)
        loss = m(tokens(), tokens().roll(-1, 1))[1]
        loss.backward()
        losses.append((loss.item(), *(p.grad.norm().item() for p in m.parameters())))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_copies_double_all_streams_within_the_budget_and_never_fade():
    for budget, streams in ((1.5, 1), (2, 2), (3, 2), (4, 4)):
        tok, P = streams_of(model(Variant(copies=True)), budget=budget)
        assert (tok == torch.arange(16).repeat_interleave(streams)).all() and (P == 1).all()


def test_originals_are_faded_kept_or_normalised():
    shares = {}
    for kind in ("faded", "kept", "normalised"):
        tok, P = streams_of(model(Variant(originals=kind)))
        original = ablate.originals(tok) & (tok >= 0)
        total = logsumexp_per_token(P.log(), tok, 16).exp()
        shares[kind] = (P[original] == 1).all().item(), torch.allclose(total, torch.ones_like(total), atol=1e-6)
    assert shares == dict(faded=(False, False), kept=(True, False), normalised=(False, True))


def test_without_attenuation_scores_matter_to_the_selection_alone():
    """Then the loss depends on P nowhere, so no gradient reaches the scorers; each part alone lets some through."""
    off = dict(logits="none", values=False, writes=False, merge="original")
    parts = dict(logits="undivided", values=True, writes=True, merge="mean")
    for part in [None, *parts]:
        m = model(Variant(**off | ({part: parts[part]} if part else {})))
        m(tokens(), tokens().roll(-1, 1))[1].backward()
        gradient = sum(fork.score.weight.grad.abs().sum() if fork.score.weight.grad is not None else 0
                       for fork in m.forks.values())
        assert (gradient > 0) == bool(part), part


def test_log_p_divided_undivided_and_none_differ_as_said():
    """The score channel of the keys holds log P, sqrt(d) times that, or nothing; padding stays out of reach."""
    for kind in ("divided", "undivided", "none"):
        m = model(Variant(logits=kind))
        tok, P = streams_of(m)
        logp = P.log().clamp(min=-50)
        scale = dict(divided=1, undivided=math.sqrt(8), none=0)[kind]
        key = m.blocks[-1].attn.qk[1][..., -1]
        assert torch.allclose(key[:, 0][tok >= 0], (scale * logp)[tok >= 0], atol=1e-4)
        assert (key[:, 0][tok < 0] == ablate.PADDING).all()


def test_merges_take_the_original_alone_or_the_mean():
    """Seen on streams given by hand: two of token 0 with P = 1/2 and 1/4, one of token 1."""
    x, tok = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([[0, 0, 1]])
    logp = torch.tensor([[0.5, 0.25, 0.5]]).log()
    for merge, first in (("original", x[:, 1]), ("mean", (2 * x[:, 0] + x[:, 1]) / 3)):
        m = model(Variant(merge=merge))
        want = (m.ln_f(first) @ m.wte.weight.T).log_softmax(-1)
        assert torch.allclose(m.merge_residual(x, tok, logp, 2, None)[:, 0], want, atol=1e-5)


def test_selection_is_by_score_at_random_or_noisy_in_training_only():
    for select, training, varies in (("", True, False), ("random", False, True), ("noisy", True, True),
                                     ("noisy", False, False)):
        m = model(Variant(select=select)).train(training)
        kept = {str(ablate.originals(streams_of(m)[0]).long().tolist()) for _ in range(4)}
        assert (len(kept) > 1) == varies, (select, training)


def test_streams_that_share_attention_lower_their_keys_by_the_log_of_their_number():
    """Seen in the score channel of block 1, against the same model without; before the first fork nothing changes."""
    keys, streams = {}, []
    for share in (False, True):
        m = model(Variant(share=share), fork_layers=(1,), form="ours")
        m(tokens(), budget=1.5, streams=streams)
        keys[share] = [block.attn.qk[1][:, 0, :, -1] for block in m.blocks[:2]]
    tok = streams[1][0]
    count = (tok.unsqueeze(2) == tok.unsqueeze(1)).sum(1)                            # (B, N)
    assert (keys[True][0] == keys[False][0]).all() and set(count.flatten().tolist()) == {1, 2}
    assert torch.allclose(keys[False][1] - keys[True][1], math.sqrt(8) * count.float().log(), atol=1e-4)


def test_straight_through_changes_gradients_alone_and_a_temperature_the_scores_alone():
    loss, gradient = {}, {}
    for variant in (Variant(), Variant(straight=True), Variant(temperature=4.0)):
        m = model(variant)
        loss[str(variant)] = m(tokens(), tokens().roll(-1, 1))[1]
        loss[str(variant)].backward()
        gradient[str(variant)] = m.forks["0"].score.weight.grad.norm().item()
    plain, straight, warm = loss
    assert loss[plain] == loss[straight] != loss[warm] and gradient[plain] != gradient[straight]
    cold = model(None)
    for fork in cold.forks.values():
        fork.score.weight.data.div_(4)
    assert cold(tokens(), tokens().roll(-1, 1))[1].item() == pytest.approx(loss[warm].item(), rel=1e-5)


def test_biases_and_the_fork_embedding_start_where_they_are_told():
    tok, P = streams_of(model(Variant()))
    fork = ~ablate.originals(tok) & (tok >= 0)
    for variant, which in ((Variant(keep_bias=9.0), ablate.originals(tok)), (Variant(fork_bias=-9.0), fork)):
        tok, changed = streams_of(model(variant))
        assert changed.sum() > P.sum() if variant.keep_bias else changed[changed > 0].min() < 1e-3
    small, large = (model(Variant(large=large), n_embd=256, form="ours").forks["0"].embedding.detach()
                    for large in (False, True))
    assert large.std().item() == pytest.approx(256 ** -0.5, rel=0.15) and torch.allclose(large, small * 3.125)


def prepared(tmp_path, arm, variant, monkeypatch):
    monkeypatch.setitem(ARMS, arm, ("", variant))
    return ablate.prepare("lookup", arm, 0, tmp_path, "--max_iters 8 --batch_size 2")[0]


def test_the_scorers_learning_rate_and_the_growing_budget(tmp_path, monkeypatch):
    moved = []
    for scale in (1.0, 0.25):
        trainer = prepared(tmp_path, "x", Variant(scorer_lr=scale), monkeypatch)
        weights = [trainer.model.forks["0"].score.weight, trainer.model.wte.weight]
        before = [w.detach().clone() for w in weights]
        ablate.train_step(trainer, Variant(scorer_lr=scale), 0)
        moved.append([(w - b).norm().item() for w, b in zip(weights, before)])
    assert moved[1] == pytest.approx([moved[0][0] / 4, moved[0][1]], rel=1e-3)
    trainer, budgets = prepared(tmp_path, "x", Variant(grow=True), monkeypatch), []
    for step in range(8):
        ablate.train_step(trainer, Variant(grow=True), step)
        budgets += trainer.s.budget
    assert budgets == [1, 1, 1, 1.5, 2, 2, 2, 2]


def test_the_deep_gpt_has_a_block_for_every_stream_of_a_token():
    for task, deep in ablate.DEEP.items():
        config = read_flags(train.Settings, ablate.flags_of(task, "bubbles"), "")
        streams = [min(2, 2 ** sum(fork <= l for fork in config.fork_layers)) for l in range(config.n_layer)]
        gpt = read_flags(train.Settings, ablate.flags_of(task, "GPT of as many FLOPs"), "")
        assert sum(streams) == deep == gpt.n_layer and gpt.fork_layers == ()


def test_every_arm_of_every_task_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task in ablate.TASKS:
        for arm in ARMS:
            s = read_flags(train.Settings, ablate.flags_of(task, arm), "")
            Config(**{name: getattr(s, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "fork_layers",
                                                          "form", "merge", "routing", "dropout")}, budget=max(s.budget))


def test_differences_are_paired_and_the_interval_is_students():
    runs = [dict(arm=arm, seed=seed, val_loss=loss) for arm, losses in (("plain GPT", (1.0, 3.0, 2.0)),
            ("bubbles", (0.5, 2.0))) for seed, loss in enumerate(losses)]
    assert ablate.differences(runs, "bubbles") == [-0.5, -1.0]
    assert ablate.interval([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, 3.795), abs=1e-3)       # 4.303 * 1.5275 / sqrt(3)


def test_runs_are_kept_tabled_and_drawn_and_repeated_only_if_their_flags_change(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--seeds", "0,1", "--arms", "plain GPT; bubbles", "--results", "results", "--processes", "1"]
    tiny = "--eval_iters 4 --batch_size 2 --max_iters "
    ablate.main([*flags, "--flags", tiny + "3"])
    table = (tmp_path / "results" / "ablate_lookup.md").read_text("utf-8")
    assert table.count("± ") >= 3 and table in capsys.readouterr().out
    assert (tmp_path / "results" / "ablate_lookup.png").stat().st_size > 10_000
    made = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("out-ablate/lookup/*.json"))]
    ablate.main([*flags, "--flags", tiny + "3"])
    again = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("out-ablate/lookup/*.json"))]
    assert len(made) == 4 and made == again
    ablate.main([*flags, "--flags", tiny + "2"])
    assert "2 steps" in (tmp_path / "results" / "ablate_lookup.md").read_text("utf-8")


@pytest.mark.parametrize("flags, part", [("--task chess", "chess"), ("--seeds 1,1", "1,1"), ("--arms teapot", "teapot"),
                                         ("--processes 0", "0")])
def test_bad_flags_are_refused_in_one_sentence(flags, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        ablate.main(flags.split())
    assert end.value.code == 2 and part in capsys.readouterr().err and not list(tmp_path.iterdir())
