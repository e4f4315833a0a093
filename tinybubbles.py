"""
Thoughtbubbles (Liu, Murty, Manning, Csordas; arXiv 2510.00219) in one file: a GPT that forks and deletes residual
streams in the middle of the network, so that a hard token becomes a bubble of several streams that think in parallel
and merge before the output. It is learned from the language-modelling loss alone. Equation numbers are the paper's.

    code           meaning                                                                        paper
    token          a position of the input                                                        i
    stream         one residual vector; a token owns one or more                                  x_{i,j}
    original       a token's rightmost stream; it always survives                                 j = 0
    fork           any other stream of a token; it sits to the left of its parent                 j > 0
    candidate      what a fork layer chooses from: every stream kept, and a fork of every stream
    extra          a candidate that is not some original kept; extras compete for the budget
    tok   (B, N)   owner token of each stream, non-decreasing along N; -1 = padding
    logp  (B, N)   log cumulative score of each stream, 0 at the input; P = exp(logp)             log p_cum
    score          log of the keep or fork probability given by one fork layer                    log p_keep, log p_fork
    budget         streams allowed per token, r >= 1                                              kappa / L
    quota          ceil(r * t), streams allowed to the first t tokens                             kappa
    merge          many streams of a token -> one distribution over the next token                eq. 11

Shapes: B rows, T tokens in this call, N streams (T <= N <= r T), D = n_embd, H heads of d = D / H channels, V words;
M = 2N candidates, in the order (fork of stream 0, stream 0, fork of stream 1, stream 1, ...); S streams in the cache.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 2**25        # logits held at once in training
MARGIN = 2.0         # an old fork, kept, gives way only to extras that score this much more: exp(2) = 7.4 times its P
MIN_SCORE = -20.0    # one fork layer multiplies P by exp(-20) at the least
TIE = 5e-6           # scores of two tokens this close are equal: rounding must not choose, it differs between chunkings
PADDING = -1e4       # logp of padding: P = 0 exactly, and no query attends to it; finite, so gradients stay finite too


def check_budget(budget):
    """Return `budget` as a float, or raise ValueError unless it is a finite number >= 1."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 1 <= budget < math.inf:
        raise ValueError(f"budget must be a finite number >= 1 (streams per token), not {budget!r}")
    return float(budget)


