"""
What bubbles are compared with, built on tinybubbles' own blocks, so that only the idea differs:
    other ways to compute more for a token: copies, pauses (two forms), recurrent depth, PonderLM-2 and PonderLM-3;
    bubbles with one part changed: they fork at random, are not attenuated, or merge as the paper's do;
    for the task urns, forks that are placed by hand, and ways to teach bubbles where to put them.

All are called, trained and sampled as a Tinybubbles is. The budget of a Rival is a whole number n: how many positions a
token owns, which are its copies, itself and its pauses, or itself and its latent slots; and with recurrent depth the
number of iterations. Some compute otherwise in calls that train; `trains` says which do.

Shapes: B rows, T tokens of this call, N positions, D = n_embd, H heads of d channels, V words, S slots of a cache.
"""
import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks.urns import Urns  # noqa: E402
from tinybubbles import (PADDING, Cache, Fork, Slots, Streams, Tinybubbles, check_budget, init_matrix,  # noqa: E402
                         kept_originals, mixture)

LEAST_LOG_W = math.log(1e-4)    # a PonderLM reads no slot that counts less


def trains(model, cache):
    """Whether a call trains: in training mode, with gradients, without a cache."""
    return model.training and cache is None and torch.is_grad_enabled()


class Charging(Tinybubbles):
    """Calls that train add `charge` times the extras' P per token to the loss, for each entry of the trace."""
    charge = 0.01

    def forward(self, idx, targets=None, *, budget=None, cache=None, trace=None):
        own_trace = []      # of this call alone: `trace` may hold what earlier calls put there
        logits, loss = super().forward(idx, targets, budget=budget, cache=cache, trace=own_trace)
        if trace is not None:
            trace.extend(own_trace)
        if targets is not None and trains(self, cache):
            # All streams less the originals, whose P is 1.
            loss = loss + self.charge * sum(logp.exp().sum() / idx.numel() - 1 for _, logp in own_trace)
        return logits, loss


# -- other ways to compute more for a token ----------------------------------------------------------------------------

class Rival(Tinybubbles):
    """What rivals share: nothing is forked, and every token has the same number of positions, in all blocks. So a trace
    gets one entry. Each defines `read`."""

    def whole_budget(self, budget):
        """The budget of a call, as an int, or ValueError."""
        budget = check_budget(self.config.budget if budget is None else budget)
        if budget % 1 or self.config.fork_layers:
            raise ValueError(f"this model needs fork_layers () and a whole budget, not {self.config.fork_layers} and "
                             f"{budget:g}")
        return int(budget)

    def check(self, idx, targets, budget, cache):
        n = self.whole_budget(budget)
        super().check(idx, targets, 1, cache)
        if cache is not None and n > cache.budget:
            raise ValueError(f"this cache is for budgets up to {cache.budget}, not {n}; make another with new_cache")
        return n

    def new_cache(self, rows, budget=None):
        """An empty Cache, with room for n positions of each token."""
        n = self.whole_budget(budget)
        return Cache(self, rows, n, [n], [0] * self.config.n_layer)

    def cache_of_this_call(self, rows, n, cache):
        """A cache for a call that reads in parts. It has the memory of `cache`, if there is one, but its own count of
        what is filled: if the call fails, nothing in `cache` has changed."""
        cache = self.new_cache(rows, n) if cache is None else copy.copy(cache)
        cache.filled = cache.filled.clone()
        return cache

    def positions(self, idx, n, cache):
        """The Streams of n positions for each token of idx."""
        B, T = idx.shape
        owner = torch.arange(T, device=idx.device).repeat_interleave(n).repeat(B, 1)  # (B, N)
        seen = torch.full_like(idx[:, :1], 0 if cache is None else cache.length)    # (B, 1)
        return Streams(owner, self.wte.weight.new_zeros(owner.shape), T, seen, self.frequency)

    def run(self, x, streams, cache, trace=None):
        """x (B, N, D) through all blocks."""
        slots = None if cache is None else Slots(cache, 0, streams)
        for block in self.blocks:
            x = block(x, streams, slots)
        if trace is not None:
            trace.append((streams.token_number - 1, streams.logp))
        return x


