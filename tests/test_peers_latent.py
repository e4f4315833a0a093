"""Recurrent depth, PonderLM-2 and PonderLM-3: `python -m pytest tests/test_peers_latent.py`."""
import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from experiments.peers_latent import NOISE, PonderLM2, PonderLM3, RecurrentDepth, predict
from test_tinybubbles import layer_norm, log_softmax, oracle_turn, tokens
from tinybubbles import Config, Tinybubbles
from tools.program import read_flags

BUDGET = {RecurrentDepth: 3.0, PonderLM2: 2.0, PonderLM3: 4.0}
LAYERS = {RecurrentDepth: 4, PonderLM2: 2, PonderLM3: 2}
SMALL = dict(vocab_size=11, block_size=24, n_head=2, n_embd=16, fork_layers=())
all_peers = pytest.mark.parametrize("kind", BUDGET, ids=lambda kind: kind.__name__)


def fresh(kind, **changes):
    """A small peer as training finds it."""
    torch.manual_seed(0)
    return kind(Config(**{**SMALL, "budget": BUDGET[kind], "n_layer": LAYERS[kind], **changes}))


def peer(kind, seed=0, router=8.0, **changes):
    """A small peer with weights large enough that states, exits and predictions differ; some tokens of PonderLM-3 stop.
    """
    model = fresh(kind, **changes).eval()
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1 if p.dim() == 1 else 0.3)
    if kind is PonderLM3:
        model.router.weight.data.mul_(router)
    return model


def exiting(seed=0, threshold=0.2):
    """Recurrent depth whose tokens leave early, each at its own iteration."""
    model = peer(RecurrentDepth, seed, budget=8.0)
    model.exit_kl = threshold
    return model


def ran(model, idx, **call):
    """Positions or iterations that each token ran (B, T)."""
    streams = []
    model(idx, streams=streams, **call)
    return (streams[-1][0].unsqueeze(-1) == torch.arange(idx.size(1))).sum(1)


# -- slow obvious twins: NumPy, one position after another ------------------------------------------------------------

def arrays(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: p.detach().double().numpy() for name, p in named}


def part(w, prefix):
    return {name[len(prefix):]: p for name, p in w.items() if name.startswith(prefix)}


def rms_norm(x, w):
    return x / np.sqrt((x * x).mean() + 1e-6) * w


def twin_attention(u, w, n_head, seen, position, log_w=None):
    """Attention of one position to those seen, [(key, value, log w)], and itself; log_w None: no score channel."""
    q, k, v = (w["attn.qkv.weight"] @ u).reshape(3, n_head, -1)
    d = q.shape[1]
    used, out = d if log_w is None else d - 1, []
    seen.append((np.array([oracle_turn(key, position) for key in k]), v, log_w or 0.0))
    for h in range(n_head):
        query = oracle_turn(q[h], position)[:used]
        weight = np.exp(log_softmax(np.array([query @ k[h][:used] / np.sqrt(d) + b for k, _, b in seen])))
        out.append(sum(p * v[h] for p, (_, v, _) in zip(weight, seen)))
    return w["attn.proj.weight"] @ np.concatenate(out)


def twin_mlp(u, w):
    u = w["mlp.fc.weight"] @ u
    return w["mlp.proj.weight"] @ (0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u ** 3))))


