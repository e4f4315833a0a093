"""The rivals of experiments/rivals.py, each against its definition: `python -m pytest tests/test_rivals.py`."""
import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments import rivals
from experiments.compare import ARMS, count_flops, decode
from tasks.urns import Urns
from test_tinybubbles import SMALL, layer_norm, log_softmax, rotate, random_model, tokens
from tinybubbles import Config, Streams
from tools.program import read_flags
from train import Settings as TrainSettings
from train import Trainer, measure_bars

PLAIN = dict(fork_layers=())
KINDS = {   # class: configuration, budgets to read at, positions that pass through all blocks for one generated token
    rivals.Copies: (PLAIN | dict(budget=3.0), (1, 3), lambda n: n),
    rivals.Pauses: (PLAIN | dict(budget=3.0), (1, 3), lambda n: n),
    rivals.RandomPauses: (PLAIN | dict(budget=3.0), (1, 3), lambda n: n),
    rivals.RecurrentDepth: (PLAIN | dict(budget=3.0), (1, 3), lambda n: (2 + 2 * n) / 4),
    rivals.PonderLM2: (PLAIN, (2,), lambda n: n),
    rivals.PonderLM3: (PLAIN | dict(budget=3.0), (1, 3), lambda n: n),
    rivals.RandomSelection: ({}, (1, 1.5, 3), None),
    rivals.Hand: (dict(budget=8.0), (8,), None),                       # of so few words all are hard
    rivals.HandMixture: (dict(budget=8.0), (8,), None),
    **{kind: ({}, (1, 1.5, 3), None) for kind in (
        rivals.Mixture, rivals.RandomMixture, rivals.FadingNoise, rivals.RandomFirst, rivals.Charged)},
    # Sure forks of the first layer stay, and are served first: at a budget of 2 the second one has no room for its own.
    rivals.SureCharged: (dict(budget=3.0), (1, 1.5, 3), None),
    rivals.Floor: (dict(budget=3.0), (1, 1.5, 3), None),
}
EACH = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def make(kind, seed=0):
    model = random_model(seed, kind, **KINDS[kind][0])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norms" in name or name == "ln_s.weight":
                p.add_(1)                                             # an RMSNorm's gain, not a LayerNorm's
    return model.double()


@EACH
def test_no_later_token_changes_an_earlier_logit(kind):
    for seed in range(3):
        model, idx = make(kind, seed), tokens(seed, T=10)
        for budget in KINDS[kind][1]:
            full = model(idx, budget=budget)[0]
            for t in (1, 4, 9):
                other = idx.clone()
                other[:, t] = (other[:, t] + 1) % 11
                changed = (model(other, budget=budget)[0] - full).abs().amax((0, 2))
                assert changed[:t].max() < 2e-5 and changed[t] > 1e-4


@EACH
def test_cached_logits_are_the_full_ones_for_any_chunks(kind):
    for seed in range(3):
        model, idx = make(kind, seed), tokens(seed, B=3, T=14)
        for budget in KINDS[kind][1]:
            full, cache = model(idx, budget=budget)[0], model.new_cache(3, budget)
            parts = [model(idx[:, a:b], budget=budget, cache=cache)[0] for a, b in ((0, 5), (5, 6), (6, 7), (7, 14))]
            assert (torch.cat(parts, 1) - full).abs().max() < 2e-5
            assert (decode(model, idx, budget) - full).abs().max() < 2e-5
            if issubclass(kind, rivals.Mixture):                      # whose logits are log-probabilities
                assert full.exp().sum(-1).sub(1).abs().max() < 1e-5