def check_choice(name, value, *choices):
    """Return `value`, or raise ValueError unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")
    return value


@dataclass
class Config:
    """The architecture, and the defaults of what each call may change (budget, routing). Bad values: ValueError."""
    vocab_size: int = 256                       # 256: text as bytes
    block_size: int = 128                       # tokens in a context
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 128
    fork_layers: tuple = (1, 2, 3)              # fork before these blocks, counted from 0; () is a plain GPT
    budget: float = 2.0                         # streams per token; 1 = every token keeps its original alone
    routing: str = "causal"                     # or "topk": the paper's, which looks at later tokens
    form: str = "ours"                          # originals' P = 1, log P undivided, MARGIN, small embedding; or "paper"
    merge: str = ""                             # "residual" (ours, authors' code), "probability" (paper); "": form's
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, not {value!r}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd must be a multiple of 2 n_head = {2 * self.n_head}, for heads of an even size, "
                             f"not {self.n_embd}")
        layers = self.fork_layers
        if not (isinstance(layers, (tuple, list)) and all(type(l) is int and 0 <= l < self.n_layer for l in layers)
                and len(set(layers)) == len(layers)):
            raise ValueError(f"fork_layers must be a tuple of whole numbers from 0 to n_layer - 1 = "
                             f"{self.n_layer - 1}, none twice, not {layers!r}")
        self.fork_layers = tuple(sorted(layers))
        self.budget = check_budget(self.budget)
        check_choice("routing", self.routing, "causal", "topk")
        check_choice("form", self.form, "ours", "paper")
        self.merge = self.merge or ("residual" if self.form == "ours" else "probability")
        check_choice("merge", self.merge, "probability", "residual")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number from 0 to less than 1, not {self.dropout!r}")


class Cache:
    """What decoding must remember of earlier tokens; it only ever grows. Pass an empty one to `model(idx, cache=...)`,
    then the same one with each next chunk of tokens. It belongs to one model and one batch, and has no gradient."""

    def __init__(self):
        self.length = 0    # tokens seen
        self.kv = {}       # block -> keys with logp in their last channel, and values times P: (2, B, H, room, d)
        self.count = {}    # fork layer, or 0 -> streams that each row holds in the blocks from there on (B, 1)
        self.extras = {}   # fork layer -> scores of all extras seen (B, M), -inf = none, and the number admitted (B, 1)
        self.fixed = False

    def fix(self, tokens, budget):
        """Make room for `tokens` tokens in all at this budget; from here on they come one by one, no shape changes, and
        nothing waits for the device: a step can be compiled, or recorded as a CUDA graph. After the first chunk."""
        for l, kv in self.kv.items():
            streams = 2 ** sum(fork <= l for fork in self.extras)                    # of one token at the most
            room = min(quota(budget, tokens), streams * tokens) + streams
            self.kv[l] = F.pad(kv, (0, 0, 0, room - kv.size(3)))                     # or cut what was to spare
        for i, (l, (scores, used)) in enumerate(self.extras.items()):
            more = 2 ** (i + 1) * tokens - scores.size(1)
            self.extras[l] = F.pad(scores, (more, 0), value=-math.inf), used.clone()
        self.length, self.fixed = torch.tensor(self.length, device=self.kv[0].device), True
        for state in (self.length, *self.kv.values(), *self.count.values(), *sum(self.extras.values(), ())):
            torch._dynamo.mark_static_address(state)

    def place(self, layer, tok):
        """Choose where the new streams of the blocks from `layer` on go: each row's own next slots. Its padding comes
        last, and the next chunk overwrites it. Returns a function that adds keys and values to a block's."""
        count = self.count.setdefault(layer, tok.new_zeros(tok.size(0), 1))
        slot, mask = count + torch.arange(tok.size(1), device=tok.device), None      # (B, N)
        size = self.kv[layer].size(3) if self.fixed else int(slot.max()) + 1
        if layer in self.kv:                                                         # else plain causal attention
            hidden = torch.arange(size, device=tok.device) > slot[:, None, :, None]  # (B, 1, N, S)
            mask = torch.zeros_like(hidden, dtype=self.kv[layer].dtype).masked_fill(hidden, -math.inf)
        count += (tok >= 0).sum(1, keepdim=True)
        return partial(self.append_kv, slot, size, mask)

    def append_kv(self, slot, size, mask, layer, k, v):
        """Add the keys and values (B, H, N, d) of new streams; return those to attend to, (B, H, S, d) each, and a mask
        to add to the logits, (B, 1, N, S) or None: plain causal attention, in the first chunk."""
        new = torch.stack((k, v)).detach()                                           # (2, B, H, N, d)
        kv = self.kv.get(layer, new[:, :, :, :0])
        if kv.size(3) < size:                                                        # some to spare
            kv = torch.cat((kv, kv.new_zeros(*kv.shape[:3], size + size // 32 + 16 - kv.size(3), kv.size(4))), 3)
        self.kv[layer] = kv.scatter_(3, slot[:, None, :, None].expand_as(new), new)
        return (k, v, None) if mask is None else (*kv[:, :, :, :size], mask)

    def append_extras(self, layer, scores, used):
        """Add the scores of a chunk's extras (B, M); used (B, 1) were admitted after it."""
        earlier, used_before = self.extras.get(layer, (scores[:, :0], used))
        if self.fixed:                                                               # they push out as many -inf
            earlier.copy_(torch.cat((earlier[:, scores.size(1):], scores), dim=1))
            used_before.copy_(used)
        else:
            self.extras[layer] = torch.cat((earlier, scores), dim=1), used


# --------------------------------------------------------------------------------------------------------------------
# Selection: which candidates of a fork layer survive

def quota(budget, t):
    """ceil(budget * t), streams allowed to the first t tokens; t is an int or an int64 tensor. The product is rounded
    to 1e-6 first, so that 1.1 * 10 is 11, in whole numbers throughout, so that every device agrees."""
    return -((500_000 - round(budget * 10**12) * t) // 10**12)


def token_index(values, tok, T):
    """The token of each of values (B, N, ...), in their shape, to scatter by; padding goes to a token T of its own."""
    return (tok % (T + 1)).view(tok.shape + (1,) * (values.dim() - 2)).expand_as(values)


def sum_per_token(values, tok, T):
    """Sum values (B, N, ...) over the streams of each token: (B, T, ...)."""
    index = token_index(values, tok, T)
    return values.new_zeros(values.size(0), T + 1, *values.shape[2:]).scatter_add(1, index, values)[:, :T]


def count_at_least(seen, values):
    """How many of seen (..., A) are >= each of values (..., M): (..., M)."""
    if values.size(-1) <= 16:
        return (seen.unsqueeze(-2) >= values.unsqueeze(-1)).sum(-1)
    return seen.size(-1) - torch.searchsorted(seen.sort().values, values.contiguous())


def count_earlier_at_least(values, slack=0.0):
    """How many earlier entries of its row are >= each entry of values (B, M), less the slack: (B, M). Pairwise among
    every 16; from there a merge sort's ladder: at width w every right half is counted against the left half beside it;
    O(M log^2 M) time, O(M) memory."""
    B, M = values.shape
    width, size = 16, 16 << ((M - 1) // 16).bit_length()
    values = F.pad(values, (0, size - M), value=-math.inf)
    few = values.view(B, -1, width)                                                  # (B, size / 16, 16)
    earlier = torch.ones(width, width, dtype=torch.bool, device=values.device).tril(-1)
    counts = ((few.unsqueeze(-2) >= few.unsqueeze(-1) - slack) & earlier).sum(-1).view(B, size)
    while width < size:
        left, right = values.view(B, -1, 2, width).unbind(2)                         # (B, size / 2w, w) each
        counts.view(B, -1, 2, width)[:, :, 1] += count_at_least(left, right - slack)
        width *= 2
    return counts[:, :M]


def select_topk(score, size):
    """The paper's rule: the best `size` candidates of the whole sequence (equal scores: the earlier first). Not causal:
    a later token can evict an earlier one's fork. score (B, M), inf for originals; returns the survivors (B, M), bool.
    """
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :size]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)


def select_next(score, allowed, earlier, used):
    """Our rule, for one token: those of its extras survive that fewer than E(t) others of tokens up to t beat, the best
    first, as long as the budget lasts. Equal scores: the earlier wins.

    score (B, M): of the token's extras, -inf for every other slot; allowed: E(t), the extras that tokens up to t may
    hold; earlier (B, M'): scores of all extras of earlier tokens, admitted or not; used (B, 1): extras admitted so far.
    Returns the admitted extras (B, M), bool, and used after this token (B, 1)."""
    best, order = score.sort(dim=1, descending=True, stable=True)
    i = torch.arange(score.size(1), device=score.device)
    rank = i + count_at_least(earlier, best - TIE)                                   # (B, M), rises along a row
    wanted = ((rank < allowed) & (best > -math.inf)).sum(1, keepdim=True)            # (B, 1)
    used_after = (used + wanted).minimum(used.clamp(min=allowed))                    # E(t), if that is not past
    admitted = i < used_after - used                                                 # (B, M)
    return torch.zeros_like(admitted).scatter(1, order, admitted), used_after


def select_causal(score, tok, allowed, earlier, used):
    """`select_next` for T tokens one after the other, all at once: allowed (T,), tok (B, M): the tokens of the slots,
    earlier and used: of the tokens before these T. Returns the admitted extras (B, M) and used after each token (B, T).
    """
    T = allowed.size(0)
    order = score.sort(dim=1, descending=True, stable=True).indices                  # best extra first ...
    order = order.gather(1, tok.gather(1, order).sort(dim=1, stable=True).indices)   # ... within each token
    score, tok = score.gather(1, order), tok.gather(1, order)
    # Want: fewer than E(t) extras of tokens 1..t, admitted or not, beat this one. Equal scores: the earlier token's.
    rank = count_earlier_at_least(score, TIE) + count_at_least(earlier, score - TIE)      # (B, M)
    wanted = ((rank < allowed[tok]) & (score > -math.inf)).long()                    # (B, M)
    # Admit: used(t) = min(used(t-1) + wanted(t), E(t)), unrolled into one running minimum.
    total = sum_per_token(wanted, tok, T).cumsum(1)                                  # (B, T), W(t)
    limit = allowed.maximum(used)                                                    # (B, T), E(t), if that is not past
    used_after = total + used.minimum((limit - total).cummin(1).values)              # (B, T), used(t)
    # Each token admits its best used(t) - used(t-1); those it wants come first in its part of the order.
    last = F.pad(total, (1, 0))[:, :-1] + used_after.diff(dim=1, prepend=used)       # (B, T)
    admitted = (wanted > 0) & (wanted.cumsum(1) <= last.gather(1, tok.clamp(min=0)))
    return torch.zeros_like(admitted).scatter(1, order, admitted), used_after


class Fork(nn.Module):
    """A fork layer (section 2.2, eqs. 1-6): score -> select -> gather. N streams come in; the survivors among their 2N
    candidates go out, in order, padded on the right to the same number in every row."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.fades_originals = layer, config.form == "paper"
        self.margin = 0.0 if config.form == "paper" else MARGIN
        self.ln = nn.LayerNorm(config.n_embd, bias=False)
        self.score = nn.Linear(config.n_embd, 2, bias=False)                         # row 0 fork, row 1 keep
        self.embedding = nn.Parameter(torch.empty(config.n_embd))                    # added to a fork, not its parent

    def forward(self, x, tok, logp, T, budget, routing, cache):
        original = torch.cat((tok[:, 1:], tok.new_full((tok.size(0), 1), -1)), 1) != tok      # (B, N): last of a token
        fork, keep = self.scores(x, logp, original)                                  # (B, N) each
        candidates = torch.stack((fork, keep), -1).flatten(1)                        # (B, M)
        ranking = self.ranking(fork.detach(), keep.detach(), original, tok)          # (B, M)
        survives = self.select(ranking, tok, T, budget, routing, cache)              # (B, M), bool
        size = ranking.size(1) if cache else min(ranking.size(1), quota(budget, T))
        if cache and not cache.fixed:
            size = int(survives.sum(1).max())                                        # of the widest row
        return self.gather(x, tok, candidates, survives, size)

    def scores(self, x, logp, original):
        """New log cumulative scores if forked and if kept (eqs. 1-3), (B, N) float32 each. An elementwise product
        rather than a matmul: a stream scores the same bits in any chunk, so equal scores stay equal when decoding."""
        a = (self.ln(x).float().unsqueeze(-2) * self.score.weight.float()).sum(-1)   # (B, N, 2)
        fork, keep = F.logsigmoid(a).clamp(min=MIN_SCORE).unbind(-1)                 # (B, N) each
        if not self.fades_originals:
            keep = keep.masked_fill(original, 0.0)                                   # an original's P stays 1
        return logp + fork, logp + keep

    def ranking(self, fork, keep, original, tok):
        """What candidates compete by, (B, M): their scores, old forks' with the margin; originals win (eq. 4)."""
        keep = torch.where(original, math.inf, keep + self.margin)                   # (B, N)
        return torch.stack((fork, keep), -1).masked_fill((tok < 0).unsqueeze(-1), -math.inf).flatten(1)

    def select(self, score, tok, T, budget, routing, cache):
        """Which candidates survive, (B, M) bool: every original, and the extras that `routing` chooses (eqs. 4-5)."""
        if routing == "topk":
            return select_topk(score, min(score.size(1), quota(budget, T)))
        original = score == math.inf
        score = score.masked_fill(original, -math.inf)
        start, (earlier, used) = 0, (score.new_empty(tok.size(0), 0), tok.new_zeros(tok.size(0), 1))
        if cache is not None:
            start, (earlier, used) = cache.length, cache.extras.get(self.layer, (earlier, used))
        t = start + (1 if T == 1 else torch.arange(1, T + 1, device=tok.device))
        allowed = quota(budget, t) - t                                               # E(t)
        if T == 1:
            admitted, used_after = select_next(score, allowed, earlier, used)
        else:
            admitted, used_after = select_causal(score, tok.repeat_interleave(2, 1), allowed, earlier, used)
        if cache is not None:
            cache.append_extras(self.layer, score, used_after[:, -1:])
        return original | admitted

    def gather(self, x, tok, candidates, survives, size):
        """The survivors' x (B, size, D), tok and logp (B, size): slot 2j+1 is stream j, slot 2j its fork (eq. 6)."""
        slot = (~survives).byte().sort(dim=1, stable=True).indices[:, :size]         # survivors in order, then the rest
        real = survives.gather(1, slot)                                              # (B, size); the rest is padding
        parent, is_fork = slot // 2, (slot % 2 == 0).unsqueeze(-1)
        row = torch.arange(x.size(0), device=x.device).unsqueeze(-1) * x.size(1)
        x = x.flatten(0, 1).index_select(0, (row + parent).flatten()).view(*slot.shape, -1) + is_fork * self.embedding
        tok = tok.gather(1, parent).masked_fill(~real, -1)
        return x, tok, candidates.gather(1, slot).masked_fill(~real, PADDING)


# --------------------------------------------------------------------------------------------------------------------
# The transformer

def rotary(tok, T, start, head_size):
    """cos and sin (B, 1, N, d/2) of the streams' fractional positions (appendix D): of the q streams of token k, k
    counted from 1 over all chunks, the p-th from the right (p = 0 is the original) stands at k - p/q."""
    count = sum_per_token(torch.ones_like(tok), tok, T)                              # (B, T)
    owner, i = tok.clamp(min=0), torch.arange(tok.size(1), device=tok.device)
    from_right = count.cumsum(1).gather(1, owner) - 1 - i                            # (B, N)
    position = (start + 1) + owner - from_right / count.gather(1, owner)
    frequency = 10000.0 ** (torch.arange(0, head_size, 2, device=tok.device) / -head_size)   # (d/2,)
    angle = position[:, None, :, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the first half of each head (..., B, H, N, d) with its second half."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def linear(x, W):
    """x W^T. Of a few rows on a CPU, W x^T: the same product, for which its BLAS takes half the time."""
    if x.device.type != "cpu" or x.numel() > 32 * x.size(-1):
        return F.linear(x, W)
    return (W @ x.flatten(0, -2).t()).t().contiguous().view(*x.shape[:-1], -1)


class CausalSelfAttention(nn.Module):
    """Score-attenuated attention (eqs. 7-8): logits (q k^T + logp_key) / sqrt(d), values times P. The last channel of
    each head carries the score: q = 1, k = logp there. So any fused attention kernel serves, with no mask tensor.
    Our form adds logp undivided: then a fork's attention ends as its P does, and deleting it changes nothing."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, P, channel, rotation, append_kv):
        B, N, D = x.shape
        qkv = linear(x, self.qkv.weight).view(B, N, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)   # (3, B, H, N, d)
        qk, v = rotate(qkv[:2], *rotation), qkv[2]                                   # (2, B, H, N, d), (B, H, N, d)
        if channel is not None:                                                      # there are scores
            qk[..., -1] = channel
            v = (v * P.unsqueeze(1)).type_as(v)
        q, k = qk                                                                    # (B, H, N, d) each
        k, v, mask = append_kv(self.layer, k, v) if append_kv else (k, v, None)      # (B, H, S, d) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return linear(y.transpose(1, 2).reshape(B, N, D), self.proj.weight)          # (B, N, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return linear(F.gelu(linear(x, self.fc.weight), approximate="tanh"), self.proj.weight)   # (B, N, D)


class Block(nn.Module):
    """A GPT block whose writes to each stream are scaled by that stream's P (eqs. 9-10)."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, P, channel, rotation, append_kv):
        x = torch.addcmul(x, P, self.drop(self.attn(self.ln_1(x), P, channel, rotation, append_kv)))
        return torch.addcmul(x, P, self.drop(self.mlp(self.ln_2(x))))                # x + P * write, (B, N, D)


def logsumexp_per_token(values, tok, T):
    """log of the sum of exp(values) (B, N, ...) over the streams of each token: (B, T, ...)."""
    index = token_index(values, tok, T)
    top = values.new_full((values.size(0), T + 1, *values.shape[2:]), -math.inf)
    top = top.scatter_reduce(1, index, values.detach(), "amax")                      # (B, T + 1, ...)
    return top[:, :T] + sum_per_token((values - top.gather(1, index)).exp(), tok, T).log()


def nats(x, y, W):
    """Negative log-probability (M,) of the words y (M,) after x (M, D), under the head W (V, D)."""
    return F.cross_entropy(F.linear(x, W).float(), y, reduction="none")


def mean_loss(log_probs, targets):
    """Mean negative log-probability (B, T) in nats, over the targets that are not -1."""
    counted = targets != -1
    return -log_probs.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def sample(log_probs, temperature, top_k, generator):
    """Draw one token a row from log_probs (B, V) / temperature, among the top_k likeliest: (B, 1)."""
    size = 1 if temperature == 0 else min(top_k or log_probs.size(-1), log_probs.size(-1))
    best, token = log_probs.topk(size)                                               # (B, size), likeliest first
    if size == 1:
        return token
    probs = ((best - best[:, :1]) / temperature).softmax(-1)                         # the likeliest at 0: no overflow
    return token.gather(1, torch.multinomial(probs, 1, generator=generator))


class Tinybubbles(nn.Module):
    """The language model. Dropout is active in training mode only, as in any nn.Module."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)                    # the output head too
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, l) for l in range(config.n_layer))
        self.forks = nn.ModuleDict({str(l): Fork(config, l) for l in config.fork_layers})
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.init_weights()

    def init_weights(self):
        """GPT-2's initialisation, parameter by parameter: one that is not named here, or twice, raises."""
        c, normal = self.config, 0.02
        fork_embedding = normal if c.form == "ours" else c.n_embd ** -0.5            # a fork still looks like its token
        std = [(self.wte.weight, normal), (self.ln_f.weight, None)]                  # None: a gain, 1 at first
        for block in self.blocks:
            residual = normal / math.sqrt(2 * c.n_layer)
            std += [(block.ln_1.weight, None), (block.attn.qkv.weight, normal), (block.attn.proj.weight, residual),
                    (block.ln_2.weight, None), (block.mlp.fc.weight, normal), (block.mlp.proj.weight, residual)]
        for fork in self.forks.values():
            std += [(fork.ln.weight, None), (fork.score.weight, normal), (fork.embedding, fork_embedding)]
        if sorted(id(p) for p, _ in std) != sorted(id(p) for p in self.parameters()):
            raise RuntimeError("init_weights must name every parameter exactly once")
        for p, s in std:
            nn.init.ones_(p) if s is None else nn.init.normal_(p, std=s)

    def forward(self, idx, targets=None, *, budget=None, routing=None, cache=None, streams=None):
        """Read the tokens idx (B, T), int64, that follow those in `cache`, if one is given, and predict.

        Returns (logits, None): logits (B, T, V), float32, normalised log-probabilities of each next token. With
        targets (B, T), -1 = ignore, returns (None, loss), the mean loss in nats; the mixture is never built then.
        budget, routing: instead of the configuration's. streams: a list that receives (tok, logp) of every block.
        ValueError: bad budget or routing, no tokens or too many, 'topk' with a cache."""
        budget, routing, start = self.check_call(idx, budget, routing, cache)
        B, T = idx.shape
        x = self.drop(self.wte(idx))                                                 # (B, N, D), N = T so far
        tok = torch.arange(T, device=idx.device).expand(B, T)                        # (B, N), within this chunk
        logp = torch.zeros(B, T, device=idx.device)                                  # (B, N)
        for l, block in enumerate(self.blocks):
            if l in self.config.fork_layers:
                x, tok, logp = self.forks[str(l)](x, tok, logp, T, budget, routing, cache)
            if l == 0 or l in self.config.fork_layers:
                rotation = rotary(tok, T, start, self.config.n_embd // self.config.n_head)
                P, channel = logp.exp().unsqueeze(-1), self.score_channel(logp)      # (B, N, 1), (2, B, 1, N)
                append_kv = None if cache is None else cache.place(l, tok)
            x = block(x, P, channel, rotation, append_kv)
            if streams is not None:
                streams.append((torch.where(tok < 0, -1, tok + start), logp))
        if cache is not None:
            cache.length += T
        merge = self.merge_residual if self.config.merge == "residual" else self.merge_probability
        log_probs = merge(x, tok, logp, T, targets)
        return (log_probs, None) if targets is None else (None, mean_loss(log_probs, targets))

    def score_channel(self, logp):
        """What the last channel of queries and keys holds, (2, B, 1, N): 1 and logp (B, N), sqrt(d) times that in our
        form, which undoes attention's division. None: a plain GPT, which keeps the channel."""
        if self.config.fork_layers:
            scale = 1 if self.config.form == "paper" else math.sqrt(self.config.n_embd // self.config.n_head)
            return torch.stack((torch.ones_like(logp), scale * logp)).unsqueeze(2)

    def check_call(self, idx, budget, routing, cache):
        """Refuse what a call cannot do; return its budget, its routing and the number of tokens before it."""
        budget = check_budget(self.config.budget if budget is None else budget)
        routing = check_choice("routing", self.config.routing if routing is None else routing, "causal", "topk")
        start = 0 if cache is None else cache.length
        most = 1 if cache is not None and cache.fixed else self.config.block_size - start
        if idx.dim() != 2 or not 1 <= idx.size(1) <= most:
            raise ValueError(f"idx must be (B, T) with 1 <= T <= {most} (block_size - cache.length; 1 if the cache is "
                             f"fixed), not {tuple(idx.shape)}")
        if routing == "topk" and cache is not None:
            raise ValueError("routing 'topk' cannot decode from a cache, since later tokens change its earlier choices;"
                             " use routing 'causal', or give it the whole sequence without a cache")
        return min(budget, 2.0 ** len(self.config.fork_layers)), routing, start      # more than 2^layers cannot be had

    def merge_probability(self, x, tok, logp, T, targets):
        """Eq. 11: p(y|t) = sum_j P_j softmax(W LN(x_j)) / sum_j P_j over the streams of token t, in log space. Returns
        log p (B, T, V); with targets only theirs (B, T): per-stream cross-entropy first, V never meets T."""
        y = None if targets is None else targets.gather(1, tok.clamp(min=0))         # (B, N)
        log_probs = self.head(x, y)                                                  # (B, N, V) or (B, N)
        weight = logp.view(*logp.shape, *[1] * (log_probs.dim() - 2))
        return logsumexp_per_token(weight + log_probs, tok, T) - logsumexp_per_token(weight, tok, T)

    def merge_residual(self, x, tok, logp, T, targets):
        """The authors' code: x_t = sum_j P_j x_j, then LN and head. Returns log p (B, T, V), or (B, T) for targets."""
        return self.head(sum_per_token(logp.exp().unsqueeze(-1) * x, tok, T), targets)

    def head(self, x, y):
        """log p of the next token: LN and head of x (B, N, D) -> (B, N, V), or (B, N) for targets y. For these the
        logits are made CHUNK at a time, and anew for the gradient, so that not all of (B, N, V) ever exists."""
        x, W = self.ln_f(x), self.wte.weight
        if y is None:
            return linear(x, W).float().log_softmax(-1)
        rows = max(1, CHUNK // W.size(0))
        chunks = list(zip(x.flatten(0, 1).split(rows), y.clamp(min=0).flatten().split(rows)))
        again = partial(checkpoint, nats, use_reentrant=False, preserve_rng_state=False) if len(chunks) > 1 else nats
        return -torch.cat([again(*chunk, W) for chunk in chunks]).view(y.shape)

    @torch.no_grad()
    def generate_steps(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, budget=None, generator=None,
                       streams=None, compile=False):
        """Continue idx (B, T), token by token, each read once into a cache: yields max_new_tokens tensors (B, 1).

        temperature: 0 = always the likeliest. top_k: sample among the k likeliest; None or 0 = all. Of a prompt longer
        than block_size the last block_size tokens count. When the cache is full, the last block_size // 2 + 1 tokens
        are read again into a new one: contexts stay between half and full size, the cost per token constant on
        average. streams: as in forward; it grows with every token read. compile: torch.compile the step that reads one
        token (CUDA graphs on a GPU). ValueError: bad arguments."""
        if not (temperature >= 0 and (top_k is None or top_k >= 0) and max_new_tokens >= 0):
            raise ValueError(f"temperature, top_k and max_new_tokens must be >= 0, not {temperature}, {top_k} and "
                             f"{max_new_tokens}")
        block_size, cache, length = self.config.block_size, Cache(), 0
        one = torch.compile(self, fullgraph=True, mode="reduce-overhead" if idx.is_cuda else None) if compile else self
        unread = recent = idx[:, -block_size:]
        for _ in range(max_new_tokens):
            if length + unread.size(1) > block_size:
                unread, cache, length = recent[:, -(block_size // 2 + 1):], Cache(), 0
            read, new = one if cache.fixed else self, []
            logits, _ = read(unread, budget=budget, routing="causal", cache=cache, streams=new)   # (B, T, V)
            if compile and not cache.fixed:
                cache.fix(block_size, self.config.budget if budget is None else budget)
            if streams is not None:
                streams += [(tok.clone(), logp.clone()) for tok, logp in new]        # a CUDA graph writes over its own
            length += unread.size(1)
            unread = sample(logits[:, -1], temperature, top_k, generator)            # (B, 1)
            recent = torch.cat((recent, unread), dim=1)[:, -block_size:]
            yield unread

    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, budget=None, generator=None, compile=False):
        """Continue idx (B, T), int64: (B, T + max_new_tokens). Arguments as in generate_steps."""
        steps = self.generate_steps(idx, max_new_tokens, temperature=temperature, top_k=top_k, budget=budget,
                                    generator=generator, compile=compile)
        return torch.cat([idx, *steps], dim=1)
