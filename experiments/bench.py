"""
How fast, against the limit: python experiments/bench.py --preset cpu        (or smoke, gpu)

Ratios measured in one run, the rivals taking turns: training against a plain GPT that computes as many positions in
each block as bubbles have streams; decoding against the same GPT with a preallocated cache, and against reading the
sequence anew for every token; the probability merge against the residual one; and how cost grows with the length and
the budget. Prints a table, writes bench_PRESET.json, .md and .png; the first after every row, so that --resume goes on.
"""
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tinybubbles import MLP, Cache, Config, Tinybubbles, linear, quota, rotate  # noqa: E402
from tools.program import choose_device, knob, read_flags, refuse, write_atomically  # noqa: E402
from train import Settings as TrainSettings  # noqa: E402
from train import make_optimizer  # noqa: E402

MICRO = dict(n_layer=3, n_head=2, n_embd=32, fork_layers=[1, 2])
TINY = dict(n_layer=6, n_head=4, n_embd=128, fork_layers=[1, 2])
SMALL = dict(n_layer=6, n_head=4, n_embd=256, fork_layers=[1, 2])
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, fork_layers=[3, 7])
PRESETS = {   # train: model, batch, lengths; decode, compiled: models, batches, contexts; processor: rows for CPUs
              # alone; words: of the merge's vocabulary; rounds: turns of the rivals
    "smoke": dict(train=(MICRO, 1, (32, 64)), decode=((MICRO,), (1, 2), (32, 48)), compiled=((), (), ()),
                  processor=True, words=300, rounds=2),
    "cpu": dict(train=(SMALL, 1, (128, 256, 512, 1024)), decode=((TINY, SMALL, GPT2), (1,), (256, 1024, 4096)),
                compiled=((TINY,), (1,), (256, 1024)), processor=True, words=50304, rounds=7),
    "gpu": dict(train=(GPT2, 16, (128, 512, 1024)), decode=((GPT2,), (1,), (1024,)),
                compiled=((GPT2, TINY), (1, 64), (256, 1024, 4096)), processor=False, words=50304, rounds=10),
}
RIVALS = {"training step": "GPT, as many positions", "training step, bfloat16": "the same, float32",
          "decoding a token": "GPT with a cache", "decoding a token, compiled": "GPT with a cache",
          "training step, one thread": "the same, all threads", "product of few rows": "F.linear",
          "probability merge": "residual merge"}


def plans(preset):
    """What a preset measures: a dict (what, model, B, tokens, r) for each row of the table, and with `over` for each
    point of the figure: growth over the tokens (r = 2) and over r (at a middle length)."""
    (model, B, lengths), contexts = preset["train"], preset["decode"][2]
    middle, rows = lengths[len(lengths) // 2], []

    def plan(what, model, B, tokens, r=2.0, **more):
        rows.append(dict(what=what, model=model, B=B, tokens=tokens, r=r, **more))
    for T, r in itertools.product(lengths, (2.0, 4.0)):
        plan("training step", model, B, T, r)
    for what, shapes in (("decoding a token", "decode"), ("decoding a token, compiled", "compiled")):
        for shape in itertools.product(*preset[shapes]):
            plan(what, *shape)
    plan("training step, bfloat16", model, B, middle)
    if preset["processor"]:
        plan("training step, one thread", model, B, middle)
        plan("product of few rows", preset["decode"][0][-1], 1, 2, 1.0)
    plan("probability merge", model, 1, max(lengths))
    for what, over in (("training", lengths), ("decoding", contexts)):
        for tokens in over:
            plan(f"growth of {what}", model, 1, tokens, over="tokens")
        for r in (1.0, 1.5, 2.0, 3.0, 4.0):
            plan(f"growth of {what}", model, 1, middle, r, over="r")
    return rows


# -- the rival: a plain GPT, which may compute more positions than there are tokens -----------------------------------

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rotation, kv, start):
        B, N, D = x.shape
        qkv = linear(x, self.qkv.weight).view(B, N, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)   # (3, B, H, N, d)
        (q, k), v = rotate(qkv[:2], *rotation), qkv[2]
        if kv is not None:
            kv[:, :, :, start:start + N] = torch.stack((k, v))
            k, v = kv[:, :, :, :start + N]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0 and N > 1)
        return linear(y.transpose(1, 2).reshape(B, N, D), self.proj.weight)


