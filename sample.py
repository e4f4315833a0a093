"""
Generate text from a trained model: python sample.py --budget 2.0        (every knob: python sample.py --help)
"""
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from train import choose_device, decoder, knob, load_checkpoint, read_flags, refuse

SHADES = "", "30;48;5;189", "30;48;5;111", "97;48;5;26", "97;48;5;17"     # a terminal's: 1, 2, 3, 4, 5 or more streams
ROW, MOST = 72, 720                                                        # tokens in a row of the picture, and in all


@dataclass
class Settings:
    out_dir: str = knob("out", "the folder of a run of train.py")
    checkpoint: str = knob("best", "best: best.pt, of the lowest validation loss, if it is there; or last: ckpt.pt")
    prompt: str = knob(None, "text to continue, or FILE:path for a file's bytes; default: a new line, if the model has "
                       "one, else its token 0", "str", alias="start")
    num_samples: int = knob(1, "samples to draw", low=1)
    max_new_tokens: int = knob(500, "tokens (bytes) to add in each", low=0)
    temperature: float = knob(0.8, "below 1: safer, above 1: wilder; 0 = always the likeliest token", low=0)
    top_k: int = knob(0, "sample among the k likeliest tokens; 0 = all", low=0)
    budget: float = knob(None, "streams per token, 1 or more; default: as trained", "float", low=1)
    seed: int = knob(0, "the first sample's; the next ones count up from it", low=0)
    show_bubbles: bool = knob(False, "shade characters by their streams in the last block (colour on a terminal only)")
    plot: str = knob(None, "draw the first sample's streams as this .png, .pdf or .svg; default: no picture", "str")
    compile: bool = knob(False, "torch.compile the step that reads one token: slow to start, faster then")
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")


def choose_checkpoint(s):
    """The path of the checkpoint to sample from, or a refusal."""
    if s.checkpoint not in ("best", "last"):
        refuse(f"--checkpoint must be best or last, not {s.checkpoint!r}")
    best, last = Path(s.out_dir) / "best.pt", Path(s.out_dir) / "ckpt.pt"
    return best if s.checkpoint == "best" and best.exists() else last


def read_prompt(prompt, vocabulary):
    """The prompt's bytes, or a refusal."""
    if prompt is None:
        return b"\n" if vocabulary is None or "\n" in vocabulary else (vocabulary or "0")[0].encode()
    if prompt.startswith("FILE:"):
        try:
            data = Path(prompt[5:]).read_bytes()
        except OSError as error:
            refuse(f"--prompt cannot read {prompt[5:]!r} ({error.strerror}); name a readable file after FILE:")
    else:
        data = prompt.encode(errors="surrogateescape")                # bytes that are not UTF-8 arrive so
    if not data:
        refuse("--prompt is empty; give at least one byte to continue")
    return data


def encode(prompt, vocabulary, vocab_size):
    """The tokens of the prompt's bytes, a list (see `decoder`), or a refusal. At each place the longest string of the
    vocabulary is taken. If all end in spaces, words may stand any white space apart, and . and ? right behind one."""
    if vocabulary is None:
        return list(prompt)
    try:
        text = prompt.decode()
        spaced = bool(vocabulary) and all(word.endswith(" ") for word in vocabulary)
        text = " ".join(re.sub(r"[.?]", r" \g<0>", text).split() + [""]) if spaced else text
        number = {word: token for token, word in enumerate(vocabulary)}
        longest_first = map(re.escape, sorted(filter(None, number), key=len, reverse=True))
        pattern = "|".join([*longest_first, r"\S+" if spaced else "."])            # last: what no string matches
        parts = re.findall(pattern, text, re.DOTALL) if vocabulary else text.split()
        tokens = [number[part] if vocabulary else int(part) for part in parts]
    except UnicodeDecodeError:
        refuse("--prompt is not UTF-8, which this model's vocabulary needs; save it as UTF-8")
    except KeyError as error:
        refuse(f"--prompt holds {error.args[0]!r}, which is not in this model's vocabulary; leave it out")
    except ValueError:
        tokens = []
    if not tokens or not all(0 <= token < vocab_size for token in tokens):
        refuse(f"--prompt must be token numbers from 0 to {vocab_size - 1}, as \"17 4\": this model's text has no "
               f"meta.pkl; not {prompt.decode(errors='replace')[:40]!r}")
    return tokens