class Copies(Rival):
    """Copy-n (a baseline of arXiv 2510.00219): each embedding n times, at rotary positions t - p/n. The sum of a
    token's copies predicts, as in bubbles whose P are all 1."""

    def read(self, idx, n, cache, trace):
        streams = self.positions(idx, n, cache)
        x = self.drop(self.wte(idx)).repeat_interleave(n, 1)                        # (B, N, D)
        x = self.run(x, streams, cache, trace).unflatten(1, (-1, n))                # (B, T, n, D)
        return self.head(x.sum(2)), streams.count.unsqueeze(0)


class Pauses(Rival):
    """n - 1 pauses after every token (after arXiv 2310.02226, in a form for perplexity at a fixed cost): one learned
    embedding, at the rotary position of the token before. The last of them predicts."""

    def __init__(self, config):
        super().__init__(config)
        self.pause = nn.Parameter(torch.randn(config.n_embd) * math.sqrt(2 / (5 * config.n_embd)))  # as an embedding's

    def read(self, idx, n, cache, trace):
        streams = self.positions(idx, n, cache)
        streams.move_to(streams.token_number, self.frequency)
        pauses = self.pause.expand(*idx.shape, n - 1, -1)                           # (B, T, n - 1, D)
        x = torch.cat((self.wte(idx).unsqueeze(2), pauses), 2).flatten(1, 2)        # (B, N, D)
        x = self.run(self.drop(x), streams, cache, trace)
        return self.head(x[:, n - 1::n]), streams.count.unsqueeze(0)


class RandomPauses(Pauses):
    """Pauses as in pre-training (arXiv 2310.02226, section 3).

    Calls that train with targets put a tenth of the length in pauses at random places, and cut off what is then too
    long. Each pause has a rotary position of its own, and what stands before a pause has no target.

    All other calls append n - 1 pauses to the text, for each of its tokens: the prediction of token t is read at the
    last of those that follow tokens 1 to t. No later token sees them, so they are not kept in a cache."""

    def forward(self, idx, targets=None, *, budget=None, cache=None, trace=None):
        if targets is not None and trains(self, cache):
            self.check(idx, targets, budget, cache)
            idx, targets = self.insert(idx, targets)
            budget = 1                                                              # nothing is appended
        return super().forward(idx, targets, budget=budget, cache=cache, trace=trace)

    def insert(self, idx, targets):
        """Put pauses, as token -1, among the tokens: idx and targets (B, T)."""
        B, T = idx.shape
        number = round(0.1 * T)
        place = 1 + torch.rand(B, T + number - 1, device=idx.device).argsort(1)[:, :number]  # never the first
        is_pause = torch.zeros(B, T + number, dtype=torch.bool, device=idx.device).scatter(1, place, True)
        latest = (~is_pause).cumsum(1) - 1                                          # the last token so far
        before_pause = is_pause.roll(-1, 1)
        return (idx.gather(1, latest).masked_fill(is_pause, -1)[:, :T],
                targets.gather(1, latest).masked_fill(before_pause, -1)[:, :T])

    def read(self, idx, n, cache, trace):
        is_pause = (idx == -1).unsqueeze(-1)
        x = self.drop(torch.where(is_pause, self.pause, self.wte(idx.clamp(min=0))))  # (B, T, D)
        text = self.positions(idx, 1, cache)
        if n > 1:
            cache = self.cache_of_this_call(len(idx), n, cache)
        x = self.run(x, text, cache, trace)
        if n > 1:
            cache.commit(text.count.unsqueeze(0), 0)
            x = self.run_appended(idx, n, cache)
        return self.head(x), text.count.unsqueeze(0)

    def run_appended(self, idx, n, cache):
        """What predicts, (B, T, D): the last of the n - 1 pauses that follow each token, as if it ended the text."""
        pauses = self.positions(idx, n - 1, cache)
        nth = torch.arange(1, n, device=idx.device).repeat(idx.size(1))             # (N,), from 1 for each token
        pauses.move_to(pauses.token_number + nth, self.frequency)
        slots = Slots(cache, 0, pauses)
        # A pause sees its token, what comes before that, and the pauses of its token up to itself. So what lies between
        # its token and the first pause of its token is hidden.
        first_pause = slots.slot[:, 0, :, 0] - nth + 1                                  # (B, N)
        after_token = cache.slot_numbers[0] >= pauses.token_number.unsqueeze(-1)                 # (B, N, S)
        hidden = after_token & (cache.slot_numbers[0] < first_pause.unsqueeze(-1))
        slots.mask = slots.mask.masked_fill(hidden.unsqueeze(1), -math.inf)
        x = self.drop(self.pause.repeat(*pauses.owner.shape, 1))                    # (B, N, D)
        for block in self.blocks:
            x = block(x, pauses, slots)
        return x[:, n - 2::n - 1]