class GPT(nn.Module):
    """A GPT without biases, with rotary positions. counts: the positions of each block, at most twice those of the
    block before. kv (L, 2, B, H, S, d): a cache that holds `start` tokens; after the first call one token at a time."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            ln_1=nn.LayerNorm(config.n_embd, bias=False), attn=Attention(config),
            ln_2=nn.LayerNorm(config.n_embd, bias=False), mlp=MLP(config))) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)

    def rotation(self, start, N, device):
        d = self.config.n_embd // self.config.n_head
        angle = torch.arange(start, start + N, device=device)[:, None] * 10000.0 ** -(
            torch.arange(0, d, 2, device=device) / d)
        return angle.cos(), angle.sin()                                              # (N, d/2) each

    def forward(self, idx, targets=None, counts=None, kv=None, start=0):
        x, T = self.wte(idx), idx.size(1)
        rotation = self.rotation(start, T, idx.device)
        for l, block in enumerate(self.blocks):
            if counts and counts[l] > x.size(1):
                x = torch.cat((x, x), 1)[:, :counts[l]]
                rotation = self.rotation(start, counts[l], idx.device)
            x = x + block.attn(block.ln_1(x), rotation, None if kv is None else kv[l], start)
            x = x + block.mlp(block.ln_2(x))
        logits = F.linear(self.ln_f(x[:, :T]), self.wte.weight).float()
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def counts_of(config, T, budget):
    """The streams of each block for T tokens."""
    counts, N = [], T
    for l in range(config.n_layer):
        N = min(2 * N, quota(budget, T)) if l in config.fork_layers else N
        counts.append(N)
    return counts


def flops(config, T, budget):
    """Of a forward pass of one row at the residual merge: its matmuls, a multiply and an add each, attention in full
    (its causal half is what flash kernels spare)."""
    D, V = config.n_embd, config.vocab_size
    return sum(24 * N * D * D + 4 * N * N * D for N in counts_of(config, T, budget)) + 2 * T * D * V


# -- measuring --------------------------------------------------------------------------------------------------------

def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(functions, rounds, device):
    """Run the functions in turn, `rounds` times after a warm-up: the median seconds of each, and for each the median
    and the range over rounds of its time as a multiple of the last one's."""
    seconds = []
    for i in range(rounds + 1):
        row = []
        for function in functions:
            wait(device)
            started = time.perf_counter()
            function()
            wait(device)
            row.append(time.perf_counter() - started)
        seconds += [row] * (i > 0)
    ratios = [[row[i] / row[-1] for row in seconds] for i in range(len(functions))]
    return ([statistics.median(column) for column in zip(*seconds)],
            [(statistics.median(r), min(r), max(r)) for r in ratios])


def step_bytes(net, function, device):
    """Memory of a training step: weights, gradients and AdamW's two moments, and on cuda the peak above what was held
    before, elsewhere what the forward keeps for the backward, each storage once."""
    state, kept = 16 * sum(p.numel() for p in net.parameters()), {}
    if device.type == "cuda":
        function().backward()                                                        # gradients are there from now on
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function().backward()
        return state + torch.cuda.max_memory_allocated() - before

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor                       # alive: none takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return state + sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class Operations(TorchDispatchMode):
    """Counts the operations that run within it."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def ceiling(device, half):
    """Measured multiply-adds per second, counted twice, of a large square matmul; and bytes per second of a copy."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if half else torch.float32)
    big = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    (matmul, copy), _ = compare([lambda: a @ a, big.clone], 10, device)
    return 2 * n**3 / matmul, 2 * 4 * big.numel() / copy


