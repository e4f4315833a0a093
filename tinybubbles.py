r"""
Thoughtbubbles (arXiv 2510.00219) in one file: a GPT that forks and deletes residual streams in the middle of the
network, so that a hard token becomes a bubble of several streams that think in parallel and merge before the output,
learned from the language-modelling loss alone. Equation numbers are the paper's.

      a     b     c     d      four tokens, one residual stream each       block 0
   .--|     |  .--|     |      fork layer: a and c fork
   a' a     b  c' c     d      six streams, each writes as its P says      block 1
   |  |     |  x  |  .--|      fork layer: c' is deleted, d forks
   a' a     b     c  d' d                                                  block 2
    \ |     |     |   \ |      merge: a token's streams are summed, by P, and predict the next token

token      a position of the input
stream     one residual vector; a token owns one or more, side by side
original   the rightmost stream of a token; it always survives
extra      what competes for the budget: a new fork, left of its parent, which so sees it, or an old one that would stay
budget r   streams per token: the first t tokens of a text own ceil(r t) at the most, whatever t
P          how much a stream counts: 1 for originals, for a fork the product of the scores of its life

Shapes: B rows, T tokens, N streams, M = 2N candidates, D = n_embd, H heads of d channels, V words, S slots of a cache.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

MIN_SCORE = -20.0  # the least log probability to fork or stay
NO_BAR = -100.0    # every extra is wanted
PADDING = -1e4     # log P of padding: P is 0, and no query attends to it


@dataclass
class Config:
    """The architecture, and the budget of calls that name none. Bad values: ValueError."""
    vocab_size: int = 256  # 256 for bytes
    block_size: int = 128  # tokens in a context
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 128
    fork_layers: tuple = (1, 2, 3)  # fork before these blocks, from 0; () is a plain GPT
    budget: float = 2.0  # streams per token; 1 = no forks
    bars: tuple = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0)  # budgets with a bar, besides `budget`
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, not {value!r}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd must be a multiple of 2 n_head = {2 * self.n_head}, not {self.n_embd}")
        if sorted(self.fork_layers) != sorted(set(self.fork_layers) & set(range(self.n_layer))):
            raise ValueError(f"fork_layers must differ and be from 0 to {self.n_layer - 1}, not {self.fork_layers!r}")
        self.fork_layers, self.budget = tuple(sorted(self.fork_layers)), check_budget(self.budget)
        self.bars = tuple(sorted({1.0, 2.0**len(self.fork_layers), self.budget, *map(check_budget, self.bars)}))


def check_budget(budget):
    """`budget` as a float, or ValueError."""
    if not isinstance(budget, (int, float)) or not 1 <= budget < math.inf:
        raise ValueError(f"budget must be a finite number >= 1, not {budget!r}")
    return float(budget)


def quota(budget, t):
    """ceil(budget * t), streams of the first t tokens; t is an int or a tensor. The product is rounded to 1e-6 first,
    as 1.1 * 10 must give 11, in whole numbers, as devices must agree."""
    return -((500_000 - round(budget * 10**12) * t) // 10**12)


def admit(wanted, allowed, used):
    """First come, first served: which of the wanted extras (B, M) are admitted, where a row holds used (B, 1)
    and may hold allowed (B, M), which never falls, up to each slot. All at once, of each row:
        for i in range(M):
            before, used = used, min(used + wanted[i], allowed[i])
            admitted[i] = used > before"""
    W = wanted.cumsum(1)
    used_after = W + (allowed - W).cummin(1).values.minimum(used)
    return used_after > torch.cat((used, used_after[:, :-1]), 1)


class Fork(nn.Module):
    """A fork layer (section 2.2): N streams come in, the survivors of their 2N candidates go out. An extra must reach
    the bar, the log P that r - 1 extras per token reached in earlier batches; so no token depends on a later one."""
    originals_fade = False

    def __init__(self, config):
        super().__init__()
        self.budgets, D = config.bars, config.n_embd
        self.ln = nn.LayerNorm(D, bias=False)
        self.score = start(nn.Linear(D, 2, bias=False), config)  # row 0 fork, row 1 keep
        self.embedding = nn.Parameter(torch.randn(D) / math.sqrt(D))  # marks a new fork
        self.register_buffer("bar", torch.full((len(self.budgets),), NO_BAR))
        self.register_buffer("error", torch.zeros(len(self.budgets)), persistent=False)

    def forward(self, x, s, budget, used, cache):
        """Of the streams x (B, N, D), which s describes, the survivors: x (B, N', D), tok and logp (B, N').
        used (B, 1): extras of earlier tokens behind this layer."""
        # Score: how likely each stream is to fork, and to stay (eqs. 1-3), in float32.
        with torch.autocast(x.device.type, enabled=False):
            score = F.logsigmoid(self.score(self.ln(x))).clamp(min=MIN_SCORE)  # (B, N, 2)
        safe = F.pad(s.original.unsqueeze(-1), (1, 0))  # (B, N, 2), an original, kept
        if not self.originals_fade:
            score = score.masked_fill(safe, 0.0)

        # Candidates: slot 2j is a fork of stream j, slot 2j + 1 the stream itself. Scores multiply along a life.
        logp, safe = (s.logp.unsqueeze(-1) + score).flatten(1), safe.flatten(1)  # (B, M)
        x = torch.stack((x + self.embedding, x), 2).flatten(1, 2)  # (B, M, D)

        # Select: every original, some extras.
        survives = self.select(logp.detach(), safe, s, budget, used)  # (B, M)

        # Gather: the survivors in their order, with padding on the right.
        size = survives.size(1)
        if cache is None:
            size = min(size, quota(budget, s.T))  # no shape waits for the data
        elif not torch.compiler.is_compiling():
            size = int(survives.sum(1).max())  # the widest row
        slot = survives.byte().sort(dim=1, descending=True, stable=True).indices[:, :size]  # (B, N')
        tok = s.tok.repeat_interleave(2, 1).masked_fill(~survives, s.T).gather(1, slot)
        logp = logp.masked_fill(~survives, PADDING).gather(1, slot)
        return x.take_along_dim(slot.unsqueeze(-1), 1), tok, logp

    def select(self, logp, safe, s, budget, used):
        """Our rule: an extra is wanted if its logp (B, M) reaches the bar, and admitted while the budget lasts. Returns
        the survivors (B, M). safe (B, M): originals."""
        i = sum(b <= budget for b in self.budgets[:-1])  # the bar lies between i - 1 and i
        part = min(1.0, (budget - self.budgets[i - 1]) / (self.budgets[i] - self.budgets[i - 1]))
        bar = self.bar[i - 1].lerp(self.bar[i], part)
        if self.training and s.mask is None:  # no cache
            best = logp.masked_fill(safe, PADDING).flatten().sort(descending=True).values
            reached = best[min(max(1, round((budget - 1) * s.T * len(logp))), len(best)) - 1]
            error = (reached - 1e-3).clamp(min=NO_BAR) - bar  # lest rounding decide
            self.error[i - 1] += (1 - part) * error
            self.error[i] += part * error
        wanted = (logp >= bar) & ~safe
        allowed = (quota(budget, s.t) - s.t).maximum(used)  # (B, N)
        return safe | admit(wanted, allowed.repeat_interleave(2, 1), used)


def start(layer, config, added=1):
    """Draw a matrix from N(0, 2 / (5 D added)), where `added` outputs are summed; at D = 1,000 GPT-2's start."""
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (5 * config.n_embd * added)))
    return layer