def twin_ponder(model, idx, K):
    """Log-probabilities (T, V) of PonderLM on one text, and the slots that each token ran."""
    w, c, logits, counts = arrays(model), model.config, [], []
    seen = [[] for _ in range(c.n_layer)]

    def hidden(x, position, log_w):
        for l in range(c.n_layer):
            block = part(w, f"blocks.{l}.")
            x = x + twin_attention(layer_norm(x, block["ln_1.weight"]), block, c.n_head, seen[l], position, log_w)
            x = x + twin_mlp(layer_norm(x, block["ln_2.weight"]), block)
        return layer_norm(x, w["ln_f.weight"])

    for t, token in enumerate(idx):
        h = [hidden(w["wte.weight"][token] * np.sqrt(c.n_embd), t + 1, 0.0 if "router.weight" in w else None)]
        if "router.weight" in w:
            s = np.exp(log_softmax(w["router.weight"][:K + 1] @ h[0]))
            for k in range(1, K + 1):
                if s[k:].sum() >= 1e-4:
                    h.append(hidden(h[-1], t + 1, np.log(s[k:].sum())))
        else:
            h.append(hidden(h[0], t + 1, None))
            s = [0, 1]
        counts.append(len(h))
        logits.append(log_softmax(w["wte.weight"] @ sum(share * state for share, state in zip(s, h))))
    return np.array(logits), counts


def twin_recurrent(model, idx, most, exit_kl=None):
    """Log-probabilities (T, V) of recurrent depth on one text, and each token's iterations; at most most[t]."""
    w, c, logits, counts = arrays(model), model.config, [], []
    seen = {l: [] for l in range(c.n_layer)}     # of prelude and coda [(key, value, 0)]; of core that, by iteration

    def sandwich(x, l, position, memory):
        block = part(w, f"blocks.{l}.")
        x = x + twin_attention(rms_norm(x, block["norms.0.weight"]), block, c.n_head, memory, position)
        x = rms_norm(x, block["norms.1.weight"])
        x = x + twin_mlp(rms_norm(x, block["norms.2.weight"]), block)
        return rms_norm(x, block["norms.3.weight"])

    for t, token in enumerate(idx):
        e = sandwich(w["wte.weight"][token] * np.sqrt(c.n_embd), 0, t + 1, seen[0])
        s, before, i = w["noise"][t], None, 0
        mine = {l: [] for l in range(1, c.n_layer - 1)}
        while i < most[t]:
            s = e + s
            for l in mine:
                memory = [earlier[min(i, len(earlier) - 1)] for earlier in seen[l]]
                s = sandwich(s, l, t + 1, memory)
                mine[l].append(memory[-1])
            coda = list(seen[c.n_layer - 1])
            h = sandwich(rms_norm(s, w["ln_s.weight"]), c.n_layer - 1, t + 1, coda)
            now, i = log_softmax(w["wte.weight"] @ rms_norm(h, w["ln_f.weight"])), i + 1
            if exit_kl is not None and before is not None and np.exp(now) @ (now - before) < exit_kl:
                break
            before = now
        seen[c.n_layer - 1] = coda
        for l in mine:
            seen[l].append(mine[l])
        logits.append(now)
        counts.append(i)
    return np.array(logits), counts


@pytest.mark.parametrize("kind, budget", [(PonderLM2, 2), (PonderLM3, 4), (PonderLM3, 2), (PonderLM3, 1)])
def test_ponderlm_is_its_equations(kind, budget):
    counts = []
    for seed in range(3):
        model, idx = peer(kind, seed, router=10.0), tokens(seed, B=1, T=9)
        expected, slots = twin_ponder(model, idx[0].tolist(), budget - 1)
        assert np.abs(model(idx, budget=budget)[0][0].detach().numpy() - expected).max() < 5e-5
        assert ran(model, idx, budget=budget)[0].tolist() == slots
        counts += slots
    assert set(counts) == {PonderLM2: {2}, PonderLM3: set(range(1, budget + 1))}[kind]


@pytest.mark.parametrize("r", [1, 2, 5])
def test_recurrent_depth_is_its_equations(r):
    for seed in range(3):
        model, idx = peer(RecurrentDepth, seed, n_layer=3 + seed), tokens(seed, B=1, T=8)
        expected, _ = twin_recurrent(model, idx[0].tolist(), [r] * 8)
        assert np.abs(model(idx, budget=r)[0][0].detach().numpy() - expected).max() < 5e-5
        assert (ran(model, idx, budget=r) == r).all()


