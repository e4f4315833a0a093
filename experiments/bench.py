"""
How fast, beside a plain GPT: python experiments/bench.py        (--preset smoke: seconds, at a size that shows nothing)

A training step is set beside one of a GPT that computes as many positions in each block. A cached token is set beside
one of a GPT with a preallocated cache. The two models take turns in one run, and a row holds the ratio of their
shortest times; on the CPU also how many operations PyTorch dispatches for a token. Rows go to a JSON file as they are
measured, and a row that is there is not measured again.

The preset gpu compiles both models, in bfloat16, and reads a token as CUDA graphs. Its rows, in bench-gpu.json, also
hold milliseconds, and the rate of training as a share of the rate at which the GPU multiplies two 8,192 x 8,192
matrices. It prints where the GPU's time goes.
"""
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tinybubbles import MLP, Config, Tinybubbles, init_matrix, quota  # noqa: E402
from tools.files import make_folder, write_atomically  # noqa: E402
from tools.program import choose_device, knob, read_flags  # noqa: E402
from train import measure_bars  # noqa: E402

SMALL = dict(n_layer=6, n_head=4, n_embd=128, fork_layers=(1, 2))
MEDIUM = dict(n_layer=6, n_head=4, n_embd=256, fork_layers=(1, 2))
LARGE = dict(n_layer=12, n_head=12, n_embd=768, fork_layers=(3, 7))
TINY = dict(n_layer=2, n_head=2, n_embd=16, fork_layers=(1,))

STEPS = [dict(kind="step", T=T, batch=1, budget=budget, **MEDIUM)
         for T in (128, 256, 512, 1024) for budget in (2.0, 4.0)]
TOKENS = [dict(kind="token", T=T, batch=batch, budget=2.0, **sizes)
          for batch, sizes in ((1, SMALL), (8, SMALL), (1, MEDIUM), (1, LARGE)) for T in (256, 1024)]
GPU_STEPS = [dict(kind="step", T=T, batch=16384 // T, budget=2.0, n_layer=6, n_head=width // 64, n_embd=width,
                  fork_layers=(1, 2)) for width in (384, 768, 1024) for T in (512, 1024)]
GPU_TOKENS = [dict(kind="token", T=T, batch=batch, budget=2.0, **LARGE) for batch in (1, 64) for T in (256, 1024, 4096)]
SMOKE = [dict(kind=kind, T=16, batch=1, budget=2.0, **TINY) for kind in ("step", "token")]


class Preset(NamedTuple):
    rows: list       # what to measure
    rounds: int      # how often the two models take turns
    target: float    # how many times the GPT's time a token may take


PRESETS = dict(cpu=Preset(STEPS + TOKENS, 10, 1.6), gpu=Preset(GPU_STEPS + GPU_TOKENS, 10, 1.3),
               smoke=Preset(SMOKE, 2, 1.6))


@dataclass
class Settings:
    preset: str = knob("cpu", "cpu, gpu: minutes; smoke: seconds", choices=PRESETS)
    results: str = knob(str(ROOT / "experiments" / "results"), "where the rows, their table and its picture go")