class Bench:
    """What every measurement shares: the preset's numbers, the device and its dtype."""

    def __init__(self, preset, device):
        self.words, self.rounds = preset["words"], preset["rounds"]
        self.device, self.half = device, device.type == "cuda"
        self.methods = {"training step": self.train, "training step, bfloat16": self.dtype,
                        "decoding a token": partial(self.decode, compiled=False),
                        "decoding a token, compiled": partial(self.decode, compiled=True),
                        "training step, one thread": self.threads, "product of few rows": self.few_rows,
                        "probability merge": self.merge,
                        "growth of training": self.train_once, "growth of decoding": self.decode_once}

    def measure(self, plan):
        """The plan's row: the plan and what was measured, or the error that ended it, as the first line says it."""
        try:
            return plan | self.methods[plan["what"]](*(plan[key] for key in ("model", "B", "tokens", "r")))
        except RuntimeError as error:                                 # out of memory, or what cannot be compiled
            return plan | dict(error=str(error).strip().partition("\n")[0])

    def nets(self, model, **changes):
        """Tinybubbles and the GPT of the same sizes."""
        config = Config(**model | changes)
        torch.manual_seed(0)
        return Tinybubbles(config).to(self.device), GPT(config).to(self.device)

    def idx(self, B, T, words=256):
        return torch.randint(words, (B, T), device=self.device)

    def autocast(self, half=None):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half if half is None else half)

    def step(self, net, call, half=None):
        """A training step: forward, backward and update."""
        optimizer = make_optimizer(net, TrainSettings(), self.device)

        def step():
            with self.autocast(half):
                loss = call()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return step

    def compiled(self, *nets):
        if self.device.type != "cuda":
            return nets
        torch._dynamo.reset()                                         # it keeps eight graphs of a function at most
        return [torch.compile(net, fullgraph=True) for net in nets]

    def train(self, model, B, T, r):
        """A training step of bubbles against the GPT of as many positions."""
        peak, _ = ceiling(self.device, self.half)
        bubbles, gpt = self.nets(model, block_size=T)
        idx, counts = self.idx(B, T), counts_of(bubbles.config, T, r)
        nets = self.compiled(bubbles, gpt)
        calls = lambda: nets[0](idx, idx, budget=r)[1], lambda: nets[1](idx, idx, counts)
        seconds, (ratio, _) = compare([self.step(net, call) for net, call in zip((bubbles, gpt), calls)],
                                      self.rounds, self.device)
        with self.autocast():
            memory = [step_bytes(net, call, self.device) for net, call in zip((bubbles, gpt), calls)]
        work = 3 * B * flops(bubbles.config, T, r)
        return dict(ratio=ratio, target=1.05 if self.half else 1.10, seconds=seconds[0], memory=memory[0] / memory[1],
                    memory_target=1.15, of_ceiling=work / seconds[0] / peak, rivals_of_ceiling=work / seconds[1] / peak)

    def dtype(self, model, B, T, r):
        """A training step in bfloat16 autocast against float32."""
        bubbles, _ = self.nets(model, block_size=T)
        idx = self.idx(B, T)
        call = lambda: bubbles(idx, idx, budget=r)[1]
        seconds, (ratio, _) = compare([self.step(bubbles, call, half) for half in (True, False)], self.rounds,
                                      self.device)
        return dict(ratio=ratio, seconds=seconds[0])

    def threads(self, model, B, T, r):
        """A training step on one thread against as many as PyTorch takes."""
        bubbles, _ = self.nets(model, block_size=T)
        idx, threads = self.idx(B, T), torch.get_num_threads()
        step = self.step(bubbles, lambda: bubbles(idx, idx, budget=r)[1])

        def on(n):
            torch.set_num_threads(n)
            step()
        seconds, (ratio, _) = compare([partial(on, 1), partial(on, threads)], self.rounds, self.device)
        return dict(ratio=ratio, seconds=seconds[0])

    @torch.no_grad()
    def decode(self, model, B, context, r, compiled):
        """Reading a token after `context` others, bubbles' step compiled or not, against the GPT; and, after 1,024 or
        the smoke run's 48, against no cache."""
        with self.autocast():
            seconds, ratio, cache, operations, (bubbles, idx) = self.read_tokens(model, B, context, r, compiled)
            row = dict(ratio=ratio, target=1.3 if self.half else 1.6, seconds=seconds, operations=operations,
                       memory_target=1.05, **self.cache_bytes(bubbles.config, cache, B))
            if context in (48, 1024):
                anew, _ = compare([lambda: bubbles(idx[:, :context], budget=r)], 1, self.device)
                row.update(faster_than_anew=anew[0] / seconds, faster_target=20)
        if self.half:                                                 # a CPU's own caches make this no limit
            read = sum(p.numel() for p in bubbles.parameters()) * 2 + row["cache_bytes"]
            row["of_bandwidth"] = read / seconds / ceiling(self.device, self.half)[1]
        return row

    def read_tokens(self, model, B, context, r, compiled, tokens=16):
        """Seconds a token of bubbles, its ratio to the GPT's, the cache, how many operations a token takes both models
        when not compiled, and bubbles with the text it read."""
        last = context + tokens * (self.rounds + 1) + 1
        bubbles, gpt = (net.eval() for net in self.nets(model, block_size=last))
        c, idx, cache, place = bubbles.config, self.idx(B, last), Cache(), dict(bubbles=context, gpt=context)
        bubbles(idx[:, :context], budget=r, cache=cache)
        step = bubbles
        if compiled:
            torch._dynamo.reset()                                     # it keeps eight graphs of a function at most
            step = torch.compile(bubbles, fullgraph=True, mode="reduce-overhead" if self.half else None)
            cache.fix(last, r)
        kv = torch.empty(c.n_layer, 2, B, c.n_head, last, c.n_embd // c.n_head, device=self.device,
                         dtype=cache.kv[0].dtype)
        gpt(idx[:, :context], kv=kv)

        def read(name, call):
            for t in range(place[name], place[name] + tokens):
                call(idx[:, t:t + 1], t)
            place[name] += tokens
        seconds, (ratio, _) = compare([lambda: read("bubbles", lambda one, t: step(one, budget=r, cache=cache)),
                                       lambda: read("gpt", lambda one, t: gpt(one, kv=kv, start=t))],
                                      self.rounds, self.device)
        operations = []
        for call in (lambda: bubbles(idx[:, :1], budget=r, cache=cache), lambda: gpt(idx[:, :1], kv=kv, start=context)):
            with Operations() as seen:
                call()
            operations.append(seen.count)
        return seconds[0] / tokens, ratio, cache, operations, (bubbles, idx)

    def cache_bytes(self, c, cache, B):
        """The keys' and values' room over what the streams need; and their bytes."""
        held = sum(kv.untyped_storage().nbytes() for kv in cache.kv.values())
        size, stages = cache.kv[0].element_size(), [l for l in sorted({0, *c.fork_layers})]
        streams = sum(int(cache.count[max(s for s in stages if s <= l)].sum()) for l in range(c.n_layer))
        return dict(memory=held / (streams * 2 * c.n_embd * size), cache_bytes=held,
                    streams=streams / c.n_layer / B / int(cache.length))

    @torch.no_grad()
    def few_rows(self, model, B, T, r):
        """The product with T streams' rows that `linear` takes, against F.linear, over a model's weights."""
        D = model["n_embd"]
        weights = [torch.randn(n * D, D, device=self.device) for n in (3, 1, 4) for _ in range(model["n_layer"])]
        x = torch.randn(B, T, D, device=self.device)
        seconds, (ratio, _) = compare([lambda: [linear(x, W) for W in weights],
                                       lambda: [F.linear(x, W) for W in weights]], self.rounds, self.device)
        return dict(ratio=ratio, seconds=seconds[0])

    def merge(self, model, B, T, r):
        """Loss and gradient with many words, the probability merge against the residual one."""
        nets = [self.nets(model, vocab_size=self.words, merge=m, block_size=T)[0] for m in ("probability", "residual")]
        idx = self.idx(B, T, self.words)
        calls = [lambda net=net: net(idx, idx, budget=r)[1] for net in nets]
        with self.autocast():
            seconds, (ratio, _) = compare([lambda call=call: call().backward() for call in calls], self.rounds,
                                          self.device)
            memory = [step_bytes(net, call, self.device) for net, call in zip(nets, calls)]
        c, base = nets[0].config, 3 * flops(nets[0].config, T, r)
        head = 2 * c.n_embd * self.words                               # flops a row; four times: chunks, forward twice
        more = 1 + 4 * (quota(r, T) - T) * head / (base + T * head)
        return dict(ratio=ratio, target=1.25 * more, seconds=seconds[0], memory=memory[0] / memory[1],
                    memory_target=1.25)

    def train_once(self, model, B, T, r):
        """Seconds and bytes of a training step."""
        bubbles, _ = self.nets(model, block_size=T)
        idx = self.idx(B, T)
        call = lambda: bubbles(idx, idx, budget=r)[1]
        with self.autocast():
            held = step_bytes(bubbles, call, self.device)
        return dict(seconds=compare([self.step(bubbles, call)], self.rounds, self.device)[0][0], bytes=held)

    @torch.no_grad()
    def decode_once(self, model, B, T, r):
        """Seconds of reading a token after T others, and the bytes of their keys and values."""
        last = T + 16 * (self.rounds + 1)
        (bubbles, _), idx, cache = self.nets(model, block_size=last), self.idx(B, last), Cache()
        with self.autocast():
            bubbles.eval()(idx[:, :T], budget=r, cache=cache)
            held = sum(kv.untyped_storage().nbytes() for kv in cache.kv.values())
            one = lambda: [bubbles(idx[:, t:t + 1], budget=r, cache=cache) for t in
                           range(cache.length, cache.length + 16)]
            return dict(seconds=compare([one], self.rounds, self.device)[0][0] / 16, bytes=held)


