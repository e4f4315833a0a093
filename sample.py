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
    vocabulary is taken; if all of them end in spaces, any white space may stand between words."""
    if vocabulary is None:
        return list(prompt)
    try:
        text = prompt.decode()
        spaced = bool(vocabulary) and all(word.endswith(" ") for word in vocabulary)
        text = "".join(word + " " for word in text.split()) if spaced else text
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


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip())
    device = choose_device(s.device)
    checkpoint, model = load_checkpoint(choose_checkpoint(s), device)
    vocabulary = checkpoint["vocabulary"]
    prompt = encode(read_prompt(s.prompt, vocabulary), vocabulary, model.config.vocab_size)
    idx = torch.tensor([prompt], device=device)
    model.eval()
    sys.stdout.reconfigure(errors="replace")
    started, n_tokens, n_streams = time.perf_counter(), 0, 0
    for seed in range(s.seed, s.seed + s.num_samples):
        streams, text = [], decoder(vocabulary)
        print("".join(map(text, prompt)), end="", flush=True)
        generator = torch.Generator(device).manual_seed(seed)
        for token in model.generate_steps(idx, s.max_new_tokens, temperature=s.temperature, top_k=s.top_k,
                                          budget=s.budget, generator=generator, streams=streams, compile=s.compile):
            print(text(token.item()), end="", flush=True)
            tok, _ = streams[-1]                                      # (1, N) of the last block: those that merge
            tok = tok[tok >= 0]
            n_tokens, n_streams = n_tokens + (tok[-1] - tok[0] + 1).item(), n_streams + tok.numel()
            streams.clear()
        print(text(None) + "\n" + "-" * 80, flush=True)
    made, seconds = s.num_samples * s.max_new_tokens, time.perf_counter() - started
    print(f"{made} tokens, {made / seconds:.0f} tokens/s, {n_streams / max(1, n_tokens):.2f} streams per token "
          f"at budget {s.budget or model.config.budget:g}, on {device}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130)
    except BrokenPipeError:                                           # the reader of a pipe has left: end quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
