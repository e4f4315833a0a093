r"""
Thoughtbubbles (arXiv 2510.00219) in one file: a GPT that forks and deletes residual streams in the middle of the
network, so that a hard token becomes a bubble of several streams, which think in parallel and merge before the
output. Where to fork is learned from the language-modelling loss alone. Equation numbers are the paper's.

      a     b     c     d      Four tokens, one residual stream each, run through block 0.
   .--|     |  .--|     |      First fork layer: a and c fork.
   a' a     b  c' c     d      Six streams run through block 1.
   |  |     |  x  |  .--|      Second fork layer: a' stays, c' is deleted, d forks.
   a' a     b     c  d' d      Six streams run through block 2.
    \ |     |     |   \ |      Merge: a token's streams are summed, weighted by P, and predict the next token.

Words used here, each with one meaning:
    token       a position of the input
    stream      one residual vector; a token owns one or more of them, side by side
    original    the rightmost stream of a token, which is never deleted
    fork        any other stream; it starts as its parent stream plus a learned vector, and stands left of it
    candidate   what a fork layer chooses from: for each stream, a new fork of it and the stream itself
    extra       a candidate that is not an original: a new fork, or an old fork that would stay
    score       the probability that a fork layer gives to a candidate; the code works with its log
    P           how much a stream counts. An original has 1. A new fork has the P that its parent had before this
                fork layer, times its own score; each later fork layer multiplies it by the score for staying
    budget r    how many streams a token may own on average (in the picture 1.5)
    quota       ceil(r t), how many streams the first t tokens of a text may own together, for every t
    bar         the log P that an extra must reach to be wanted. Each fork layer has a bar for each budget of a
                list. A forward pass that trains moves the bars of its own budget (see `move_bar`), and
                `measure_bars` in train.py sets the others
    segment     the blocks from one fork layer to the next, in which the streams stay the same

Four things that are easy to get wrong:
    1. Streams attend causally in the order in which they stand. A fork stands left of its parent, so the parent
       sees the fork, and the fork does not see its parent. All that stand further right see both.
    2. An extra survives if it reaches the bar and the quota has room. The quota is the hard limit. Without a bar
       it would be spent on whatever comes first. So there is the bar, set so that on average r - 1 extras per
       token reach it. An extra below it is refused even if there is room, and the room stays for later extras
       that reach it. (Where there are no more than r - 1 extras per token, the bar goes so low that all reach it.
       At r = 2 or more that is so in the first fork layer, which forks every token.)
    3. Room is given out from left to right, stream by stream; each stream that would stay is served just before
       its own new fork. So a new fork never takes the room of its parent, and no later token changes an earlier
       choice. If a stream misses the bar and is deleted, its new fork can still survive.
    4. The loss teaches the scores through P alone. A fork that is not chosen has no P in any block, and so its
       score gets no gradient.

Shapes: B rows, T tokens of this call, N streams (another number in each segment), D = n_embd, H heads of
d = D / H channels, V words, R budgets that have a bar, S slots of a cache. Rows may own different numbers of
streams: the rest is padding, on the right.
"""
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

MIN_SCORE = -20.0           # the lowest log score, so that every log P is finite
PADDING = -1e4              # the log P of padding: its P is exactly 0, and no stream attends to it
NEVER_MEASURED = -math.inf  # a bar that no batch has set yet: every extra reaches it
ROUNDING = 1e-6             # budgets are compared with this tolerance, as they are saved in float32