def test_a_token_leaves_when_its_prediction_settles_and_is_attended_to_at_its_latest_iteration():
    counts = []
    for seed in range(2):
        model, idx = exiting(seed), tokens(seed, B=1, T=8)
        expected, iterations = twin_recurrent(model, idx[0].tolist(), [8] * 8, model.exit_kl)
        assert np.abs(model(idx)[0][0].numpy() - expected).max() < 5e-5
        assert ran(model, idx)[0].tolist() == iterations
        counts += iterations
    assert len(set(counts)) >= 3 and min(counts) >= 2 and max(counts) <= 8
    model.exit_kl = 0.0
    assert (ran(model, idx) == 8).all()


def test_a_cache_serves_calls_of_different_iterations():
    model, idx, cache = peer(RecurrentDepth), tokens(0, B=2, T=9), None
    cache, logits, most = model.new_cache(), [], []
    for chunk, r in zip(idx.split([3, 2, 1, 3], 1), (2, 5, 1, 4)):
        logits.append(model(chunk, budget=r, cache=cache)[0])
        most += [r] * chunk.size(1)
    for b in range(2):
        expected, _ = twin_recurrent(model, idx[b].tolist(), most)
        assert np.abs(torch.cat(logits, 1)[b].detach().numpy() - expected).max() < 5e-5


# -- properties of all ------------------------------------------------------------------------------------------------

def variants(kind):
    """A peer of this kind, and one of it whose tokens differ in what they run."""
    return [peer(kind), {RecurrentDepth: exiting, PonderLM2: lambda: peer(PonderLM2, 1),
                         PonderLM3: lambda: peer(PonderLM3, 1, router=12.0)}[kind]()]


@all_peers
def test_cached_is_full_however_the_text_is_cut_up(kind):
    rng = random.Random(0)
    for model in variants(kind):
        idx, streams = tokens(2, B=3, T=10), []
        full = model(idx, streams=streams)[0]
        for _ in range(2):
            cuts = sorted(rng.sample(range(1, 10), rng.randint(1, 5)))
            cache, seen, parts = model.new_cache(), [], []
            for chunk in idx.tensor_split(cuts, 1):
                parts.append(model(chunk, cache=cache, streams=seen)[0])
            assert (torch.cat(parts, 1) - full).abs().max() < 2e-5 and cache.length == 10
            assert (torch.cat([tok for tok, _ in seen], 1) == streams[0][0]).all()
        alone = torch.cat([model(row)[0] for row in idx.split(1)])
        assert (alone - full).abs().max() < 2e-5


@all_peers
def test_a_later_token_never_changes_an_earlier_logit(kind):
    for model in variants(kind):
        idx = tokens(3, B=2, T=12)
        before = model(idx)[0]
        for t in (1, 6):
            edited = idx.clone()
            edited[:, t] = (edited[:, t] + 1) % 11
            change = (model(edited)[0] - before).abs().amax((0, 2))
            assert (change[:t] < 2e-5).all() and (change[t:] > 1e-3).all()


@all_peers
def test_training_is_causal_too(kind):
    """The gradient of one token's loss reaches no later token's embedding."""
    model = peer(kind).train()
    idx, targets = torch.arange(11).unsqueeze(0), torch.full((1, 11), -1)
    targets[0, 4] = 7
    inputs = []
    model.wte.register_forward_hook(lambda module, args, out: inputs.append(out) or out.retain_grad())
    model(idx, targets)[1].backward()
    reached = inputs[0].grad.abs().sum(-1)[0] > 0
    assert reached.tolist() == [True] * 5 + [False] * 6


