"""
The core suite: `python -m pytest test_tinybubbles.py`. First numbers from the authors' own code, then a slow obvious
twin of the model (NumPy, float64, loops and equations only), then the properties that make it what it claims to be.
"""
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tinybubbles import (NEVER_MEASURED, Config, Fork, PaperFork, PaperTinybubbles, Streams, Tinybubbles, admit,
                         quota)

SMALL = dict(vocab_size=11, block_size=24, n_layer=4, n_head=2, n_embd=16, fork_layers=(1, 2))


def random_model(seed, kind=Tinybubbles, **changes):
    """A small model with weights and bars large enough that scores, choices and predictions all differ."""
    torch.manual_seed(seed)
    model = kind(Config(**{**SMALL, **changes})).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "ln" in name else 0.0, std=0.1 if "ln" in name else 0.4)
    for fork in model.forks.values():
        fork.bar.copy_(-4 * torch.rand(fork.bar.shape).sort().values)
    return model


def authors(config):
    return PaperTinybubbles(config, merge="residual")


KINDS = pytest.mark.parametrize("kind", [Tinybubbles, PaperTinybubbles, authors], ids=["ours", "paper", "authors"])


def tokens(seed, B=2, T=12, vocab_size=11):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# -- the authors' numbers --------------------------------------------------------------------------------------------

GOLDEN_IDX = [[0, 10, 4, 4, 10, 0, 7, 9, 6, 9, 7, 0], [5, 4, 9, 9, 4, 5, 1, 3, 0, 3, 1, 5]]
GOLDEN_LOGITS = """
    1.95261 2.4501 -4.86263 -4.85886 -0.53017 1.0592 -0.83205 -4.91209 0.54923 1.88779 -0.93565 -2.07532 2.98764
    -6.56899 -4.35378 -2.35114 1.56154 -4.99097 -0.6689 1.09622 2.85303 1.88307 1.22802 2.66588 -2.36996 -4.12566
    4.20461 3.07098 -4.80735 0.27725 1.83954 0.9353 1.05138 1.27715 2.33451 -0.2849 -3.75256 6.03166 2.89377 -4.50549
    0.07135 0.77421 -1.02997 0.72285 1.28156 3.69198 -4.13674 -2.61952 -0.29773 3.34275 -4.21588 -0.53449 1.66806
    3.75694 1.4443 4.33077 2.02221 -1.5406 -0.81821 -0.46315 3.34897 -0.98296 -0.99481 4.2379 5.8307 0.7075 -0.21861
    0.93732 -2.42838 -0.5504 0.88567 5.15644 -3.05368 5.57956 -0.95313 2.54235 1.62597 -1.38429 -0.60622 2.50109 2.59359
    -3.70418 2.82465 0.18903 1.60649 1.81636 4.88806 -0.0441 1.20345 2.01097 -2.05501 -2.29932 2.76329 4.32014 -2.88571
    0.33851 0.47288 2.16579 -1.79029 0.60743 -0.21858 2.80189 2.22738 -2.26134 2.93701 0.36716 -0.04437 2.22318 4.81954
    -0.84242 -1.29708 0.78111 -2.05766 0.23895 -0.25944 4.42045 -3.30529 7.37492 -0.23727 2.18391 1.61832 1.71532
    2.38719 3.96332 -0.23628 -2.27716 1.54892 -0.24521 -1.11117 3.59672 4.67352 1.81115 0.37358 -2.78807 5.87914
    -0.37968 3.96924 6.07545 0.42225 6.28673 -0.41638 -0.46898 3.52029 0.65819 -0.81375 6.4075 0.09495 8.17074 2.41266
    1.15577 3.94779 -2.35654 -5.30373 0.51551 -0.53835 -1.36675 5.37691 -1.0474 0.1722 3.33942 -0.45663 1.91933 4.11448
    1.80413 3.4741 -0.50046 -0.87891 3.79132 -1.76404 -0.48852 3.62534 -0.88041 1.31134 4.49985 2.51982 3.68817 0.70825
    0.62582 4.0578 -2.71561 7.88166 3.34574 -0.1436 2.60723 -0.19062 -5.27637 0.76112 1.22684 -3.42686 4.2753 0.84364
    1.92422 8.21484 -0.52277 7.10612 -1.91379 1.68341 1.26692 3.10053 5.22209 1.33235 -2.1982 4.23837 2.39449 -3.26611
    2.06885 3.2599 -2.5198 0.36687 1.24446 0.77028 3.35548 7.74253 -2.25056 0.76916 0.35162 -0.50569 -0.83991 -2.07895
    -1.79614 4.58234 -1.24971 6.76093 1.15475 -0.86264 0.70945 1.7642 -2.50283 3.81497 0.70656 2.68891 2.73365 2.32221
    4.10828 4.98139 1.94087 -1.8701 -0.66724 2.17397 1.68165 -3.56027 -0.84463 2.66886 6.24533 -2.83267 -3.81411 2.25712
    0.33133 -3.98087 2.13482 5.13987 1.66948 0.23766 1.04684 -2.59396 3.37079 -0.14862 -0.07976 7.6039 0.09139 4.45866
    -0.643 4.53734 1.20534
"""


