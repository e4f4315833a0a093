"""
What bubbles are compared with, each built on tinybubbles' own blocks, so that only the idea differs: copies, pauses
(two forms), recurrent depth, PonderLM-2 and PonderLM-3; bubbles that fork at random, are not attenuated, or merge as
the paper's do; and, on the task urns, forks placed by hand, and ways to teach bubbles where to put them.

All are called, trained and sampled as a Tinybubbles. The budget of a rival, always a whole number, is n, the positions
of a token: copies, a token and its pauses, a token and its latent slots; of recurrent depth, its iterations.

Shapes: B rows, T tokens of this call, N positions, D = n_embd, d = D / n_head, V words, S slots of a cache.
"""
import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tasks.urns import Urns  # noqa: E402
from tinybubbles import PADDING, Cache, Fork, PaperTinybubbles, Streams, Tinybubbles, check_budget, start  # noqa: E402


class Rival(Tinybubbles):
    """What rivals share: nothing is forked, every token has the same number of positions, and a cache has room for
    them. Each defines `read`, which Tinybubbles' forward and generate call."""
    def check(self, idx, budget, cache):
        """Refuse what cannot be done, and claim the cache's room. Returns n."""
        n = check_budget(self.config.budget if budget is None else budget)
        if n % 1 or self.config.fork_layers:
            raise ValueError(f"this model needs fork_layers () and a whole budget, not {self.config.fork_layers}, {n}")
        assert idx.size(1) <= self.config.block_size - (cache.length if cache else 0)
        if cache is not None:
            cache.claim(replace(self.config, block_size=int(n) * self.config.block_size), idx, n)
        return int(n)

    def room(self, idx, n):
        """A cache for a text that is read once."""
        cache = Cache()
        self.check(idx, n, cache)
        return cache

    def positions(self, idx, n, cache, own=False):
        """The Streams of n positions of each token of idx; own: all at their token's rotary position."""
        B, T = idx.shape
        tok = torch.arange(T, device=idx.device).repeat_interleave(n).repeat(B, 1)   # (B, N)
        first = torch.full_like(idx[:, :1], 1 + (cache.length - T if cache else 0))
        s = Streams(tok, self.wte.weight.new_zeros(tok.shape), T, first, self.frequency, cache, 0)
        return self.rotate(s, s.t) if own else s

    def rotate(self, s, position):
        """Put the streams at the rotary positions (B, N)."""
        angle = position.view(*position.shape, 1, 1, 1) * self.frequency
        s.cos, s.sin = angle.cos(), angle.sin()
        return s

    def run(self, x, s, cache, streams=None):
        """x (B, N, D) through all blocks."""
        for block in self.blocks:
            x = block(x, s, cache)
        if streams is not None:
            streams.append((s.t - 1, s.logp))
        return x

    def vector(self):
        """A learned vector (D), drawn as the embeddings are."""
        return nn.Parameter(torch.randn(self.config.n_embd) * math.sqrt(2 / (5 * self.config.n_embd)))


class Copies(Rival):
    """Copy-n (a baseline of arXiv 2510.00219): each embedding n times, at rotary positions t - p/n; predicts from the
    sum of the copies, as bubbles do whose P are all 1."""
    def merge(self, x):
        return x.sum(2)

    def read(self, idx, targets, n, cache, streams):
        x = self.drop(self.wte(idx)).repeat_interleave(n, 1)                         # (B, N, D)
        x = self.run(x, self.positions(idx, n, cache), cache, streams)
        return self.log_probs(self.merge(x.unflatten(1, (-1, n))), targets)


class LastCopy(Copies):
    """The same, predicting from the rightmost copy alone."""
    def merge(self, x):
        return x[:, :, -1]


class Pauses(Rival):
    """n - 1 pauses after every token (after arXiv 2310.02226, in a form for perplexity at a fixed cost): one learned
    embedding, at their token's rotary position; the last of them predicts."""
    def __init__(self, config):
        super().__init__(config)
        self.pause = self.vector()

    def read(self, idx, targets, n, cache, streams):
        x = self.wte(idx).unsqueeze(2)                                               # (B, T, 1, D)
        x = torch.cat((x, self.pause.expand(*idx.shape, n - 1, -1)), 2).flatten(1, 2)             # (B, N, D)
        x = self.run(self.drop(x), self.positions(idx, n, cache, own=True), cache, streams)
        return self.log_probs(x[:, n - 1::n], targets)


