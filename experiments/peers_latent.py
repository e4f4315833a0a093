"""
Rivals of bubbles that think in latent space, in their minimal form, on tinybubbles' own parts so that only the idea
differs: recurrent depth ("Huginn", arXiv 2502.05171), PonderLM-2 (2509.23184) and PonderLM-3 (2603.02023).

Each is called, trained and sampled as a Tinybubbles. `budget`, always a whole number, is its dial: the iterations of
recurrent depth; 2 for PonderLM-2; K + 1 for PonderLM-3: the positions that a token gets, or may get. `streams` receives
the token of every position that was run. `cache` is tinybubbles' Cache: an empty one, then the same one again.

B rows, T tokens, N positions, D = n_embd, V words; K latent slots of a token, slot 0 being its embedding's.
"""
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments.peers import begin, block_flops, run, scale_start, whole_budget  # noqa: E402
from tinybubbles import Cache, Tinybubbles, linear, mean_loss, nats, rotary  # noqa: E402


# -- what the peers share ---------------------------------------------------------------------------------------------

def predict(h, W, targets):
    """(log p (B, T, V), None) from normed states h (B, T, D) and the head W (V, D); with targets (B, T), (None, loss).
    """
    if targets is None:
        return linear(h, W).float().log_softmax(-1), None
    nll = nats(h.flatten(0, 1), targets.clamp(min=0).flatten(), W).view(targets.shape)
    return None, mean_loss(-nll, targets)


def positions_run(count, start, most):
    """(tok, logp) as `streams` wants them, (B, T * most) each, of tokens that ran count (B, T) positions of `most`."""
    tok = start + torch.arange(count.size(1), device=count.device)[:, None]          # (T, 1)
    tok = torch.where(torch.arange(most, device=count.device) < count.unsqueeze(-1), tok, -1).flatten(1)
    return tok, torch.zeros(tok.shape, device=tok.device)


# -- recurrent depth --------------------------------------------------------------------------------------------------

NOISE = math.sqrt(2 / 5)     # standard deviation of the first state, cut off at three times that
WITH_GRADIENT = 8            # iterations that training differentiates, the last ones


class Sandwich(nn.Module):
    """A block of recurrent depth (2502.05171, section 3.2): x = norm(x + attn(norm(x))), the same with the MLP."""

    def __init__(self, block, config):
        super().__init__()
        self.attn, self.mlp, self.drop = block.attn, block.mlp, block.drop
        self.norms = nn.ModuleList(nn.RMSNorm(config.n_embd, eps=1e-6) for _ in range(4))

    def forward(self, x, P, channel, rotation, append_kv):
        before_attn, after_attn, before_mlp, after_mlp = self.norms
        x = after_attn(x + self.drop(self.attn(before_attn(x), P, channel, rotation, append_kv)))
        return after_mlp(x + self.drop(self.mlp(before_mlp(x))))                     # (B, T, D)


