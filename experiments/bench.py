"""
How fast, beside a plain GPT: python experiments/bench.py        (--preset smoke: seconds, at a size that shows nothing)

A training step against a GPT of as many positions per block, and a cached token against a GPT with a preallocated
cache. Both take turns in one run; a row holds the ratio of the shortest times, and the operations that PyTorch
dispatches for a token. Rows go to a JSON file as they are measured, and one that is there is not measured again.

The preset gpu compiles both, in bfloat16, a token as CUDA graphs. Its rows, in bench-gpu.json, also hold milliseconds,
and what share training has of the rate at which the GPU multiplies two 8,192 x 8,192 matrices; and it prints where the
GPU's time goes.
"""
import itertools
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tinybubbles import MLP, Cache, Config, Tinybubbles, quota, start  # noqa: E402
from tools.files import make_folder, write_atomically  # noqa: E402
from tools.program import choose_device, knob, read_flags  # noqa: E402
from train import measure_bars  # noqa: E402

TRAIN = [dict(kind="step", T=T, budget=r, n_layer=6, n_head=4, n_embd=256, fork_layers=(1, 2))
         for T in (128, 256, 512, 1024) for r in (2.0, 4.0)]
DECODE = [dict(kind="token", T=T, budget=2.0, n_layer=L, n_head=H, n_embd=D, fork_layers=forks)
          for L, H, D, forks in ((6, 4, 128, (1, 2)), (6, 4, 256, (1, 2)), (12, 12, 768, (3, 7))) for T in (256, 1024)]
GPU = [dict(kind="step", T=T, batch=16384 // T, budget=2.0, n_layer=6, n_head=D // 64, n_embd=D, fork_layers=(1, 2))
       for D in (384, 768, 1024) for T in (512, 1024)]
GPU += [dict(kind="token", T=T, batch=B, budget=2.0, n_layer=12, n_head=12, n_embd=768, fork_layers=(3, 7))
        for B in (1, 64) for T in (256, 1024, 4096)]
TINY = dict(T=16, budget=2.0, n_layer=2, n_head=2, n_embd=16, fork_layers=(1,))
PRESETS = dict(cpu=(TRAIN + DECODE, 10, 1.6), gpu=(GPU, 10, 1.3),                    # rows, rounds, a token's target
               smoke=([dict(TINY, kind="step"), dict(TINY, kind="token")], 2, 1.6))


@dataclass
class Settings:
    preset: str = knob("cpu", "cpu, gpu: minutes; smoke: seconds", choices=PRESETS)
    results: str = knob(str(ROOT / "experiments" / "results"), "where the rows, their table and its picture go")


class GPT(nn.Module):
    """A plain GPT of a Config's sizes. `counts` says how many positions each block computes: as many as bubbles do."""
    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.n_embd
        linear = lambda n: start(nn.Linear(D, n, bias=False), config)
        self.wte = start(nn.Embedding(config.vocab_size, D), config)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            ln_1=nn.LayerNorm(D, bias=False), qkv=linear(3 * D), proj=linear(D), ln_2=nn.LayerNorm(D, bias=False),
            mlp=MLP(config))) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(D, bias=False)
        d = D // config.n_head
        frequency = 10000.0 ** (torch.arange(0, d, 2) / -d)
        self.register_buffer("frequency", torch.cat((-frequency, frequency)))

    def forward(self, idx, targets=None, counts=None, kv=None, seen=0):
        """idx (B, T) after `seen` tokens; kv: of each block, keys and values (2, B, H, S, d). Loss or logits. seen: a
        number; or a tensor, and attention then covers all S slots behind a mask, so that no shape ever changes."""
        x, T = self.wte(idx), idx.size(1)
        new, mask, ends = slice(seen, seen + T), None, seen + T
        if torch.is_tensor(seen):
            new = seen + torch.arange(T, device=x.device)
            mask, ends = torch.arange(kv[0].size(-2), device=x.device) <= new[:, None], None
        for l, block in enumerate(self.blocks):
            if l == 0 or counts and counts[l] > x.size(1):
                x = torch.cat((x, x), 1)[:, :counts[l]] if counts else x
                angle = (seen + 1 + torch.arange(x.size(1), device=x.device))[:, None] * self.frequency
                cos, sin = angle.cos(), angle.sin()
            qkv = block.qkv(block.ln_1(x)).view(*x.shape[:2], 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
            (q, k), v = qkv[:2] * cos + qkv[:2].roll(qkv.size(-1) // 2, -1) * sin, qkv[2]
            if kv is not None:
                kv[l][:, :, :, new] = torch.stack((k, v)).type_as(kv[l])
                k, v = kv[l][:, :, :, :ends]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=x.size(1) > 1)
            x = x + block.proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        logits = F.linear(self.ln_f(x[:, :T]), self.wte.weight).float()
        return logits.log_softmax(-1) if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def shortest(functions, rounds, device):
    """The shortest time of each function, in seconds, over rounds in turns; the first round warms up."""
    best = [float("inf")] * len(functions)
    for number in range(rounds + 1):
        for i, function in enumerate(functions):
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - began) if number else best[i]
    return best