@dataclass
class Config:
    """The architecture, and the budget of calls that name none. A value that cannot be used is a ValueError."""
    vocab_size: int = 256          # 256 for the bytes of a text
    block_size: int = 128          # the most tokens in a context
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    fork_layers: tuple = (1, 2)    # before these blocks, counted from 0, are fork layers; () is a plain GPT
    budget: float = 2.0            # streams per token; 1 means no forks
    bar_budgets: tuple = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0)  # some more join them below
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, not {value!r}")
        if self.n_embd % (2 * self.n_head):  # rotary positions turn the channels of a head in pairs
            raise ValueError(f"n_embd must be a multiple of 2 n_head = {2 * self.n_head}, not {self.n_embd}")
        layers = self.fork_layers if isinstance(self.fork_layers, Sequence) else [None]
        are_blocks = all(type(layer) is int and 0 <= layer < self.n_layer for layer in layers)
        if not are_blocks or len(set(layers)) < len(layers):
            raise ValueError("fork_layers must be different whole numbers from 0 to n_layer - 1 = "
                             f"{self.n_layer - 1}, or none, not {self.fork_layers!r}")
        self.fork_layers = tuple(sorted(self.fork_layers))
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number from 0 to below 1, not {self.dropout!r}")
        if not isinstance(self.bar_budgets, Sequence):
            raise ValueError(f"bar_budgets must be a sequence of budgets, not {self.bar_budgets!r}")
        self.budget = check_budget(self.budget)
        # A fork layer can at most double the streams, so no higher budget than `most` can be spent. With `most` in
        # the list, no budget that can be spent is above all in it.
        most = 2.0 ** len(self.fork_layers)
        self.bar_budgets = tuple(sorted({most, self.budget, *map(check_budget, self.bar_budgets)}))


def check_budget(budget):
    """`budget` as a float, or ValueError."""
    if not isinstance(budget, numbers.Real) or not 1 <= budget < math.inf:
        raise ValueError(f"budget must be a finite number >= 1, not {budget!r}")
    return float(budget)


