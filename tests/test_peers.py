"""The rivals with more positions per token: `python -m pytest tests/test_peers.py`."""
import random

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from experiments import peers
from test_tinybubbles import (layer_norm, log_softmax, oracle_choose, oracle_turn, random_model, split,
                              tokens)
from tinybubbles import Cache, Config
from tools.program import read_flags

SMALL = dict(vocab_size=11, block_size=24, n_layer=2, n_head=2, n_embd=16, fork_layers=())
RIVALS = {"last": peers.Copies, "mean": lambda config: peers.Copies(config, merge="mean"), "pauses": peers.Pauses,
          "random pauses": peers.RandomPauses}
CONTROLS = {"random": peers.random_selection, "no attenuation": peers.no_attenuation}
every_rival = pytest.mark.parametrize("rival", RIVALS)
every_control = pytest.mark.parametrize("control", CONTROLS)


def rival_model(rival, seed=0, **changes):
    """A small rival in evaluation mode, with weights large enough that everything differs."""
    torch.manual_seed(seed)
    model = RIVALS[rival](Config(**SMALL | changes)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "ln" in name else 0.0, std=0.1 if "ln" in name else 0.4)
    return model


# -- the slow obvious twin: one sequence of vectors, NumPy, float64, loops ---------------------------------------------

def weights(model):
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def gpt(w, config, x, position):
    """What a GPT's blocks make of the vectors x at these rotary positions, each of which sees those to its left."""
    d, H = config.n_embd // config.n_head, config.n_head
    for l in range(config.n_layer):
        u = {name: w[f"blocks.{l}.{name}.weight"] for name in ("ln_1", "attn.qkv", "attn.proj", "ln_2", "mlp.fc",
                                                               "mlp.proj")}
        qkv = np.stack([(u["attn.qkv"] @ layer_norm(row, u["ln_1"])).reshape(3, H, d) for row in x])
        out = np.zeros((len(x), H, d))
        for h in range(H):
            q, k = ([oracle_turn(qkv[i, part, h], position[i]) for i in range(len(x))] for part in (0, 1))
            for i in range(len(x)):
                weight = np.exp(log_softmax(np.array([q[i] @ k[j] for j in range(i + 1)]) / np.sqrt(d)))
                out[i, h] = sum(weight[j] * qkv[j, 2, h] for j in range(i + 1))
        x = [row + u["attn.proj"] @ out[i].ravel() for i, row in enumerate(x)]
        for i, row in enumerate(x):
            hidden = u["mlp.fc"] @ layer_norm(row, u["ln_2"])
            hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden ** 3)))
            x[i] = row + u["mlp.proj"] @ hidden
    return x


def head(w, x):
    return log_softmax(w["wte.weight"] @ layer_norm(x, w["ln_f.weight"]))


def twin(rival, model, idx, n):
    """Log-probabilities (T, V) of one sequence."""
    w, c, T = weights(model), model.config, len(idx)
    e, pause = [w["wte.weight"][i] for i in idx], w.get("pause")
    if rival in ("last", "mean"):
        x = gpt(w, c, [e[t] for t in range(T) for _ in range(n)],
                [t + 1 - (n - 1 - copy) / n for t in range(T) for copy in range(n)])
        groups = [x[n * t:n * t + n] for t in range(T)]
        return np.array([head(w, group[-1] if rival == "last" else sum(group)) for group in groups])
    if rival == "pauses":
        x = gpt(w, c, [row for t in range(T) for row in [e[t]] + [pause] * (n - 1)],
                [t + 1 for t in range(T) for _ in range(n)])
        return np.array([head(w, x[n * t + n - 1]) for t in range(T)])
    texts = [e[:t + 1] + [pause] * (n - 1) for t in range(T)]         # every prefix anew
    return np.array([head(w, gpt(w, c, text, range(1, len(text) + 1))[-1]) for text in texts])


@every_rival
def test_a_rival_is_its_idea_written_out_as_one_sequence(rival):
    for seed, n in enumerate((1, 2, 3, 4)):
        model, idx = rival_model(rival, seed), tokens(seed, B=2, T=5)
        logits = model(idx, budget=n)[0].detach().numpy()
        for row in (0, 1):
            assert np.abs(logits[row] - twin(rival, model, idx[row].tolist(), n)).max() < 5e-5


