"""
How fast, beside a plain GPT: python experiments/bench.py        (--preset smoke: seconds, at a size that shows nothing)

A training step is set beside one of a GPT that computes as many positions in each block. A cached token is set beside
one of a GPT with a preallocated cache, which holds as many tokens, and beside one of a GPT whose cache holds as many
positions as that of bubbles holds streams. The models take turns in one run, and a row holds ratios of their shortest
times; on the CPU also how many operations PyTorch dispatches for a token. Rows go to a JSON file as they are measured,
and a row that is there is not measured again.

A row of kind "muon" sets a step of the default run's optimizers, Muon and AdamW, beside one of AdamW alone.

A token attends by PyTorch's fused kernel, or by the plain equation written out: all models of a row by the same one.

The preset gpu compiles all models, in bfloat16, and reads a token as CUDA graphs. Its rows, in bench-gpu.json, also
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
from unittest import mock

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tinybubbles import MLP, Config, Tinybubbles, init_matrix, quota  # noqa: E402
from tools.files import make_folder, read_json, write_picture, write_text  # noqa: E402
from tools.program import choose_device, knob, read_flags, refuse, run_program  # noqa: E402
from train import Settings as TrainSettings  # noqa: E402
from train import make_optimizers, measure_bars  # noqa: E402

SMALL = dict(n_layer=6, n_head=4, n_embd=128, fork_layers=(1, 2))
MEDIUM = dict(n_layer=6, n_head=4, n_embd=256, fork_layers=(1, 2))
LARGE = dict(n_layer=12, n_head=12, n_embd=768, fork_layers=(3, 7))
TINY = dict(n_layer=2, n_head=2, n_embd=16, fork_layers=(1,))

STEPS = [dict(kind="step", T=T, batch=1, budget=budget, **MEDIUM)
         for T in (128, 256, 512, 1024) for budget in (2.0, 4.0)]
TOKENS = [dict(kind="token", T=T, batch=batch, budget=2.0, attention="fused", **sizes)
          for batch, sizes in ((1, SMALL), (8, SMALL), (1, MEDIUM), (1, LARGE)) for T in (256, 1024)]
GPU_STEPS = [dict(kind="step", T=T, batch=16384 // T, budget=2.0, n_layer=6, n_head=width // 64, n_embd=width,
                  fork_layers=(1, 2)) for width in (384, 768, 1024) for T in (512, 1024)]
GPU_TOKENS = [dict(kind="token", T=T, batch=batch, budget=2.0, attention=attention, **LARGE)
              for T in (1024, 4096, 256) for batch in (1, 64) for attention in ("fused", "plain")]
DEFAULT = dict(kind="muon", T=128, batch=8, budget=2.0, n_layer=4, n_head=4, n_embd=128, fork_layers=(1, 2))
SCALE = dict(kind="muon", T=512, batch=32, budget=2.0, n_layer=8, n_head=6, n_embd=384, fork_layers=(2, 4, 6))
SMOKE = [dict(kind="muon", T=16, batch=1, budget=2.0, **TINY),
         dict(kind="step", T=16, batch=1, budget=2.0, **TINY),
         *(dict(kind="token", T=16, batch=1, budget=2.0, attention=way, **TINY) for way in ("fused", "plain"))]


class Preset(NamedTuple):
    rows: list       # what to measure
    rounds: int      # how often the two models take turns
    targets: dict    # for each of RATIOS, how many times a GPT's time is aimed at


STEP = "a step, beside a GPT of as many positions"
TOKEN = "a token, beside a GPT of as many tokens"
TOKEN_OF_STREAMS = "a token, beside a GPT of as many positions"
RATIOS = {STEP: ("step", "ratio"), TOKEN: ("token", "ratio"), TOKEN_OF_STREAMS: ("token", "as_many")}  # kind, key
PRESETS = dict(cpu=Preset([DEFAULT] + STEPS + TOKENS, 10, {STEP: 1.05, TOKEN: 1.6}),
               gpu=Preset([SCALE] + GPU_TOKENS + GPU_STEPS, 10, {STEP: 1.05, TOKEN_OF_STREAMS: 1.3}),
               smoke=Preset(SMOKE, 2, {STEP: 1.05, TOKEN: 1.6}))


@dataclass
class Settings:
    preset: str = knob("cpu", "cpu: minutes; gpu: minutes, needs CUDA; smoke: seconds", choices=PRESETS)
    results: str = knob(str(ROOT / "experiments" / "results"), "where the rows, their table and its picture go; what is "
                        "there is not measured again")


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
    steps = [new_step(model.to(device), idx, "adamw") for model in (Tinybubbles(config), GPT(config, counts))]
    seconds = shortest([lambda step=step: repeat(times, step) for step in steps], rounds, device)
    bubbles, plain = (total / times for total in seconds)
    found = dict(ratio=bubbles / plain)
    if gpu:
        flops, ceiling = flops_of_step(config, row["batch"], row["T"], counts), matrix_rate(rounds, device)
        found |= dict(ms=1000 * bubbles, gpt_ms=1000 * plain, share=flops / bubbles / ceiling,
                      gpt_share=flops / plain / ceiling, ceiling=ceiling)
        print_kernels(steps[0])
    return found


def optimizers_step(row, config, rounds, device):
    """A step of bubbles by Muon and AdamW, beside one by AdamW alone."""
    idx, times = torch.randint(256, (row["batch"], row["T"]), device=device), 8 if device.type == "cuda" else 1
    steps = [new_step(Tinybubbles(config).to(device), idx, optimizer) for optimizer in ("muon", "adamw")]
    muon, adamw = shortest([lambda step=step: repeat(times, step) for step in steps], rounds, device)
    return dict(beside_adamw=muon / adamw) | (dict(ms=1000 * muon / times) if device.type == "cuda" else {})


def positions_per_block(config, T):
    """How many streams bubbles give to each block when they read T tokens: twice as many after each fork layer, as long
    as the budget allows it."""
    counts, N = [], T
    for layer in range(config.n_layer):
        if layer in config.fork_layers:
            N = min(2 * N, quota(config.budget, T))
        counts.append(N)
    return counts


def new_step(model, idx, optimizer):
    """A function that trains the model for one step with train.py's --optimizer; on a GPU compiled, and in bfloat16."""
    gpu = idx.device.type == "cuda"
    optimizers = make_optimizers(model, TrainSettings(optimizer=optimizer, learning_rate=1e-4), idx.device)
    run = torch.compile(model) if gpu else model

    def step():
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=gpu):
            _, loss = run(idx, idx)
        loss.backward()
        for optimizer in optimizers:
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