# -- the table and the figure -----------------------------------------------------------------------------------------

def slope(xs, ys):
    """The exponent k of the fit y ~ x^k."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def size(model):
    return f"{model['n_layer']} x {model['n_embd']}"


def table(rows):
    head = ("what", "against", "blocks x width", "B", "tokens", "r", "time, times the rival's", "target", "memory",
            "target")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        target, missed = row.get("target"), "error" in row or row["ratio"][0] > row.get("target", math.inf)
        time = f"failed: {row['error']}" if "error" in row else "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"])
        cells = [row["what"], RIVALS[row["what"]], size(row["model"]), row["B"], row["tokens"], f"{row['r']:g}",
                 f"**{time}**" if missed else time, f"{target:.2f}" if target else "",
                 f"{row['memory']:.2f}" if "memory" in row else "",
                 f"{row['memory_target']:.2f}" if "memory" in row else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        if "faster_than_anew" in row:
            cells[1], cells[6:] = "reading all anew", [f"1 / {row['faster_than_anew']:.0f}",
                                                       f"1 / {row['faster_target']}", "", ""]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


NOTE = """Time: median (and range) over {rounds} rounds in which both took turns; bold: the target is missed. Memory of
training: weights, gradients, AdamW's moments, and {memory}. Memory of decoding: room for keys and values over what the
streams held need. Machine: {device}, {cores} cores, {threads} threads, torch {torch}, {dtype}."""


def draw(points, path):
    """Time and memory of training and decoding, as multiples of the first point's, against length and budget."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 5), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 4)
    for i, (what, over) in enumerate((w, o) for w in ("training", "decoding") for o in ("tokens", "r")):
        mine = [p for p in points if p["what"].endswith(what) and p["over"] == over]
        xs = [p[over] for p in mine]
        for axis, key, color in ((axes[0, i], "seconds", "#0072b2"), (axes[1, i], "bytes", "#d55e00")):
            ys = [p[key] / mine[0][key] for p in mine]
            axis.loglog(xs, ys, "o-", color=color, base=2)
            axis.set_title(f"{what}: {'time' if key == 'seconds' else 'memory'} ~ {over}^{slope(xs, ys):.2f}",
                           fontsize=9)
            ticks = np.geomspace(min(ys), max(ys), 4)
            axis.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=7)
            axis.set_yticks(ticks, [f"{y:.2g}" for y in ticks], fontsize=7)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[1, i].set_xlabel({"tokens": "tokens read" if what == "training" else "tokens in the cache",
                               "r": "budget r"}[over])
    axes[0, 0].set_ylabel("time, times the first")
    axes[1, 0].set_ylabel("memory, times the first")
    figure.savefig(path, dpi=110)