def test_training_puts_pauses_between_the_tokens_and_predicts_nothing_before_one():
    """The loss against the elements listed one by one: (embedding, target); the same places from the same seed."""
    model, (idx, targets) = rival_model("random pauses").train(), (tokens(1, T=20), tokens(2, T=20))
    targets[0, 3], total, w, streams = -1, [], weights(model), []
    torch.manual_seed(5)
    loss = model(idx, targets, budget=3, streams=streams)[1]
    torch.manual_seed(5)
    pause = peers.place_pauses(2, 20, "cpu")
    for row in (0, 1):
        elements, t = [], -1
        for slot in range(22):
            t += not pause[row, slot]
            goal = -1 if slot < 21 and pause[row, slot + 1] else int(targets[row, t])
            elements.append((w["pause"] if pause[row, slot] else w["wte.weight"][idx[row, t]], goal, t))
        elements = elements[:20]
        x = gpt(w, model.config, [e[0] for e in elements], range(1, 21))
        total += [-head(w, x[i])[goal] for i, (_, goal, _) in enumerate(elements) if goal >= 0]
        assert streams[0][0][row].tolist() == [t for _, _, t in elements]
    assert pause[:, :20].any() and loss.item() == pytest.approx(np.mean(total), abs=2e-5)


def test_places_of_pauses_are_random_as_likely_everywhere_and_follow_the_seed():
    torch.manual_seed(0)
    pause = peers.place_pauses(20_000, 20, "cpu")
    assert pause.shape == (20_000, 22) and (pause.sum(1) == 2).all() and not pause[:, 0].any()
    assert (pause[:, 1:].float().mean(0) - 2 / 21).abs().max() < 0.012               # 6 standard deviations
    assert (pause[:, 1:-1] & pause[:, 2:]).any()
    torch.manual_seed(0)
    assert torch.equal(peers.place_pauses(20_000, 20, "cpu"), pause)
    assert not peers.place_pauses(2, 4, "cpu").any() and not torch.equal(peers.place_pauses(20_000, 20, "cpu"), pause)


def test_random_pauses_are_placed_in_training_only_and_follow_torchs_seed():
    model, idx = rival_model("random pauses"), tokens(0, T=20)
    assert model(idx, idx)[1] == model(idx, idx)[1]
    model.train()
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(model(idx, idx)[1].item())
    assert losses[0] == losses[2] != losses[1]
    assert torch.equal(model(idx)[0], model.eval()(idx)[0])           # without targets it is inference


# -- what every rival promises ----------------------------------------------------------------------------------------

def first_change(model, idx, t, n):
    """The largest change before token t, and after, of a row's log-probabilities when token t is another one."""
    other = idx.clone()
    other[:, t] = (other[:, t] + 1) % 11
    change = (model(other, budget=n)[0] - model(idx, budget=n)[0]).abs()
    return change[:, :t].max(), change[:, t:].amax((0, 2)).min()


@every_rival
def test_a_later_token_never_changes_an_earlier_logit(rival):
    model, idx = rival_model(rival), tokens(0)
    for t in (1, 5, 11):
        for n in (1, 2, 4):
            before, after = first_change(model, idx, t, n)
            assert before < 2e-6 and after > 1e-3


def read_in_chunks(model, idx, chunks, cache, **call):
    logits = torch.cat([model(idx[:, a:b], cache=cache, **call)[0] for a, b in chunks], 1)
    assert cache.length == idx.size(1)
    return logits


@torch.no_grad()
@every_rival
def test_cached_logits_equal_full_logits(rival):
    rng = random.Random(rival)
    for seed in range(6):
        model, n, streams, parts = rival_model(rival, seed), 1 + seed % 4, [], []
        idx = tokens(seed, B=3, T=rng.randint(2, 24))
        full = model(idx, budget=n, streams=streams)[0]
        one_by_one = [(t, t + 1) for t in range(idx.size(1))]
        for chunks in (split(rng, idx.size(1)), one_by_one):
            parts.clear()
            logits = read_in_chunks(model, idx, chunks, model.new_cache(), budget=n, streams=parts)
            assert (logits - full).abs().max() < 2e-5
            assert torch.equal(torch.cat([tok for tok, _ in parts], 1), streams[0][0])
        assert streams[0][0].tolist() == [sorted([*range(idx.size(1))] * n)] * 3 and (streams[0][1] == 0).all()


@every_rival
def test_the_fused_loss_is_the_logits_loss(rival):
    model, idx, targets = rival_model(rival), tokens(0), tokens(1)
    targets[:, 3] = -1
    log_probs = model(idx)[0]                                         # the configuration's budget, 2
    assert (log_probs.exp().sum(-1) - 1).abs().max() < 1e-5
    wanted = -log_probs.gather(2, targets.clamp(min=0).unsqueeze(2))[targets >= 0].mean()
    assert model(idx, targets, budget=2)[1].item() == pytest.approx(wanted.item(), abs=1e-5)