@all_peers
def test_losses_are_those_of_the_log_probabilities_and_targets_of_minus_one_do_not_count(kind):
    model, idx, targets = peer(kind), tokens(4), tokens(5)
    targets[:, ::3] = -1
    logits, nothing = model(idx)
    assert nothing is None and torch.allclose(logits.exp().sum(-1), torch.ones(2, 12), atol=1e-5)
    expected = F.nll_loss(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert model(idx, targets)[0] is None and torch.allclose(model(idx, targets)[1], expected, atol=1e-5)
    assert model(idx, torch.full_like(idx, -1))[1] == 0


@all_peers
def test_gradients_reach_every_parameter(kind):
    model = fresh(kind).train()
    model(tokens(0), tokens(1))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_recurrent_depth_starts_as_its_paper_says():
    """Variances 2 / 5D, and 1 / 5DL of what is added, of L = 1 + 3 * 2 + 1 blocks; gains of 1."""
    for name, p in fresh(RecurrentDepth).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
        else:
            variance = 1 / (5 * 16 * 8) if "proj" in name else 2 / (5 * 16)
            assert p.var().item() == pytest.approx(variance, rel=0.3), name


@pytest.mark.parametrize("kind", [PonderLM2, PonderLM3])
def test_the_start_of_ponderlm_is_gpt_2s_but_for_the_embedding(kind):
    """The same weights as those of a GPT with the same seed; gains of 1; the router's as any other matrix; embeddings,
    times sqrt(D), have entries of about 1."""
    names = dict(fresh(kind).named_parameters())
    torch.manual_seed(0)
    gpt = dict(Tinybubbles(Config(**SMALL, n_layer=LAYERS[kind])).named_parameters())
    matrices = {name for name, p in names.items() if p.dim() == 2} - {"router.weight"}
    assert matrices == {name for name, p in gpt.items() if p.dim() == 2}
    assert all((names[name] == gpt[name]).all() for name in matrices - {"wte.weight"})
    assert 0.8 < math.sqrt(SMALL["n_embd"]) * names["wte.weight"].std() < 1.2
    assert all((p == 1).all() for name, p in names.items() if p.dim() == 1)
    assert kind is not PonderLM3 or 0.01 < names["router.weight"].std() < 0.03


@all_peers
def test_what_a_peer_cannot_do_is_refused(kind):
    model, idx = peer(kind), tokens(0)
    for budget in (0, 1.5, math.inf, True, "2", *dict.fromkeys([1, 3] if kind is PonderLM2 else []),
                   *([5] if kind is PonderLM3 else [])):
        with pytest.raises(ValueError, match="budget"):
            model(idx, budget=budget)
    with pytest.raises(ValueError, match="budget"):
        fresh(kind, budget=2.5)
    with pytest.raises(ValueError, match="routing"):
        model(idx, routing="topk")
    with pytest.raises(ValueError, match="idx"):
        model(torch.zeros(1, 25, dtype=torch.long))
    cache = model.new_cache()
    model(idx, cache=cache)
    cache.fixed = True
    with pytest.raises(ValueError, match="fixed"):
        model(idx[:, :1], cache=cache)


def test_too_few_layers_or_positions_are_refused():
    with pytest.raises(ValueError, match="n_layer"):
        fresh(RecurrentDepth, n_layer=2)
    for kind, budget in ((PonderLM2, 3), (PonderLM3, 1)):
        with pytest.raises(ValueError, match="budget"):
            fresh(kind, budget=budget)


@all_peers
def test_generation_takes_the_likeliest_token_of_the_full_forward(kind):
    for model in variants(kind):
        text = model.generate(tokens(6, T=5), 6, temperature=0)
        assert (model(text[:, :-1])[0].argmax(-1)[:, 4:] == text[:, 5:]).all()


@all_peers
def test_a_step_and_an_evaluation_of_train_py(kind, tmp_path):
    flags = ("--dataset lookup --block_size 48 --n_layer 3 --n_head 1 --n_embd 16 --fork_layers none --batch_size 2 "
             f"--eval_iters 1 --device cpu --budget {BUDGET[kind]} --out_dir {tmp_path}").split()
    s = read_flags(train.Settings, flags, "")
    trainer = train.Trainer(s)
    model = trainer.model = trainer.compiled = trainer.parallel = kind(trainer.model.config)
    trainer.optimizer = train.make_optimizer(model, s, trainer.device)
    before = [p.detach().clone() for p in model.parameters()]
    losses, tok = zip(*(trainer.train_step(step) for step in range(2)))
    assert all(math.isfinite(loss) for loss in losses)
    assert all((p != old).any() for p, old in zip(model.parameters(), before))
    assert all((t >= 0).sum() % (2 * 48) == 0 for t in tok)
    model.eval()
    assert 0 < trainer.evaluate(BUDGET[kind]) < 10
    assert "streams" in trainer.data.report(model, BUDGET[kind], trainer.device, 48)


# -- FLOPs ------------------------------------------------------------------------------------------------------------

def counted(function):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@all_peers
def test_decoding_flops_are_those_that_torch_counts(kind):
    for T in (1, 7):
        model, idx = peer(kind, router=0.1), tokens(0, B=1, T=T)
        cache = model.new_cache()
        assert counted(lambda: [model(token, cache=cache) for token in idx.split(1, 1)]) == model.decode_flops(T)


def test_decoding_flops_of_the_positions_that_were_run():
    model, idx = peer(PonderLM3), tokens(1, B=1, T=12)
    positions = int(ran(model, idx).sum())
    assert 12 < positions < 48
    assert counted(lambda: model(idx)) == model.decode_flops(12, positions=positions) < model.decode_flops(12)


@pytest.mark.parametrize("r", [1, 5])
def test_forward_flops_of_recurrent_depth_are_those_that_torch_counts(r):
    model, idx = peer(RecurrentDepth), tokens(0, B=1)
    assert counted(lambda: model(idx, budget=r)) == model.forward_flops(12, r)


@pytest.mark.parametrize("kind", [PonderLM2, PonderLM3])
def test_forward_flops_of_ponderlm_are_those_of_a_pass_over_all_slots(kind):
    model, T, N = peer(kind), 12, 12 * int(BUDGET[kind])
    rotation = model.rotation(N, 0, "cpu")

    def one_pass():
        h = model.hidden(torch.randn(1, N, 16), rotation, torch.zeros(1, N))
        model.gates(h[:, :T], N // T - 1)
        predict(h[:, :T], model.wte.weight, None)
    assert counted(one_pass) == model.forward_flops(T) == model.forward_flops(T, BUDGET[kind])


@pytest.mark.parametrize("kind", [PonderLM2, PonderLM3])
def test_training_flops_of_ponderlm_are_those_that_torch_counts(kind):
    model, totals = peer(kind).train(), []
    for sweeps in (2, 3):
        model.sweeps = (sweeps,)
        totals.append(counted(lambda: model(tokens(0, B=1), tokens(1, B=1))[1].backward()))
        assert totals[-1] == model.train_flops(12)
    model.sweeps = (2, 3)
    assert model.train_flops(12) == sum(totals) / 2


def test_training_flops_of_recurrent_depth_are_those_that_torch_counts():
    """Counted for each r; then its mean over the r that are drawn, which training's formula integrates."""
    model, total = peer(RecurrentDepth, budget=6.0).train(), {}
    torch.manual_seed(1)
    draws = np.array([model.draw(6) for _ in range(4000)])
    for r in (1, 8, 9, 12):
        model.draw = lambda mean, r=r: r
        total[r] = counted(lambda: model(tokens(0, B=1), tokens(1, B=1))[1].backward())
    with_gradient, without = (total[8] - total[1]) / 7, total[9] - total[8]
    assert with_gradient == 3 * without and total[12] == total[9] + 3 * without
    mean = total[1] + np.mean((draws.clip(max=8) - 1) * with_gradient + (draws - 8).clip(min=0) * without)
    assert model.train_flops(12) == pytest.approx(mean, rel=0.02)


# -- recurrent depth --------------------------------------------------------------------------------------------------

def test_iterations_are_poisson_of_a_lognormal_and_one():
    """Mean m + 1; variance m + m^2 (e^(1/4) - 1)."""
    torch.manual_seed(0)
    model = peer(RecurrentDepth)
    for m in (1, 8):
        draws = np.array([model.draw(m) for _ in range(4000)])
        assert draws.min() == 1 and draws.mean() == pytest.approx(m + 1, rel=0.03)
        assert draws.var() == pytest.approx(m + m * m * math.expm1(0.25), rel=0.15)


def test_iterations_are_drawn_in_training_with_targets_only():
    model, idx = peer(RecurrentDepth, budget=8.0), tokens(0)
    seen = {training: {int(ran(model.train(training), idx, targets=targets)[0, 0]) for _ in range(6)}
            for training in (True, False) for targets in [idx]}
    assert len(seen[True]) > 1 and seen[False] == {8}
    assert (ran(model.train(), idx) == 8).all()


def test_the_first_state_is_truncated_noise_drawn_in_training_and_a_table_otherwise():
    model, states = peer(RecurrentDepth, block_size=24), []
    assert model.noise.std().item() == pytest.approx(NOISE, rel=0.1) and model.noise.abs().max() <= 3 * NOISE
    assert (model.noise == peer(RecurrentDepth, 5).noise).all() and "noise" not in model.state_dict()
    model.blocks[1].register_forward_hook(lambda module, args, out: states.append(args[0].detach()))
    model.draw = lambda mean: 1
    model.blocks[0].register_forward_hook(lambda module, args, out: out * 0)
    for training in (True, False):
        model.train(training)
        for _ in range(2):
            model(tokens(0), tokens(0), budget=1)
    drawn, again, table, same = states
    assert drawn.abs().max() <= 3 * NOISE and drawn.std().item() == pytest.approx(NOISE, rel=0.1)
    assert (drawn != again).all()
    assert (table == same).all() and (table == model.noise[:12]).all()


def test_the_first_iterations_give_no_gradient_but_their_state_and_the_prelude_keeps_its_own():
    model, idx = peer(RecurrentDepth).train(), tokens(0)
    model.draw = lambda mean: 11
    torch.manual_seed(7)
    loss = model(idx, idx)[1]
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(7)
    e, rotation, _ = model.prelude(idx, 0, None)
    s = torch.nn.init.trunc_normal_(torch.empty(2, 12, 16), 0, NOISE, -3 * NOISE, 3 * NOISE)
    for i in range(11):
        x = e + s if i >= 3 else (e + s).detach()
        for block in model.blocks[1:-1]:
            x = block(x, torch.ones(1, 1, 1), None, rotation, None)
        s = x if i >= 3 else x.detach()
    again = predict(model.coda(s, rotation, None), model.wte.weight, idx)[1]
    again.backward()
    assert torch.allclose(loss, again, atol=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, got[name], atol=1e-5, rtol=1e-3), name
    assert got["blocks.0.mlp.fc.weight"].abs().sum() > 0


# -- PonderLM ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, sweeps", [(PonderLM2, 8), (PonderLM3, 24)])
def test_as_many_sweeps_as_latent_slots_are_the_sequential_reading(kind, sweeps):
    """Fewer are exact as far as they reach: token t is, t counted from 1, after K t - 1 sweeps."""
    model, idx = peer(kind, router=0.3), tokens(0, T=8)
    K, emb = sweeps // 8, model.wte(idx) * 4
    sequential = model(idx, cache=model.new_cache())[0]
    for j in (sweeps, sweeps // 8):
        h, _ = model.sweep(emb, K, j)
        change = (predict(h, model.wte.weight, None)[0] - sequential).abs().amax((0, 2))
        exact = (j + 1) // K
        assert (change[:exact] < 2e-5).all() and (j == sweeps or change[exact:].max() > 1e-4)


def test_sweeps_end_early_only_when_nothing_changes():
    model, idx, passes = fresh(PonderLM2).eval(), tokens(0, T=12), []
    model.ln_f.register_forward_hook(lambda *args: passes.append(1))
    assert (model(idx)[0] - model(idx, cache=model.new_cache())[0]).abs().max() < 2e-5
    settled = len(passes) - 2 * 12                                    # the cached reading takes two passes a token
    assert 2 < settled < 12
    wild = peer(PonderLM2, 3)
    assert (wild(idx)[0] - wild(idx, cache=wild.new_cache())[0]).abs().max() < 2e-5


@pytest.mark.parametrize("kind", [PonderLM2, PonderLM3])
def test_training_draws_its_sweeps_and_runs_all_slots(kind):
    model, idx, drawn = peer(kind).train(), tokens(0), []
    sweep = model.sweep
    model.sweep = lambda emb, K, sweeps, *rest: drawn.append(sweeps) or sweep(emb, K, sweeps, *rest)
    counts = [ran(model, idx, targets=idx) for _ in range(12)]
    assert set(drawn) == {2, 3} and all((count == BUDGET[kind]).all() for count in counts)


def test_the_last_sweep_of_training_is_the_prediction_of_its_states():
    """One sweep by hand, from PonderLM-3's equations on explicit attention logits, for every slot of every token."""
    model, idx = peer(PonderLM3, router=0.3), tokens(0, B=1, T=6)
    w, K, T = arrays(model), 3, 6
    emb = [w["wte.weight"][i] * 4 for i in idx[0].tolist()]
    slots, log_w, s = [[x] for x in emb], [[0.0]] * T, None
    for sweep in range(3):                                            # the embeddings alone, one sweep, the last pass
        seen, states = [[] for _ in range(2)], []
        for t in range(T):
            states.append([])
            for x, bias in zip(slots[t], log_w[t]):
                for l in range(2):
                    block = part(w, f"blocks.{l}.")
                    x = x + twin_attention(layer_norm(x, block["ln_1.weight"]), block, 2, seen[l], t + 1, bias)
                    x = x + twin_mlp(layer_norm(x, block["ln_2.weight"]), block)
                states[t].append(layer_norm(x, w["ln_f.weight"]))
        s = [np.exp(log_softmax(w["router.weight"] @ h[0])) for h in states]
        log_w = [[0.0] + [np.log(share[k:].sum()) for k in (1, 2, 3)] for share in s]
        slots = [[emb[t], *(h[:K] if len(h) > 1 else h * K)] for t, h in enumerate(states)]
    expected = [sum(share * h for share, h in zip(s[t], states[t])) for t in range(T)]
    h, given = model.sweep(model.wte(idx) * 4, K, 1)
    assert np.abs(h[0].detach().numpy() - expected).max() < 5e-5
    assert np.abs(given[0].detach().numpy() - log_w).max() < 5e-5


def test_the_penalty_is_on_the_mean_number_of_latent_slots_in_training_alone():
    model, idx = peer(PonderLM3), tokens(0)
    model.sweeps, losses = (2,), {}
    for training in (True, False):
        model.train(training)
        for model.penalty in (0.0, 0.5):
            losses[training, model.penalty] = model(idx, idx)[1].item()
    _, log_w = model.sweep(model.wte(idx) * 4, 3, 2)
    mean = log_w.exp().sum(-1).mean().item() - 1                      # w_0 = 1
    assert losses[True, 0.5] - losses[True, 0.0] == pytest.approx(0.5 * mean, abs=1e-5)
    assert losses[False, 0.5] == losses[False, 0.0] and 0 < mean < 3


def test_a_slot_that_is_not_run_is_not_cached():
    model, idx = peer(PonderLM3), tokens(0, B=3)
    cache = model.new_cache()
    model(idx, cache=cache)
    assert (cache.count[0][:, 0] == ran(model, idx).sum(1)).all() and len(set(ran(model, idx).sum(1).tolist())) > 1
