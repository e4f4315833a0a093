r"""
Thoughtbubbles (arXiv 2510.00219) in one file: a GPT that forks and deletes residual streams in the middle of the
network, so that a hard token becomes a bubble of several streams, which think in parallel and merge before the output.
Where to fork is learned from the language-modelling loss alone. Equation and section numbers are the paper's.

      a     b     c     d      Four tokens, one residual stream each, run through block 0.
   .--|     |  .--|     |      First fork layer: a and c fork.
   a' a     b  c' c     d      Six streams run through block 1.
   |  |     |  x  |  .--|      Second fork layer: a' stays, c' is deleted, d forks.
   a' a     b     c  d' d      Six streams run through block 2.
    \ |     |     |   \ |      Merge: the streams of a token are summed, weighted by P, and predict the next token.

Words used here, each with one meaning:
    token       a position of the input
    stream      one residual vector; a token owns one or more of them, side by side
    original    the rightmost stream of a token, which is never deleted
    fork        any other stream; it starts as a copy of its parent and stands left of it
    candidate   what a fork layer chooses from: for each stream, a new fork of it and the stream itself
    extra       a candidate that is not an original: a new fork, or an old fork that wants to stay
    score       the probability that a fork layer gives a candidate; its log is used throughout
    P           how much a stream counts: 1 for an original, for a fork the product of all scores in its life
    budget r    how many streams per token are allowed, on average over the text so far
    quota       ceil(r t), the number of streams that the first t tokens of a text may own together, for every t
    bar         the log P that an extra must reach at a fork layer; each budget has its own
    segment     the blocks between two fork layers, through which the streams stay the same

Three things that are easily got wrong:
    1. Streams attend causally in the order in which they stand. A fork stands left of its parent, so the parent
       sees the fork and the fork never sees its parent. Everything to the right sees both.
    2. An extra survives if its log P reaches the bar and the quota still has room. The bar is set so that about
       r - 1 extras per token reach it: most extras are refused by the bar, and the quota catches the rest. Tokens are
       served from left to right; within a token too, and every stream is served before its own new fork. So no later
       token changes an earlier choice.
    3. Only P carries a gradient to the scores. A fork that is not chosen has no P in any block, hence no gradient.

Shapes: B rows, T tokens of this call, N streams (their number changes at each fork layer), D = n_embd, H heads of
d = D / H channels, V words, S slots of a cache. Rows may own different numbers of streams: padding is on the right.
"""
import math
import numbers
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

MIN_SCORE = -20.0           # no log score is lower, so a log P is finite
PADDING = -1e4              # the log P of padding: its P is exactly 0, and nothing attends to it
NEVER_MEASURED = -math.inf  # a bar before any batch has set it: every extra reaches it


@dataclass
class Config:
    """The architecture, and the budget of calls that name none. A value that cannot be used raises ValueError."""
    vocab_size: int = 256           # 256 for the bytes of a text
    block_size: int = 128           # the most tokens in a context
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    fork_layers: tuple = (1, 2)     # a fork layer stands before each of these blocks, counted from 0; () is a plain GPT
    budget: float = 2.0             # streams per token; 1 means no forks
    bar_budgets: tuple = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0)  # these have bars; so has `budget`
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, not {value!r}")
        if self.n_embd % (2 * self.n_head):  # rotary positions turn pairs of a head's channels
            raise ValueError(f"n_embd must be a multiple of 2 n_head = {2 * self.n_head}, not {self.n_embd}")
        if len(set(self.fork_layers)) < len(self.fork_layers) or not set(self.fork_layers) <= set(range(self.n_layer)):
            raise ValueError(f"fork_layers must differ and be from 0 to {self.n_layer - 1}, not {self.fork_layers!r}")
        self.fork_layers = tuple(sorted(self.fork_layers))
        self.budget = check_budget(self.budget)
        most = 2.0 ** len(self.fork_layers)  # each fork layer can double the streams, so no budget is spent beyond this
        self.bar_budgets = tuple(sorted({1.0, most, self.budget, *map(check_budget, self.bar_budgets)}))