@every_rival
def test_gradient_reaches_every_parameter(rival):
    model = rival_model(rival).train()
    model(tokens(0), tokens(1))[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@every_rival
def test_a_training_step_is_one_graph(rival):
    model, idx, losses = rival_model(rival).train(), tokens(0), []
    call = lambda idx: model(idx, idx)[1]
    for step in (call, torch.compile(call, backend="eager", fullgraph=True)):
        torch.manual_seed(1)
        losses.append(step(idx).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@every_rival
def test_initialisation_is_gpt2s(rival):
    model = RIVALS[rival](Config(n_layer=2, n_embd=256, fork_layers=()))
    for name, p in model.named_parameters():
        std = 0.0 if "ln" in name else 0.01 if name.endswith("proj.weight") else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.2) and (std > 0 or (p == 1).all()), name


@every_rival
def test_dropout_acts_in_training_only_and_on_the_embeddings_too(rival):
    model, idx, read = rival_model(rival, dropout=0.5), tokens(0), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for training in (False, True):
        losses = {model.train(training)(idx, idx)[1].item() for _ in range(2)}
        assert len(losses) == 1 + training
        assert 0.35 < (read[-1] == 0).float().mean() < 0.65 if training else (read[-1] != 0).all()


@every_rival
def test_flops_are_those_that_torch_counts(rival):
    T = 9
    for n in (1, 2, 3):
        model, idx = rival_model(rival, budget=n), tokens(0, B=1, T=T)
        cache, counts = model.new_cache(), []

        def decode():
            with torch.no_grad():
                read_in_chunks(model, idx, [(t, t + 1) for t in range(T)], cache)
        for call in (lambda: model(idx), decode, lambda: model.train()(idx, idx)[1].backward()):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                call()
            counts.append(counter.get_total_flops())
        assert counts == [model.forward_flops(T), model.decode_flops(T), model.train_flops(T)]
        assert model.forward_flops(T, 4) == rival_model(rival, budget=4).forward_flops(T) > counts[0]
        assert model.decode_flops(T, 4) == rival_model(rival, budget=4).decode_flops(T) > counts[1]


@every_rival
def test_bad_calls_are_refused(rival):
    model, idx = rival_model(rival), tokens(0)
    for budget in (0, 1.5, float("inf"), float("nan"), True, "2", -1):
        for call in (lambda: model(idx, budget=budget), lambda: model.forward_flops(4, budget),
                     lambda: model.decode_flops(4, budget)):
            with pytest.raises(ValueError, match="budget must be"):
                call()
    cache = model.new_cache()
    model(idx, cache=cache)
    with pytest.raises(ValueError, match="T <= 12"):
        model(tokens(0, T=13), cache=cache)
    cache.fix(24, 2.0)
    for call, words in ((dict(cache=cache), "fixed cache"), (dict(routing="topk"), "routing must be")):
        with pytest.raises(ValueError, match=words):
            model(idx[:, :1], **call)
    with pytest.raises(ValueError, match="fork_layers must be"):
        RIVALS[rival](Config(fork_layers=(1,)))


def test_a_merge_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="merge must be 'last' or 'mean'"):
        peers.Copies(Config(**SMALL), merge="sum")


@every_rival
def test_it_generates_what_reading_everything_anew_would(rival):
    model, idx = rival_model(rival), tokens(0, T=3)
    out = model.generate(idx, 8, temperature=0, budget=3)
    for t in range(3, 11):
        assert torch.equal(model(out[:, :t], budget=3)[0][:, -1].argmax(-1), out[:, t])


# -- under the trainer ------------------------------------------------------------------------------------------------

def trainer_of(tmp_path, make, flags):
    """train.py's trainer on lookup, whose model is make(its model)."""
    argv = ("--dataset lookup --block_size 48 --n_layer 2 --n_head 1 --n_embd 16 --batch_size 2 --max_iters 2 "
            f"--eval_iters 1 --device cpu --out_dir {tmp_path} {flags}")
    s = read_flags(train.Settings, argv.split(), "")
    trainer = train.Trainer(s)
    torch.manual_seed(s.seed)
    trainer.model = trainer.compiled = trainer.parallel = make(trainer.model)
    trainer.optimizer = train.make_optimizer(trainer.model, s, trainer.device)
    return trainer


def assert_trains(tmp_path, make, flags, streams):
    """Two steps change every parameter, alike twice over; evaluation and report work. streams: a range, of 96."""
    ends = []
    for _ in range(2):
        trainer = trainer_of(tmp_path, make, flags)
        before = [p.clone() for p in trainer.model.parameters()]
        for step in (0, 1):
            loss, tok = trainer.train_step(step)
            assert torch.isfinite(loss) and int((tok >= 0).sum()) in streams
        assert not any(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before))
        trainer.model.eval()
        assert "accuracy" in trainer.data.report(trainer.model, 2, trainer.device, 48)
        ends.append((loss.item(), trainer.evaluate(2.0)))
    assert ends[0] == ends[1]