class Tinybubbles(nn.Module):
    """A GPT with fork layers before some of its blocks."""
    causal = True  # no later token changes an earlier choice, so a cache can be used

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = init_matrix(nn.Embedding(config.vocab_size, config.n_embd), config)  # the output head too
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.forks = nn.ModuleDict({str(layer): self.new_fork_layer() for layer in config.fork_layers})
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        d = config.n_embd // config.n_head
        frequency = 10000.0 ** (-torch.arange(0, d, 2) / d)                           # (d/2,), of rotary positions
        self.register_buffer("frequency", frequency, persistent=False)

    def new_fork_layer(self):
        return Fork(self.config)

    def forward(self, idx, targets=None, *, budget=None, cache=None, trace=None):
        """Predict the next token after each token of idx (B, T), int64. Returns (logits, loss). The logits
        (B, T, V) are float32. The loss, in nats, is the mean cross-entropy of those targets (B, T) that are
        not -1; without targets it is None.

        budget: streams per token in this call; default: the configuration's.
        cache: from `new_cache`; the tokens follow those of earlier calls with it. A call that fails leaves
            it as it was.
        trace: a list that receives (owner, logp) for each block, (B, N) both: which token owns each stream,
            counted from 0 in the whole text, -1 for padding; and the stream's log P.
        Raises ValueError for what `check` refuses."""
        budget = self.check(idx, targets, budget, cache)
        logits, stream_counts = self.read(idx, budget, cache, trace)
        loss = None
        if targets is not None:
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
            loss = total / (targets != -1).sum().clamp(min=1)
        if cache is not None:
            cache.commit(stream_counts, idx.size(1))
        return logits, loss

    def read(self, idx, budget, cache, trace):
        """The method: embed, then fork and run the blocks, then merge. Returns the logits (B, T, V), and the
        number of streams that this call added to each segment, (segments, B, 1)."""
        B, T = idx.shape
        # How many streams of earlier calls each segment holds, and how many tokens these calls have read, which is
        # the same as what segment 0 holds: there each token has one stream.
        filled = idx.new_zeros(1 + len(self.forks), B, 1) if cache is None else cache.filled
        seen = filled[0]                                                              # (B, 1)
        x = self.drop(self.wte(idx))                                                  # (B, T, D)
        owner = torch.arange(T, device=idx.device).repeat(B, 1)                       # (B, T), one stream a token
        streams = Streams(owner, x.new_zeros(B, T), T, seen, self.frequency)          # log P = 0, so P = 1
        segments = [streams]
        slots = None if cache is None else Slots(cache, 0, streams)
        for layer, block in enumerate(self.blocks):
            if layer in self.config.fork_layers:
                segment, fork_layer = len(segments), self.forks[str(layer)]
                earlier_extras = filled[segment] - seen                               # (B, 1), all but the originals
                x, owner, logp = fork_layer(x, streams, budget, earlier_extras, cached=cache is not None)
                streams = Streams(owner, logp, T, seen, self.frequency)
                slots = None if cache is None else Slots(cache, segment, streams)
                segments.append(streams)
            x = block(x, streams, slots)                                              # (B, N, D)
            if trace is not None:
                trace.append((torch.where(streams.is_real, streams.token_number - 1, -1), streams.logp))
        return self.predict(x, streams), torch.stack([s.count for s in segments])

    def predict(self, x, streams):
        """Merge, and predict: x (B, N, D) becomes the logits (B, T, V). As in the authors' code, x_t is the sum
        of P_j x_j over the streams j of token t. It is not divided by the sum of their P_j: the norm in the head
        takes the scale away."""
        return self.head(streams.sum_per_token(streams.P * x))

    def head(self, x):
        return F.linear(self.ln_f(x), self.wte.weight).float()

    def check(self, idx, targets, budget, cache):
        """Refuse with ValueError what cannot be done, and change nothing. Returns the budget of this call."""
        budget = self.spendable(budget)
        left = self.config.block_size if cache is None else cache.block_size - cache.length
        if left == 0:
            raise ValueError(f"the cache is full with block_size = {cache.length} tokens; clear it or make another")
        if idx.dim() != 2 or len(idx) == 0 or not 1 <= idx.size(1) <= left:
            raise ValueError(f"idx must be (B, T), B at least 1 and T from 1 to {left}, which is block_size less the "
                             f"tokens in the cache, not {tuple(idx.shape)}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have idx's shape {tuple(idx.shape)}, not {tuple(targets.shape)}")
        if cache is not None and not self.causal:
            raise ValueError("the paper's model cannot use a cache, as later tokens change earlier choices; "
                             "use Tinybubbles")
        if cache is not None and (len(idx) != cache.rows or budget > cache.budget):
            raise ValueError(f"this cache is for {cache.rows} rows and budgets up to {cache.budget:g}, not for "
                             f"{len(idx)} and {budget:g}; make another one with new_cache")
        return budget

    def spendable(self, budget):
        """The budget of a call, or the configuration's if it names none; at most what the forks can spend."""
        return min(check_budget(self.config.budget if budget is None else budget), 2.0 ** len(self.forks))

    def new_cache(self, rows, budget=None):
        """An empty Cache for texts of this many rows, to be read at this budget (default: the
        configuration's) or lower ones."""
        budget = self.spendable(budget)
        # Each fork layer doubles the streams at most.
        segment_budgets = [min(2**segment, budget) for segment in range(1 + len(self.forks))]
        segment_of_block = [sum(first_block <= layer for first_block in self.config.fork_layers)
                            for layer in range(self.config.n_layer)]
        return Cache(self, rows, budget, segment_budgets, segment_of_block)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, budget=None, generator=None,
                 show=None, compile=False):
        """Continue idx (B, T), int64: returns (B, T + max_new_tokens). Each token is read once, into a cache;
        when that is full, the newest token and the block_size // 2 before it are read into the emptied cache.

        temperature: 0 always takes the likeliest token. top_k: sample among the k likeliest; None or 0 means
        all. generator: a torch.Generator. show: a function that is called with each new token (B, 1).
        compile: torch.compile the step that reads one token."""
        if not all(number >= 0 for number in (temperature, top_k or 0, max_new_tokens)):
            raise ValueError("temperature, top_k and max_new_tokens must be at least 0, not "
                             f"{temperature}, {top_k} and {max_new_tokens}")
        block_size, V = self.config.block_size, self.config.vocab_size
        cache = self.new_cache(len(idx), budget) if self.causal else None
        read_one = self.read
        if compile and self.causal:  # one graph serves all steps, as no shape ever changes (see `Fork.width`)
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
            step = read_one if unread.size(1) == 1 else self.read
            logits, stream_counts = step(unread, budget, cache, None)
            if cache is not None:
                cache.commit(stream_counts, unread.size(1))
            k = min(top_k or V, V) if temperature else 1
            likeliest, token = logits[:, -1].topk(k)                                  # (B, k), the likeliest first
            # All are relative to the likeliest, hence at most 0, so no temperature makes them overflow.
            probs = ((likeliest - likeliest[:, :1]) / max(temperature, 1e-9)).softmax(-1)
            unread = token.gather(1, torch.multinomial(probs, 1, generator=generator))  # (B, 1)
            idx = torch.cat((idx, unread), dim=1)
            if show:
                show(unread)
        return idx