def check_budget(budget):
    """`budget` as a float, or ValueError."""
    if not isinstance(budget, numbers.Real) or not 1 <= budget < math.inf:
        raise ValueError(f"budget must be a finite number >= 1, not {budget!r}")
    return float(budget)


class Tinybubbles(nn.Module):
    """A GPT with fork layers before some of its blocks."""
    causal = True  # no later token changes an earlier prediction, so a cache can be used

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = init_matrix(nn.Embedding(config.vocab_size, config.n_embd), config)  # also the output head
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.forks = nn.ModuleDict({str(layer): self.new_fork_layer() for layer in config.fork_layers})
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        d = config.n_embd // config.n_head
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(0, d, 2) / d), persistent=False)  # (d/2,), of RoPE

    def new_fork_layer(self):
        return Fork(self.config)

    def forward(self, idx, targets=None, *, budget=None, cache=None, trace=None):
        """Predict the token after each token of idx (B, T), int64. Returns (logits, loss): logits (B, T, V), float32;
        loss, in nats, the mean cross-entropy of the targets (B, T) that are not -1, or None without targets.

        budget: streams per token, of this call; default: the configuration's. cache: from `new_cache`; idx then goes
        on where the last call with it ended, and nothing in it is changed if the call fails. trace: a list that
        receives for each block (owner, logp), (B, N) each: the token that owns each stream, counted from the first
        token of the text, -1 for padding, and the stream's log P. Raises ValueError for what `check` refuses."""
        budget = self.check(idx, targets, budget, cache)
        logits, stream_counts = self.read(idx, budget, cache, trace)
        if cache is not None:
            cache.commit(stream_counts, idx.size(1))
        if targets is None:
            return logits, None
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return logits, total / (targets != -1).sum().clamp(min=1)

    def read(self, idx, budget, cache, trace):
        """The method: embed, then fork and run the blocks, then merge. Returns the logits (B, T, V), and how many
        streams each row got in each segment, (segments, B, 1). A text without a cache is read as one chunk from an
        empty cache would be."""
        B, T = idx.shape
        # How many streams of earlier calls there are: filled[0] of them before any fork layer, which is one a token.
        filled = idx.new_zeros(1 + len(self.forks), B, 1) if cache is None else cache.filled
        x = self.drop(self.wte(idx))                                                # (B, T, D)
        owner, logp = torch.arange(T, device=idx.device).repeat(B, 1), x.new_zeros(B, T)
        streams = Streams(owner, logp, T, filled[0], self.frequency)
        segments = [streams]
        slots = None if cache is None else cache.reserve(0, streams)
        for layer, block in enumerate(self.blocks):
            if layer in self.config.fork_layers:
                extras_before = filled[len(segments)] - filled[0]                   # (B, 1)
                fork = self.forks[str(layer)]
                x, owner, logp = fork(x, streams, budget, extras_before, cache is not None)  # (B, N, D)
                streams = Streams(owner, logp, T, filled[0], self.frequency)
                slots = None if cache is None else cache.reserve(len(segments), streams)
                segments.append(streams)
            x = block(x, streams, slots)                                            # (B, N, D)
            if trace is not None:
                trace.append((torch.where(streams.is_real, streams.number - 1, -1), streams.logp))
        return self.predict(x, streams), torch.stack([streams.count for streams in segments])

    def predict(self, x, streams):
        """Merge and predict as the authors' code does: x_t = sum_j P_j x_j over the streams j of token t, not divided
        by the sum of P; then the norm and the head. x (B, N, D) gives logits (B, T, V)."""
        return self.head(streams.sum_per_token(streams.P * x))

    def head(self, x):
        return F.linear(self.ln_f(x), self.wte.weight).float()

    def check(self, idx, targets, budget, cache):
        """Refuse with ValueError what cannot be done, and change nothing. Returns the budget of this call."""
        budget = check_budget(self.config.budget if budget is None else budget)
        budget = min(budget, 2.0 ** len(self.forks))
        left = self.config.block_size - (0 if cache is None else cache.length)
        if idx.dim() != 2 or len(idx) == 0 or not 1 <= idx.size(1) <= left:
            raise ValueError(f"idx must be (B, T) with B >= 1 and T from 1 to {left}, which is block_size less what is in "
                             f"the cache, not {tuple(idx.shape)}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have idx's shape {tuple(idx.shape)}, not {tuple(targets.shape)}")
        if cache is not None and not self.causal:
            raise ValueError("the paper's model cannot use a cache, as later tokens change earlier choices; "
                             "take Tinybubbles")
        if cache is not None and (len(idx) != cache.rows or budget > cache.budget):
            raise ValueError(f"this cache is for {cache.rows} rows and budgets up to {cache.budget:g}, not for {len(idx)} "
                             f"rows at {budget:g}; make another with new_cache")
        return budget

    def new_cache(self, rows, budget=None):
        """An empty Cache for texts of this many rows, read at `budget` (default: the configuration's) or less."""
        budget = min(check_budget(self.config.budget if budget is None else budget), 2.0 ** len(self.forks))
        most = [min(2**i, budget) for i in range(1 + len(self.forks))]  # streams per token in each segment, at most
        segment_of = [sum(fork <= layer for fork in self.config.fork_layers) for layer in range(self.config.n_layer)]
        return Cache(self, rows, budget, most, segment_of)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, budget=None, generator=None, show=None,
                 compile=False):
        """Continue idx (B, T), int64: returns (B, T + max_new_tokens). Each token is read once, into a cache; when that
        is full, the last block_size // 2 + 1 tokens are read anew. temperature: 0 takes the likeliest token always.
        top_k: sample among the k likeliest; None or 0 means all. generator: a torch.Generator. show: a function that
        is called with each new token (B, 1). compile: torch.compile the step that reads one token."""
        assert min(temperature, top_k or 0, max_new_tokens) >= 0
        block_size, V = self.config.block_size, self.config.vocab_size
        cache = self.new_cache(len(idx), budget) if self.causal else None
        read_one = self.read
        if compile and self.causal:
            cache.keep_addresses()
            read_one = torch.compile(self.read, fullgraph=True, mode="reduce-overhead")
        unread = idx[:, -block_size:]
        for _ in range(max_new_tokens):
            if cache is None:
                unread = idx[:, -block_size:]
            elif cache.length + unread.size(1) > block_size:
                unread = idx[:, -(block_size // 2 + 1):]
                cache.clear()
            budget = self.check(unread, None, budget, cache)
            read = read_one if unread.size(1) == 1 else self.read
            logits, stream_counts = read(unread, budget, cache, None)
            if cache is not None:
                cache.commit(stream_counts, unread.size(1))
            likeliest, token = logits[:, -1].topk(min(top_k or V, V) if temperature else 1)  # (B, k)
            # The likeliest is subtracted first: then no temperature, however low, can overflow.
            probs = ((likeliest - likeliest[:, :1]) / max(temperature, 1e-9)).softmax(-1)
            unread = token.gather(1, torch.multinomial(probs, 1, generator=generator))  # (B, 1)
            idx = torch.cat((idx, unread), dim=1)
            if show:
                show(unread)
        return idx


def init_matrix(layer, config, added=1):
    """Draw a weight matrix from N(0, 2 / (5 D added)), where `added` is how many such outputs are summed up. At
    D = 1,000 this is GPT-2's start; GPT-2's fixed 0.02 is too small for small models."""
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (5 * config.n_embd * added)))
    return layer