# -- the rival ---------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """A plain GPT of a Config's sizes, which returns (logits, loss) as Tinybubbles does.

    counts: how many positions N each block computes; default: T. Those beyond T repeat the text and predict nothing."""

    def __init__(self, config, counts=None):
        super().__init__()
        self.n_head, self.counts = config.n_head, counts
        self.wte = init_matrix(nn.Embedding(config.vocab_size, config.n_embd), config)
        self.blocks = nn.ModuleList(self.new_block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        d = config.n_embd // config.n_head
        frequency = 10000.0 ** (-torch.arange(0, d, 2) / d)
        # A head of two halves (a, b) is turned to (a cos - b sin, b cos + a sin). The first half has negative angles:
        # this changes no cosine, and gives the sine its sign.
        self.register_buffer("frequency", torch.cat((-frequency, frequency)))       # (d,)

    def new_block(self, config):
        D = config.n_embd
        linear = lambda outputs: init_matrix(nn.Linear(D, outputs, bias=False), config)
        return nn.ModuleDict(dict(ln_1=nn.LayerNorm(D, bias=False), qkv=linear(3 * D), proj=linear(D),
                                  ln_2=nn.LayerNorm(D, bias=False), mlp=MLP(config)))

    def forward(self, idx, targets=None, kv=None, seen=0):
        """Predict the token after each token of idx (B, T).

        kv: a cache, each block's keys and values (2, B, H, S, d); idx is then one token a row, (B, 1), after `seen`
        others. With a number for `seen`, attention covers the tokens so far. With a tensor (1,) it covers all S slots
        behind a mask, so that no shape ever changes and a step compiles to one graph."""
        T = idx.size(1)
        slot, end, mask = slice(seen, seen + 1), seen + 1, None
        if torch.is_tensor(seen):
            slot, end, mask = seen, None, torch.arange(kv[0].size(3), device=idx.device) <= seen[:, None]  # (1, S)
        x = self.wte(idx)                                                           # (B, T, D)
        cos, sin = self.rotation(seen, T)
        for layer, block in enumerate(self.blocks):
            if self.counts and self.counts[layer] > x.size(1):
                x = torch.cat((x, x), 1)[:, :self.counts[layer]]                    # (B, N, D)
                cos, sin = self.rotation(seen, x.size(1))
            qkv = block.qkv(block.ln_1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
            qk, v = qkv[:2], qkv[2]                                                 # (2, B, H, N, d), (B, H, N, d)
            q, k = qk * cos + qk.roll(qk.size(-1) // 2, -1) * sin                   # (B, H, N, d) each
            if kv is not None:
                kv[layer][:, :, :, slot] = torch.stack((k, v)).type_as(kv[layer])
                k, v = kv[layer][:, :, :, :end]                                     # (B, H, S, d) each
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kv is None)
            x = x + block.proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        logits = F.linear(self.ln_f(x[:, :T]), self.wte.weight).float()             # (B, T, V)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def rotation(self, seen, N):
        """The cosines and sines (N, d) of the positions after `seen`."""
        angle = (seen + 1 + torch.arange(N, device=self.frequency.device))[:, None] * self.frequency
        return angle.cos(), angle.sin()


# -- measuring ---------------------------------------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operations(function):
    with Operations() as operations:
        function()
    return operations.count


def shortest(functions, rounds, device):
    """The shortest time of each function, in seconds, over rounds in turns; one more round, before them, warms up."""
    best = [math.inf] * len(functions)
    for number in range(1 + rounds):
        for i, function in enumerate(functions):
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > 0:
                best[i] = min(best[i], time.perf_counter() - began)
    return best


def repeat(times, function):
    for _ in range(times):
        function()


def print_kernels(function):
    """Where the GPU's time goes."""
    with torch.profiler.profile() as profile:
        function()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=70))


def training_step(row, config, rounds, device):
    """A step of bubbles beside one of a GPT that computes as many positions in each block."""
    gpu, times = device.type == "cuda", 8 if device.type == "cuda" else 1
    counts = positions_per_block(config, row["T"])
    idx = torch.randint(256, (row["batch"], row["T"]), device=device)
    steps = [new_step(model.to(device), idx) for model in (Tinybubbles(config), GPT(config, counts))]
    seconds = shortest([lambda step=step: repeat(times, step) for step in steps], rounds, device)
    bubbles, plain = (total / times for total in seconds)
    found = dict(ratio=bubbles / plain)
    if gpu:
        flops, ceiling = flops_of_step(config, row["batch"], row["T"], counts), matrix_rate(rounds, device)
        found |= dict(ms=1000 * bubbles, gpt_ms=1000 * plain, share=flops / bubbles / ceiling,
                      gpt_share=flops / plain / ceiling, ceiling=ceiling)
        print_kernels(steps[0])
    return found


