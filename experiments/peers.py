"""
Rivals of bubbles that give every token more positions, each built on tinybubbles' own blocks, so that only the idea
differs: copies of the embedding, pauses after every token, pauses at random places; and two controls for bubbles, forks
chosen at random and forks without attenuation.

A rival is called as Tinybubbles is: model(idx, targets, budget=, cache=, streams=), and trained by train.Trainer. Its
budget is its dial: n, the positions that a token gets, a whole number; None is the configuration's. Nothing is forked.

Shapes: B rows, T tokens in this call, N = n T positions, M = n - 1 pauses of a token, D = n_embd, d = D / n_head, V
words; S tokens in the cache.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments.ablate import Variant, vary  # noqa: E402
from tinybubbles import Cache, Fork, Tinybubbles, check_budget, check_choice, mean_loss, rotary  # noqa: E402

SHARE = 0.1          # of a sequence's length: the pauses put into it in training


# -- what rivals share ------------------------------------------------------------------------------------------------

def whole_budget(budget):
    """Return `budget` as an int, or raise ValueError unless it is a whole number >= 1."""
    if check_budget(budget) % 1:
        raise ValueError(f"this model's budget must be a whole number (positions per token), not {budget!r}")
    return int(budget)


def begin(model, idx, budget, routing, cache):
    """Refuse what no rival can do; return the budget, an int, and the number of tokens before this call."""
    check_choice("routing", routing or "causal", "causal")
    if cache is not None and cache.fixed:
        raise ValueError("this model cannot decode from a fixed cache; leave out cache.fix, or compile=True")
    _, _, start = model.check_call(idx, 1, "causal", cache)
    return whole_budget(model.config.budget if budget is None else budget), start


def run(blocks, x, rotation, append_kv=None, channel=None):
    """x (B, N, D) through blocks, with P = 1 and what the score channel of queries and keys holds, if anything."""
    P = x.new_ones(1, 1, 1)
    for block in blocks:
        x = block(x, P, channel, rotation, append_kv)
    return x                                                                         # (B, N, D)


def block_flops(config, N, pairs):
    """Of one block on N positions with so many pairs of a query and a key: its matmuls, multiply and add each."""
    return 24 * N * config.n_embd ** 2 + 4 * pairs * config.n_embd


def gpt_flops(config, positions, pairs, predictions):
    """FLOPs of a GPT's matmuls, a multiply and an add each: blocks at so many positions, attention of so many (query,
    key) pairs in each block, the head at so many predictions."""
    return config.n_layer * block_flops(config, positions, pairs) + 2 * predictions * config.n_embd * config.vocab_size


class ManyPositions(Tinybubbles):
    """A GPT that gives each token n positions, n = budget, and predicts once for each token: what the rivals share.
    It decodes from an empty `new_cache()`, in chunks of any size, but not from a fixed one (so no compile=True)."""

    def __init__(self, config):
        if config.fork_layers:
            raise ValueError(f"this model forks nothing: fork_layers must be (), not {config.fork_layers}")
        super().__init__(config)

    def new_cache(self):
        return Cache()

    def positions(self, budget):
        """n, the positions of a token, for a call's budget."""
        return whole_budget(self.config.budget if budget is None else budget)

    def angles(self, tok, T, start):
        """tinybubbles' rotary: cos and sin (1, 1, N, d/2) for the positions of tok (N,)."""
        return rotary(tok.unsqueeze(0), T, start, self.config.n_embd // self.config.n_head)

    def predict(self, x, targets, tok, cache, streams):
        """What forward returns, from x (B, T, D). tok (N,) or (B, N): the token of each position, for `streams`."""
        if streams is not None:
            tok = tok.expand(x.size(0), -1)                                          # (B, N)
            streams.append((tok, torch.zeros_like(tok, dtype=torch.float32)))
        if cache is not None:
            cache.length += x.size(1)
        log_probs = self.head(x, targets)                                            # (B, T, V) or (B, T)
        return (log_probs, None) if targets is None else (None, mean_loss(log_probs, targets))

    def forward_flops(self, T, budget=None):
        """Of a forward of one row of T tokens, attention in full, the head included."""
        N = self.positions(budget) * T
        return gpt_flops(self.config, N, N * N, T)

    def decode_flops(self, T, budget=None):
        """Of reading T tokens one at a time: the n positions of each look at those of all tokens up to it."""
        n = self.positions(budget)
        return gpt_flops(self.config, n * T, n * n * (T * (T + 1) // 2), T)

    def train_flops(self, T):
        """Of a training step of one row: forward, and twice that backward."""
        return 3 * self.forward_flops(T)


# -- copies -----------------------------------------------------------------------------------------------------------

class Copies(ManyPositions):
    """Copy-N (a baseline of arXiv 2510.00219): each input embedding n times, then a GPT. Copies differ by their rotary
    positions, k - p/n for the p-th from the right, and by what they see: those to their left. merge: "last" predicts
    from the rightmost copy; "mean" as bubbles whose P are all 1 do, from their sum, of which LN makes their mean."""

    def __init__(self, config, merge="last"):
        super().__init__(config)
        self.merge = check_choice("merge", merge, "last", "mean")

    def forward(self, idx, targets=None, *, budget=None, routing=None, cache=None, streams=None):
        n, start = begin(self, idx, budget, routing, cache)
        B, T = idx.shape
        x = self.drop(self.wte(idx)).repeat_interleave(n, 1)                         # (B, N, D)
        tok = torch.arange(T, device=idx.device).repeat_interleave(n)                # (N,)
        append_kv = None if cache is None else cache.place(0, tok.expand(B, -1))
        x = run(self.blocks, x, self.angles(tok, T, start), append_kv).unflatten(1, (T, n))   # (B, T, n, D)
        x = x[:, :, -1] if self.merge == "last" else x.sum(2)                        # (B, T, D)
        return self.predict(x, targets, tok + start, cache, streams)


# -- pauses -----------------------------------------------------------------------------------------------------------

class Pauses(ManyPositions):
    """Pauses after every token (after arXiv 2310.02226, section 3, in a form for perplexity at a fixed cost): M = n - 1
    times one learned embedding, at their token's rotary position; the last of them predicts. No target is a pause."""

    def __init__(self, config):
        super().__init__(config)
        self.pause = nn.Parameter(0.02 * torch.randn(config.n_embd))                 # as wte's rows

    def forward(self, idx, targets=None, *, budget=None, routing=None, cache=None, streams=None):
        n, start = begin(self, idx, budget, routing, cache)
        B, T = idx.shape
        x = self.wte(idx).unsqueeze(2)                                               # (B, T, 1, D)
        x = self.drop(torch.cat((x, self.pause.expand(B, T, n - 1, -1)), 2)).flatten(1, 2)        # (B, N, D)
        token = torch.arange(T, device=idx.device)                                   # (T,)
        tok = token.repeat_interleave(n)                                             # (N,)
        rotation = [angle.repeat_interleave(n, 2) for angle in self.angles(token, T, start)]
        append_kv = None if cache is None else cache.place(0, tok.expand(B, -1))
        x = run(self.blocks, x, rotation, append_kv)[:, n - 1::n]                     # (B, T, D)
        return self.predict(x, targets, tok + start, cache, streams)


def place_pauses(B, T, device):
    """Which elements are pauses when round(T / 10) of them are put at random places behind the first of T tokens, all
    places equally likely, drawn from torch's own generator: (B, T + round(T / 10)), bool."""
    number = round(SHARE * T)
    slot = 1 + torch.rand(B, T + number - 1, device=device).argsort(1)[:, :number]
    return torch.zeros(B, T + number, dtype=torch.bool, device=device).scatter(1, slot, True)


class RandomPauses(ManyPositions):
    """Pauses as in pre-training (arXiv 2310.02226, section 3). In training mode, of a call with targets: pauses at
    random places, a tenth of the sequence's length, which is then cut back; a pause is an element with a position of
    its own, from which the next token is predicted too, and an element before a pause predicts nothing. The budget
    changes nothing there. Otherwise M = n - 1 pauses follow the text: token t's prediction is read at the last of M
    pauses put after tokens 1..t, which no later token sees. All at once, or one token after the other from a cache."""

    def __init__(self, config):
        super().__init__(config)
        self.pause = nn.Parameter(0.02 * torch.randn(config.n_embd))                 # as wte's rows

    def forward(self, idx, targets=None, *, budget=None, routing=None, cache=None, streams=None):
        n, start = begin(self, idx, budget, routing, cache)
        if self.training and targets is not None and cache is None:
            return self.train_forward(idx, targets, streams)
        (B, T), M = idx.shape, n - 1
        token = torch.arange(T, device=idx.device)                                   # (T,)
        tok = torch.cat((token, token.repeat_interleave(M)))                         # (N,), the tokens, then pauses
        after = torch.cat((0 * token, torch.arange(1, n, device=idx.device).repeat(T)))      # (N,), 0: a token
        x = self.drop(torch.cat((self.wte(idx), self.pause.expand(B, T * M, -1)), 1))        # (B, N, D)
        angles = self.angles(torch.arange(T + M, device=idx.device), T + M, start)
        rotation = [angle[:, :, tok + after] for angle in angles]
        place = None if cache is None else cache.place(0, tok.masked_fill(after > 0, -1).expand(B, -1))
        mask = self.mask(tok, after, start)                                          # (N, S + N)

        def append_kv(layer, k, v):
            k, v = (k, v) if place is None else place(layer, k, v)[:2]               # pauses are padding to the cache
            return k, v, mask.to(k.dtype)
        x = run(self.blocks, x, rotation, append_kv)
        x = x[:, T + M - 1::M] if M else x                                           # (B, T, D)
        return self.predict(x, targets, token.repeat_interleave(n) + start, cache, streams)

    def mask(self, tok, after, start):
        """To add to attention's logits, (N, S + N): a token and its pauses see the tokens up to it, and a pause those
        of its own token up to itself."""
        seen = (after == 0) & (tok <= tok[:, None]) | (tok == tok[:, None]) & (after <= after[:, None])   # (N, N)
        hidden = torch.cat((seen.new_zeros(len(tok), start), ~seen), 1)              # (N, S + N)
        return torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -math.inf)

    def train_forward(self, idx, targets, streams):
        """The loss on the tokens with pauses among them, cut back to T elements."""
        B, T = idx.shape
        pause = place_pauses(B, T, idx.device)                                       # (B, T + pauses)
        tok = (~pause).cumsum(1) - 1                                                 # the last token so far
        targets = targets.gather(1, tok).masked_fill(pause.roll(-1, 1), -1)[:, :T]   # the first is never a pause
        x = torch.where(pause.unsqueeze(-1), self.pause, self.wte(idx.gather(1, tok)))[:, :T]     # (B, T, D)
        rotation = self.angles(torch.arange(T, device=idx.device), T, 0)
        x = run(self.blocks, self.drop(x), rotation, None)
        return self.predict(x, targets, tok[:, :T], None, streams)

    def decode_flops(self, T, budget=None):
        """Of reading T tokens one at a time: the n positions of each look at the tokens before, and at each other."""
        n = self.positions(budget)
        return gpt_flops(self.config, n * T, n * (T * (T - 1) // 2) + n * n * T, T)

    def train_flops(self, T):
        """Of a training step of one row, which has T elements: forward, and twice that backward."""
        return 3 * self.forward_flops(T, 1)


# -- controls for bubbles ---------------------------------------------------------------------------------------------

def mix(h):
    """Scramble whole numbers below 2^32, int64, into others: a hash of two rounds of xor-shift and multiply."""
    h = (h ^ h >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    h = (h ^ h >> 15) * 0x735A2D97 & 0xFFFFFFFF
    return h ^ h >> 15


class RandomFork(Fork):
    """A fork layer whose extras compete by chance: by a hash of the seed, the layer, the token's place in the text and
    the candidate's place in its token. Nothing later matters, and a token read from a cache draws the same again."""

    def forward(self, x, tok, logp, T, budget, routing, cache):
        self.start = 0 if cache is None else cache.length
        return super().forward(x, tok, logp, T, budget, routing, cache)

    def ranking(self, fork, keep, original, tok):
        i = torch.arange(tok.size(1), device=tok.device)
        first = torch.cat((torch.ones_like(tok[:, :1], dtype=torch.bool), tok.diff(dim=1) != 0), 1)
        place = i - torch.where(first, i, 0).cummax(1).values                        # (B, N), of a stream in its token
        token = tok.clamp(min=0) + self.start                                        # (B, N)
        key = mix(mix(1024 * self.seed + self.layer) + token & 0xFFFFFFFF)           # (B, N)
        fork, keep = ((mix(key + 2 * place + slot & 0xFFFFFFFF) >> 8) / 2**24 for slot in (0, 1))   # 0 to 1, exact
        return super().ranking(fork, keep, original, tok)


def random_selection(model, seed=0):
    """Have every fork layer of a Tinybubbles choose its extras at random, old forks without a margin. Scores still
    give each fork its P. Every text and every row has the same draw; another seed, another one. Returns the model."""
    if not model.config.fork_layers:
        raise ValueError("random selection needs a model with fork_layers, not ()")
    for fork in model.forks.values():
        fork.__class__, fork.seed, fork.margin = RandomFork, seed, 0.0
    return model


def no_attenuation(model):
    """Have a Tinybubbles' blocks treat every stream as if P = 1: in attention's logits, its values, and the writes.
    Scores still choose, and weigh the merge. Returns the model."""
    if not model.config.fork_layers:
        raise ValueError("no attenuation needs a model with fork_layers, not ()")
    vary(model, Variant(logits="none", values=False, writes=False))
    return model


def scale_start(model, L):
    """Have a model of L blocks begin as recurrent depth does (arXiv 2502.05171): the blocks' matrices and the embedding
    N(0, 2 / 5D), projections that are added N(0, 1 / 5DL). At D = 1,000 that is GPT-2's 0.02; below, it is more.
    Returns the model."""
    for name, p in model.named_parameters():
        if p.dim() == 2 and "forks" not in name:
            times = 1 / L if name.endswith("proj.weight") else 2
            nn.init.normal_(p, std=math.sqrt(times / (5 * model.config.n_embd)))
    return model