class Streams:
    """What blocks need to know of a stretch, the streams between two fork layers. tok (B, N): their owners, never
    falling, T for padding; logp (B, N): log P; first (B, 1): the number of token 0 in the text, from 1."""
    def __init__(self, tok, logp, T, first, frequency, cache, stretch):
        self.tok, self.logp, self.T = tok, logp, T
        self.t = first + tok  # (B, N)
        self.original = tok != F.pad(tok[:, 1:], (0, 1), value=T)  # (B, N), the last of its token
        self.P = logp.exp().unsqueeze(-1)  # (B, N, 1)
        # Positions (appendix D): of the q streams of token t, one with p to its right stands at t - p/q.
        left, right = (torch.searchsorted(self.t, self.t, right=end) for end in (False, True))
        p, q = right - torch.arange(1, tok.size(1) + 1, device=tok.device), right - left
        angle = (self.t - p / q).view(*tok.shape, 1, 1, 1) * frequency  # (B, N, 1, 1, d)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.channel = torch.stack((torch.ones_like(logp), logp), -1).unsqueeze(-1)  # (B, N, 2, 1), for attention
        self.slot, self.mask = (None, None) if cache is None else cache.place(stretch, logp)

    def sum_per_token(self, values):
        """Sum values (B, N, C), 0 for padding, over each token's streams: (B, T, C)."""
        index = self.tok.clamp(max=self.T - 1).unsqueeze(-1).expand_as(values)
        return values.new_zeros(len(values), self.T, values.size(-1)).scatter_add(1, index, values)