class RandomPauses(Pauses):
    """Pauses as in pre-training (arXiv 2310.02226, section 3). In training, a tenth of the length in pauses at random
    places, then cut back to T elements; each has a rotary position of its own, and an element before a pause has no
    target. Otherwise n - 1 pauses follow the text: token t's prediction is read at the last of those put after tokens
    1..t, which no later token sees."""
    def forward(self, idx, targets=None, *, budget=None, cache=None, streams=None):
        if self.training and targets is not None:
            idx, targets = self.insert(idx, targets)
        return super().forward(idx, targets, budget=budget, cache=cache, streams=streams)

    def insert(self, idx, targets):
        """Pauses, as token -1, among the tokens: idx and targets (B, T)."""
        B, T = idx.shape
        number = round(0.1 * T)
        slot = 1 + torch.rand(B, T + number - 1, device=idx.device).argsort(1)[:, :number]        # never the first
        pause = torch.zeros(B, T + number, dtype=torch.bool, device=idx.device).scatter(1, slot, True)
        tok = (~pause).cumsum(1) - 1                                                 # the last token so far
        return (idx.gather(1, tok).masked_fill(pause, -1)[:, :T],
                targets.gather(1, tok).masked_fill(pause.roll(-1, 1), -1)[:, :T])

    def read(self, idx, targets, n, cache, streams):
        M, T = 0 if self.training and targets is not None else n - 1, idx.size(1)
        cache = cache or (self.room(idx, n) if M else None)
        x = torch.where((idx < 0).unsqueeze(-1), self.pause, self.wte(idx.clamp(min=0)))
        x = self.run(self.drop(x), self.positions(idx, 1, cache), cache, streams)    # (B, T, D)
        if M:
            s = self.positions(idx, M, cache, own=True)
            after = torch.arange(1, n, device=idx.device).repeat(T)                  # (N,)
            s, i = self.rotate(s, s.t + after), torch.arange(s.mask.size(-1), device=idx.device)
            row = (cache.length + torch.arange(T * M, device=idx.device)).unsqueeze(1)            # (N, 1), own slots
            hidden = (i >= s.t[0].unsqueeze(1)) & (i <= row - after.unsqueeze(1)) | (i > row)     # (N, S)
            s.mask = torch.where(hidden, -math.inf, 0.0).to(s.mask)
            x = self.run(self.pause.repeat(len(idx), T * M, 1), s, cache)[:, M - 1::M]
            cache.held[0] -= T * M                                                   # forget the pauses
        return self.log_probs(x, targets)


class Sandwich(nn.Module):
    """A block of recurrent depth (arXiv 2502.05171, section 3.2): x = norm(x + attn(norm(x))), the same with the MLP.
    Its matrices begin as the paper's, whose L counts the blocks that run."""
    def __init__(self, block, config, L):
        super().__init__()
        self.attn, self.mlp, self.drop = block.attn, block.mlp, block.drop
        self.norms = nn.ModuleList(nn.RMSNorm(config.n_embd, eps=1e-6) for _ in range(4))
        for layer in (self.attn.proj, self.mlp.proj):
            start(layer, config, 2 * L)

    def forward(self, x, s, cache):
        before_attn, after_attn, before_mlp, after_mlp = self.norms
        x = after_attn(x + self.drop(self.attn(before_attn(x), s, cache)))
        return after_mlp(x + self.drop(self.mlp(before_mlp(x))))