class RecurrentDepth(Tinybubbles):
    """e = prelude(emb sqrt(D)); s_0 = noise; s_i = core(e + s_{i-1}), r times; head(norm(coda(norm(s_r)))). Blocks: 1
    of prelude, n_layer - 2 of core, 1 of coda. Matrices begin as N(0, 2 / 5D), projections that are added as
    N(0, 1 / 5DL), L being the blocks that run, as in the paper, and gains as 1. (With GPT-2's 0.02 the norms after each
    addition leave the blocks no say: 400 steps on the plays ended where a count of the bytes does.)

    In training mode, with targets, r is drawn for each call, around the budget, and s_0 is drawn anew. Otherwise r is
    the budget, and s_0 a fixed draw for each absolute position, so that a prediction does not depend on how the text
    was cut up. exit_kl (the paper's: 5e-4; None: never): a token stops when its prediction, as a distribution, is less
    than that from its last one, KL(new || last); then tokens are read one at a time, with no gradient."""

    def __init__(self, config):
        if config.n_layer < 3:
            raise ValueError(f"recurrent depth needs n_layer >= 3 (prelude, core, coda), not {config.n_layer}")
        whole_budget(config.budget)
        super().__init__(replace(config, fork_layers=()))
        self.blocks = nn.ModuleList(Sandwich(block, config) for block in self.blocks)
        self.ln_s, self.ln_f = (nn.RMSNorm(config.n_embd, eps=1e-6) for _ in range(2))
        self.exit_kl = None
        scale_start(self, 2 + config.budget * (config.n_layer - 2))
        table = torch.empty(config.block_size, config.n_embd)
        nn.init.trunc_normal_(table, 0, NOISE, -3 * NOISE, 3 * NOISE, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", table, persistent=False)

    def new_cache(self):
        """An empty cache: keys and values of block l, or of core block l at iteration i: kv[l] or kv[l, i]."""
        return Cache()

    def forward(self, idx, targets=None, *, budget=None, routing=None, cache=None, streams=None):
        """As Tinybubbles.forward; budget: r, or in training its mean less one."""
        (r, start), drawn = begin(self, idx, budget, routing, cache), self.training and targets is not None
        if drawn:
            r = self.draw(r)
        exits = self.exit_kl is not None and not drawn
        with torch.set_grad_enabled(torch.is_grad_enabled() and not exits):
            if exits:
                cache = self.new_cache() if cache is None else cache
                parts = [self.read_until_settled(token, r, cache) for token in idx.split(1, 1)]
                h, count = (torch.cat(part, 1) for part in zip(*parts))
            else:
                h, count = self.read(idx, r, start, cache, drawn), torch.full_like(idx, r)
            if streams is not None:
                streams.append(positions_run(count, start, r))
            return predict(h, self.wte.weight, targets)

    def draw(self, mean):
        """r = Poisson(exp(tau)) + 1, tau ~ Normal(log(mean) - 1/8, 1/2), (section 3.3): its mean is `mean` + 1."""
        return int(torch.poisson((math.log(mean) - 1 / 8 + torch.randn(()) / 2).exp())) + 1

    def read(self, idx, r, start, cache, drawn):
        """The final states (B, T, D) of the tokens idx (B, T) after r iterations."""
        e, rotation, append_kv = self.prelude(idx, start, cache)
        s = self.noise[start:start + idx.size(1)].expand_as(e)                       # (B, T, D)
        if drawn:
            s = nn.init.trunc_normal_(torch.empty_like(e, requires_grad=False), 0, NOISE, -3 * NOISE, 3 * NOISE)
        for i in range(r):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (not drawn or i >= r - WITH_GRADIENT)):
                s = run(self.blocks[1:-1], e + s, rotation, self.append_at(i, append_kv, cache))
        self.fill(r, append_kv, cache, idx.size(1))
        return self.coda(s, rotation, append_kv)

    def read_until_settled(self, idx, r, cache):
        """The final states (B, 1, D) of one token a row, idx (B, 1), and the iterations it took (B, 1), at most r."""
        e, rotation, append_kv = self.prelude(idx, cache.length, cache)
        s, before = self.noise[cache.length - 1:cache.length].expand_as(e), None     # (B, 1, D)
        going, count = torch.ones_like(idx, dtype=torch.bool), torch.zeros_like(idx)           # (B, 1)
        for i in range(r):
            new = run(self.blocks[1:-1], e + s, rotation, self.append_at(i, append_kv, cache, going))
            s, count = torch.where(going.unsqueeze(-1), new, s), count + going
            h = self.coda(s, rotation, append_kv)
            now, _ = predict(h, self.wte.weight, None)                               # (B, 1, V)
            if before is not None:
                going = going & ((now.exp() * (now - before)).sum(-1) >= self.exit_kl)
            if not going.any():
                break
            before = now
        self.fill(i + 1, append_kv, cache, 1)
        return h, count

    def prelude(self, idx, start, cache):
        """e (B, T, D), the rotation and the `append_kv` of these tokens, now in the cache's length."""
        tok = torch.arange(idx.size(1), device=idx.device).expand_as(idx)            # (B, T)
        rotation = rotary(tok[:1], idx.size(1), start, self.config.n_embd // self.config.n_head)
        append_kv = None if cache is None else cache.place(0, tok)
        if cache is not None:
            cache.length += idx.size(1)
        x = self.drop(self.wte(idx) * math.sqrt(self.config.n_embd))
        return run(self.blocks[:1], x, rotation, append_kv), rotation, append_kv

    def coda(self, s, rotation, append_kv):
        return self.ln_f(run(self.blocks[-1:], self.ln_s(s), rotation, append_kv))   # (B, T, D)

    def append_at(self, i, append_kv, cache, going=None):
        """The `append_kv` of iteration i, which keeps keys and values apart from other iterations'. A token that left
        earlier stands there as of its latest iteration (section 6.1); going (B, T): the new ones that have not left."""
        def append_core(layer, k, v):
            latest = cache.kv.get((layer, i - 1))
            if latest is not None and going is not None:
                latest_kv = latest[:, :, :, cache.length - k.size(2):cache.length]   # (2, B, H, T, d)
                k, v = torch.where(going[:, None, :, None], torch.stack((k, v)), latest_kv)
            if latest is not None and (layer, i) not in cache.kv:
                cache.kv[layer, i] = latest.clone()
            return append_kv((layer, i), k, v)
        return append_kv and append_core

    def fill(self, i, append_kv, cache, T):
        """Have the last T tokens, which left after i iterations, stand in the cache's later ones as of their latest."""
        while cache is not None and (1, i) in cache.kv:
            for layer in range(1, self.config.n_layer - 1):
                append_kv((layer, i), *cache.kv[layer, i - 1][:, :, :, cache.length - T:cache.length])
            i += 1

    def flops(self, T, iterations, pairs):
        """Of T tokens: prelude, coda and head, and so many iterations of the core."""
        blocks = 2 + iterations * (self.config.n_layer - 2)
        return blocks * block_flops(self.config, T, pairs) + 2 * T * self.config.n_embd * self.config.vocab_size

    def forward_flops(self, T, budget=None):
        """Of a forward pass of one row of T tokens, attention in full."""
        return self.flops(T, whole_budget(self.config.budget if budget is None else budget), T * T)

    def decode_flops(self, T, budget=None):
        """Of reading T tokens one at a time, none before them."""
        return self.flops(T, whole_budget(self.config.budget if budget is None else budget), T * (T + 1) // 2)

    def train_flops(self, T):
        """Mean, over r, of a training step on one row: three forward passes of what has a gradient, one of the rest."""
        tau, weight = np.polynomial.hermite_e.hermegauss(64)
        mean = np.exp(math.log(self.config.budget) - 1 / 8 + tau / 2)                # of Poisson, at each tau
        p = [float(weight @ (np.exp(-mean) * mean ** k) / math.factorial(k) / weight.sum())
             for k in range(WITH_GRADIENT)]                                          # p[k]: that r = k + 1
        last = sum(1 - sum(p[:k]) for k in range(WITH_GRADIENT))                     # mean of min(r, WITH_GRADIENT)
        core = (self.config.n_layer - 2) * block_flops(self.config, T, T * T)
        return 3 * self.flops(T, last, T * T) + (self.config.budget + 1 - last) * core


# -- PonderLM ---------------------------------------------------------------------------------------------------------

LOWEST_W = math.log(1e-4)    # a latent slot whose log w is lower is not run
SETTLED = 1e-6               # entries of states, of about 1, that change less than this do not change


class PonderLM2(Tinybubbles):
    """A token's embedding, times sqrt(D), is its slot 0; slot 1, at the same rotary position, is fed the normed final
    state of slot 0, and predicts. (2509.23184.) Embeddings begin as N(0, 1 / D), so that what is fed has entries of
    about 1, whether it is an embedding or a state; all else is GPT-2's initialisation.

    In training mode, with targets, all tokens at once, by Jacobi iteration (section 3.2): states of the embeddings
    alone, then J sweeps, each over all slots with the states of the sweep before, then one more that predicts; J is
    drawn from `sweeps`; the gradient goes through all. Otherwise exact, and with no gradient: with a cache slot after
    slot; with none by sweeps until nothing changes, T at most: 4 at T = 64, after 100 steps of 4 blocks of 64 on the
    plays, in a fifth of the time that slot after slot took.

    Most methods serve PonderLM-3 too: this is PonderLM-3 at K = 1 with s = (0, 1), w = (1, 1)."""

    def __init__(self, config):
        super().__init__(replace(config, fork_layers=()))
        nn.init.normal_(self.wte.weight, std=config.n_embd ** -0.5)
        self.sweeps = (2, 3)
        self.latents(config.budget)

    def new_cache(self):
        """An empty cache: each block's keys and values, one after another of the slots that were run."""
        return Cache()

    def latents(self, budget):
        """K, the latent slots of a token, or ValueError."""
        if budget != 2:
            raise ValueError(f"the budget of PonderLM-2 is 2 (positions of a token), not {budget!r}")
        return 1

    def gates(self, h, K):
        """Of tokens whose slot 0 has the state h (B, T, D): the share s of each slot in the prediction, and log w,
        which slot k's key adds to attention's logits, (B, T, K + 1) each."""
        zero = h.new_zeros(*h.shape[:2], 1)
        return torch.cat((zero, zero + 1), -1), torch.cat((zero, zero), -1)

    def channel(self, log_w):
        """What the score channel of queries and keys holds for log_w (B, N)."""
        return None

    def training_loss(self, h, log_w, targets):
        return predict(h, self.wte.weight, targets)

    def forward(self, idx, targets=None, *, budget=None, routing=None, cache=None, streams=None):
        """As Tinybubbles.forward; budget: positions of a token."""
        budget, start = begin(self, idx, budget, routing, cache)
        K, learns = self.latents(budget), self.training and targets is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            x = self.drop(self.wte(idx) * math.sqrt(self.config.n_embd))             # (B, T, D)
            if learns:
                h, log_w = self.sweep(x, K, self.sweeps[int(torch.randint(len(self.sweeps), ()))])
                count, result = torch.full_like(idx, K + 1), self.training_loss(h, log_w, targets)
            else:
                h, count = self.read_all(x, K) if cache is None else self.read(x, K, start, cache)
                result = predict(h, self.wte.weight, targets)
        if streams is not None:
            streams.append(positions_run(count, start, K + 1))
        return result

    def hidden(self, x, rotation, log_w, append_kv=None):
        """The normed final states (B, N, D) of slots that are fed x (B, N, D)."""
        return self.ln_f(run(self.blocks, x, rotation, append_kv, self.channel(log_w)))

    def rotation(self, T, start, device):
        """cos and sin (1, 1, T, d/2) of T tokens' positions, `start` before them."""
        tok = torch.arange(T, device=device).unsqueeze(0)
        return rotary(tok, T, start, self.config.n_embd // self.config.n_head)

    def read_all(self, emb, K):
        """With no cache: what predicts after each token of emb (B, T, D), and the slots it ran (B, T)."""
        h, _ = self.sweep(emb, K, K * emb.size(1), SETTLED)
        return h, torch.full(emb.shape[:2], K + 1, device=emb.device)

    def sweep(self, emb, K, sweeps, settled=None):
        """Jacobi iteration over tokens' scaled embeddings emb (B, T, D): what predicts (B, T, D), and log w. It ends
        early when no state changes by `settled`, if that is given."""
        (B, T, D), rotation = emb.shape, self.rotation(emb.size(1), 0, emb.device)
        h = self.hidden(emb, rotation, emb.new_zeros(B, T)).unsqueeze(2)             # (B, T, 1, D)
        z, (s, log_w) = h.repeat(1, 1, K, 1), self.gates(h[:, :, 0], K)              # (B, T, K, D)
        rotation = [part.repeat_interleave(K + 1, 2) for part in rotation]
        for _ in range(sweeps + 1):
            x = torch.cat((emb.unsqueeze(2), z), 2).flatten(1, 2)                    # (B, N, D)
            h = self.hidden(x, rotation, log_w.flatten(1)).view(B, T, K + 1, D)
            fed, z, (s, log_w) = z, h[:, :, :-1], self.gates(h[:, :, 0], K)          # slot k feeds slot k + 1
            if settled is not None and (z - fed).abs().max() < settled:
                break
        return (s.unsqueeze(-1) * h).sum(2), log_w

    def read(self, emb, K, start, cache):
        """Slot after slot: what predicts after each token of emb (B, T, D), and the slots it ran (B, T)."""
        cos, sin = self.rotation(emb.size(1), start, emb.device)
        parts = [self.read_token(x, K, (cos[:, :, t:t + 1], sin[:, :, t:t + 1]), cache)
                 for t, x in enumerate(emb.split(1, 1))]
        cache.length += emb.size(1)
        h, count = (torch.cat(part, 1) for part in zip(*parts))
        return h, count

    def read_token(self, x, K, rotation, cache):
        """One token a row, x (B, 1, D). A row whose w has fallen below 1e-4 stops: its slots are padding, tok = -1."""
        tok = torch.zeros(x.size(0), 1, dtype=torch.long, device=x.device)           # (B, 1)
        log_w, out, count = x.new_zeros(x.size(0), 1, K + 1), torch.zeros_like(x), torch.zeros_like(tok)
        for k in range(K + 1):
            tok = tok.masked_fill(log_w[..., k] < LOWEST_W, -1)
            if (tok < 0).all():
                break
            x = self.hidden(x, rotation, log_w[..., k], cache.place(0, tok))         # (B, 1, D)
            if k == 0:
                s, log_w = self.gates(x, K)                                          # (B, 1, K + 1)
            out, count = out + ((tok >= 0) * s[..., k]).unsqueeze(-1) * x, count + (tok >= 0)
        return out, count

    def flops(self, N, pairs):
        """Of a pass over N positions, with so many pairs of a query and a key."""
        return self.config.n_layer * block_flops(self.config, N, pairs)

    def gate_flops(self, T, K):
        """Of the router on T tokens."""
        return 0

    def head_flops(self, T):
        return 2 * T * self.config.n_embd * self.config.vocab_size

    def forward_flops(self, T, budget=None):
        """Of a pass over all slots of T tokens, attention in full, and the head: what a GPT of as many positions would
        take. The slots' inputs must be known; a reading that is to find them, slot by slot, takes decode_flops."""
        K = self.latents(self.config.budget if budget is None else budget)
        N = (K + 1) * T
        return self.flops(N, N * N) + self.gate_flops(T, K) + self.head_flops(T)

    def decode_flops(self, T, budget=None, positions=None):
        """Of reading T tokens one at a time, none before them; positions: how many were run in all, if not each slot.
        """
        K = self.latents(self.config.budget if budget is None else budget)
        N = (K + 1) * T if positions is None else positions
        return self.flops(N, N * (N + 1) // 2) + self.gate_flops(T, K) + self.head_flops(T)

    def train_flops(self, T):
        """Mean, over J, of a training step on one row: three forward passes."""
        K, passes = self.latents(self.config.budget), sum(self.sweeps) / len(self.sweeps) + 1
        N = (K + 1) * T
        return 3 * (self.flops(T, T * T) + passes * self.flops(N, N * N) + (passes + 1) * self.gate_flops(T, K)
                    + self.head_flops(T))


class PonderLM3(PonderLM2):
    """Up to K latent slots of a token, slot k fed the normed final state of slot k - 1 (2603.02023). A router on the
    state h0 of slot 0 says how much each slot counts: s = softmax(router(h0)), w_k = s_k + ... + s_K. log w_k is added
    to every attention logit of slot k's key, in the score channel, which slot 0 (w = 1) gives up too; the head reads
    sum_k s_k h_k. A reader stops at the last slot with w >= 1e-4: later ones are neither run nor cached. Training runs
    all K, by the Jacobi iteration of PonderLM-2: all latent slots of a token start as the state of its embedding, and
    log w is the last sweep's, so that K T sweeps, rather than T, would be exact. Otherwise slot after slot, with or
    without a cache: sweeps until nothing changes were 38 there, at K = 3, and took twice the time.

    K + 1 is config.budget; a lower budget takes the first slots, s being the softmax over these. penalty: training adds
    that times the mean of w_1 + ... + w_K, the mean number of latent slots; our reading, its form is not published."""

    def __init__(self, config):
        super().__init__(config)
        self.router = nn.Linear(config.n_embd, whole_budget(config.budget), bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.penalty = 0.0

    def latents(self, budget):
        most = whole_budget(self.config.budget)
        if most < 2 or not 1 <= whole_budget(budget) <= most:
            raise ValueError(f"the budget of PonderLM-3 is K + 1 >= 2 (positions of a token), that of a call 1 to "
                             f"K + 1 = {most}, not {budget!r}")
        return whole_budget(budget) - 1

    def gates(self, h, K):
        log_s = F.linear(h, self.router.weight[:K + 1]).float().log_softmax(-1)      # (B, T, K + 1)
        log_w = log_s.flip(-1).logcumsumexp(-1).flip(-1)
        return log_s.exp(), torch.cat((torch.zeros_like(log_w[..., :1]), log_w[..., 1:]), -1)

    def channel(self, log_w):
        root = math.sqrt(self.config.n_embd // self.config.n_head)                   # attention divides by it
        return torch.stack((torch.ones_like(log_w), root * log_w)).unsqueeze(2)      # (2, B, 1, N)

    def read_all(self, emb, K):
        return self.read(emb, K, 0, self.new_cache())

    def training_loss(self, h, log_w, targets):
        _, loss = predict(h, self.wte.weight, targets)
        return None, loss + self.penalty * log_w[..., 1:].exp().sum(-1).mean()

    def gate_flops(self, T, K):
        return 2 * T * self.config.n_embd * (K + 1)