class CausalSelfAttention(nn.Module):
    """Score-attenuated attention (eqs. 7-8): logits (q k^T + log P of the key) / sqrt(d), values times P. Each head's
    last channel carries the score, q = 1 and k = log P, so that any attention kernel serves."""
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, D = config, layer, config.n_embd
        self.qkv = start(nn.Linear(D, 3 * D, bias=False), config)
        self.proj = start(nn.Linear(D, D, bias=False), config, 2 * config.n_layer)

    def forward(self, x, s, cache):
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.config.n_head, -1)  # (B, N, 3, H, d)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        qk = (qk * s.cos + qk.roll(qk.size(-1) // 2, -1) * s.sin).type_as(v)  # RoPE; frequency < 0 in the first half
        if self.config.fork_layers:
            qk[..., -1] = s.channel
            v = (v * s.P.unsqueeze(-1)).type_as(v)
        q, k = qk.unbind(2)  # (B, N, H, d)
        if cache is not None:
            k, v = cache.append(self.layer, s, k, v)  # (B, S, H, d)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, N or S, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=s.mask, is_causal=cache is None,
                                           dropout_p=self.config.dropout * self.training)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.fc = start(nn.Linear(D, 4 * D, bias=False), config)
        self.proj = start(nn.Linear(4 * D, D, bias=False), config, 2 * config.n_layer)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    """A GPT block that writes to each stream as much as its P says (eqs. 9-10)."""
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd, bias=False), CausalSelfAttention(config, layer)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd, bias=False), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, s, cache):
        x = x + s.P * self.drop(self.attn(self.ln_1(x), s, cache))
        return x + s.P * self.drop(self.mlp(self.ln_2(x)))


