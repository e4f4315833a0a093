"""
How fast, beside a plain GPT: python experiments/bench.py        (--preset smoke: seconds, at a size that shows nothing)

A training step against a GPT of as many positions per block, and a cached token against a GPT with a preallocated
cache, not compiled. Both take turns in one run; a row holds the ratio of the shortest times, and the operations that
PyTorch dispatches for a token. Rows go to bench.json as they are measured, and one that is there is not measured again.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tinybubbles import MLP, Cache, Config, Tinybubbles, quota, start  # noqa: E402
from tools.files import write_atomically  # noqa: E402
from tools.program import choose_device, knob, read_flags  # noqa: E402
from train import measure_bars  # noqa: E402

TRAIN = [dict(kind="step", T=T, budget=r, n_layer=6, n_head=4, n_embd=256, fork_layers=(1, 2))
         for T in (128, 256, 512, 1024) for r in (2.0, 4.0)]
DECODE = [dict(kind="token", T=T, budget=2.0, n_layer=L, n_head=H, n_embd=D, fork_layers=forks)
          for L, H, D, forks in ((6, 4, 128, (1, 2)), (6, 4, 256, (1, 2)), (12, 12, 768, (3, 7))) for T in (256, 1024)]
TINY = dict(T=16, budget=2.0, n_layer=2, n_head=2, n_embd=16, fork_layers=(1,))
PRESETS = dict(cpu=(TRAIN + DECODE, 10), smoke=([dict(TINY, kind="step"), dict(TINY, kind="token")], 2))


@dataclass
class Settings:
    preset: str = knob("cpu", "cpu: a quarter of an hour; smoke: seconds", choices=PRESETS)
    results: str = knob("experiments/results", "where bench.json and bench.md go")
    device: str = knob("cpu", "cpu, or another device")


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
        """idx (B, T) after `seen` tokens; kv: for each block keys and values (2, B, H, S, d). Loss or logits."""
        x, T = self.wte(idx), idx.size(1)
        for l, block in enumerate(self.blocks):
            if l == 0 or counts and counts[l] > x.size(1):
                x = torch.cat((x, x), 1)[:, :counts[l]] if counts else x
                angle = torch.arange(seen + 1, seen + 1 + x.size(1), device=x.device)[:, None] * self.frequency
                cos, sin = angle.cos(), angle.sin()
            qkv = block.qkv(block.ln_1(x)).view(*x.shape[:2], 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
            (q, k), v = qkv[:2] * cos + qkv[:2].roll(qkv.size(-1) // 2, -1) * sin, qkv[2]
            if kv is not None:
                kv[l][:, :, :, seen:seen + T] = torch.stack((k, v))
                k, v = kv[l][:, :, :, :seen + T]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=x.size(1) > 1)
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


def training_step(row, config, rounds, device):
    """The ratio of a step of bubbles to one of a GPT that computes as many positions in each block."""
    counts, N = [], row["T"]
    for l in range(config.n_layer):
        N = min(2 * N, quota(row["budget"], row["T"])) if l in config.fork_layers else N
        counts.append(N)
    model, gpt = Tinybubbles(config).to(device), GPT(config).to(device)
    idx = torch.randint(256, (1, row["T"]), device=device)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (model, gpt)]

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    bubbles, plain = shortest([lambda: (step(optimizers[0], lambda: model(idx, idx)[1]), model.update_bars()),
                               lambda: step(optimizers[1], lambda: gpt(idx, idx, counts))], rounds, device)
    return dict(ratio=bubbles / plain)


@torch.no_grad()
def cached_token(row, config, rounds, device):
    """The ratio of a token that bubbles read after T others to one that a GPT reads; and to reading all T anew."""
    model, gpt = Tinybubbles(config).to(device).eval(), GPT(config).to(device).eval()
    idx = torch.randint(256, (1, config.block_size), device=device)
    measure_bars(model, [idx[:, :256]], [config.budget])
    cache, T, H = Cache(), row["T"], config.n_head
    kv = torch.empty(config.n_layer, 2, 1, H, config.block_size, config.n_embd // H, device=device)
    model(idx[:, :T], cache=cache)
    gpt(idx[:, :T], kv=kv)
    at = itertools.count(T)                                           # where the GPT's next token stands
    eight_of_gpt = lambda: [gpt(idx[:, t:t + 1], kv=kv, seen=t) for t in itertools.islice(at, 8)]
    eight_of_ours = lambda: [model(idx[:, :1], cache=cache) for _ in range(8)]
    bubbles, plain = shortest([eight_of_ours, eight_of_gpt], rounds, device)
    anew, = shortest([lambda: model(idx[:, :T])], 2, device)
    with Operations() as ours:
        model(idx[:, :1], cache=cache)
    with Operations() as theirs:
        gpt(idx[:, :1], kv=kv, seen=T)
    return dict(ratio=bubbles / plain, anew=anew / (bubbles / 8), operations=ours.count, gpt_operations=theirs.count)


def write_table(path, rows, about):
    """rows as a Markdown table."""
    lines = ["| | blocks, width | T | r | times the GPT's | operations (GPT's) | faster than reading anew |",
             "|" + "---|" * 7]
    for row in rows:
        token = row["kind"] == "token"
        lines.append(f"| {row['kind']} | {row['n_layer']}, {row['n_embd']} | {row['T']} | {row['budget']:g} | "
                     f"{row['ratio']:.2f} | " + (f"{row['operations']} ({row['gpt_operations']}) | {row['anew']:.0f} |"
                                                 if token else "| |"))
    path.write_text("\n".join([*lines, "", about]) + "\n")


def draw(path, rows, about):
    """The ratios against T: of a training step, a line for each budget; of a cached token, one for each width."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
    panels = (("step", "budget", "a training step", 1.05), ("token", "n_embd", "a cached token", 1.6))
    for axes, (kind, by, title, target) in zip(figure.subplots(1, 2), panels):
        own = [row for row in rows if row["kind"] == kind]
        for value, color in zip(sorted({row[by] for row in own}), ("#0072b2", "#d55e00", "#009e73")):
            line = [(row["T"], row["ratio"]) for row in own if row[by] == value]
            axes.plot(*zip(*line), "o-", color=color, label=f"r = {value:g}" if by == "budget" else f"width {value}")
        axes.axhline(1, color="black", linewidth=1)
        axes.axhline(target, color="black", linewidth=1, linestyle=":", label=f"target, {target}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        top = max([target, *(row["ratio"] for row in own)])
        axes.set(title=title, xlabel="T, tokens", ylabel="times a GPT's", ylim=(0, 1.1 * top))
        axes.legend(frameon=False)
    figure.supxlabel(about[:about.index(",")], fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    device, (plan, rounds), path = choose_device(s.device), PRESETS[s.preset], Path(s.results) / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.exists() else []
    about = (f"Ratios of the shortest times of {rounds} rounds in turns, batch 1, float32, on {device} "
             f"({platform.machine()}, {torch.get_num_threads()} threads), PyTorch {torch.__version__}, Python "
             f"{platform.python_version()}.")
    for row in json.loads(json.dumps(plan)):
        if not any(row.items() <= done.items() for done in rows):
            torch.manual_seed(0)
            room = row["T"] + (8 * rounds + 16) * (row["kind"] == "token")
            config = Config(block_size=room, **{name: row[name] for name in ("n_layer", "n_head", "n_embd", "budget")},
                            fork_layers=tuple(row["fork_layers"]))
            measure = training_step if row["kind"] == "step" else cached_token
            rows.append(row | measure(row, config, rounds, device))
            write_atomically(path, lambda file: file.write(json.dumps(rows, indent=1).encode()))
            print(rows[-1], flush=True)
    write_table(path.with_suffix(".md"), rows, about)
    draw(path.with_suffix(".png"), rows, about)


if __name__ == "__main__":
    main(sys.argv[1:])