def test_golden_numbers_of_the_authors_jax_code():
    model = authors(Config(**SMALL | dict(block_size=12)))
    names = ["wte.weight"]
    for l in range(4):
        names += [f"forks.{l}.{n}" for n in ("ln.weight", "score.weight", "embedding") if l in (1, 2)]
        names += [f"blocks.{l}.{n}.weight" for n in ("ln_1", "attn.qkv", "attn.proj", "ln_2", "mlp.fc", "mlp.proj")]
    names += ["ln_f.weight"]
    scale = {"wte": 1.0, "qkv": 0.4, "attn.proj": 0.4, "mlp.fc": 0.3, "mlp.proj": 0.3, "score": 0.5, "embedding": 0.5}
    state = model.state_dict()
    assert sorted(names) == sorted(name for name in state if not name.endswith((".bar", ".budgets")))
    for key, name in enumerate(names):
        kind = next((k for k in scale if name.endswith((k, k + ".weight"))), None)         # None: a LayerNorm
        i = np.arange(state[name].numel(), dtype=np.float64)
        w = (kind is None) + scale.get(kind, 0.1) * np.sin((1 + 0.37 * key) * (i + 1) ** 2)
        state[name].copy_(torch.from_numpy(w.astype(np.float32)).view_as(state[name]))
    golden = torch.tensor([float(x) for x in GOLDEN_LOGITS.split()]).view(2, 12, 11).log_softmax(-1)
    logits, loss = model(torch.tensor(GOLDEN_IDX))
    assert loss is None and (logits.log_softmax(-1) - golden).abs().max() < 2e-5


# -- the specification -----------------------------------------------------------------------------------------------
#
# The whole forward pass for one sequence, in loops over plain lists and NumPy vectors of float64, straight from the
# equations. It is slow and obvious; tinybubbles.py is fast and must give the same numbers.

@dataclass
class Stream:
    x: np.ndarray     # (D,), the residual vector
    token: int        # its owner
    logp: float       # log of P, how much it counts


@dataclass
class Candidate:
    stream: Stream    # what it is if it survives
    is_extra: bool    # an original is none
    survives: bool


def layer_norm(x, weight):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def log_sigmoid(a):
    return -np.logaddexp(0, -a)


def gelu(u):
    return 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u ** 3)))


def rotate(head, position):
    """Rotary positions: each channel of a head's first half is turned together with one of the second half."""
    half = len(head) // 2
    angle = position / 10000.0 ** (np.arange(half) / half)
    a, b = head[:half], head[half:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)))


def room_for_extras(budget, token):
    """How many extras the tokens up to this one may own: what the quota leaves beside their originals."""
    t = token + 1
    return math.ceil(round(budget * t, 6)) - t