def init_matrix(module, config, added=1):
    """Draw a weight matrix from N(0, 2 / (5 D added)). added: of a matrix whose output is added to the stream,
    how many such matrices the model has; else 1. At D = 1,000 and added = 1 that is GPT-2's standard deviation of
    0.02, which is too small for small models."""
    nn.init.normal_(module.weight, std=math.sqrt(2 / (5 * config.n_embd * added)))
    return module


# -- fork layers ---------------------------------------------------------------------------------------------

class Fork(nn.Module):
    """A fork layer (section 2.2): of N streams it makes 2N candidates, and lets some of them survive.
    Candidates are kept as pairs, (B, N, 2): of each stream a new fork, and the stream itself."""
    originals_fade = False  # originals keep P = 1, which at a budget of 1 leaves a plain GPT

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.ln = nn.LayerNorm(D, bias=False)
        self.score = init_matrix(nn.Linear(D, 2, bias=False), config)  # for each of a pair
        self.embedding = nn.Parameter(torch.randn(D) / math.sqrt(D))   # tells a new fork from its parent
        # The budgets are saved beside their bars, so a state dict with another list of the same length brings its
        # own budgets with its bars.
        self.register_buffer("budgets", torch.tensor(config.bar_budgets))             # (R,), rising
        self.register_buffer("bar", torch.full_like(self.budgets, NEVER_MEASURED))    # (R,), log P
        self.lowest_logp = MIN_SCORE * len(config.fork_layers)                        # the lowest that a log P can be

    def forward(self, x, streams, budget, earlier_extras, cached):
        """Score, select, gather: of the streams x (B, N, D), the surviving candidates as x (B, N', D), owner
        and logp (B, N').

        earlier_extras (B, 1): the forks that tokens of earlier calls own after this layer. cached: whether
        this call has a cache."""
        # Score: how likely is each stream to fork, and to stay (eqs. 1-3)? In float32, as close scores decide
        # much.
        with torch.autocast(x.device.type, enabled=False):
            score = F.logsigmoid(self.score(self.ln(x))).clamp(min=MIN_SCORE)         # (B, N, 2)
        if not self.originals_fade:
            score = score.masked_fill(kept_originals(streams), 0.0)                   # log 1
        logp = streams.logp.unsqueeze(-1) + score                                     # (B, N, 2)

        # Select: every original, and some of the extras. A choice has no gradient; logp keeps its own.
        moves_bar = self.training and torch.is_grad_enabled() and not cached
        survives = self.select(logp.detach(), streams, budget, earlier_extras, moves_bar)     # (B, N, 2)

        # Gather: a stable sort moves the survivors to the front in their order. Behind them there is padding,
        # whose x does not matter, as its P is 0. Candidate 2j is a new fork of stream j, and 2j + 1 is stream j.
        survives = survives.flatten(1)                                                # (B, 2N)
        candidate = survives.byte().sort(dim=1, descending=True, stable=True).indices
        candidate = candidate[:, :self.width(survives, streams.T, budget, cached)]    # (B, N')
        parent, is_new = candidate // 2, candidate % 2 == 0
        is_padding = ~survives.gather(1, candidate)
        x = x.take_along_dim(parent.unsqueeze(-1), 1) + is_new.unsqueeze(-1) * self.embedding
        owner = streams.owner.gather(1, parent).masked_fill(is_padding, streams.T)
        logp = logp.flatten(1).gather(1, candidate).masked_fill(is_padding, PADDING)
        return x, owner, logp

    def width(self, survives, T, budget, cached):
        """How many columns the survivors get, at least as many as the widest row needs. Without a cache that is
        what the quota of T tokens allows. With a cache it can be more, as the tokens of this call may use room that
        earlier ones left: so the survivors are counted. But to count makes a GPU wait, and a shape that depends on
        the data cannot be compiled, so a compiled step takes all candidates."""
        if not cached:
            return min(survives.size(1), quota(budget, T))
        if torch.compiler.is_compiling():
            return survives.size(1)
        return int(survives.sum(1).max())

    def select(self, logp, streams, budget, earlier_extras, moves_bar):
        """The causal rule: which candidates survive, (B, N, 2), given their logp (B, N, 2). Padding does not.
        moves_bar: whether this is a forward pass that trains."""
        is_original = kept_originals(streams)                                         # (B, N, 2)
        is_extra = streams.is_real.unsqueeze(-1) & ~is_original
        wanted = is_extra & (logp >= self.bar_for(budget))                            # (B, N, 2)
        if moves_bar:
            self.move_bar(budget, logp, is_extra, tokens=len(logp) * streams.T)
        # The most extras that the tokens up to and including a stream's own may hold together.
        allowed = quota(budget, streams.token_number) - streams.token_number          # (B, N)
        # If the budget was lowered within a text, earlier tokens may hold more. They keep them.
        allowed = allowed.maximum(earlier_extras)
        # A pair is flipped to be served, the stream before its new fork, and flipped back.
        in_turn = wanted.flip(-1).flatten(1)                                          # (B, 2N)
        admitted = admit(in_turn, allowed.repeat_interleave(2, dim=1), earlier_extras)
        return is_original | admitted.unflatten(1, (-1, 2)).flip(-1)

    def bar_for(self, budget):
        """The bar (1,) to use at this budget: that of the lowest measured budget which is not below it. If that
        is a higher budget, too many extras reach its bar, and the quota trims them. If there is no such budget,
        all extras are wanted. (The answer is a tensor, as to turn it into a number would make a GPU wait.)"""
        usable = (self.budgets >= budget - ROUNDING) & (self.bar != NEVER_MEASURED)   # (R,)
        first = usable.int().argmax(0, keepdim=True)                                  # (1,), the first that is usable
        return self.bar.masked_fill(~usable, NEVER_MEASURED).gather(0, first)

    @torch.no_grad()
    def move_bar(self, budget, logp, is_extra, tokens):
        """Move the bar of a budget r towards the log P of this batch's k-th best extra, where k is r - 1 times the
        tokens of the batch: a tenth of the way, or all of it the first time. All extras count, whether they
        survive or not. Each forward pass that trains moves the bar once, for the passes after it. No other pass
        does: neither validation without gradients nor sampling, whatever mode the model is in. If the budget is
        not in the list, r is the next higher one that is."""
        bar_index = (self.budgets < budget - ROUNDING).sum(0, keepdim=True)           # (1,)
        r = self.budgets.gather(0, bar_index)
        k = ((r - 1) * tokens).round().long()                                         # (1,)
        best_first = logp.masked_fill(~is_extra, PADDING).flatten().sort(descending=True).values
        kth_best = best_first.gather(0, (k - 1).clamp(0, len(best_first) - 1))
        # 1e-3 lower, so that if the same extras come again, rounding does not put them under the bar. If there are
        # no more than k extras, the target is the lowest possible log P, which every extra reaches. (At r = 1, k
        # is 0. The best extra sets the bar, and the quota refuses it.)
        all_may_survive = k >= is_extra.sum()
        target = torch.where(all_may_survive, self.lowest_logp, kth_best - 1e-3)
        bar = self.bar.gather(0, bar_index)
        self.bar.scatter_(0, bar_index, torch.where(bar == NEVER_MEASURED, target, bar.lerp(target, 0.1)))