def print_kernels(function):
    """Where the GPU's time goes."""
    with torch.profiler.profile() as profile:
        function()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=70))


def training_step(row, config, rounds, device):
    """The ratio of a step of bubbles to one of a GPT that computes as many positions in each block."""
    (B, T), counts, gpu = (row.get("batch", 1), row["T"]), [], device.type == "cuda"
    for l in range(config.n_layer):
        N = counts[-1] if l else T
        counts.append(min(2 * N, quota(row["budget"], T)) if l in config.fork_layers else N)
    model, gpt = Tinybubbles(config).to(device), GPT(config).to(device)
    idx = torch.randint(256, (B, T), device=device)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=gpu) for m in (model, gpt)]
    ours, theirs = (torch.compile(m) if gpu else m for m in (model, gpt))

    def step(optimizer, loss):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            value = loss()
        value.backward()
        optimizer.step()
    repeat = range(8 if gpu else 1)
    bubbles, plain = shortest(
        [lambda: [(step(optimizers[0], lambda: ours(idx, idx)[1]), model.update_bars()) for _ in repeat],
         lambda: [step(optimizers[1], lambda: theirs(idx, idx, counts)) for _ in repeat]], rounds, device)
    found = dict(ratio=bubbles / plain)
    if gpu:                                                           # matrix products alone, half of all attention
        D, a = config.n_embd, torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
        flops = 6 * B * (T * D * config.vocab_size + sum(12 * N * D * D + N * N * D for N in counts))
        ceiling = 20 * 8192**3 / shortest([lambda: [a[0] @ a[1] for _ in range(10)]], rounds, device)[0]
        found |= dict(ms=bubbles * 125, gpt_ms=plain * 125, share=flops * 8 / bubbles / ceiling,
                      gpt_share=flops * 8 / plain / ceiling, ceiling=ceiling)
        print_kernels(lambda: step(optimizers[0], lambda: ours(idx, idx)[1]))
    return found


@torch.no_grad()
def cached_token(row, config, rounds, device):
    """The ratio of a token that bubbles read after T others to one that a GPT reads; and to reading all T anew."""
    B, T, H, gpu = row.get("batch", 1), row["T"], config.n_head, device.type == "cuda"
    model, gpt = Tinybubbles(config).to(device).eval(), GPT(config).to(device).eval()
    idx, cache = torch.randint(256, (B, config.block_size), device=device), Cache()
    measure_bars(model, [idx[:, :256]], [config.budget])
    for part in idx[:, :T].split(256, 1):
        model(part, cache=cache)
    kv = [torch.randn(2, B, H, config.block_size, config.n_embd // H, device=device,
                      dtype=torch.bfloat16 if gpu else None) for _ in range(config.n_layer)]
    graph = lambda f: torch.compile(f, fullgraph=True, mode="reduce-overhead") if gpu else f
    ours, theirs, at = graph(model.read), graph(gpt), torch.tensor(T, device=device) if gpu else T
    for block in kv:
        torch._dynamo.mark_static_address(block)

    def eight_of_ours():
        for _ in range(8):
            ours(idx[:, :1], None, model.check(idx[:, :1], config.budget, cache), cache, None)

    def eight_of_gpt():
        nonlocal at
        for _ in range(8):
            theirs(idx[:, :1], kv=kv, seen=at)
            at = at + 1
    bubbles, plain = shortest([eight_of_ours, eight_of_gpt], rounds, device)
    if gpu:
        print_kernels(eight_of_ours)
        return dict(ratio=bubbles / plain, ms=bubbles * 125, gpt_ms=plain * 125)
    anew, = shortest([lambda: model(idx[:, :T])], 2, device)
    with Operations() as mine:
        model(idx[:, :1], cache=cache)
    with Operations() as rival:
        gpt(idx[:, :1], kv=kv, seen=T)
    return dict(ratio=bubbles / plain, anew=anew / (bubbles / 8), operations=mine.count, gpt_operations=rival.count)