def make_candidates(streams, weights, originals_fade):
    """For each stream a new fork of it, and then the stream itself (equations 1 to 3)."""
    candidates = []
    for j, stream in enumerate(streams):
        is_original = j + 1 == len(streams) or streams[j + 1].token != stream.token
        fork_logit, keep_logit = weights["score.weight"] @ layer_norm(stream.x, weights["ln.weight"])
        fork_score = max(log_sigmoid(fork_logit), -20.0)
        keep_score = max(log_sigmoid(keep_logit), -20.0)
        if is_original and not originals_fade:
            keep_score = 0.0
        fork = Stream(stream.x + weights["embedding"], stream.token, stream.logp + fork_score)
        kept = Stream(stream.x, stream.token, stream.logp + keep_score)
        candidates.append(Candidate(fork, is_extra=True, survives=False))
        candidates.append(Candidate(kept, is_extra=not is_original, survives=is_original))
    return candidates


def serve_from_left_to_right(candidates, budget, bar):
    """Our rule: an extra survives if it reaches the bar and there is room. A stream is served before its own fork."""
    used = 0
    for j in range(0, len(candidates), 2):
        new_fork, the_stream = candidates[j], candidates[j + 1]
        for candidate in (the_stream, new_fork):
            has_room = used < room_for_extras(budget, candidate.stream.token)
            if candidate.is_extra and candidate.stream.logp >= bar and has_room:
                candidate.survives = True
                used += 1


def choose_the_best(candidates, budget, T):
    """The paper's rule: the best extras of the whole sequence survive; of equal ones the earlier."""
    extras = [candidate for candidate in candidates if candidate.is_extra]
    extras.sort(key=lambda candidate: -candidate.stream.logp)         # Python's sort keeps the order of equal ones
    for candidate in extras[:room_for_extras(budget, T - 1)]:
        candidate.survives = True


def positions_of(streams):
    """Of the q streams of token t, counted from 1, the one with p others to its right stands at t - p/q."""
    positions = []
    for j, stream in enumerate(streams):
        q = sum(other.token == stream.token for other in streams)
        p = sum(other.token == stream.token for other in streams[j + 1:])
        positions.append(stream.token + 1 - p / q)
    return positions


def attention(streams, weights, n_head, has_scores):
    """What attention writes to each stream, before the write is scaled by P (equations 7 and 8)."""
    positions, outputs = positions_of(streams), []
    qkv = [weights["attn.qkv.weight"] @ layer_norm(stream.x, weights["ln_1.weight"]) for stream in streams]
    q, k, v = np.array(qkv).reshape(len(streams), 3, n_head, -1).transpose(1, 0, 2, 3)          # (N, H, d) each
    d = q.shape[-1]
    compared = d - 1 if has_scores else d                             # the last channel is given up for log P
    for i in range(len(streams)):
        heads = []
        for h in range(n_head):
            query, logits, values = rotate(q[i, h], positions[i]), [], []
            for j in range(i + 1):                                    # itself and all that stand left of it
                key = rotate(k[j, h], positions[j])
                logits.append((query[:compared] @ key[:compared] + streams[j].logp) / np.sqrt(d))
                values.append(np.exp(streams[j].logp) * v[j, h])
            weight = np.exp(log_softmax(np.array(logits)))
            heads.append(weight @ np.array(values))
        outputs.append(weights["attn.proj.weight"] @ np.concatenate(heads))
    return outputs


def block(streams, weights, n_head, has_scores):
    """Both writes of a block are scaled by P (equations 9 and 10)."""
    outputs = attention(streams, weights, n_head, has_scores)
    for stream, output in zip(streams, outputs):
        P = np.exp(stream.logp)
        stream.x = stream.x + P * output
        hidden = gelu(weights["mlp.fc.weight"] @ layer_norm(stream.x, weights["ln_2.weight"]))
        stream.x = stream.x + P * (weights["mlp.proj.weight"] @ hidden)


