"""
How fast, against the limit: python experiments/bench.py --preset cpu        (or smoke, gpu)

Ratios measured in one run, the rivals taking turns: training against a plain GPT that computes as many positions in
each block as bubbles have streams; decoding against the same GPT with a preallocated cache, and against reading the
sequence anew for every token; the probability merge against the residual one. Prints a table, writes JSON.
"""
import json
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tinybubbles import MLP, Cache, Config, Tinybubbles, quota, rotate  # noqa: E402
from train import choose_device, knob, make_optimizer, read_flags, refuse  # noqa: E402
from train import Settings as TrainSettings  # noqa: E402

PRESETS = {   # model; batch and lengths to train; batches and contexts to decode; words for the merge; rounds
    "smoke": (dict(n_layer=2, n_head=2, n_embd=32, fork_layers=(0, 1)), 1, (32,), (1,), (32,), 300, 2),
    "cpu": (dict(n_layer=6, n_head=6, n_embd=384, fork_layers=(1, 2)), 1, (128, 256, 512, 1024), (1,),
            (256, 1024, 4096), 50304, 5),
    "gpu": (dict(n_layer=12, n_head=12, n_embd=768, fork_layers=(3, 7)), 16, (128, 256, 512, 1024), (1, 64),
            (256, 1024, 4096), 50304, 10),
}


# -- the rival: a plain GPT, which may compute more positions than there are tokens -----------------------------------

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rotation, kv, start):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if kv is not None:
            kv[:, :, :, start:start + N] = torch.stack((k, v))
            k, v = kv[:, :, :, :start + N]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0 and N > 1)
        return self.proj(y.transpose(1, 2).reshape(B, N, D))


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


# -- measuring --------------------------------------------------------------------------------------------------------

def compare(functions, rounds, device):
    """Run the functions in turn, `rounds` times after a warm-up; the median seconds of each, and the median over rounds
    of each one's time as a multiple of the last one's."""
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
    columns = list(zip(*seconds))
    ratios = [statistics.median(row[i] / row[-1] for row in seconds) for i in range(len(functions))]
    return [statistics.median(column) for column in columns], ratios


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def saved_bytes(function):
    """Bytes that the function's forward keeps for the backward, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)                                           # alive, so that no storage takes its place
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def counts_of(model, T, budget):
    """The streams of each block for T tokens."""
    counts, N = [], T
    for l in range(model.config.n_layer):
        N = min(2 * N, quota(budget, T)) if l in model.config.fork_layers else N
        counts.append(N)
    return counts


def flops(config, counts, T):
    """Multiply-adds counted twice, for a forward pass of one row: the matmuls of each block and the head's."""
    D, V = config.n_embd, config.vocab_size
    return sum(24 * N * D * D + 4 * N * N * D for N in counts) + 2 * T * D * V


def train_rows(model, gpt, B, lengths, rounds, device, half):
    """Forward, backward and update: bubbles against the GPT of as many positions."""
    for T in lengths:
        for budget in (2.0, 4.0):
            idx = torch.randint(256, (B, T), device=device)
            counts, steps = counts_of(model, T, budget), []
            for net, call in ((model, lambda: model(idx, idx, budget=budget)[1]), (gpt, lambda: gpt(idx, idx, counts))):
                optimizer = make_optimizer(net, TrainSettings(), device)

                def step(call=call, optimizer=optimizer):
                    with torch.autocast(device.type, torch.bfloat16, enabled=half):
                        loss = call()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                steps.append((step, call))
            seconds, ratios = compare([step for step, _ in steps], rounds, device)
            memory = [saved_bytes(call) for _, call in steps]
            yield dict(what="training step", T=T, B=B, budget=budget, rival="GPT of as many positions",
                       ratio=ratios[0], target=1.05 if device.type == "cuda" else 1.10, seconds=seconds[0],
                       memory_ratio=memory[0] / memory[1], memory_target=1.15,
                       flops_per_second=3 * B * flops(model.config, counts, T) / seconds[0])