def positions_per_block(config, T):
    """How many streams bubbles give to each block when they read T tokens: twice as many after each fork layer, as long
    as the budget allows it."""
    counts, N = [], T
    for layer in range(config.n_layer):
        if layer in config.fork_layers:
            N = min(2 * N, quota(config.budget, T))
        counts.append(N)
    return counts


def new_step(model, idx):
    """A function that trains the model for one step; on a GPU compiled, and in bfloat16."""
    gpu = idx.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu)
    run = torch.compile(model) if gpu else model

    def step():
        optimizer.zero_grad()
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=gpu):
            _, loss = run(idx, idx)
        loss.backward()
        optimizer.step()
    return step


def flops_of_step(config, B, T, counts):
    """FLOPs of a training step's matrix products alone, forwards and backwards, with half of all attention."""
    D = config.n_embd
    return 6 * B * (T * D * config.vocab_size + sum(12 * N * D * D + N * N * D for N in counts))


def matrix_rate(rounds, device):
    """FLOPs per second of ten products of two 8,192 x 8,192 matrices."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    seconds, = shortest([lambda: repeat(10, lambda: a @ b)], rounds, device)
    return 10 * 2 * 8192**3 / seconds


@torch.no_grad()
def cached_token(row, config, rounds, device):
    """A token that bubbles read after T others, beside one that a GPT reads; and beside reading all T anew."""
    B, T, gpu, times = row["batch"], row["T"], device.type == "cuda", 8
    model, gpt = Tinybubbles(config).to(device).eval(), GPT(config).to(device).eval()
    idx = torch.randint(256, (B, config.block_size), device=device)
    token = idx[:, :1]
    measure_bars(model, idx[:, :256], [config.budget])
    cache = model.new_cache(B)
    for part in idx[:, :T].split(256, 1):
        model(part, cache=cache)
    kv = list(torch.randn(config.n_layer, 2, B, config.n_head, config.block_size, config.n_embd // config.n_head,
                          device=device, dtype=torch.bfloat16 if gpu else None))    # (2, B, H, S, d) of each block
    read, read_gpt, seen = model.read, gpt, T
    if gpu:
        cache.keep_addresses()
        for block in kv:
            torch._dynamo.mark_static_address(block)
        read, read_gpt = (torch.compile(f, fullgraph=True, mode="reduce-overhead") for f in (read, gpt))
        seen = torch.tensor([T], device=device)

    def token_of_bubbles():                                                         # as `forward` reads one
        budget = model.check(token, None, config.budget, cache)
        _, stream_counts = read(token, budget, cache, None)
        cache.commit(stream_counts, 1)

    def token_of_gpt():
        nonlocal seen
        read_gpt(token, kv=kv, seen=seen)
        seen = seen + 1

    seconds = shortest([lambda: repeat(times, token_of_bubbles), lambda: repeat(times, token_of_gpt)], rounds, device)
    bubbles, plain = (total / times for total in seconds)
    if gpu:
        print_kernels(lambda: repeat(times, token_of_bubbles))
        return dict(ratio=bubbles / plain, ms=1000 * bubbles, gpt_ms=1000 * plain)
    anew, = shortest([lambda: model(idx[:, :T])], 2, device)
    return dict(ratio=bubbles / plain, anew=anew / bubbles, operations=count_operations(token_of_bubbles),
                gpt_operations=count_operations(token_of_gpt))


def measure(row, rounds, gpu):
    """The row, with what was measured and on which machine."""
    device = choose_device("cuda" if gpu else "cpu")
    how = f"{torch.cuda.get_device_name()}, bfloat16, compiled" if gpu else (
        f"{platform.machine()}, {torch.get_num_threads()} threads, float32, not compiled")
    torch.manual_seed(0)
    torch._dynamo.reset()                                       # else shapes that change are compiled as unknown
    room = 8 * rounds + 16 if row["kind"] == "token" else 0     # for the tokens that are read to be timed and counted
    config = Config(block_size=row["T"] + room, n_layer=row["n_layer"], n_head=row["n_head"], n_embd=row["n_embd"],
                    fork_layers=row["fork_layers"], budget=row["budget"])
    if row["kind"] == "step":
        found = training_step(row, config, rounds, device)
    else:
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            found = cached_token(row, config, rounds, device)
    return row | dict(machine=f"{how}, PyTorch {torch.__version__}, Python {platform.python_version()}") | found


# -- showing -----------------------------------------------------------------------------------------------------------

def write_table(path, rows, about):
    """The rows as a Markdown table, in brackets the GPT's numbers."""
    lines = ["| | blocks, width | T | batch | r | times the GPT's | ms | share of the ceiling | operations | faster "
             "than reading anew |", "|" + "---|" * 10]
    both = lambda row, name, form: f"{row[name]:{form}} ({row['gpt_' + name]:{form}})" if name in row else ""
    for row in rows:
        cells = (row["kind"], f"{row['n_layer']}, {row['n_embd']}", row["T"], row["batch"], f"{row['budget']:g}",
                 f"{row['ratio']:.2f}", both(row, "ms", ".3f"), both(row, "share", ".0%"), both(row, "operations", "d"),
                 f"{row['anew']:.0f}" if "anew" in row else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    path.write_text("\n".join([*lines, "", about]) + "\n")


def draw(path, rows, target, about):
    """The ratios against T: on the left of training steps, on the right of cached tokens."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    steps, tokens = ([row for row in rows if row["kind"] == kind] for kind in ("step", "token"))
    draw_ratios(left, steps, "a training step at as many positions", 1.05,
                lambda row: f"r = {row['budget']:g}, width {row['n_embd']}")
    draw_ratios(right, tokens, "a cached token", target, lambda row: f"width {row['n_embd']}, batch {row['batch']}")
    figure.supxlabel(about[about.index("on "):-1], fontsize=9)
    figure.savefig(path, dpi=120)


def draw_ratios(axes, rows, title, target, name):
    """One panel; `name` of a row is that of its line."""
    lines = {}
    for row in rows:
        lines.setdefault(name(row), []).append((row["T"], row["ratio"]))
    for (label, points), color in zip(lines.items(), ("#0072b2", "#d55e00", "#009e73", "#cc79a7")):
        axes.plot(*zip(*points), "o-", color=color, label=label)
    axes.axhline(1, color="black", linewidth=1)
    axes.axhline(target, color="black", linewidth=1, linestyle=":", label=f"target, {target}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    top = max([target, *(row["ratio"] for row in rows)])
    axes.set(title=title, xlabel="T, tokens", ylabel="times a GPT's", ylim=(0, 1.1 * top))
    axes.legend(framealpha=1, edgecolor="none")


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    preset = PRESETS[s.preset]
    path = Path(s.results) / ("bench.json" if s.preset == "cpu" else f"bench-{s.preset}.json")
    make_folder(path.parent, "--results")
    rows = json.loads(path.read_text()) if path.exists() else []
    for row in json.loads(json.dumps(preset.rows)):                                 # as JSON has them: lists, no tuples
        if not any(row.items() <= done.items() for done in rows):
            rows.append(measure(row, preset.rounds, s.preset == "gpu"))
            write_atomically(path, lambda file: file.write(json.dumps(rows, indent=1).encode()))
            print(rows[-1], flush=True)
    machines = " and on ".join(sorted({row["machine"] for row in rows}))
    about = f"Ratios of the shortest times of {preset.rounds} rounds in turns, on {machines}."
    write_table(path.with_suffix(".md"), rows, about)
    draw(path.with_suffix(".png"), rows, preset.target, about)


if __name__ == "__main__":
    main(sys.argv[1:])