def predict(streams, token, weights, mixes):
    """Log-probabilities of what follows a token: of the sum of its streams, or their mixture (equation 11)."""
    head = lambda x: log_softmax(weights["wte.weight"] @ layer_norm(x, weights["ln_f.weight"]))
    mine = [stream for stream in streams if stream.token == token]
    if not mixes:
        return head(sum(np.exp(stream.logp) * stream.x for stream in mine))
    total = sum(np.exp(stream.logp) for stream in mine)
    return np.log(sum(np.exp(stream.logp) / total * np.exp(head(stream.x)) for stream in mine))


def find_bar(fork_layer, budget):
    """The bar of the lowest budget that is not below this one and that was measured; if there is none, all reach it."""
    for r, bar in zip(fork_layer.budgets.tolist(), fork_layer.bar.tolist()):
        if r >= budget - 1e-6 and bar != NEVER_MEASURED:
            return bar
    return -math.inf


def specification(model, idx, budget):
    """Read one sequence, a list of tokens: log-probabilities (T, V), and [(owner, log P) of each stream] per block."""
    config, T, trace = model.config, len(idx), []
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    below = lambda prefix: {name[len(prefix):]: w for name, w in weights.items() if name.startswith(prefix)}
    paper = isinstance(model, PaperTinybubbles)
    budget = min(budget, 2 ** len(config.fork_layers))
    streams = [Stream(weights["wte.weight"][token], t, 0.0) for t, token in enumerate(idx)]
    for layer in range(config.n_layer):
        if layer in config.fork_layers:
            candidates = make_candidates(streams, below(f"forks.{layer}."), originals_fade=paper)
            if paper:
                choose_the_best(candidates, budget, T)
            else:
                serve_from_left_to_right(candidates, budget, find_bar(model.forks[str(layer)], budget))
            streams = [candidate.stream for candidate in candidates if candidate.survives]
        block(streams, below(f"blocks.{layer}."), config.n_head, has_scores=len(config.fork_layers) > 0)
        trace.append([(stream.token, stream.logp) for stream in streams])
    mixes = paper and model.merge == "probability"
    return np.array([predict(streams, t, weights, mixes) for t in range(T)]), trace


def log_probs(model, idx, **call):
    return model(idx, **call)[0].log_softmax(-1)


def assert_matches_specification(model, idx, budget):
    trace = []
    fast = log_probs(model, idx[None], budget=budget, trace=trace)[0]
    expected, expected_trace = specification(model, idx.tolist(), budget)
    for (owner, logp), streams in zip(trace, expected_trace, strict=True):
        assert owner[owner >= 0].tolist() == [token for token, _ in streams]
        assert np.allclose(logp[owner >= 0].detach(), [logp for _, logp in streams], atol=2e-5)
    assert np.abs(fast.detach().numpy() - expected).max() < 5e-5


@KINDS
def test_the_model_is_its_equations(kind):
    rng = random.Random(3)
    for seed in range(24):
        n_layer = rng.randint(1, 4)
        forks = tuple(sorted(rng.sample(range(n_layer), rng.randint(0, n_layer))))
        model = random_model(seed, kind, n_layer=n_layer, fork_layers=forks, n_head=rng.choice((1, 2, 4)))
        idx = tokens(seed, B=1, T=rng.randint(1, 10))[0]
        for fork in model.forks.values():                             # some bars were never measured
            fork.bar[torch.rand(len(fork.bar)) < 0.3] = NEVER_MEASURED
        assert_matches_specification(model, idx, rng.choice((1, 1.1, 1.25, 1.5, 1.7, 2, 2.5, 3, 4, 9.9)))


@KINDS
@pytest.mark.parametrize("slope", [0.0, 1e4], ids=["all equal", "at the clamp"])
def test_equal_scores_are_settled_as_in_the_equations(kind, slope):
    for seed in range(8):
        model = random_model(seed, kind, fork_layers=(0, 1, 3))
        for fork in model.forks.values():
            fork.score.weight.data.mul_(slope)
        assert_matches_specification(model, tokens(seed, B=1, T=9, vocab_size=3)[0], 1.5 + seed % 3)