# -- seeing bubbles ---------------------------------------------------------------------------------------------------

def count_streams(streams):
    """The streams that each token of one row owns in each block, (L, T), from what a forward pass reported."""
    first = streams[0][0][0, 0]
    return torch.stack([torch.bincount(tok[tok >= 0] - first) for tok, _ in streams]).cpu()


@torch.no_grad()
def read_bubbles(model, idx, budget):
    """The streams that each token of idx (1, T) owns in each block, and those of its own that were deleted just before
    it: (2, L, T). Where a context ends, its last half is read again, as `generate` does."""
    def look(fork, read, out):
        (x, tok), (x_out, tok_out) = read[:2], out[:2]                # what is kept is kept to the bit: 8 channels tell
        same = (x[:, :, None, :8] == x_out[:, None, :, :8]).all(-1)   # (1, N, N after)
        kept = (same & (tok.unsqueeze(2) == tok_out.unsqueeze(1))).any(-1)
        deleted[fork.layer] = torch.bincount(tok[(tok >= 0) & ~kept], minlength=deleted.size(1)).cpu()

    size, done, parts = model.config.block_size, 0, []
    hooks = [fork.register_forward_hook(look) for fork in model.forks.values()]
    while done < idx.size(1):
        start, streams = max(0, done - size // 2), []
        tokens = idx[:, start:start + size]
        deleted = torch.zeros(model.config.n_layer, tokens.size(1), dtype=torch.long)
        model(tokens, budget=budget, routing="causal", streams=streams)
        parts.append(torch.stack((count_streams(streams), deleted))[:, :, done - start:])
        done = start + size
    for hook in hooks:
        hook.remove()
    return torch.cat(parts, dim=2)


def shade(text, n):
    """The text, on a terminal that wants colours in the shade of n streams."""
    code = SHADES[min(n, len(SHADES)) - 1]
    if not (code and sys.stdout.isatty()) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return "\n".join(f"\33[{code}m{line}\33[0m" if line else "" for line in text.split("\n"))


def legend(counts):
    """What each shade means, and the share of the tokens that have it, given their streams, a list."""
    top = len(SHADES)
    share = torch.bincount(torch.tensor(counts).clamp(max=top), minlength=top + 1) / len(counts)
    return "streams: " + "  ".join(shade(f" {n}{' or more' * (n == top)} ", n) + f" {share[n]:.0%}"
                                   for n in range(1, top + 1) if share[n])


def draw_bubbles(counts, deleted, words, path, title):
    """Draw the streams and the deletions (L, T) of a text, whose T tokens are `words`, as a picture."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    (L, T), top = counts.shape, max(2, int(counts.max()))
    rows, below = -(-T // ROW), 0.35 + 0.08 * max(map(len, words))                   # inches
    height = 0.9 + rows * (0.2 * L + below)
    colors = ListedColormap(colormaps["Blues"](torch.linspace(0.1, 0.9, top).numpy()))
    figure = Figure((13, height), facecolor="white")
    for row in range(rows):
        bottom = height - 0.8 - (row + 1) * 0.2 * L - row * below
        axes = figure.add_axes((0.04, bottom / height, 0.95, 0.2 * L / height))
        at = slice(row * ROW, (row + 1) * ROW)
        axes.imshow(counts[:, at].numpy(), cmap=colors, vmin=1, vmax=top, aspect="auto", origin="lower")
        y, x = deleted[:, at].numpy().nonzero()
        cross, = axes.plot(x, y - 0.5, "x", color="#d62728", markersize=6, markeredgewidth=2, clip_on=False)
        axes.set(xlim=(-0.5, min(T, ROW) - 0.5), ylabel="block", yticks=range(0, L, max(1, L // 4)))
        axes.set_xticks(range(len(words[at])), words[at], family="monospace", rotation=90 * (max(map(len, words)) > 2))
        axes.tick_params(axis="x", length=0)
    boxes = [Rectangle((0, 0), 1, 1, color=colors(n)) for n in range(top)]
    names = [f"{n} stream{'s' * (n > 1)}" for n in range(1, top + 1)]
    figure.legend(boxes + [cross], names + ["deleted just before this block"], ncols=top + 1, frameon=False,
                  loc="upper center", bbox_to_anchor=(0.5, 1 - 0.3 / height))
    figure.suptitle(title, y=1 - 0.1 / height, va="top")
    figure.savefig(path, dpi=110)


def plot(path, model, tokens, vocabulary, budget):
    """Draw the bubbles of the first MOST of a text's tokens, a list."""
    idx = torch.tensor([tokens[:MOST]], device=model.wte.weight.device)
    marks = {"\n": "\u21b5", "\t": "\u21e5", "$": r"\$"}
    words = [(lambda text: text(token) + text(None))(decoder(vocabulary)) for token in tokens[:MOST]]
    words = [marks.get(word, word.strip()) if word.isprintable() or word in marks else "\ufffd" for word in words]
    counts, deleted = read_bubbles(model, idx, budget)
    title = (f"Streams of each token in each block at a budget of {budget or model.config.budget:g}, "
             f"{counts[-1].float().mean():.2f} in the last block")
    draw_bubbles(counts, deleted, words, path, title + f" (the first {MOST} tokens)" * (len(tokens) > MOST))
    print(path)


# -- sampling ---------------------------------------------------------------------------------------------------------

def write_sample(model, prompt, vocabulary, s, seed):
    """Print one sample as it is made. A token's streams are known when it is read, one step after it was drawn, so the
    last step's own is not used. Returns the text's tokens, and the streams of all tokens read in the last block."""
    device, text, tokens, read, streams = model.wte.weight.device, decoder(vocabulary), list(prompt), [], []
    idx = torch.tensor([prompt], device=device)
    shades = read_bubbles(model, idx, s.budget)[0, -1].tolist() if s.show_bubbles else [1] * len(prompt)
    print("".join(map(shade, map(text, prompt), shades)), end="", flush=True)
    steps = model.generate_steps(idx, s.max_new_tokens + 1, temperature=s.temperature, top_k=s.top_k, budget=s.budget,
                                 generator=torch.Generator(device).manual_seed(seed), streams=streams,
                                 compile=s.compile)
    for i, token in enumerate(steps):
        read.append(count_streams(streams)[-1])
        streams.clear()
        if i:
            n = int(read[-1][-1])
            shades.append(n)
            print(shade(text(tokens[-1]), n if s.show_bubbles else 1), end="", flush=True)
        tokens.append(token.item())
    print(text(None) + "\n" + (legend(shades) + "\n") * s.show_bubbles + "-" * 80, flush=True)
    return tokens[:-1], torch.cat(read)


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip())
    if s.plot and not (Path(s.plot).suffix in (".png", ".pdf", ".svg") and Path(s.plot).parent.is_dir()):
        refuse(f"--plot must be a .png, .pdf or .svg in a folder that is there, not {s.plot!r}")
    checkpoint, model = load_checkpoint(choose_checkpoint(s), choose_device(s.device))
    vocabulary = checkpoint["vocabulary"]
    prompt = encode(read_prompt(s.prompt, vocabulary), vocabulary, model.config.vocab_size)
    model.eval()
    sys.stdout.reconfigure(errors="replace")
    started = time.perf_counter()
    samples = [write_sample(model, prompt, vocabulary, s, seed) for seed in range(s.seed, s.seed + s.num_samples)]
    made, seconds = s.num_samples * s.max_new_tokens, time.perf_counter() - started
    streams = torch.cat([read for _, read in samples]).float().mean()
    print(f"{made} tokens, {made / seconds:.0f} tokens/s, {streams:.2f} streams per token "
          f"at budget {s.budget or model.config.budget:g}, on {model.wte.weight.device}")
    if s.plot:
        plot(s.plot, model, samples[0][0], vocabulary, s.budget)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130)
    except BrokenPipeError:                                           # the reader of a pipe has left: end quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