FUSED = F.scaled_dot_product_attention


def plain_attention(q, k, v, attn_mask=None, is_causal=False, dropout_p=0.0):
    """PyTorch's scaled_dot_product_attention with a cache, written out; without one it is the kernel. Logits are
    float32."""
    if is_causal:
        return FUSED(q, k, v, is_causal=True, dropout_p=dropout_p)
    logits = (q @ k.mT).float() / math.sqrt(q.size(-1))                             # (B, H, N, S)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1).type_as(v) @ v


class TokenOfGPT:
    """A function that reads a token by a GPT whose cache holds `seen` positions at first."""

    def __init__(self, config, token, seen, room):
        device, gpu = token.device, token.device.type == "cuda"
        self.model, self.token, self.seen = GPT(config).to(device).eval(), token, seen
        self.kv = list(torch.randn(config.n_layer, 2, len(token), config.n_head, seen + room,
                                   config.n_embd // config.n_head, device=device,
                                   dtype=torch.bfloat16 if gpu else None))          # (2, B, H, S, d) of each block
        self.read = self.model
        if gpu:
            for block in self.kv:
                torch._dynamo.mark_static_address(block)
            self.read = torch.compile(self.model, fullgraph=True, mode="reduce-overhead")
            self.seen = torch.tensor([seen], device=device)

    def __call__(self):
        self.read(self.token, kv=self.kv, seen=self.seen)
        self.seen = self.seen + 1


@torch.no_grad()
def cached_token(row, config, rounds, device):
    """A token that bubbles read after T others, beside one that a GPT reads after as many tokens, and one that it reads
    after as many positions as bubbles have streams; and beside reading all T anew."""
    B, T, gpu, times = row["batch"], row["T"], device.type == "cuda", 8
    model = Tinybubbles(config).to(device).eval()
    idx = torch.randint(256, (B, config.block_size), device=device)
    token = idx[:, :1]
    measure_bars(model, idx[:, :256], [config.budget])
    cache = model.new_cache(B)
    for part in idx[:, :T].split(256, 1):
        model(part, cache=cache)
    read, room = model.read, config.block_size - T
    if gpu:
        cache.keep_addresses()
        read = torch.compile(read, fullgraph=True, mode="reduce-overhead")
    gpt, gpt_of_streams = TokenOfGPT(config, token, T, room), TokenOfGPT(config, token, quota(config.budget, T), room)

    def token_of_bubbles():                                                         # as `forward` reads one
        budget = model.check(token, None, config.budget, cache)
        _, stream_counts = read(token, budget, cache, None)
        cache.commit(stream_counts, 1)

    functions = token_of_bubbles, gpt, gpt_of_streams
    seconds = shortest([lambda f=f: repeat(times, f) for f in functions], rounds, device)
    bubbles, plain, as_many = (total / times for total in seconds)
    found = dict(ratio=bubbles / plain, as_many=bubbles / as_many)
    if gpu:
        print_kernels(lambda: repeat(times, token_of_bubbles))
        return found | dict(ms=1000 * bubbles, gpt_ms=1000 * plain, as_many_ms=1000 * as_many)
    anew, = shortest([lambda: model(idx[:, :T])], 2, device)
    return found | dict(anew=anew / bubbles, operations=count_operations(token_of_bubbles),
                        gpt_operations=count_operations(gpt))


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
    if row["kind"] == "muon":
        found = optimizers_step(row, config, rounds, device)
    elif row["kind"] == "step":
        found = training_step(row, config, rounds, device)
    else:
        attend = plain_attention if row["attention"] == "plain" else FUSED
        with (torch.autocast(device.type, torch.bfloat16, enabled=gpu),
              mock.patch.object(F, "scaled_dot_product_attention", attend)):
            found = cached_token(row, config, rounds, device)
    return row | dict(machine=f"{how}, PyTorch {torch.__version__}, Python {platform.python_version()}") | found