def test_the_worked_example_of_the_readme():
    """Four tokens a b c d, budget 1.5, bar 0.5: E(t) = 1, 1, 2, 2 extras. Layer 1 forks; layer 2 keeps, deletes, forks."""
    config = Config(**SMALL | dict(budget=1.5))
    assert [quota(1.5, t) - t for t in (1, 2, 3, 4)] == [1, 1, 2, 2]
    none, one_radian = torch.zeros(1, 1, dtype=torch.int64), torch.ones(2)
    table = [  # the (fork, stay) probabilities of every stream, and what survives: owners and rotary positions
        ([(.7, 1), (.9, 1), (.6, 1), (.8, 1)],                                      # a b c d
         [0, 0, 1, 2, 2, 3], [.5, 1, 2, 2.5, 3, 4]),
        ([(.9, .8), (.4, 1), (.2, 1), (.2, .1), (.3, 1), (.8, 1)],                  # a' a b c' c d
         [0, 0, 1, 2, 3, 3], [.5, 1, 2, 3, 3.5, 4]),
    ]
    x, streams = torch.zeros(1, 4, 16), Streams(torch.arange(4)[None], torch.zeros(1, 4), 4, none, one_radian)
    for probabilities, owners, positions in table:
        ours, papers = Fork(config).eval(), PaperFork(config)
        for fork in (ours, papers):
            torch.nn.init.ones_(fork.embedding)                                     # so x counts how often it was forked
            fork.bar.fill_(math.log(0.5))
            fork.score.forward = lambda x: torch.tensor([probabilities]).logit().clamp(max=50)
        papers_owners = papers(x, streams, 1.5, none, False)[1]
        x, owner, logp = ours(x, streams, 1.5, none, False)
        assert owner.tolist() == [owners]
        streams = Streams(owner, logp, 4, none, one_radian)                         # the angle is the position itself
        angle = torch.atan2(streams.sin[..., -1], streams.cos[..., -1]).remainder(2 * math.pi)
        assert angle.flatten().tolist() == pytest.approx(positions)
        if len(probabilities) == 4:
            assert papers_owners.tolist() == [[0, 1, 1, 2, 3, 3]]                   # b and d, which came too late for us
            assert x[0, :, 0].tolist() == [1, 0, 0, 1, 0, 0]                        # a fork stands left of its parent
    # a' stays, as it is served before its own fork, which was the better one; c' is deleted; d forks.
    assert logp.exp().tolist() == [pytest.approx([.56, 1, 1, 1, .8, 1], rel=1e-4)]
    assert x[0, :, 0].tolist() == [1, 0, 0, 0, 1, 0]


# -- selection -------------------------------------------------------------------------------------------------------

def test_admitting_all_at_once_is_admitting_one_after_the_other():
    rng = np.random.default_rng(0)
    for _ in range(200):
        M = rng.integers(1, 20)
        wanted, used = torch.tensor(rng.random(M) < rng.random()), int(rng.integers(4))
        allowed = used + torch.tensor(rng.integers(0, 3, M)).cumsum(0) * int(rng.integers(2))
        held, expected = used, []
        for i in range(M):
            before, held = held, min(held + int(wanted[i]), int(allowed[i]))
            expected.append(held > before)
        assert admit(wanted[None], allowed[None], torch.tensor([[used]])).tolist() == [expected]


def test_a_quota_is_in_whole_numbers():
    for budget in (1, 1.1, 1.25, 4 / 3, 1.5, 5 / 3, 2, 2.7, 3.3, 4):
        for t in (1, 2, 3, 7, 10, 30, 1000, 100_000):
            expected = math.ceil(round(budget * t, 6))
            assert quota(budget, t) == quota(budget, torch.tensor(t)).item() == expected
    assert math.ceil(1.1 * 50) == 56 and quota(1.1, 50) == 55


