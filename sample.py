"""
Generate text from a trained model: python sample.py --budget 2.0        (every knob: python sample.py --help)
"""
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tasks.text import decoder, encode
from tools.files import best_or_last, load_checkpoint
from tools.pictures import legend, plot, read_bubbles, shade
from tools.program import choose_device, knob, read_flags, refuse, run_program


@dataclass
class Settings:
    out_dir: str = knob("out", "the folder of a run of train.py")
    checkpoint: str = knob("best", "best: best.pt, of the lowest validation loss, if it is there; last: ckpt.pt",
                           choices=("best", "last"))
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


def read_prompt(prompt, vocabulary):
    """The prompt's bytes, or a refusal."""
    if prompt is None:
        has_newline = vocabulary is None or "\n" in vocabulary
        return b"\n" if has_newline else next(filter(None, vocabulary), "0").encode()
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


def write_sample(model, prompt, vocabulary, s, seed):
    """Print one sample as it is made; with --show_bubbles once it is made, as its last streams are known only then.
    Returns the text's tokens, and how many streams each has in the last block."""
    device, text = model.wte.weight.device, decoder(vocabulary)

    def write(token):
        if not s.show_bubbles:
            print(text(token), end="", flush=True)
    for token in prompt:
        write(token)
    idx = model.generate(torch.tensor([prompt], device=device), s.max_new_tokens, temperature=s.temperature,
                         top_k=s.top_k, budget=s.budget, generator=torch.Generator(device).manual_seed(seed),
                         show=lambda token: write(token.item()), compile=s.compile)
    tokens, counts = idx[0].tolist(), read_bubbles(model, idx, s.budget)[0, -1].tolist()
    if s.show_bubbles:
        print("".join(shade(text(token), n) for token, n in zip(tokens, counts)), end="")
    end = text(None) + "\n" + (legend(counts) + "\n" if s.show_bubbles else "")      # None: what `text` held back
    print(end + "-" * 80, flush=True)
    return tokens, counts


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip())
    picture = None if s.plot is None else Path(s.plot)
    if picture and not (picture.suffix in (".png", ".pdf", ".svg") and os.access(picture.parent, os.W_OK)
                        and not os.path.isdir(picture)):
        refuse(f"--plot must be a .png, .pdf or .svg in a folder that can be written to, not {s.plot!r}")
    path = best_or_last(s.out_dir) if s.checkpoint == "best" else Path(s.out_dir) / "ckpt.pt"
    checkpoint, model = load_checkpoint(path, choose_device(s.device))
    vocabulary = checkpoint["vocabulary"]
    prompt = encode(read_prompt(s.prompt, vocabulary), vocabulary, model.config.vocab_size)
    model.eval()
    started = time.perf_counter()
    samples = [write_sample(model, prompt, vocabulary, s, seed) for seed in range(s.seed, s.seed + s.num_samples)]
    made, seconds = s.num_samples * s.max_new_tokens, time.perf_counter() - started
    streams = [n for _, counts in samples for n in counts]
    print(f"{made} tokens, {made / seconds:.0f} tokens/s, {sum(streams) / len(streams):.2f} streams per token "
          f"at budget {s.budget or model.config.budget:g}, on {model.wte.weight.device}")
    if s.plot:
        text, tokens = decoder(vocabulary), samples[0][0]
        words = [text(token) + text(None) for token in tokens]                       # each token for itself
        plot(s.plot, model, tokens, words, s.budget)


if __name__ == "__main__":
    run_program(main, "stopped")