@EACH
def test_after_a_call_that_fails_the_same_call_gives_the_right_logits(kind):
    """It fails in the first run of a block, in one half way through, or in the last."""
    model, idx, budget = make(kind), tokens(0, B=3, T=9), KINDS[kind][1][-1]
    full, cache, runs = model(idx, budget=budget)[0], model.new_cache(3, budget), []

    def run_block(block, args, x):
        runs.append(block)
        if len(runs) == fails_at:
            raise InterruptedError

    for block in model.blocks:
        block.register_forward_hook(run_block)
    read = lambda a, b: model(idx[:, a:b], budget=budget, cache=cache)[0]
    fails_at = None
    read(0, 5), runs.clear(), read(5, 9)
    for fails_at in (1, len(runs) // 2, len(runs)):
        cache.clear()
        runs[:] = [None] * fails_at                                   # no failure here
        read(0, 5), runs.clear()
        with pytest.raises(InterruptedError):
            read(5, 9)
        assert cache.length == 5 and (read(5, 9) - full[:, 5:]).abs().max() < 2e-5


@EACH
def test_gradient_reaches_every_parameter(kind):
    torch.manual_seed(0)
    model, idx, targets = make(kind).train(), tokens(1, T=12), tokens(2, T=12)
    loss = sum(model(idx, targets)[1] for _ in range(4))              # pauses and iterations are drawn
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any(), name


@EACH
def test_it_generates_as_its_forward_predicts(kind):
    model, idx = make(kind), tokens(3, T=5)
    out = model.generate(idx, 8, temperature=0)
    assert torch.equal(out[:, 5:], model(out[:, :-1])[0][:, 4:].argmax(-1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]], ids=lambda kind: kind.__name__)
def test_flops_are_those_of_the_positions_that_are_run(kind):
    """By PyTorch's counter, over a text read token by token; S, the cache's slots, take part in each attention."""
    model, idx, V, D, L = make(kind), tokens(0, B=1), 11, 16, 4
    for n in KINDS[kind][1]:
        S, positions = model.new_cache(1, n).kv[0].size(3), KINDS[kind][2](n)
        counted = count_flops(lambda: decode(model, idx, n)) / idx.size(1)
        router = 2 * D * n * (kind is rivals.PonderLM3)
        assert counted == positions * L * (24 * D * D + 4 * S * D) + 2 * D * V + router


def test_a_rival_refuses_forks_and_parts_of_a_position():
    for config, budget in ((dict(fork_layers=(1,)), 2), (PLAIN, 1.5)):
        with pytest.raises(ValueError, match="fork_layers .* whole budget"):
            rivals.Copies(Config(**SMALL | config))(tokens(0), budget=budget)


# -- twins, in NumPy, from the definitions ----------------------------------------------------------------------------

def twin(model, x, position, sees, add=None, layers=None):
    """x (N, D) through GPT blocks: position i stands at position[i], sees j where sees[i][j], and adds add[j] to its
    logit; with a score channel if `add` is given. States before the last norm."""
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    H, N = model.config.n_head, len(x)
    for l in range(model.config.n_layer) if layers is None else layers:
        w = lambda name: weights[f"blocks.{l}.{name}.weight"]
        q, k, v = np.stack([w("attn.qkv") @ layer_norm(u, w("ln_1")) for u in x], 1).reshape(3, H, -1, N)
        out = np.zeros((N, H, x.shape[1] // H))
        d = out.shape[-1]
        used = d - (add is not None)
        for h in range(H):
            for i in range(N):
                js = [j for j in range(N) if sees[i][j]]
                turned = rotate(q[h, :, i], position[i])[:used]
                logits = [turned @ rotate(k[h, :, j], position[j])[:used] / math.sqrt(d)
                          + (0 if add is None else add[j]) for j in js]
                out[i, h] = np.exp(log_softmax(np.array(logits))) @ v[h, :, js]
        x = x + out.reshape(N, -1) @ w("attn.proj").T
        u = np.stack([w("mlp.fc") @ layer_norm(u, w("ln_2")) for u in x])
        x = x + (0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u ** 3)))) @ w("mlp.proj").T
    return x


def predictions(model, x):
    """Log-probabilities of states (T, D) that are not normed yet."""
    W, w = model.wte.weight.detach().double().numpy(), model.ln_f.weight.detach().double().numpy()
    return np.stack([log_softmax(W @ layer_norm(u, w)) for u in x])