def kept_originals(streams):
    """Which candidates are originals, (B, N, 2). A pair is a new fork and the stream itself, so only the
    second of a pair can be one."""
    return F.pad(streams.is_original.unsqueeze(-1), (1, 0))


def quota(budget, t):
    """How many streams the first t tokens may own together: ceil(round(budget * t, 6)). t is an int or an int64
    tensor.

    The product is rounded before it is raised, as that of floats can be a little too large: 1.1 * 50 is
    55.00000000000001. It is computed in whole numbers, in units of 1e-12, so that all devices agree."""
    units = round(budget * 10**12) * t - 500_000  # half of 1e-6 less, so that what rounding would lower is not raised
    return -(-units // 10**12)                    # -(-a // b) is ceil(a / b) in whole numbers


def admit(wanted, allowed, used):
    """Give out room from left to right. wanted (B, M) says which extras are wanted, allowed (B, M) how many the
    row may hold up to each of them, and used (B, 1) how many it holds to begin with. `allowed` never falls
    along a row and is never less than `used`. Returns which extras are admitted, (B, M). Each row is served as
    by this loop:

        for i in range(M):
            admitted[i] = wanted[i] and used < allowed[i]
            used = used + admitted[i]

    As used never exceeds allowed[i], a step of the loop is used = min(used + wanted[i], allowed[i]). Let total[i]
    be the sum of wanted up to i, and subtract it from both sides: with slack = used - total, the step is
    slack = min(slack, allowed[i] - total[i]), a running minimum. An extra is admitted where `used` rises."""
    total = wanted.cumsum(1)                                                          # (B, M)
    slack = (allowed - total).cummin(1).values.minimum(used)                          # (B, M)
    used_after = total + slack
    used_before = torch.cat((used, used_after[:, :-1]), 1)
    return used_after > used_before


class Streams:
    """Where the streams of one segment stand, and how much they count.

    owner (B, N): the token of this call that owns each stream, counted from 0; it never falls along a row,
    and is T for padding. logp (B, N): log P. seen (B, 1): how many tokens of the text earlier calls have
    read."""

    def __init__(self, owner, logp, T, seen, frequency):
        self.owner, self.logp, self.T = owner, logp, T
        self.P = logp.exp().unsqueeze(-1)                                             # (B, N, 1)
        self.token_number = seen + owner + 1                                          # (B, N), from 1, in the text
        self.is_real = owner < T                                                      # (B, N)
        self.count = self.is_real.sum(1, keepdim=True)                                # (B, 1)
        self.is_original = owner != F.pad(owner[:, 1:], (0, 1), value=T)              # (B, N), a token's last
        # Rotary positions (appendix D): if q streams belong to token number t, the one with p others of them to
        # its right is at t - p/q. Token numbers never fall along a row, so a binary search finds where the
        # streams of a token begin and end.
        begin = torch.searchsorted(self.token_number, self.token_number)
        end = torch.searchsorted(self.token_number, self.token_number, right=True)
        place = torch.arange(owner.size(1), device=owner.device)
        position = self.token_number - (end - 1 - place) / (end - begin)              # (B, N)
        self.move_to(position, frequency)
        # What attention puts into the last channel of each q and k (see CausalSelfAttention).
        self.last_channel = torch.stack((torch.ones_like(logp), logp)).unsqueeze(2)   # (2, B, 1, N)

    def move_to(self, position, frequency):
        """Put the streams at these rotary positions (B, N); frequency (d/2,)."""
        angle = position[:, None, :, None] * frequency                                # (B, 1, N, d/2)
        self.cos = angle.cos().repeat(1, 1, 1, 2)                                     # (B, 1, N, d)
        self.sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)                     # (B, 1, N, d)

    def rotate(self, heads):
        """Turn the queries or keys (..., B, H, N, d) to the positions of their streams. Channel i of a head's
        first half and channel i of its second, (a, b), become (a cos - b sin, b cos + a sin)."""
        return heads * self.cos + heads.roll(heads.size(-1) // 2, -1) * self.sin

    def sum_per_token(self, values):
        """Sum the values (B, N, C) of each token's streams, which must be 0 for padding: (B, T, C)."""
        index = self.owner.clamp(max=self.T - 1).unsqueeze(-1).expand_as(values)
        return values.new_zeros(len(values), self.T, values.size(-1)).scatter_add(1, index, values)


# -- the network ---------------------------------------------------------------------------------------------

class CausalSelfAttention(nn.Module):
    """Score-attenuated attention (eqs. 7-8). In each head, stream i attends to the streams j <= i:

        weight_ij = softmax over j of (q_i . k_j + log P_j) / sqrt(d)
        y_i       = sum over j of weight_ij P_j v_j

    so log P_j is scaled as well. To add it, a model with fork layers gives up the last channel of each head:
    there q is 1 and k is log P, so any attention kernel serves. As in the authors' code this happens after the
    rotation: of the pair of channels that turns most slowly, one is lost."""

    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.has_forks = len(config.fork_layers) > 0
        self.qkv = init_matrix(nn.Linear(D, 3 * D, bias=False), config)
        self.proj = init_matrix(nn.Linear(D, D, bias=False), config, added=2 * config.n_layer)

    def forward(self, x, streams, slots):
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, d)
        qk, v = streams.rotate(qkv[:2]).type_as(qkv), qkv[2]
        if self.has_forks:
            qk[..., -1] = streams.last_channel
            v = (v * streams.P.unsqueeze(1)).type_as(v)
        q, k = qk                                                                     # (B, H, N, d) each
        mask = None
        if slots is not None:  # the keys and values of earlier calls too
            k, v = slots.write(self.layer, k, v)                                      # (B, H, S, d)
            mask = slots.mask.type_as(q)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))                                # (B, N, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.fc = init_matrix(nn.Linear(D, 4 * D, bias=False), config)
        self.proj = init_matrix(nn.Linear(4 * D, D, bias=False), config, added=2 * config.n_layer)

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