class Cache:
    """The keys and values of earlier streams, without gradients. Pass an empty one to `model(idx, cache=...)`, then the
    same with each next chunk. The first call makes its room, for a whole context at its budget; no shape changes
    later, so a step compiles to one graph."""
    def __init__(self):
        self.length = 0   # tokens seen
        self.held = None  # (stretches, B, 1): streams that a row holds, which is its next free slot
        self.slots = []   # of each stretch: 0, 1, ..., S - 1; only padding takes the last one
        self.kv = {}      # of each block: keys and values (B, S, 2, H, d)

    def claim(self, config, idx, budget):
        """Claim room for the tokens idx (B, T), or refuse."""
        if self.held is None:
            self.budget, self.row = budget, torch.arange(len(idx), device=idx.device).unsqueeze(1)
            most = [2**i + min(2**i, budget) * config.block_size for i in range(1 + len(config.fork_layers))]
            self.slots = [torch.arange(int(size) // 16 * 16 + 32, device=idx.device) for size in most]
            self.held = idx.new_zeros(len(most), len(idx), 1)
            torch._dynamo.mark_static_address(self.held)  # for CUDA graphs
        if budget > self.budget or len(idx) != len(self.row):
            raise ValueError(f"this cache is for {len(self.row)} rows, budgets to {self.budget:g}, not {len(idx)}, "
                             f"{budget:g}; start a new Cache()")
        self.length += idx.size(1)

    def clear(self):
        """Forget all tokens."""
        self.length = 0
        self.held.zero_()

    def place(self, stretch, logp):
        """Take slots (B, N), each row's next, for new streams; and a mask (B, 1, N, S) that hides later ones. Padding
        is last, and overwritten by what comes next."""
        held, i = self.held[stretch], self.slots[stretch]
        slot = (held + i[:logp.size(1)]).clamp(max=len(i) - 1)
        held += (logp != PADDING).sum(1, keepdim=True)
        return slot, torch.where(i > slot[:, None, :, None], -math.inf, 0.0).type_as(logp)

    def append(self, layer, s, k, v):
        """Add the keys and values (B, N, H, d) of new streams; return all (B, S, H, d)."""
        new = torch.stack((k, v), 2).detach()  # (B, N, 2, H, d)
        if layer not in self.kv:
            self.kv[layer] = new.new_zeros(len(new), s.mask.size(-1), *new.shape[2:])
            torch._dynamo.mark_static_address(self.kv[layer])
        self.kv[layer][self.row, s.slot] = new
        return self.kv[layer].unbind(2)


class Tinybubbles(nn.Module):
    """A GPT that forks before some blocks."""
    fork_layer, causal = Fork, True

    def __init__(self, config):
        super().__init__()
        self.config, d = config, config.n_embd // config.n_head
        self.wte = start(nn.Embedding(config.vocab_size, config.n_embd), config)  # the output head too
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, l) for l in range(config.n_layer))
        self.forks = nn.ModuleDict({str(l): self.fork_layer(config) for l in config.fork_layers})
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        frequency = 10000.0 ** (torch.arange(0, d, 2) / -d)
        self.register_buffer("frequency", torch.cat((-frequency, frequency)), persistent=False)

    def forward(self, idx, targets=None, *, budget=None, cache=None, streams=None):
        """Read the tokens idx (B, T), int64, that follow those in `cache`. Returns (logits, None): log-probabilities
        (B, T, V), float32, of each next token; with targets (B, T), -1 = ignore, (None, loss), their mean loss in nats.
        streams: a list that receives (tok, logp) of each block, tok counted from the text's first token, -1 = padding.
        ValueError: a bad budget, or more than block_size or the cache can hold."""
        log_probs = self.read(idx, targets, self.check(idx, budget, cache), cache, streams)
        if targets is None:
            return log_probs, None
        counted = targets != -1
        return None, -(log_probs[..., 0] * counted).sum() / counted.sum().clamp(min=1)

    def check(self, idx, budget, cache):
        """Refuse what cannot be done; claim the cache's room. Returns the budget."""
        if cache is not None and not self.causal:
            raise ValueError("the paper's model cannot use a cache; take Tinybubbles")
        budget = min(check_budget(self.config.budget if budget is None else budget), 2.0**len(self.forks))
        most = self.config.block_size - (cache.length if cache else 0)
        if idx.dim() != 2 or not 1 <= idx.size(1) <= most:
            raise ValueError(f"idx must be (B, T), T from 1 to {most} (block_size - cache.length), not {(*idx.shape,)}")
        if cache is not None:
            cache.claim(self.config, idx, budget)
        return budget

    def read(self, idx, targets, budget, cache, streams):
        """The whole method. Without a cache, it is decoding into an empty one."""
        (B, T), stretch = idx.shape, 0
        held = idx.new_zeros(1 + len(self.forks), B, 1) if cache is None else cache.held
        first, used = held[0] + 1, held - held[0]  # (B, 1), (stretches, B, 1)
        x = self.drop(self.wte(idx))  # (B, T, D)
        tok, logp = torch.arange(T, device=idx.device).repeat(B, 1), x.new_zeros(B, T)
        s = Streams(tok, logp, T, first, self.frequency, cache, stretch)
        for l, block in enumerate(self.blocks):
            if l in self.config.fork_layers:
                stretch += 1
                x, tok, logp = self.forks[str(l)](x, s, budget, used[stretch], cache)
                s = Streams(tok, logp, T, first, self.frequency, cache, stretch)
            x = block(x, s, cache)
            if streams is not None:
                streams.append((torch.where(tok < T, s.t - 1, -1), logp))
        return self.predict(x, s, targets)

    def predict(self, x, s, targets):
        """Merge (the authors' code): x_t = sum_j P_j x_j, (B, N, D) to (B, T, D); then log_probs."""
        return self.log_probs(s.sum_per_token(s.P * x), targets)

    def log_probs(self, x, targets):
        """Of states x (B, N, D): log-probabilities (B, N, V) of next tokens; with targets, only theirs (B, N, 1)."""
        log_probs = F.linear(self.ln_f(x), self.wte.weight).float().log_softmax(-1)
        return log_probs if targets is None else log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1))

    @torch.no_grad()
    def update_bars(self, batches=1, rate=0.1):
        """After each training step: move the bars by `rate`, at first all the way, to what its `batches` measured."""
        for fork in self.forks.values():
            fork.bar += fork.error / batches * torch.where(fork.bar == NO_BAR, 1.0, rate)
            fork.error.zero_()

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, budget=None, generator=None, show=None,
                 compile=False):
        """Continue idx (B, T), int64: (B, T + max_new_tokens). Each token is read once, into a cache; when it is full,
        the last block_size // 2 + 1 are read again. temperature: 0 = always the likeliest. top_k: sample among the k
        likeliest; None or 0 = all. show: called with each new token (B, 1). compile: the step that reads one token."""
        assert min(temperature, top_k or 0, max_new_tokens) >= 0
        read_one = torch.compile(self.read, fullgraph=True, mode="reduce-overhead") if compile else self.read
        cache, block_size, V = Cache(), self.config.block_size, self.config.vocab_size
        unread = idx[:, -block_size:]
        for _ in range(max_new_tokens):
            if not self.causal:
                unread, cache = idx[:, -block_size:], None
            elif cache.length + unread.size(1) > block_size:
                unread = idx[:, -(block_size // 2 + 1):]
                cache.clear()
            budget = self.check(unread, budget, cache)
            read = read_one if cache and cache.length > unread.size(1) else self.read
            log_probs = read(unread, None, budget, cache, None)[:, -1]  # (B, V)
            best, token = log_probs.topk(min(top_k or V, V) if temperature else 1)
            probs = ((best - best[:, :1]) / max(temperature, 1e-9)).softmax(-1)  # <= 0: no overflow
            unread = token.gather(1, torch.multinomial(probs, 1, generator=generator))  # (B, 1)
            idx = torch.cat((idx, unread), dim=1)
            if show:
                show(unread)
        return idx


class PaperFork(Fork):
    """Originals fade too, and the whole sequence's best survive (eqs. 4-5): a later token can evict an earlier fork."""
    originals_fade = True

    def select(self, logp, safe, s, budget, used):
        """The best ceil(r T) candidates, originals first; of equal ones the earlier."""
        best = logp.masked_fill(safe, math.inf).sort(dim=1, descending=True, stable=True).indices
        chosen = torch.zeros_like(safe).scatter(1, best[:, :quota(budget, s.T)], True)
        return chosen & (logp > PADDING)


class PaperTinybubbles(Tinybubbles):
    """The paper's model, or with merge="residual" the authors' code. No cache is valid: it generates by reading the
    whole text for each token."""
    fork_layer, causal = PaperFork, False

    def __init__(self, config, merge="probability"):
        super().__init__(config)
        self.merge = merge

    def predict(self, x, s, targets):
        """p(y|t) = sum_j P_j softmax(W LN(x_j)) / sum_j P_j (eq. 11), in log space; to train, of the targets alone."""
        if self.merge == "residual":
            return super().predict(x, s, targets)
        owner = s.tok.clamp(max=s.T - 1)  # (B, N)
        joint = s.logp.unsqueeze(-1) + self.log_probs(x, None if targets is None else targets.gather(1, owner))
        index = owner.unsqueeze(-1).expand_as(joint)  # (B, N, V or 1)
        top = joint.new_full((len(x), s.T, joint.size(-1)), -math.inf).scatter_reduce(1, index, joint.detach(), "amax")
        return top + s.sum_per_token((joint - top.gather(1, index)).exp()).log() - s.sum_per_token(s.P).log()