# -- showing -----------------------------------------------------------------------------------------------------------

def write_table(path, rows, about):
    """The rows as a Markdown table, in brackets the GPT's numbers."""
    lines = ["| | attention | blocks, width | T | batch | r | times a GPT's of as many tokens | of as many positions | "
             "AdamW's | ms | share of the ceiling | operations | faster than reading anew |", "|" + "---|" * 13]
    both = lambda row, name, form: "" if name not in row else f"{row[name]:{form}}" + (
        f" ({row['gpt_' + name]:{form}})" if "gpt_" + name in row else "")
    ratio = lambda row, key: f"{row[key]:.2f}" if key in row else ""
    for row in rows:
        tokens, positions = dict(token=("ratio", "as_many"), step=("", "ratio"), muon=("", ""))[row["kind"]]
        cells = (row["kind"], row.get("attention", "fused"), f"{row['n_layer']}, {row['n_embd']}", row["T"], row["batch"],
                 f"{row['budget']:g}", ratio(row, tokens), ratio(row, positions), ratio(row, "beside_adamw"),
                 both(row, "ms", ".3f"), both(row, "share", ".0%"), both(row, "operations", "d"),
                 f"{row['anew']:.0f}" if "anew" in row else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    write_text(path, "\n".join([*lines, "", about]) + "\n")


def draw(path, rows, targets, about):
    """The ratios against T, a panel for each kind of them."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 4), layout="constrained", facecolor="white")
    name = lambda row: f"width {row['n_embd']}, " + (f"r = {row['budget']:g}" if row["kind"] == "step" else
                                                     f"batch {row['batch']}")
    for axes, (title, (kind, key)) in zip(figure.subplots(1, 3), RATIOS.items()):
        lines = {}
        for row in rows:
            if row["kind"] == kind and key in row:
                style = "--" if row.get("attention") == "plain" else "-"
                lines.setdefault((name(row), style), []).append((row["T"], row[key]))
        colors = dict(zip(dict.fromkeys(label for label, style in lines), ("#0072b2", "#d55e00", "#009e73", "#cc79a7")))
        for (label, style), points in lines.items():
            axes.plot(*zip(*sorted(points)), style, marker="o", color=colors[label],
                      label=label if style == "-" else label + ", plain attention")
        axes.axhline(1, color="black", linewidth=1, label="the GPT, 1")
        if title in targets:
            axes.axhline(targets[title], color="black", linewidth=1, linestyle=":", label=f"target, {targets[title]}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(title=title, xlabel="T, tokens", ylabel="times a GPT's")
        axes.set_ylim(0, 1.5 * axes.get_ylim()[1])                                  # with room for the legend above
        axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
    figure.supxlabel(about[about.index("on "):-1], fontsize=9)
    write_picture(path, figure, dpi=110)


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    preset = PRESETS[s.preset]
    path = Path(s.results) / ("bench.json" if s.preset == "cpu" else f"bench-{s.preset}.json")
    if s.preset == "gpu" and not torch.cuda.is_available():
        refuse("--preset gpu needs a GPU with CUDA; try --preset cpu")
    make_folder(path.parent, "--results")
    rows = read_rows(path) if path.exists() else []
    for row in json.loads(json.dumps(preset.rows)):                                 # as JSON has them: lists, no tuples
        if not any(row.items() <= done.items() for done in rows):
            rows.append(measure(row, preset.rounds, s.preset == "gpu"))
            write_text(path, json.dumps(rows, indent=1))
            print(rows[-1], flush=True)
    machines = " and on ".join(sorted({row["machine"] for row in rows}))
    about = f"Ratios of the shortest times of {preset.rounds} rounds in turns, on {machines}."
    write_table(path.with_suffix(".md"), rows, about)
    draw(path.with_suffix(".png"), rows, preset.targets, about)
    print(f"{path}, and its table and picture beside it")


def read_rows(path):
    """The rows that are in a file, or a refusal."""
    rows = read_json(path)
    numbers, kinds = ("T", "batch", "budget", "n_layer", "n_embd"), ("muon", "step", "token")
    is_row = lambda row: (isinstance(row, dict) and row.get("kind") in kinds and isinstance(row.get("machine"), str)
                          and all(isinstance(row.get(name), (int, float)) for name in numbers))
    if not (isinstance(rows, list) and all(map(is_row, rows))):
        refuse(f"{path} is not as bench.py writes it; remove it, or put the whole file back")
    return rows


if __name__ == "__main__":
    run_program(main, "stopped")