class Sandwich(nn.Module):
    """A block of recurrent depth (arXiv 2502.05171, section 3.2): x = norm(x + attn(norm(x))), then the same with the
    MLP. Its matrices begin as the paper's do; its L counts the blocks that run."""

    def __init__(self, block, config, L):
        super().__init__()
        self.attn, self.mlp, self.drop = block.attn, block.mlp, block.drop
        self.norms = nn.ModuleList(nn.RMSNorm(config.n_embd, eps=1e-6) for _ in range(4))
        for layer in (self.attn.proj, self.mlp.proj):
            init_matrix(layer, config, added=2 * L)

    def forward(self, x, streams, slots):
        before_attn, after_attn, before_mlp, after_mlp = self.norms
        x = after_attn(x + self.drop(self.attn(before_attn(x), streams, slots)))
        return after_mlp(x + self.drop(self.mlp(before_mlp(x))))


class RecurrentDepth(Rival):
    """Recurrent depth (arXiv 2502.05171). The first block is the prelude, the last the coda, those between the core:

        e      = prelude(embedding sqrt(D))
        s_0    = noise
        s_i    = core(e + s_{i-1}), for i from 1 to r
        logits = head(norm(coda(norm(s_r))))

    Calls that train draw r around the budget, and s_0 anew; their last 8 iterations have a gradient. In all other calls
    r is the budget, and s_0 a fixed draw for each position in the text.

    exit_kl: where one token is read into a cache, a row stops once KL(prediction || the one before) is less. The
    paper's is 5e-4; None means that no row stops early."""
    exit_kl = None

    def __init__(self, config):
        super().__init__(config)
        assert config.n_layer >= 3, "prelude, core, coda"
        L = 2 + config.budget * (config.n_layer - 2)
        self.blocks = nn.ModuleList(Sandwich(block, config, L) for block in self.blocks)
        self.blocks[-1].attn.layer = 1                                              # in the cache; the prelude's is 0
        self.ln_s, self.ln_f = (nn.RMSNorm(config.n_embd, eps=1e-6) for _ in range(2))
        self.register_buffer("noise", self.draw_noise(torch.empty(config.block_size, config.n_embd)))

    def draw_noise(self, s):
        return nn.init.trunc_normal_(s, 0, math.sqrt(2 / 5), -3 * math.sqrt(2 / 5), 3 * math.sqrt(2 / 5))

    def new_cache(self, rows, budget=None):
        """A token has one slot. Each iteration of each block of the core has its own keys and values."""
        r = self.whole_budget(budget)
        return Cache(self, rows, r, [1], [0] * (2 + r * (self.config.n_layer - 2)))

    def layer_in_cache(self, l, i):
        """Where the cache holds iteration i of block l of the core."""
        return 2 + i * (self.config.n_layer - 2) + l

    def read(self, idx, r, cache, trace):
        streams = self.positions(idx, 1, cache)
        slots = None if cache is None else Slots(cache, 0, streams)
        e = self.blocks[0](self.drop(self.wte(idx) * math.sqrt(self.config.n_embd)), streams, slots)
        s = self.noise[streams.token_number - 1]                                          # (B, T, D)
        if trains(self, cache):
            rate = (math.log(r) - 1 / 8 + torch.randn(()) / 2).exp()                # section 3.3
            r = int(torch.poisson(rate)) + 1                                        # its mean is the budget + 1
            s = self.draw_noise(torch.empty_like(s))
        may_exit = self.exit_kl is not None and cache is not None and idx.size(1) == 1
        going, before = torch.ones_like(idx[:, :1], dtype=torch.bool), None         # (B, 1)
        for i in range(r):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= r - 8):
                s = torch.where(going.unsqueeze(-1), self.core(e + s, streams, slots, i), s)
            self.keep_latest(slots, i, going)
            if may_exit:
                now = self.head(self.coda(s, streams, slots)).log_softmax(-1)       # (B, 1, V)
                if before is not None:
                    going = going & ((now.exp() * (now - before)).sum(-1) >= self.exit_kl)
                before = now
                if not going.any():
                    break
        for later in range(i + 1, 0 if cache is None else cache.budget):
            self.keep_latest(slots, later, torch.zeros_like(going))
        if trace is not None:
            trace.append((streams.token_number - 1, streams.logp))
        return self.head(self.coda(s, streams, slots)), streams.count.unsqueeze(0)

    def core(self, x, streams, slots, i):
        for l, block in enumerate(self.blocks[1:-1]):
            block.attn.layer = self.layer_in_cache(l, i)
            x = block(x, streams, slots)
        return x

    def coda(self, s, streams, slots):
        return self.blocks[-1](self.ln_s(s), streams, slots)

    def keep_latest(self, slots, i, going):
        """In iteration i of the cache, rows not going (B, 1) stand as in the iteration before (section 6.1)."""
        if slots is None or i == 0:
            return
        row = torch.arange(len(going), device=going.device).unsqueeze(1)            # (B, 1)
        at = slice(None), row, slice(None), slots.slot[:, 0, :, 0]                  # selects (B, T, 2, H, d)
        for l in range(self.config.n_layer - 2):
            kv, kv_before = (slots.cache.kv[self.layer_in_cache(l, j)] for j in (i, i - 1))
            kv[at] = torch.where(going[:, :, None, None, None], kv[at], kv_before[at])