# -- properties of the causal rule -----------------------------------------------------------------------------------

def first_change(model, idx, t, **call):
    """The largest change of a logit before token t when token t is another one."""
    other = idx.clone()
    other[:, t] = (other[:, t] + 1) % model.config.vocab_size
    return (model(idx, **call)[0] - model(other, **call)[0])[:, :t].abs().max()


def test_a_later_token_never_changes_an_earlier_logit():
    for seed in range(6):
        model, idx = random_model(seed), tokens(seed)
        assert all(first_change(model, idx, t, budget=r) < 1e-5 for t in range(1, 12) for r in (1, 1.3, 2, 3))


def test_the_papers_model_lets_a_later_token_change_an_earlier_logit_and_refuses_a_cache():
    model, idx = random_model(0, PaperTinybubbles), tokens(0)
    assert max(first_change(model, idx, t, budget=1.5) for t in range(1, 12)) > 1e-2
    with pytest.raises(ValueError, match="cannot use a cache"):
        model(idx, cache=random_model(0).new_cache(2))
    longer = model.generate(idx, 20, temperature=0, budget=1.5)                     # past block_size, reading anew
    assert torch.equal(longer[:, 20:21], model(longer[:, :20], budget=1.5)[0][:, -1:].argmax(-1))


def split(rng, T):
    """A random way to cut T tokens into chunks: [(start, end)]."""
    cuts = sorted(rng.sample(range(1, T), rng.randint(1, T - 1))) if T > 1 else []
    return list(zip([0, *cuts], [*cuts, T]))


def read_in_chunks(model, idx, chunks, budget=None, trace=None):
    cache = model.new_cache(len(idx), budget)
    logits = torch.cat([model(idx[:, a:b], budget=budget, cache=cache, trace=trace)[0] for a, b in chunks], dim=1)
    assert cache.length == idx.size(1)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_logits_equal_full_logits(dtype):
    rng, ragged = random.Random(1), 0
    for seed in range(24):
        model = random_model(seed, fork_layers=((1, 2), (0, 1, 3), (2,), (0, 1, 2, 3))[seed % 4]).to(dtype)
        idx, budget, streams = tokens(seed, B=3, T=rng.randint(1, 24)), rng.choice((1, 1.1, 1.5, 2, 2.7, 3, 4)), []
        full = model(idx, budget=budget, trace=streams)[0]
        ragged += len({int(n) for n in (streams[-1][0] >= 0).sum(1)}) > 1
        chunked = read_in_chunks(model, idx, split(rng, idx.size(1)), budget=budget)
        one_by_one = read_in_chunks(model, idx, [(t, t + 1) for t in range(idx.size(1))], budget=budget)
        assert (chunked - full).abs().max() < 2e-5 and (one_by_one - full).abs().max() < 2e-5
    assert ragged >= 8                                                # rows that kept different numbers were among them


def test_the_budget_holds_on_every_prefix_and_every_token_keeps_its_original():
    for seed in range(8):
        model, idx = random_model(seed, fork_layers=(0, 1, 2)), tokens(seed, B=3, T=20)
        for fork in model.forks.values():
            fork.bar.fill_((NEVER_MEASURED, -1.0)[seed % 2])                                # untrained, or as if trained
        for budget in (1, 1.05, 1.5, 2, 3.3):
            full, chunked = [], []
            model(idx, budget=budget, trace=full)
            read_in_chunks(model, idx, [(0, 7), (7, 8), (8, 20)], budget=budget, trace=chunked)
            chunked = [torch.cat([tok for tok, _ in chunked[l::4]], dim=1) for l in range(4)]
            for tok, again in zip((tok for tok, _ in full), chunked, strict=True):
                count = F.one_hot(tok + 1, 21).sum(1)[:, 1:]                          # (B, T); padding was column 0
                assert torch.equal(count, F.one_hot(again + 1, 21).sum(1)[:, 1:])
                assert count.min() >= 1
                assert (count.cumsum(1) <= torch.tensor([quota(budget, t) for t in range(1, 21)])).all()