class RecurrentDepth(Rival):
    """e = prelude(emb sqrt(D)); s_0 = noise; s_i = core(e + s_{i-1}), r times; head(norm(coda(norm(s_r)))) (arXiv
    2502.05171). Blocks: 1 of prelude, n_layer - 2 of core, 1 of coda.

    In training r is drawn for each call, around the budget, s_0 is drawn anew, and the last 8 iterations have a
    gradient. Otherwise r is the budget and s_0 a fixed draw for each position in the text. exit_kl (the paper's: 5e-4;
    None: never): where one token is read from a cache, a row stops when KL(prediction || the one before) is less."""
    exit_kl = None

    def __init__(self, config):
        super().__init__(config)
        assert config.n_layer >= 3, "prelude, core, coda"
        L = 2 + config.budget * (config.n_layer - 2)
        self.blocks = nn.ModuleList(Sandwich(block, config, L) for block in self.blocks)
        self.ln_s, self.ln_f = (nn.RMSNorm(config.n_embd, eps=1e-6) for _ in range(2))
        self.register_buffer("noise", self.draw_noise(torch.empty(config.block_size, config.n_embd)))

    def draw_noise(self, s):
        return nn.init.trunc_normal_(s, 0, math.sqrt(2 / 5), -3 * math.sqrt(2 / 5), 3 * math.sqrt(2 / 5))

    def read(self, idx, targets, r, cache, streams):
        T, learns = idx.size(1), self.training and targets is not None
        exits = self.exit_kl is not None and cache is not None and T == 1
        if learns:                                                                   # section 3.3; mean: budget + 1
            r = int(torch.poisson((math.log(r) - 1 / 8 + torch.randn(()) / 2).exp())) + 1
        where = self.positions(idx, 1, cache)
        e = self.blocks[0](self.drop(self.wte(idx) * math.sqrt(self.config.n_embd)), where, cache)
        s = self.noise[where.t - 1]                                                  # (B, T, D)
        s = self.draw_noise(torch.empty_like(s)) if learns else s
        going, before = torch.ones_like(idx[:, :1], dtype=torch.bool), None          # (B, 1)
        for i in range(r):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= r - 8):
                s = torch.where(going.unsqueeze(-1), self.core(e + s, where, cache, i), s)
            self.keep_latest(cache, where, i, going)
            if exits:
                now = self.log_probs(self.coda(s, where, cache), None)               # (B, 1, V)
                if before is not None:
                    going = going & ((now.exp() * (now - before)).sum(-1) >= self.exit_kl)
                before = now
                if not going.any():
                    break
        for j in range(i + 1, int(cache.budget) if cache else 0):
            self.keep_latest(cache, where, j, torch.zeros_like(going))
        if streams is not None:
            streams.append((where.t - 1, where.logp))
        return self.log_probs(self.coda(s, where, cache), targets)

    def core(self, x, where, cache, i):
        """Iteration i, whose keys and values are apart from other iterations'."""
        for l, block in enumerate(self.blocks[1:-1]):
            block.attn.layer = l, i
            x = block(x, where, cache)
        return x

    def coda(self, s, where, cache):
        return self.blocks[-1](self.ln_s(s), where, cache)

    def keep_latest(self, cache, where, i, going):
        """In iteration i of the cache, rows not going (B, 1) stand as of the iteration before (section 6.1)."""
        if cache is not None and i:
            for l in range(self.config.n_layer - 2):
                kv, at = cache.kv.setdefault((l, i), torch.zeros_like(cache.kv[l, 0])), (cache.row, where.slot)
                kv[at] = torch.where(going[:, :, None, None, None], kv[at], cache.kv[l, i - 1][at])