def write_table(path, rows, about):
    """rows as a Markdown table; in brackets the GPT's."""
    lines = ["| | blocks, width | T | batch | r | times the GPT's | ms | share of the ceiling | operations | faster "
             "than reading anew |", "|" + "---|" * 10]
    for row in rows:
        both = lambda name, form: f"{row[name]:{form}} ({row['gpt_' + name]:{form}})" if name in row else ""
        cells = (row["kind"], f"{row['n_layer']}, {row['n_embd']}", row["T"], row.get("batch", 1), f"{row['budget']:g}",
                 f"{row['ratio']:.2f}", both("ms", ".3f"), both("share", ".0%"), both("operations", "d"),
                 f"{row['anew']:.0f}" if "anew" in row else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    path.write_text("\n".join([*lines, "", about]) + "\n")


def draw(path, rows, target, about):
    """The ratios against T of a training step and of a cached token, a line for each budget, width or batch."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
    panels = ("step", "a training step at as many positions", 1.05), ("token", "a cached token", target)
    names = dict(budget="r = {:g}", n_embd="width {}", batch="batch {}")
    for axes, (kind, title, target) in zip(figure.subplots(1, 2), panels):
        own = [row for row in rows if row["kind"] == kind]
        by = next((name for name in names if len({row.get(name) for row in own}) > 1), "n_embd")
        for value, color in zip(sorted({row[by] for row in own}), ("#0072b2", "#d55e00", "#009e73")):
            line = [(row["T"], row["ratio"]) for row in own if row[by] == value]
            axes.plot(*zip(*line), "o-", color=color, label=names[by].format(value))
        axes.axhline(1, color="black", linewidth=1)
        axes.axhline(target, color="black", linewidth=1, linestyle=":", label=f"target, {target}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        top = max([target, *(row["ratio"] for row in own)])
        axes.set(title=title, xlabel="T, tokens", ylabel="times a GPT's", ylim=(0, 1.1 * top))
        axes.legend(framealpha=1, edgecolor="none")
    figure.supxlabel(about[about.index("on "):-1], fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    (plan, rounds, target), gpu = PRESETS[s.preset], s.preset == "gpu"
    path = Path(s.results) / f"bench{'' if s.preset == 'cpu' else '-' + s.preset}.json"
    make_folder(path.parent, "--results")
    rows = json.loads(path.read_text()) if path.exists() else []
    for row in json.loads(json.dumps(plan)):
        if not any(row.items() <= done.items() for done in rows):
            device = choose_device("cuda" if gpu else "cpu")
            kind = f"{torch.cuda.get_device_name()}, bfloat16, compiled" if gpu else (
                f"{platform.machine()}, {torch.get_num_threads()} threads, float32, batch 1, not compiled")
            row["machine"] = f"{kind}, PyTorch {torch.__version__}, Python {platform.python_version()}"
            torch.manual_seed(0)
            torch._dynamo.reset()                                     # else shapes that change are compiled as unknown
            room = row["T"] + (8 * rounds + 16) * (row["kind"] == "token")
            config = Config(block_size=room, **{name: row[name] for name in ("n_layer", "n_head", "n_embd", "budget")},
                            fork_layers=tuple(row["fork_layers"]))
            half = torch.autocast(device.type, torch.bfloat16, enabled=gpu)
            measure = training_step if row["kind"] == "step" else half(cached_token)
            rows.append(row | measure(row, config, rounds, device))
            write_atomically(path, lambda file: file.write(json.dumps(rows, indent=1).encode()))
            print(rows[-1], flush=True)
    machines = " and on ".join(sorted({row["machine"] for row in rows}))
    about = f"Ratios of the shortest times of {rounds} rounds in turns, on {machines}."
    write_table(path.with_suffix(".md"), rows, about)
    draw(path.with_suffix(".png"), rows, target, about)


if __name__ == "__main__":
    main(sys.argv[1:])