def agrees(model, idx, budget, expected):
    log_probs = model(idx, budget=budget)[0][0].log_softmax(-1)
    assert np.abs(log_probs.detach().numpy() - expected).max() < 5e-5


def causal(N):
    return np.tril(np.ones((N, N), dtype=bool))


def test_copies_are_a_gpt_over_repeated_embeddings():
    model, idx, n = make(rivals.Copies), tokens(0, B=1, T=7), 3
    x = model.wte.weight.detach().double().numpy()[idx[0]].repeat(n, 0)
    x = twin(model, x, [(i + 1) / n for i in range(7 * n)], causal(7 * n)).reshape(7, n, -1)
    agrees(model, idx, n, predictions(model, x.sum(1)))


def test_pauses_stand_at_their_tokens_position_and_the_last_predicts():
    model, idx, n = make(rivals.Pauses), tokens(0, B=1, T=7), 3
    x = model.wte.weight.detach().double().numpy()[idx[0]]
    pause = model.pause.detach().double().numpy()
    x = np.stack([u for token in x for u in (token, pause, pause)])
    x = twin(model, x, [i // n + 1 for i in range(7 * n)], causal(7 * n))
    agrees(model, idx, n, predictions(model, x[n - 1::n]))


def test_appended_pauses_follow_each_prefix_as_if_it_were_the_whole_text():
    model, idx, n = make(rivals.RandomPauses), tokens(0, B=1, T=7), 3
    x, pause = model.wte.weight.detach().double().numpy()[idx[0]], model.pause.detach().double().numpy()
    last = []
    for t in range(1, 8):
        prefix = np.stack([*x[:t], pause, pause])
        last.append(twin(model, prefix, range(1, t + n), causal(t + n - 1))[-1])
    agrees(model, idx, n, predictions(model, last))


def test_random_pauses_in_training_are_read_like_tokens_and_never_a_target():
    """A tenth of what is read are pauses, none first; no token is lost before the cut, nor its target."""
    model, T = make(rivals.RandomPauses).train(), 20
    idx, targets = tokens(0, B=64, T=T), tokens(1, B=64, T=T)
    read, wanted = model.insert(idx, targets)
    pause = read == -1
    assert not pause[:, 0].any() and 0.06 < pause.float().mean() < 0.12 and pause.sum(1).max() == 2
    assert torch.equal(read[~pause], idx.gather(1, (~pause).cumsum(1) - 1)[~pause])
    for row in range(64):
        for i in range(T - 1):
            at = int((~pause[row, :i + 1]).sum()) - 1
            assert wanted[row, i] == (-1 if pause[row, i + 1] else targets[row, at])
    log_probs = model.read(read, 1, None, None)[0].log_softmax(-1)
    found = log_probs.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    model.insert = lambda *given: (read, wanted)
    assert model(idx, targets)[1].item() == pytest.approx(-found[wanted != -1].mean().item())
    x = model.wte.weight.detach().double().numpy()[read[0]]
    x[pause[0]] = model.pause.detach().double().numpy()
    expected = predictions(model, twin(model, x, range(1, T + 1), causal(T)))
    assert np.abs(found[0].detach().numpy() - expected[range(T), wanted[0].clamp(min=0)]).max() < 5e-5


def test_recurrent_depth_is_its_definition():
    model, idx = make(rivals.RecurrentDepth), tokens(0, B=1, T=6)
    weights = {name: p.detach().double() for name, p in model.state_dict().items()}
    rms = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w

    def block(l, x):
        norms = [weights[f"blocks.{l}.norms.{i}.weight"] for i in range(4)]
        q, k, v = (rms(x, norms[0]) @ weights[f"blocks.{l}.attn.qkv.weight"].T).view(6, 3, 2, 8).permute(1, 2, 0, 3)
        q, k = (torch.from_numpy(np.stack([[rotate(u.numpy(), t + 1) for t, u in enumerate(head)] for head in z]))
                for z in (q, k))
        y = (q @ k.mT / math.sqrt(8)).masked_fill(~torch.from_numpy(causal(6)), -math.inf).softmax(-1) @ v
        x = rms(x + y.transpose(0, 1).reshape(6, 16) @ weights[f"blocks.{l}.attn.proj.weight"].T, norms[1])
        y = F.gelu(rms(x, norms[2]) @ weights[f"blocks.{l}.mlp.fc.weight"].T, approximate="tanh")
        return rms(x + y @ weights[f"blocks.{l}.mlp.proj.weight"].T, norms[3])

    e, s = block(0, weights["wte.weight"][idx[0]] * 4), weights["noise"][:6]
    for _ in range(3):
        s = block(2, block(1, e + s))
    h = rms(block(3, rms(s, weights["ln_s.weight"])), weights["ln_f.weight"])
    agrees(model, idx, 3, (h @ weights["wte.weight"].T).log_softmax(-1).numpy())


def test_a_token_that_leaves_early_stands_as_of_its_latest_iteration():
    """All leave after two iterations: a model of two. None leaves: the model itself. Some: what is kept is as of then.
    """
    model, idx = make(rivals.RecurrentDepth), tokens(0, B=3, T=9)
    for limit, same in ((math.inf, 2), (-1.0, 3)):
        model.exit_kl = limit
        assert (decode(model, idx, 3) - model(idx, budget=same)[0]).abs().max() < 2e-5
    model.exit_kl, cache, left = 0.1, model.new_cache(3, 3), []
    for t in range(9):
        model(idx[:, t:t + 1], budget=3, cache=cache)
        late, second = (cache.kv[model.layer_in_cache(1, i)][:, :, :, t] for i in (2, 1))      # (2, B, H, d)
        left.append((late == second).all(-1).all(-1).all(0))
    left = torch.stack(left)
    assert left.any() and not left.all()


def test_iterations_are_drawn_as_published():
    model, drawn = make(rivals.RecurrentDepth).train(), []
    model.core, model.coda = lambda x, streams, slots, i: drawn.append(i) or x, lambda s, *rest: s
    torch.manual_seed(0)
    for _ in range(400):
        model(tokens(0, B=1, T=1), tokens(1, B=1, T=1))
    assert drawn.count(0) == 400 and len(drawn) / 400 == pytest.approx(4, rel=0.1)            # budget + 1


def ponder_twin(model, idx, n):
    """Slot by slot, all earlier slots anew: log-probabilities (T, V)."""
    W, ln = model.wte.weight.detach().double().numpy(), model.ln_f.weight.detach().double().numpy()
    xs, position, log_w, out = [], [], [], []
    for t, token in enumerate(idx[0].tolist()):
        x, total = W[token] * 4.0, 0.0
        share, w = np.array([0.0] * (n - 1) + [1.0]), np.zeros(n)
        for k in range(n):
            if w[k] < math.log(1e-4):
                break
            xs, position, log_w = [*xs, x], [*position, t + 1], [*log_w, w[k]]
            add = np.array(log_w) if isinstance(model, rivals.PonderLM3) else None
            x = layer_norm(twin(model, np.stack(xs), position, causal(len(xs)), add)[-1], ln)
            if k == 0 and isinstance(model, rivals.PonderLM3):
                share = np.exp(log_softmax(model.router.weight.detach().double().numpy()[:n] @ x))
                w = np.log([1.0] + [share[j:].sum() for j in range(1, n)])
            total = total + share[k] * x
        out.append(log_softmax(W @ total))
    return np.array(out)


@pytest.mark.parametrize("kind", [rivals.PonderLM2, rivals.PonderLM3], ids=lambda kind: kind.__name__)
def test_latent_slots_are_read_one_after_the_other(kind):
    model, idx = make(kind), tokens(0, B=1, T=6)
    for scale in (1, 30) if kind is rivals.PonderLM3 else (1,):        # 30: some tokens stop early
        if kind is rivals.PonderLM3:
            model.router.weight.data.mul_(scale)
        for n in KINDS[kind][1]:
            agrees(model, idx, n, ponder_twin(model, idx, n))


@pytest.mark.parametrize("kind", [rivals.PonderLM2, rivals.PonderLM3], ids=lambda kind: kind.__name__)
def test_enough_sweeps_of_training_are_the_exact_reading(kind):
    model, idx, targets = make(kind), tokens(0, T=6), tokens(1, T=6)
    model.sweeps = (6 * 3,)
    exact = model(idx, targets)[1]
    assert model.train()(idx, targets)[1].item() == pytest.approx(exact.item(), abs=2e-4)
    model.sweeps = (0,)
    assert model(idx, targets)[1].item() != pytest.approx(exact.item(), abs=2e-3)
    if kind is rivals.PonderLM3:
        free = model(idx, targets)[1]
        model.charge = 0.5
        slots = (model(idx, targets)[1] - free).item() / 0.5
        assert 0 < slots < 2


def streams_of(model, idx, budget):
    """The owners of the last block's streams, (B, N)."""
    trace = []
    model(idx, budget=budget, trace=trace)
    return trace[-1][0]


def test_random_selection_spends_the_same_and_ignores_what_is_said():
    model, idx = make(rivals.RandomSelection), tokens(0, B=4, T=24)
    for fork in model.forks.values():
        fork.bar.fill_(math.log(0.5))
    owner = streams_of(model, idx, 1.5)
    assert torch.equal(owner, streams_of(model, tokens(5, B=4, T=24), 1.5))
    assert torch.equal(owner, owner[:1].expand(4, -1))
    other = make(rivals.RandomSelection, seed=1)
    for fork in other.forks.values():
        fork.bar.fill_(math.log(0.5))
    assert not torch.equal(owner, streams_of(other, idx, 1.5))
    count = torch.bincount(streams_of(make(rivals.RandomSelection), idx, 3)[0])
    assert count.min() >= 1 and len(set(count.tolist())) > 1


def test_the_hand_places_three_forks_at_every_hard_token_within_a_budget_of_one_and_a_half():
    data = Urns(read_flags(TrainSettings, ["--dataset", "urns", "--block_size", "16"], ""))
    idx = torch.from_numpy(data.val_batch(0)[0])
    shape = dict(vocab_size=data.vocab_size, block_size=16, fork_layers=(0, 1))
    for owner in streams_of(random_model(0, rivals.HandMixture, **shape), idx, 1.5):
        assert torch.bincount(owner[owner >= 0]).tolist() == [4 if hard else 1 for hard in data.hard]


def test_each_stream_of_a_mixture_predicts_for_itself():
    """Two streams whose P are 1 and 1/3 mix their distributions three to one."""
    model, x = make(rivals.Mixture), torch.randn(1, 2, 16, dtype=torch.float64)
    owner, logp = torch.tensor([[0, 0]]), torch.tensor([[1 / 3, 1.0]]).log()
    streams = Streams(owner, logp, 1, torch.zeros(1, 1), model.frequency)
    fork, original = model.head(x)[0].softmax(-1)
    assert torch.allclose(model.predict(x, streams)[0, 0].exp(), 0.25 * fork + 0.75 * original)


def test_noise_moves_the_choice_in_training_and_fades():
    for kind in (rivals.FadingNoise, rivals.RandomFirst):
        model, plain, idx = make(kind), make(rivals.Mixture), tokens(0, B=8, T=24)
        plain.load_state_dict(model.state_dict(), strict=False)
        forks = list(model.forks.values())

        def choose(training):
            for fork in [*forks, *plain.forks.values()]:
                fork.bar.fill_(math.log(0.5))                         # training moves it
            return [streams_of(one.train(training), idx, 1.5) for one in (model, plain)]

        assert not torch.equal(*choose(training=True))
        assert torch.equal(*choose(training=False))
        for left, same in ((1, kind is rivals.FadingNoise), (0, True)):
            for fork in forks:
                assert fork.step > 0
                fork.step.fill_(fork.steps - left)
            assert torch.equal(*choose(training=True)) == same


def test_bars_are_measured_without_noise():
    model, idx = make(rivals.RandomFirst).train(), tokens(0, B=8, T=24)
    measure_bars(model, idx, (1.5,))
    bars = [fork.bar.clone() for fork in model.forks.values()]
    measure_bars(model, idx, (1.5,))
    for fork, bar in zip(model.forks.values(), bars):
        assert fork.step == 0 and torch.equal(fork.bar, bar)


def test_the_charge_is_the_extras_p_per_token_in_every_block_and_only_trained():
    model, idx, targets, trace = make(rivals.Charged), tokens(0), tokens(1), []
    free = model(idx, targets)[1]
    charged = model.train()(idx, targets, trace=trace)[1]
    extras = sum(logp.exp().sum() / idx.numel() - 1 for _, logp in trace)
    assert len(trace) == model.config.n_layer and extras > 0.1
    assert (charged - free).item() == pytest.approx(0.01 * extras.item(), rel=1e-5)


@pytest.mark.parametrize("kind, forks", [(rivals.Charged, "1,2"), (rivals.PonderLM3, "none")],
                         ids=lambda value: getattr(value, "__name__", "forks " + str(value)))
def test_each_of_two_accumulated_batches_is_charged_for_its_own_extras(kind, forks, tmp_path):
    flags = f"--dataset urns --block_size 16 --n_embd 16 --n_head 2 --fork_layers {forks} --device cpu"
    settings = read_flags(TrainSettings, f"{flags} --gradient_accumulation_steps 2 --out_dir {tmp_path}".split(), "")
    trainer = Trainer(settings, make=lambda config, paper: kind(config))
    trainer.model.charge = 0.5
    free = copy.deepcopy(trainer.model)
    free.charge, expected = 0.0, []
    for number in range(2):
        rng, trace = trainer.random(number), []
        batch = trainer.data.train_batch(rng)
        torch.manual_seed(int(rng.integers(2 ** 63)))                 # as train_step does
        loss = trainer.loss(free, batch, 2.0, trace).item()
        extras = sum(logp.exp().sum().item() / batch[0].size - 1 for _, logp in trace)
        assert extras > 0.1
        expected.append(loss + 0.5 * extras)
    assert trainer.train_step()[0].item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_sure_scores_start_near_one_and_no_extra_below_the_floor_is_kept():
    for kind, left in ((rivals.SureCharged, 48), (rivals.Floor, 24)):
        model, idx, trace = kind(Config(vocab_size=11)).eval(), tokens(0), []   # bars let everything through
        model(idx, trace=trace)
        owner, logp = trace[-1]
        assert (owner >= 0).sum() == 48 and 0.5 < logp.exp().min() < 1
        for fork in model.forks.values():
            fork.score.register_forward_hook(lambda layer, read, score: score - 9.0)
        assert (streams_of(model, idx, 2) >= 0).sum() == left


def test_an_extra_below_the_floor_takes_no_room_from_a_later_one():
    """At a budget of 1.5 two tokens may own one extra: the first token's fork, whose P is 0.05, must not be it."""
    fork = rivals.FloorFork(Config(**SMALL)).eval()
    streams = Streams(torch.arange(2)[None], torch.zeros(1, 2), 2, 0, torch.ones(1))
    logp = torch.tensor([[[0.05, 1.0], [0.5, 1.0]]]).log()
    survives = fork.select(logp, streams, 1.5, torch.zeros(1, 1, dtype=torch.int64), False)
    assert survives.tolist() == [[[False, True], [True, True]]]


def test_every_arm_of_the_comparison_is_tested_here_or_with_the_core():
    classes = {arm.make for name, arm in ARMS.items() if isinstance(arm.make, type) and arm.make.__module__.endswith(
        "rivals")}
    assert classes == set(KINDS)