# -- cached decoding -----------------------------------------------------------------------------------------

class Cache:
    """The keys and values of all streams that were read so far, without gradients. Its memory is taken at
    once, so that no shape changes later. The streams of a row fill its slots from the left. A call writes to
    the free slots behind them, and `commit` makes them count when the call has come through its last block.

    segment_budgets: the most streams per token in each segment. segment_of_block: the segment of each
    block."""

    def __init__(self, model, rows, budget, segment_budgets, segment_of_block):
        config, weight = model.config, model.wte.weight
        device, d = weight.device, config.n_embd // config.n_head
        self.rows, self.budget, self.block_size = rows, budget, config.block_size
        self.length = 0                                                               # tokens read so far
        self.filled = torch.zeros(len(segment_budgets), rows, 1, dtype=torch.int64, device=device)
        # At least one slot more than the quota of a full context, as padding may be written to the last one
        # (see Slots); and a multiple of 16, which suits attention kernels.
        sizes = [quota(r, config.block_size) // 16 * 16 + 16 for r in segment_budgets]
        self.slot_numbers = [torch.arange(S, device=device) for S in sizes]           # (S,) for each segment
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        self.kv = [torch.zeros(2, rows, config.n_head, sizes[segment], d, dtype=dtype, device=device)
                   for segment in segment_of_block]                                   # (2, B, H, S, d) each

    def commit(self, stream_counts, tokens):
        """Make what a call has written count: stream_counts (segments, B, 1), and `tokens` tokens in each row."""
        self.filled += stream_counts
        self.length += tokens

    def clear(self):
        """Forget all tokens."""
        self.filled.zero_()
        self.length = 0

    def keep_addresses(self):
        """Tell torch.compile that this memory stays where it is, as CUDA graphs need."""
        for tensor in (self.filled, *self.kv):
            torch._dynamo.mark_static_address(tensor)


class Slots:
    """The slots of a cache that the streams of a call take in one segment: the next free ones of each row.
    Padding is written behind the row's streams, where nothing attends to it and the next call overwrites it;
    what would be beyond the end goes to the last slot, which no stream ever takes."""

    def __init__(self, cache, segment, streams):
        self.cache, every_slot = cache, cache.slot_numbers[segment]                   # (S,)
        free = cache.filled[segment] + torch.arange(streams.owner.size(1), device=every_slot.device)
        slot = free.clamp(max=len(every_slot) - 1).unsqueeze(-1)                      # (B, N, 1)
        self.slot = slot.unsqueeze(1)                                                 # (B, 1, N, 1), as for all heads
        is_later = every_slot > slot                                                  # (B, N, S)
        self.mask = torch.where(is_later, -math.inf, 0.0).to(cache.kv[0].dtype).unsqueeze(1)  # (B, 1, N, S)

    def write(self, layer, k, v):
        """Write the new keys and values (B, H, N, d) of a block. Returns all of them, (B, H, S, d) each."""
        kv = self.cache.kv[layer]                                                     # (2, B, H, S, d)
        new = torch.stack((k, v)).detach().type_as(kv)                                # (2, B, H, N, d)
        kv.scatter_(3, self.slot.expand_as(new), new)
        return kv.type_as(k).unbind(0)


# -- the paper's model ---------------------------------------------------------------------------------------

class PaperFork(Fork):
    """The paper's fork layer: originals fade as all streams do, and the best candidates of the whole sequence
    survive (eqs. 4-5), so a later token can evict an earlier one's fork. It has no use for a bar."""
    originals_fade = True

    def select(self, logp, streams, budget, earlier_extras, moves_bar):
        """All originals, and the best extras, ceil(r T) in all. Of equal extras the left one is better, and a new
        fork is left of its parent."""
        best_first = logp.masked_fill(kept_originals(streams), math.inf).flatten(1).sort(
            dim=1, descending=True, stable=True).indices                              # (B, 2N)
        best = best_first[:, :quota(budget, streams.T)]
        survives = torch.zeros_like(logp, dtype=torch.bool).flatten(1).scatter(1, best, True)
        return survives.unflatten(1, (-1, 2)) & streams.is_real.unsqueeze(-1)


class PaperTinybubbles(Tinybubbles):
    """The paper's model; with merge="residual", the authors' JAX code. No cache is valid, so it generates by
    reading the whole text anew for each token."""
    causal = False

    def __init__(self, config, merge="probability"):
        if merge not in ("probability", "residual"):
            raise ValueError(f"merge must be probability or residual, not {merge!r}")
        super().__init__(config)
        self.merge = merge

    def new_fork_layer(self):
        return PaperFork(self.config)

    def predict(self, x, streams):
        """Equation 11: each stream predicts for itself, and p(y|t) = sum_j P_j p_j(y) / sum_j P_j. Returns
        log p, which serves as logits: a softmax leaves it as it is."""
        if self.merge == "residual":
            return super().predict(x, streams)
        return mixture(self.head(x), streams)


def mixture(logits, streams):
    """The mean, weighted by P, of the distributions that each token's streams predict by their logits (B, N,
    V): log-probabilities (B, T, V)."""
    logp = streams.logp.unsqueeze(-1)                                                 # (B, N, 1)
    return logsumexp_per_token(logp + logits.log_softmax(-1), streams) - logsumexp_per_token(logp, streams)


def logsumexp_per_token(values, streams):
    """log(sum(exp(values))) over the streams of each token: (B, N, C) to (B, T, C). As usual, the largest
    value is subtracted first and added again at the end, so that exp is never too large or too small."""
    index = streams.owner.clamp(max=streams.T - 1).unsqueeze(-1).expand_as(values)
    largest = values.new_full((len(values), streams.T, values.size(-1)), -math.inf)
    largest = largest.scatter_reduce(1, index, values.detach(), "amax")               # (B, T, C)
    return largest + streams.sum_per_token((values - largest.gather(1, index)).exp()).log()