@torch.no_grad()
def decode_rows(model, gpt, batches, contexts, rounds, device, tokens=16):
    """One token with `context` tokens in the cache: bubbles at r = 2 against the GPT, and against no cache at all."""
    c = model.config
    for B in batches:
        for context in contexts:
            idx = torch.randint(256, (B, context), device=device)
            one, cache = idx[:, :1], Cache()
            model(idx[:, :context - tokens * (rounds + 1)], budget=2.0, cache=cache)
            kv = torch.empty(c.n_layer, 2, B, c.n_head, context, c.n_embd // c.n_head, device=device)
            gpt(idx[:, :context - 1], kv=kv)

            def bubbles():
                for _ in range(tokens):
                    model(one, budget=2.0, cache=cache)

            def plain():
                for _ in range(tokens):
                    gpt(one, kv=kv, start=context - 1)
            seconds, ratios = compare([bubbles, plain], rounds, device)
            streams = sum(k.size(2) for k, _ in cache.kv.values())
            held = sum(t.untyped_storage().nbytes() for pair in cache.kv.values() for t in pair)
            row = dict(what="decoding a token", context=context, B=B, budget=2.0, rival="GPT with a cache",
                       ratio=ratios[0], target=1.3 if device.type == "cuda" else 1.6, seconds=seconds[0] / tokens,
                       memory_ratio=held / (streams * B * 2 * c.n_embd * 4), memory_target=1.05)
            if context == 1024:
                anew, _ = compare([lambda: model(idx, budget=2.0)], 2, device)
                row.update(faster_than_recomputing=anew[0] / row["seconds"], faster_target=20)
            yield row


def merge_rows(config, words, T, rounds, device):
    """A training step's loss and backward with many words: the probability merge against the residual one."""
    nets = [Tinybubbles(Config(**config | dict(vocab_size=words, merge=merge, block_size=T))).to(device)
            for merge in ("probability", "residual")]
    idx = torch.randint(words, (1, T), device=device)
    calls = [lambda net=net: net(idx, idx, budget=2.0)[1] for net in nets]
    seconds, ratios = compare([lambda call=call: call().backward() for call in calls], rounds, device)
    memory = [saved_bytes(call) for call in calls]
    N, c = quota(2.0, T), nets[0].config
    base = 3 * flops(c, counts_of(nets[0], T, 2.0), T)
    extra = (base + 3 * 2 * (N - T) * c.n_embd * words) / base        # the head's own work for N streams, not T tokens
    yield dict(what="probability merge", T=T, B=1, budget=2.0, rival="residual merge", ratio=ratios[0],
               target=1.25 * extra, seconds=seconds[0], memory_ratio=memory[0] / memory[1], memory_target=1.25)


def table(rows):
    lines = ["| what | against | B | tokens | r | time, times the rival's | target | memory | target |", "|---" * 9 + "|"]
    for row in rows:
        lines.append(f"| {row['what']} | {row['rival']} | {row['B']} | {row.get('T', row.get('context'))} | "
                     f"{row['budget']:g} | {row['ratio']:.2f} | {row['target']:.2f} | {row['memory_ratio']:.2f} | "
                     f"{row['memory_target']:.2f} |")
        if "faster_than_recomputing" in row:
            lines.append(f"| {row['what']} | reading all anew | {row['B']} | {row['context']} | {row['budget']:g} | "
                         f"1 / {row['faster_than_recomputing']:.0f} | 1 / {row['faster_target']} | | |")
    return "\n".join(lines) + "\n"


@dataclass
class Settings:
    preset: str = knob("cpu", ", ".join(PRESETS))
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    out: str = knob("bench.json", "where the JSON goes")


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    if s.preset not in PRESETS:
        refuse(f"--preset must be one of {', '.join(PRESETS)}, not {s.preset!r}")
    config, B, lengths, batches, contexts, words, rounds = PRESETS[s.preset]
    device, rows = choose_device(s.device), []
    torch.manual_seed(0)
    config = dict(config, block_size=2 * max(contexts))
    model, gpt = Tinybubbles(Config(**config)).to(device), GPT(Config(**config)).to(device)
    half = device.type == "cuda"
    for part in (train_rows(model, gpt, B, lengths, rounds, device, half),
                 decode_rows(model.eval(), gpt, batches, contexts, rounds, device),
                 merge_rows(config, words, max(lengths) // 2, rounds, device)):
        for row in part:
            rows.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    machine = dict(device=name, cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__)
    Path(s.out).write_text(json.dumps(dict(preset=s.preset, model=config, machine=machine, rows=rows), indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