def test_a_lowered_budget_holds_from_then_on():
    model, idx, before, after = random_model(1), tokens(1, T=24), [], []
    cache = model.new_cache(2, budget=3)
    model(idx[:, :8], cache=cache, budget=3, trace=before)
    model(idx[:, 8:], cache=cache, budget=1.25, trace=after)
    spent = (before[-1][0] >= 0).sum(1)
    total = spent.unsqueeze(1) + F.one_hot(after[-1][0] - 7, 17).sum(1)[:, 1:].cumsum(1)
    allowed = torch.tensor([quota(1.25, t) for t in range(9, 25)])
    assert spent.min() > 10
    assert (total <= torch.maximum(allowed, spent.unsqueeze(1) + torch.arange(1, 17))).all()


def test_a_row_does_not_depend_on_its_batch_mates():
    for seed in range(6):
        model, idx = random_model(seed), tokens(seed, B=4)
        alone = torch.cat([model(row[None], budget=1.7)[0] for row in idx])
        assert (model(idx, budget=1.7)[0] - alone).abs().max() < 2e-5


def test_a_budget_of_one_keeps_exactly_the_originals():
    streams, idx = [], tokens(5)
    random_model(5, PaperTinybubbles)(idx, budget=1, trace=streams)
    assert all(torch.equal(tok, torch.arange(12).expand(2, 12)) for tok, _ in streams)
    assert (streams[0][1] == 0).all() and (streams[-1][1] < 0).all()                  # the paper's: it still fades them


def test_a_budget_beyond_all_forks_forks_everything():
    streams = []
    model = random_model(5)
    for fork in model.forks.values():
        fork.bar.fill_(NEVER_MEASURED)
    model(tokens(5), budget=1e9, trace=streams)
    assert [tok.size(1) for tok, _ in streams] == [12, 24, 48, 48]
    assert torch.equal(streams[-1][0][0], torch.arange(12).repeat_interleave(4))


# -- a synthetic task ------------------------------------------------------------------------------------------------

def texts_to_recall(B):
    """8 random symbols, four times over: idx and targets (B, 31); the first 7 predictions cannot be known."""
    text = torch.randint(16, (B, 8)).repeat(1, 4)
    return text[:, :-1], text[:, 1:].index_fill(1, torch.arange(7), -1)


def train_to_recall(fork_layers, budgets, seed=0, steps=200, accumulation=1, batch=16):
    """A model trained by a loop in nanoGPT's style, which knows nothing of bars, with the budgets in turn."""
    torch.manual_seed(seed)
    model = Tinybubbles(Config(vocab_size=16, block_size=31, n_layer=3, n_head=2, n_embd=48, fork_layers=fork_layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for _ in range(accumulation):
            loss = model(*texts_to_recall(batch // accumulation), budget=budgets[step % len(budgets)])[1] / accumulation
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 40, (steps - step) / (steps / 2))
    return model.eval()


def recalled(model):
    idx, targets = texts_to_recall(128)
    return (model(idx)[0].argmax(-1) == targets)[targets >= 0].float().mean()


def spent(model, budget):
    """Streams per token in the last block."""
    idx, trace = texts_to_recall(128)[0], []
    model(idx, budget=budget, trace=trace)
    return ((trace[-1][0] >= 0).sum() / idx.numel()).item()


def test_bubbles_learn_to_recall_as_a_plain_gpt_does_and_keep_their_budget():
    """It shows that a model that forks and deletes streams learns a task whose answer is known, from the loss alone.
    It does not show that forks help: the plain GPT, which is the control, learns it as well."""
    gpt, bubbles = train_to_recall((), (2.0,)), train_to_recall((1, 2), (2.0,))
    assert recalled(gpt) > 0.98 and recalled(bubbles) > 0.98
    assert spent(gpt, 2.0) == 1 and 0.87 * 2 <= spent(bubbles, 2.0) <= 2