# -- main -------------------------------------------------------------------------------------------------------------

@dataclass
class Settings:
    preset: str = knob("cpu", ", ".join(PRESETS))
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    results: str = knob(str(ROOT / "experiments" / "results"), "where bench_PRESET.json, .md and .png go")
    resume: bool = knob(False, "keep the rows that bench_PRESET.json has, and measure what it lacks")
    minutes: float = knob(1e6, "begin no row after so many; then --resume", low=0)


def machine(device):
    cuda = device.type == "cuda"
    return dict(device=torch.cuda.get_device_name() if cuda else platform.machine(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), torch=torch.__version__, dtype="bfloat16" if cuda else "float32")


def main(argv):
    s, started = read_flags(Settings, argv, __doc__.strip().splitlines()[0]), time.monotonic()
    if s.preset not in PRESETS:
        refuse(f"--preset must be one of {', '.join(PRESETS)}, not {s.preset!r}")
    preset, device, results = PRESETS[s.preset], choose_device(s.device), Path(s.results)
    bench, wanted, here = Bench(preset, device), plans(preset), machine(device)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"bench_{s.preset}.json"
    rows = json.loads(path.read_text())["rows"] if s.resume and path.exists() else []
    for plan in wanted:
        if any(plan.items() <= row.items() for row in rows) or time.monotonic() - started > 60 * s.minutes:
            continue
        rows.append(bench.measure(plan))
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        write_atomically(path, lambda file: file.write(
            (json.dumps(dict(preset=s.preset, machine=here, rows=rows), indent=1) + "\n").encode()))
    if len(rows) < len(wanted):
        return print(f"{len(rows)} of {len(wanted)} rows are measured; to go on: --resume")
    memory = "the peak of a step above them" if bench.half else "what the forward keeps for the backward"
    note = NOTE.format(**here, rounds=bench.rounds, memory=memory).replace("\n", " ")
    points = [row for row in rows if "over" in row and "error" not in row]
    text = table([row for row in rows if "over" not in row])
    (results / f"bench_{s.preset}.md").write_text(text + "\n" + note + "\n", encoding="utf-8")
    draw(points, results / f"bench_{s.preset}.png")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