@every_rival
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_trains_it(rival, dtype, tmp_path):
    streams = 96 if rival == "random pauses" else 192
    assert_trains(tmp_path, lambda model: RIVALS[rival](model.config), f"--fork_layers none --budget 2 --dtype {dtype}",
                  range(streams, streams + 1))


@every_control
def test_the_trainer_trains_a_control(control, tmp_path):
    assert_trains(tmp_path, CONTROLS[control], "--fork_layers 0,1 --budget 1.5", range(97, 145))


# -- controls for bubbles ---------------------------------------------------------------------------------------------

def control_model(control, seed=0, **changes):
    return CONTROLS[control](random_model(seed, **changes))


@torch.no_grad()
@every_control
def test_a_control_decodes_from_a_cache_and_a_later_token_changes_no_earlier_logit(control):
    rng = random.Random(control)
    for budget in (1, 1.5, 2.7, 4):
        model, idx = control_model(control, fork_layers=(0, 1, 3)), tokens(0, B=3, T=rng.randint(12, 24))
        full = model(idx, budget=budget)[0]
        for chunks in (split(rng, idx.size(1)), [(t, t + 1) for t in range(idx.size(1))]):
            assert (read_in_chunks(model, idx, chunks, Cache(), budget=budget) - full).abs().max() < 2e-5
        before, after = first_change(model, idx, rng.randint(1, 11), budget)
        assert before < 2e-6 and after > 1e-3


def mix(h):
    h = (h ^ (h >> 16)) * 0x21F0AAAD % 2**32
    h = (h ^ (h >> 15)) * 0x735A2D97 % 2**32
    return h ^ (h >> 15)


def count_random(layers, T, budget, seed):
    """How many streams each token has in the end: fork layers as loops."""
    counts = [1] * T
    for layer in layers:
        extras, owner = [], []
        for t in range(T):
            key = mix((mix(1024 * seed + layer) + t) % 2**32)
            for slot in range(2 * counts[t] - 1):                     # without the last: the original, kept
                extras.append(((mix((key + slot) % 2**32) >> 8) / 2**24, len(owner), t))
                owner.append(t)
        chosen = oracle_choose(extras, T, budget, "causal")
        counts = [1 + sum(owner[slot] == t for slot in chosen) for t in range(T)]
    return counts


def test_random_selection_is_the_rule_with_hashes_for_scores():
    seen = set()
    for seed in range(4):
        model = peers.random_selection(random_model(0, fork_layers=(0, 2, 3)), seed)
        for budget in (1, 1.5, 2.3, 4, 8):
            streams, idx = [], tokens(seed, T=20)
            model(idx, budget=budget, streams=streams)
            wanted = count_random((0, 2, 3), 20, budget, seed)
            assert [np.bincount(tok[tok >= 0]).tolist() for tok in streams[-1][0]] == [wanted] * 2
            seen.add(tuple(wanted) if budget == 2.3 else None)
    assert len(seen) == 5                                             # every seed chose otherwise


def test_random_choices_are_as_likely_for_all_candidates():
    model, tok = random_model(0), torch.arange(3000).repeat_interleave(2).expand(1, -1)
    fork = peers.random_selection(model).forks["1"]
    fork.start, zeros = 0, torch.zeros(tok.shape)
    score = fork.ranking(zeros, zeros, zeros > 0, tok).view(3000, 4)
    assert score.dtype == torch.float32 and np.allclose(score.mean(0), 0.5, rtol=0.05) and len(score.unique()) > 11_900
    assert np.abs(np.corrcoef(score.T.numpy()) - np.eye(4)).max() < 0.1
    later = score[:-1, 0], score[1:, 0]
    assert abs(np.corrcoef(*later)[0, 1]) < 0.1


def test_without_attenuation_scores_do_not_matter_to_the_blocks():
    """At a budget for every fork, other scores change the last block's streams with attenuation, not without."""
    for free in (False, True):
        model, ends = random_model(0), []
        model = peers.no_attenuation(model) if free else model
        model.blocks[-1].register_forward_hook(lambda module, args, out: ends.append(out))
        for _ in range(2):
            model(tokens(0), budget=4)
            for fork in model.forks.values():
                fork.score.weight.data.neg_()
        assert torch.equal(*ends) == free


@every_control
def test_a_control_needs_fork_layers(control):
    with pytest.raises(ValueError, match="fork_layers"):
        control_model(control, fork_layers=())