# -- forking and selection ---------------------------------------------------------------------------------------------

class Fork(nn.Module):
    """A fork layer (section 2.2). Candidates come in pairs (B, N, 2): a new fork of a stream, then the stream itself."""
    originals_fade = False  # originals keep P = 1, so a budget of 1 is a plain GPT

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.ln = nn.LayerNorm(D, bias=False)
        self.score = init_matrix(nn.Linear(D, 2, bias=False), config)  # row 0 scores a new fork, row 1 the stream itself
        self.embedding = nn.Parameter(torch.randn(D) / math.sqrt(D))   # added to a new fork, to tell it from its parent
        # The budgets are saved beside their bars, so that a bar is never read as another budget's.
        self.register_buffer("budgets", torch.tensor(config.bar_budgets))           # (budgets,)
        self.register_buffer("bar", torch.full((len(config.bar_budgets),), NEVER_MEASURED))  # (budgets,)
        self.lowest_logp = MIN_SCORE * len(config.fork_layers)

    def forward(self, x, streams, budget, extras_before, cached):
        """Fork and delete: of the streams x (B, N, D), the surviving candidates as x (B, N', D), owner and logp (B, N').
        extras_before (B, 1): extras that the tokens of earlier calls own behind this layer. cached: is there a cache?"""
        # Score: how likely is each stream to fork, and to stay (eqs. 1-3)? In float32, as small differences decide.
        with torch.autocast(x.device.type, enabled=False):
            score = F.logsigmoid(self.score(self.ln(x))).clamp(min=MIN_SCORE)       # (B, N, 2)
        if not self.originals_fade:
            score = score.masked_fill(streams.kept_original, 0.0)
        logp = streams.logp.unsqueeze(-1) + score                                   # (B, N, 2)

        # Select: every original, and some of the extras.
        survives = self.select(logp.detach(), streams, budget, extras_before).flatten(1)  # (B, 2N)

        # Gather: a stable sort puts the survivors first and keeps their order. What fills up the width is padding.
        width = survives.size(1)
        if not cached:
            width = min(width, quota(budget, streams.T))    # known without looking at data: no step waits for the GPU
        elif not torch.compiler.is_compiling():
            width = int(survives.sum(1).max())              # the widest row; a compiled step keeps room for all instead
        candidate = survives.byte().sort(dim=1, descending=True, stable=True).indices[:, :width]    # (B, N')
        parent, is_new = candidate // 2, candidate % 2 == 0
        is_padding = ~survives.gather(1, candidate)
        x = x.take_along_dim(parent.unsqueeze(-1), 1) + is_new.unsqueeze(-1) * self.embedding  # (B, N', D)
        owner = streams.owner.gather(1, parent).masked_fill(is_padding, streams.T)
        logp = logp.flatten(1).gather(1, candidate).masked_fill(is_padding, PADDING)
        return x, owner, logp

    def select(self, logp, streams, budget, extras_before):
        """Which candidates survive, (B, N, 2): all originals, and the extras that reach the bar while the quota has room.
        This is our causal rule; the paper's is PaperFork's. logp (B, N, 2)."""
        is_extra = streams.is_real.unsqueeze(-1) & ~streams.kept_original       # padding is never wanted, at any bar
        # A budget without a bar of its own takes that of the next higher one, which is lower: more is wanted, and the
        # quota trims it. 1e-6, as the budgets are stored in float32.
        which = (self.budgets < budget - 1e-6).sum(0, keepdim=True)                 # (1,)
        wanted = is_extra & (logp >= self.bar.gather(0, which))                     # (B, N, 2)
        if self.training and torch.is_grad_enabled():
            self.move_bar(which, logp, is_extra, len(logp) * streams.T)
        allowed = quota(budget, streams.number) - streams.number                    # (B, N), extras up to each stream's token
        allowed = allowed.maximum(extras_before)    # a budget that is lowered within a text takes nothing back
        # Pairs are flipped for serving, as a stream comes before its own fork, and flipped back.
        in_turn = wanted.flip(-1).flatten(1)                                        # (B, 2N)
        admitted = admit(in_turn, allowed.repeat_interleave(2, dim=1), extras_before)
        return streams.kept_original | admitted.unflatten(1, (-1, 2)).flip(-1)

    @torch.no_grad()
    def move_bar(self, which, logp, is_extra, tokens):
        """Move one bar a tenth of the way, or if it was never measured all the way, to the log P that r - 1 extras per
        token of this batch reach, where r is that bar's budget. A running statistic, as BatchNorm's mean is: it moves in
        every forward pass that trains, after it was used, and in no other. which (1,): the place of the bar."""
        count = ((self.budgets.gather(0, which) - 1) * tokens).round().long()       # (1,)
        best_first = logp.masked_fill(~is_extra, PADDING).flatten().sort(descending=True).values
        reached = best_first.gather(0, count.clamp(1, len(best_first)) - 1)
        # 1e-3 lower: else rounding would decide about the extra that set the bar, and about others like it. Where there
        # are fewer extras than may be had, the bar is the lowest possible log P, so that all are wanted.
        target = (reached - 1e-3).clamp(min=self.lowest_logp)
        before = self.bar.gather(0, which)
        after = torch.where(before == NEVER_MEASURED, target, before.lerp(target, 0.1))
        self.bar.scatter_(0, which, after)