class PonderLM2(Rival):
    """A token's embedding, times sqrt(D), is its slot 0; slot 1, at the same rotary position, is fed the normed final
    state of slot 0, and predicts (arXiv 2509.23184). n is 2. Embeddings begin as N(0, 1/D): what is fed has entries of
    about 1, an embedding or a state.

    In training by Jacobi iteration (section 3.2): states of the embeddings alone, J sweeps, each over all slots with
    the states of the sweep before, and one that predicts; J is 2 or 3, and the gradient goes through all. Otherwise
    slot after slot, exactly, from a cache. PonderLM-3 differs by its gates."""
    sweeps = 2, 3

    def __init__(self, config):
        super().__init__(config)
        nn.init.normal_(self.wte.weight, std=config.n_embd ** -0.5)

    def gates(self, h, n):
        """Of tokens whose slot 0 has the state h (B, T, D): the share of each slot in the prediction, and log w, which
        slot k's key adds to attention's logits, (B, T, n) each."""
        zero = h.new_zeros(*h.shape[:2], n)
        return F.one_hot(torch.full(h.shape[:2], n - 1, device=h.device), n), zero

    def head(self, h, targets):
        """log_probs of states that are normed already."""
        log_probs = F.linear(h, self.wte.weight).float().log_softmax(-1)
        return log_probs if targets is None else log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1))

    def hidden(self, x, s, log_w, cache):
        """The normed final states (B, N, D) of slots that are fed x (B, N, D); log_w (B, N)."""
        root = math.sqrt(self.config.n_embd // self.config.n_head)                   # attention divides by it
        s.channel = torch.stack((torch.ones_like(log_w), root * log_w), -1).unsqueeze(-1)
        return self.ln_f(self.run(x, s, cache))

    def read(self, idx, targets, n, cache, streams):
        x = self.drop(self.wte(idx) * math.sqrt(self.config.n_embd))                 # (B, T, D)
        if streams is not None:
            s = self.positions(idx, n, None)
            streams.append((s.t - 1, s.logp))
        if self.training and targets is not None:
            h, penalty = self.sweep(x, idx, n)
            return self.head(h, targets) - penalty                                   # the loss is their mean, negated
        cache = cache or self.room(idx, n)
        began = cache.length - idx.size(1) + 1
        h = torch.cat([self.read_token(part, began + t, n, cache) for t, part in enumerate(x.split(1, 1))], 1)
        return self.head(h, targets)

    def sweep(self, emb, idx, n):
        """What predicts (B, T, D), and the loss's penalty."""
        s = self.positions(idx, n, None, own=True)
        h = self.hidden(emb, self.positions(idx, 1, None), emb.new_zeros(idx.shape), None).unsqueeze(2)
        z = h.expand(-1, -1, n - 1, -1)                                              # (B, T, n - 1, D)
        share, log_w = self.gates(h[:, :, 0], n)
        for _ in range(self.sweeps[int(torch.randint(len(self.sweeps), ()))] + 1):
            x = torch.cat((emb.unsqueeze(2), z), 2).flatten(1, 2)                    # (B, N, D)
            h = self.hidden(x, s, log_w.flatten(1), None).unflatten(1, (-1, n))      # (B, T, n, D)
            z, (share, log_w) = h[:, :, :-1], self.gates(h[:, :, 0], n)              # slot k feeds slot k + 1
        return (share.unsqueeze(-1) * h).sum(2), self.penalty(log_w)

    def penalty(self, log_w):
        return 0.0

    def read_token(self, x, t, n, cache):
        """One token a row, x (B, 1, D), number t from 1: what predicts. A row stops where w is less than 1e-4: later
        slots are padding, which is not kept."""
        log_w, out, tok = x.new_zeros(len(x), 1, n), 0.0, torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        for k in range(n):
            runs = log_w[..., k] >= math.log(1e-4)                                   # (B, 1)
            if not runs.any():
                break
            logp = torch.where(runs, 0.0, PADDING).to(x)
            s = Streams(tok, logp, 1, torch.full_like(tok, t), self.frequency, cache, 0)
            x = self.hidden(x, s, log_w[..., k], cache)                              # (B, 1, D)
            if k == 0:
                share, log_w = self.gates(x, n)
            out = out + (runs * share[..., k]).unsqueeze(-1) * x
        return out


class PonderLM3(PonderLM2):
    """Up to n - 1 latent slots, slot k fed the normed final state of slot k - 1 (arXiv 2603.02023). A router on the
    state h of slot 0 says how much each counts: share = softmax(router(h)), w_k = share_k + ... + share_{n-1}; log w_k
    is added to every attention logit of slot k's key, in the score channel; the prediction is of the states' mean by
    share. All n slots are trained; a reader stops at the last w of 1e-4 or more. A budget below the configuration's
    takes the first slots. charge: training adds it times the mean number of latent slots (our reading of the paper)."""
    charge = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.router = start(nn.Linear(config.n_embd, int(config.budget), bias=False), config)
        for block in self.blocks:
            block.attn.config = replace(config, fork_layers=(0,))                    # so that it uses the score channel

    def gates(self, h, n):
        log_share = F.linear(h, self.router.weight[:n]).float().log_softmax(-1)      # (B, T, n)
        log_w = log_share.flip(-1).logcumsumexp(-1).flip(-1)
        return log_share.exp(), torch.cat((torch.zeros_like(log_w[..., :1]), log_w[..., 1:]), -1)

    def penalty(self, log_w):
        return self.charge * log_w[..., 1:].exp().sum(-1).mean()


def scramble(h):
    """A hash of whole numbers below 2^32, int64: two rounds of xor-shift and multiply."""
    for factor in (0x21F0AAAD, 0x735A2D97):
        h = (h ^ h >> 16) * factor & 0xFFFFFFFF
    return h ^ h >> 15


class RandomFork(Fork):
    """Extras compete by chance: by a hash of a number drawn at the start, the token's place in the text and the
    candidate's place in its token; a token read from a cache draws the same again. Scores still give forks their P."""
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("salt", torch.randint(2**31, ()))

    def select(self, logp, safe, s, budget, used):
        i = torch.arange(logp.size(1), device=logp.device)
        place = i - 2 * torch.searchsorted(s.tok, s.tok).repeat_interleave(2, 1)     # (B, M), of a candidate
        key = scramble(scramble(s.t.repeat_interleave(2, 1) + self.salt & 0xFFFFFFFF) + place)
        chance = ((key >> 8) + 1).float().div(2**24).log()                           # (B, M)
        return super().select(torch.where(logp > PADDING, chance, logp), safe, s, budget, used)


class RandomSelection(Tinybubbles):
    fork_layer = RandomFork


class NoAttenuation(Tinybubbles):
    """Blocks treat every stream as if P = 1: in attention's logits, its values, and the writes. Scores still choose,
    and weigh the merge."""
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.register_forward_pre_hook(self.flatten)

    @staticmethod
    def flatten(block, args):
        x, s, cache = args
        flat, there = copy.copy(s), s.logp > PADDING
        flat.P = there.unsqueeze(-1).to(s.P)
        flat.channel = torch.stack((torch.ones_like(s.logp), torch.where(there, 0.0, PADDING)), -1).unsqueeze(-1)
        return x, flat, cache


class Mixture(Tinybubbles):
    """Bubbles whose streams predict each for itself, merged as the paper's equation 11 does."""
    merge, predict = "probability", PaperTinybubbles.predict


class RandomMixture(Mixture):
    fork_layer = RandomFork


class HandFork(Fork):
    """Placed by hand: of the task urns, hard tokens fork all their streams, and nothing else does. The budget has to
    hold them."""
    def select(self, logp, safe, s, budget, used):
        wanted = self.hard.gather(1, s.tok.clamp(max=s.T - 1)) & (s.tok < s.T)       # (B, N)
        return safe | wanted.repeat_interleave(2, 1)


class Hand(Tinybubbles):
    fork_layer = HandFork

    def read(self, idx, *rest):
        for fork in self.forks.values():
            fork.hard = idx >= self.config.vocab_size - Urns.HARD
        return super().read(idx, *rest)


class HandMixture(Hand, Mixture):
    pass


class NoisyFork(Fork):
    """In training, extras compete by log P plus Gumbel noise, which fades linearly within the first `steps` of them."""
    steps = 1500

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("step", torch.zeros(()))

    def noise(self, left):
        return left.clamp(min=0)

    def select(self, logp, safe, s, budget, used):
        if torch.is_grad_enabled() and self.training:
            logp = logp - self.noise(1 - self.step / self.steps) * (-torch.rand_like(logp).log()).log()
            self.step += 1
        return super().select(logp, safe, s, budget, used)


class FadingNoise(Mixture):
    fork_layer = NoisyFork


class RandomFirstFork(NoisyFork):
    """The noise drowns log P, then is gone: forks are placed at random until their P have been taught."""
    def noise(self, left):
        return 20.0 * (left > 0)


class RandomFirst(Mixture):
    fork_layer = RandomFirstFork


class Charged(Mixture):
    """Training adds `charge` times the sum of the extras' P per token, in every block: what is of no use shall go."""
    charge = 0.01

    def read(self, idx, targets, budget, cache, streams):
        streams = [] if streams is None else streams
        log_probs = super().read(idx, targets, budget, cache, streams)
        if self.training and targets is not None:
            extras = sum(logp.exp().sum() for tok, logp in streams) / idx.numel() - len(streams)
            log_probs = log_probs - self.charge * extras                             # the loss is their mean, negated
        return log_probs


class SureFork(Fork):
    """At the start a stream forks and stays with a probability near 1 (0.95), so that forks count from the first step
    on, and are taught."""
    def __init__(self, config):
        super().__init__(config)
        self.score.register_forward_hook(lambda layer, read, score: score + 3.0)


class SureCharged(Charged):
    fork_layer = SureFork


class FloorFork(SureFork):
    """No extra is wanted whose P is below a floor: what counts for nothing takes no room from what comes later."""
    floor = 0.1

    def select(self, logp, safe, s, budget, used):
        return super().select(torch.where(logp < math.log(self.floor), PADDING, logp), safe, s, budget, used)


class Floor(Charged):
    fork_layer = FloorFork