class PonderLM2(Rival):
    """A latent slot for each token (arXiv 2509.23184); n is 2. A token's embedding, times sqrt(D), is its slot 0.
    Slot 1, at the same rotary position, is fed the normed final state of slot 0, and predicts. Embeddings begin as
    N(0, 1/D), so that what is fed has entries of about 1, be it an embedding or a state. PonderLM-3 has other gates.

    Calls that train use Jacobi iteration (section 3.2): the states of the embeddings alone; then J sweeps, each over
    all slots with the states of the sweep before; then one that predicts. J is 2 or 3, and the gradient goes through
    all. All other calls read slot after slot, exactly, into a cache. A trace says log w, of `gates`, as log P."""
    sweeps = 2, 3

    def __init__(self, config):
        super().__init__(config)
        nn.init.normal_(self.wte.weight, std=config.n_embd ** -0.5)

    def gates(self, h, n):
        """What the states h (B, T, D) of slot 0 say of their tokens, (B, T, n) each: the share of each slot in the
        prediction, and log w, which is added to attention's logits for the slot's key."""
        last = torch.full(h.shape[:2], n - 1, device=h.device)
        return F.one_hot(last, n), h.new_zeros(*h.shape[:2], n)

    def head(self, x):
        """The logits of states that are normed already."""
        return F.linear(x, self.wte.weight).float()

    def states(self, x, streams, log_w, cache):
        """The normed final states (B, N, D) of slots that are fed x (B, N, D); log_w (B, N)."""
        root = math.sqrt(self.config.n_embd // self.config.n_head)                  # attention divides by it
        streams.last_channel = torch.stack((torch.ones_like(log_w), root * log_w)).unsqueeze(2)
        return self.ln_f(self.run(x, streams, cache))

    def read(self, idx, n, cache, trace):
        x = self.drop(self.wte(idx) * math.sqrt(self.config.n_embd))                # (B, T, D)
        streams = self.positions(idx, n, cache)
        if trains(self, cache):
            h, log_w = self.sweep(x, idx, n)
            stream_counts = streams.count.unsqueeze(0)
        else:
            cache = self.cache_of_this_call(len(idx), n, cache)
            filled_before = cache.filled.clone()
            tokens = [self.read_token(token, cache.length + t, n, cache) for t, token in enumerate(x.split(1, 1))]
            h, log_w = (torch.cat(parts, 1) for parts in zip(*tokens))
            stream_counts = cache.filled - filled_before
        if trace is not None:
            log_w = log_w.flatten(1)                                                # (B, N)
            trace.append((torch.where(log_w < LEAST_LOG_W, -1, streams.token_number - 1), log_w))
        return self.head(h), stream_counts

    def sweep(self, x, idx, n):
        """Jacobi iteration on the embeddings x (B, T, D): what predicts (B, T, D), and log w (B, T, n)."""
        first = self.states(x, self.positions(idx, 1, None), x.new_zeros(idx.shape), None)  # (B, T, D)
        share, log_w = self.gates(first, n)
        fed = first.unsqueeze(2).expand(-1, -1, n - 1, -1)                          # (B, T, n - 1, D), to slots 1 on
        streams = self.positions(idx, n, None)
        streams.move_to(streams.token_number, self.frequency)
        J = self.sweeps[int(torch.randint(len(self.sweeps), ()))]
        for _ in range(J + 1):
            every_slot = torch.cat((x.unsqueeze(2), fed), 2).flatten(1, 2)          # (B, N, D)
            h = self.states(every_slot, streams, log_w.flatten(1), None).unflatten(1, (-1, n))  # (B, T, n, D)
            share, log_w = self.gates(h[:, :, 0], n)
            fed = h[:, :, :-1]                                                      # slot k feeds slot k + 1
        return (share.unsqueeze(-1) * h).sum(2), log_w

    def read_token(self, x, seen, n, cache):
        """Read one token a row, x (B, 1, D), after `seen` others: what predicts (B, 1, D), and log w (B, 1, n). A row
        stops before the first slot of little w: its later slots are padding, which is not kept."""
        log_w, predicts = x.new_zeros(len(x), 1, n), 0.0
        for k in range(n):
            runs = log_w[..., k] >= LEAST_LOG_W                                     # (B, 1)
            if not runs.any():
                break
            owner, logp = torch.where(runs, 0, 1), torch.where(runs, 0.0, PADDING).to(x)
            streams = Streams(owner, logp, 1, seen, self.frequency)
            x = self.states(x, streams, log_w[..., k], cache)                       # (B, 1, D)
            cache.commit(streams.count.unsqueeze(0), 0)
            if k == 0:
                share, log_w = self.gates(x, n)
            predicts = predicts + (runs * share[..., k]).unsqueeze(-1) * x
        return predicts, log_w


class PonderLM3(Charging, PonderLM2):
    """Up to n - 1 latent slots; slot k is fed the normed final state of slot k - 1 (arXiv 2603.02023).

    A router on the state h of slot 0 says how much each slot counts: share = softmax(router(h)), and w_k is the sum of
    share_k and all later ones. log w_k is added to every attention logit of slot k's key, in the score channel. The
    mean of the states, weighted by share, predicts.

    All n slots are trained; a reader stops at the last w of 1e-4 or more. A budget below the configuration's takes the
    first slots. charge: what a latent slot costs calls that train, times its w (our reading of the paper)."""
    charge = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.router = init_matrix(nn.Linear(config.n_embd, int(config.budget), bias=False), config)
        for block in self.blocks:
            block.attn.has_forks = True                                            # log w is put where log P is

    def gates(self, h, n):
        log_share = F.linear(h, self.router.weight[:n]).float().log_softmax(-1)     # (B, T, n)
        log_w = log_share.flip(-1).logcumsumexp(-1).flip(-1)
        return log_share.exp(), F.pad(log_w[..., 1:], (1, 0))                       # w_0 is 1


# -- bubbles with one part changed -------------------------------------------------------------------------------------

def scramble(h):
    """A hash of whole numbers below 2^32, int64: two rounds of xor-shift and multiply."""
    for factor in (0x21F0AAAD, 0x735A2D97):
        h = (h ^ h >> 16) * factor & 0xFFFFFFFF
    return h ^ h >> 15


class RandomFork(Fork):
    """Extras compete by chance instead of log P. Chance is a hash of a number drawn at the start, the token's number
    in the text, and the candidate's place in its token: so a token read into a cache draws the same again. Scores still
    give forks their P."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("salt", torch.randint(2**31, ()))

    def select(self, logp, streams, budget, earlier_extras, moves_bar):
        begin = torch.searchsorted(streams.token_number, streams.token_number)                  # (B, N)
        pair = torch.arange(begin.size(1), device=begin.device) - begin             # (B, N), from 0 in each token
        place = 2 * pair.unsqueeze(-1) + torch.arange(2, device=begin.device)       # (B, N, 2)
        of_token = scramble(streams.token_number + self.salt & 0xFFFFFFFF).unsqueeze(-1)
        chance = ((scramble(of_token + place) >> 8) + 1).float() / 2**24            # in (0, 1]
        return super().select(chance.log().to(logp), streams, budget, earlier_extras, moves_bar)


class RandomSelection(Tinybubbles):
    def new_fork_layer(self):
        return RandomFork(self.config)


class Mixture(Tinybubbles):
    """Each stream predicts for itself, and the predictions are merged by equation 11, as in the paper's model."""

    def predict(self, x, streams):
        return mixture(self.head(x), streams)


class RandomMixture(RandomSelection, Mixture):
    pass


# -- where to fork, on the task urns -----------------------------------------------------------------------------------

class HandFork(Fork):
    """Placed by hand: hard tokens fork all their streams, and nothing else does. The budget has to hold them."""
    hard = None     # (B, T), which tokens of this call are hard

    def select(self, logp, streams, budget, earlier_extras, moves_bar):
        hard = self.hard.gather(1, streams.owner.clamp(max=streams.T - 1)) & streams.is_real  # (B, N)
        return kept_originals(streams) | hard.unsqueeze(-1)


class Hand(Tinybubbles):
    def new_fork_layer(self):
        return HandFork(self.config)

    def read(self, idx, budget, cache, trace):
        for fork in self.forks.values():
            fork.hard = idx >= self.config.vocab_size - Urns.HARD
        return super().read(idx, budget, cache, trace)


class HandMixture(Hand, Mixture):
    pass


class NoisyFork(Fork):
    """In calls that train, extras compete by log P plus Gumbel noise, which fades linearly within the first `steps`."""
    steps, noisy = 1500, False

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("step", torch.zeros(()))

    def scale(self, left):
        """How strong the noise is while this share of the steps is left, or less than 0 after them."""
        return left.clamp(min=0)

    def select(self, logp, streams, budget, earlier_extras, moves_bar):
        if self.noisy:
            gumbel = -(-torch.rand_like(logp).log()).log()
            logp = logp + self.scale(1 - self.step / self.steps) * gumbel
            self.step += 1
        return super().select(logp, streams, budget, earlier_extras, moves_bar)


class FadingNoise(Mixture):
    def new_fork_layer(self):
        return NoisyFork(self.config)

    def read(self, idx, budget, cache, trace):
        for fork in self.forks.values():
            fork.noisy = trains(self, cache)
        return super().read(idx, budget, cache, trace)


class RandomFirstFork(NoisyFork):
    """The noise drowns log P, then is gone: forks are placed at random until their P have been taught."""

    def scale(self, left):
        return 20.0 * (left > 0)


class RandomFirst(FadingNoise):
    def new_fork_layer(self):
        return RandomFirstFork(self.config)


class Charged(Charging, Mixture):
    """What is of no use shall go."""


class SureFork(Fork):
    """At the start a stream forks and stays with a probability near 1 (0.95): so forks count from the first step on,
    and are taught."""

    def __init__(self, config):
        super().__init__(config)
        self.score.register_forward_hook(lambda layer, args, score: score + 3.0)


class SureCharged(Charged):
    def new_fork_layer(self):
        return SureFork(self.config)


class FloorFork(SureFork):
    """No extra is wanted whose P is below a floor: what counts for nothing takes no room from what comes later."""
    floor = 0.1

    def bar_for(self, budget):
        return super().bar_for(budget).clamp(min=math.log(self.floor))


class Floor(Charged):
    def new_fork_layer(self):
        return FloorFork(self.config)