def quota(budget, t):
    """ceil(budget t), how many streams the first t tokens may own; t is an int or an int64 tensor.

    It is computed in whole numbers, as floats would sometimes give one stream too many: 1.1 * 50 is 55.00000000000001.
    So the budget is taken in units of 1e-12, and an excess of less than 5e-7 streams is forgiven: 3 t at 5/3 is 5 t."""
    unit = 10**12
    return -((unit // 2_000_000 - round(budget * unit) * t) // unit)    # -(-a // b) rounds a / b up


def admit(wanted, allowed, used):
    """Serve extras in turn, from left to right, while there is room. wanted (B, M) says which are wanted, allowed (B, M)
    how many may be held up to each, which never falls along a row nor is below used (B, 1), the number held before.
    Returns which are admitted, (B, M). For each row this is the loop

        for i in range(M):
            admitted[i] = wanted[i] and used < allowed[i]
            used = used + admitted[i]

    without the loop: used after i is min(used + wanted[i], allowed[i]), and such a chain of sums and minima is a
    running sum of what is wanted, less the largest excess over what was allowed so far."""
    total_wanted = wanted.cumsum(1)
    used_after = total_wanted + (allowed - total_wanted).cummin(1).values.minimum(used)  # (B, M)
    used_before = torch.cat((used, used_after[:, :-1]), 1)
    return used_after > used_before


class Streams:
    """Where the N streams of a segment stand, and how much they count. Built from owner (B, N), which token of this call
    each belongs to, from 0, never falling along a row, T for padding; logp (B, N); and seen (B, 1), how many tokens of the
    text earlier calls have read."""

    def __init__(self, owner, logp, T, seen, frequency):
        self.owner, self.logp, self.T = owner, logp, T
        self.number = seen + owner + 1                                              # (B, N), the token's number in the text, from 1
        self.P = logp.exp().unsqueeze(-1)                                           # (B, N, 1)
        self.is_real = owner < T                                                    # (B, N), false for padding
        self.count = self.is_real.sum(1, keepdim=True)                              # (B, 1)
        is_original = owner != F.pad(owner[:, 1:], (0, 1), value=T)                 # (B, N), the last one of its token
        self.kept_original = F.pad(is_original.unsqueeze(-1), (1, 0))               # (B, N, 2), of each pair of candidates
        # Rotary positions (appendix D): of the q streams of token t, the one with p others to its right stands at
        # t - p/q. As owners never fall, a search finds where the streams of a token begin and end. (It searches in
        # `number`, not in `owner`, as torch.compile cannot search among constants on a GPU.)
        begin = torch.searchsorted(self.number, self.number)
        end = torch.searchsorted(self.number, self.number, right=True)
        p = end - 1 - torch.arange(owner.size(1), device=owner.device)
        position = self.number - p / (end - begin)                                  # (B, N)
        angle = position[:, None, :, None] * frequency                              # (B, 1, N, d/2)
        # A head (a, b) of two halves is turned to (a cos - b sin, b cos + a sin): it times cos, plus (b, a) times sin.
        self.cos = angle.cos().repeat(1, 1, 1, 2)                                   # (B, 1, N, d)
        self.sin = torch.cat((-angle.sin(), angle.sin()), -1)                       # (B, 1, N, d)
        self.score_channel = torch.stack((torch.ones_like(logp), logp)).unsqueeze(2)  # (2, B, 1, N)

    def rotate(self, heads):
        """Turn queries or keys (..., B, H, N, d) to their streams' rotary positions."""
        return heads * self.cos + heads.roll(heads.size(-1) // 2, -1) * self.sin

    def sum_per_token(self, values):
        """Sum the values (B, N, C) of the streams, which are 0 for padding, over each token: (B, T, C)."""
        index = self.owner.clamp(max=self.T - 1).unsqueeze(-1).expand_as(values)
        return values.new_zeros(len(values), self.T, values.size(-1)).scatter_add(1, index, values)


# -- the network -------------------------------------------------------------------------------------------------------

class CausalSelfAttention(nn.Module):
    """Score-attenuated attention (eqs. 7-8). For streams i and j <= i, and each head,

        weight_ij = softmax over j of (q_i . k_j + log P_j) / sqrt(d)
        y_i       = sum over j of weight_ij P_j v_j

    The log P is no mask: the last channel of each head is given up for it, q = 1 and k = log P, so that the product
    q . k adds it and any attention kernel serves. This comes after the rotation, which it takes one partner from; the
    authors' code does the same."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.has_scores = len(config.fork_layers) > 0
        self.qkv = init_matrix(nn.Linear(config.n_embd, 3 * config.n_embd, bias=False), config)
        self.proj = init_matrix(nn.Linear(config.n_embd, config.n_embd, bias=False), config, added=2 * config.n_layer)

    def forward(self, x, streams, slots):
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, d)
        qk, v = streams.rotate(qkv[:2]).type_as(qkv), qkv[2]                    # the angles are float32, also in bfloat16
        if self.has_scores:
            qk[..., -1] = streams.score_channel
            v = (v * streams.P.unsqueeze(1)).type_as(v)
        q, k = qk.unbind(0)                                                         # (B, H, N, d)
        mask = None
        if slots is not None:                                                   # there is a cache
            k, v = slots.write(self.layer, k, v)                                    # (B, H, S, d)
            mask = slots.mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))                              # (B, N, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = init_matrix(nn.Linear(config.n_embd, 4 * config.n_embd, bias=False), config)
        self.proj = init_matrix(nn.Linear(4 * config.n_embd, config.n_embd, bias=False), config, added=2 * config.n_layer)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    """A GPT block that adds to each stream as much as its P says (eqs. 9-10)."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, streams, slots):
        x = x + streams.P * self.drop(self.attn(self.ln_1(x), streams, slots))
        x = x + streams.P * self.drop(self.mlp(self.ln_2(x)))
        return x


# -- cached decoding ---------------------------------------------------------------------------------------------------

class Cache:
    """The keys and values of the streams read so far, without gradients. All memory is taken at the start, so that no
    shape ever changes and a step compiles to one graph. A row's streams fill its slots from the left. A call writes
    behind what is filled, and only `commit`, after its last block, says that this is filled too: a call that fails
    has changed nothing.

    most: streams per token of each segment; segment_of: each block's segment."""

    def __init__(self, model, rows, budget, most, segment_of):
        config, weight = model.config, model.wte.weight
        self.rows, self.budget, self.segment_of, self.length = rows, budget, segment_of, 0    # length: tokens read
        self.filled = torch.zeros(len(most), rows, 1, dtype=torch.int64, device=weight.device)
        # One slot more than a full context fills, as padding is written to the last one; in whole sixteens, which
        # attention kernels like.
        sizes = [quota(r, config.block_size) // 16 * 16 + 16 for r in most]
        self.slots = [torch.arange(size, device=weight.device) for size in sizes]   # (S,) each
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        heads, d = config.n_head, config.n_embd // config.n_head
        self.kv = [weight.new_zeros(2, rows, heads, sizes[segment], d, dtype=dtype, requires_grad=False)
                   for segment in segment_of]                                       # (2, B, H, S, d) each

    def reserve(self, segment, streams):
        """Where the streams of this call will be written in a segment. Changes nothing."""
        return Slots(self, segment, streams)

    def commit(self, stream_counts, tokens):
        """Take for good what a call has written: stream_counts (segments, B, 1), of this many tokens a row."""
        self.filled += stream_counts
        self.length += tokens

    def clear(self):
        """Forget all tokens."""
        self.filled.zero_()
        self.length = 0

    def keep_addresses(self):
        """Promise torch.compile that this memory stays where it is, which CUDA graphs need."""
        for tensor in (self.filled, *self.kv):
            torch._dynamo.mark_static_address(tensor)


class Slots:
    """The slots (B, N) of a cache that one segment's new streams take: each row's next ones."""

    def __init__(self, cache, segment, streams):
        self.cache, every_slot = cache, cache.slots[segment]                        # (S,)
        last = len(every_slot) - 1
        self.slot = (cache.filled[segment] + every_slot[:1] + torch.arange(
            streams.owner.size(1), device=every_slot.device)).clamp(max=last)       # (B, N)
        hidden = every_slot > self.slot.unsqueeze(-1)                               # (B, N, S)
        self.mask = torch.where(hidden, -math.inf, 0.0).to(cache.kv[0].dtype).unsqueeze(1)  # (B, 1, N, S)

    def write(self, layer, k, v):
        """Write a block's new keys and values (B, H, N, d). Returns all of them, (B, H, S, d) each."""
        kv, new = self.cache.kv[layer], torch.stack((k, v)).detach()                # (2, B, H, N, d)
        kv.scatter_(3, self.slot[:, None, :, None].expand_as(new), new)
        return kv.unbind(0)


# -- the paper's model -------------------------------------------------------------------------------------------------

class PaperFork(Fork):
    """The paper's fork layer: originals fade like any stream, and the best candidates of the whole sequence survive
    (eqs. 4-5). So a later token can evict an earlier token's fork. It has no use for a bar."""
    originals_fade = True

    def select(self, logp, streams, budget, extras_before):
        """The originals and the best extras, ceil(r T) together; of equal candidates the earlier one."""
        best_first = logp.masked_fill(streams.kept_original, math.inf).flatten(1).sort(
            dim=1, descending=True, stable=True).indices[:, :quota(budget, streams.T)]  # (B, quota)
        chosen = torch.zeros_like(logp, dtype=torch.bool).flatten(1).scatter(1, best_first, True)
        return chosen.unflatten(1, (-1, 2)) & streams.is_real.unsqueeze(-1)


class PaperTinybubbles(Tinybubbles):
    """The paper's model, with merge="probability", and with merge="residual" its authors' JAX code. No cache is valid:
    it generates by reading the whole text for each token."""
    causal = False

    def __init__(self, config, merge="probability"):
        if merge not in ("probability", "residual"):
            raise ValueError(f"merge must be probability or residual, not {merge!r}")
        super().__init__(config)
        self.merge = merge

    def new_fork_layer(self):
        return PaperFork(self.config)

    def predict(self, x, streams):
        """Equation 11: p(y|t) = sum_j P_j softmax(W LN(x_j)) / sum_j P_j over the streams j of token t, as log p."""
        if self.merge == "residual":
            return super().predict(x, streams)
        return mixture(self.head(x), streams)


def mixture(logits, streams):
    """The mean of the distributions that the streams predict, logits (B, N, V), weighted by P: log p (B, T, V)."""
    logp = streams.logp.unsqueeze(-1)                                               # (B, N, 1)
    return logsumexp_per_token(logp + logits.log_softmax(-1), streams) - logsumexp_per_token(logp, streams)


def logsumexp_per_token(values, streams):
    """log of the sum of exp(values) over each token's streams: (B, N, C) to (B, T, C). The largest of a token is taken
    out first, so that nothing overflows."""
    index = streams.owner.clamp(max=streams.T - 1).unsqueeze(-1).expand_as(values)
    largest = values.new_full((len(values), streams.T, values.size(-1)), -math.inf)
    largest = largest.scatter_reduce(1, index, values.detach(), "amax")
    return largest + streams.sum_per_token((values - largest.gather(1, index)).exp()).log()
