"""
Generate text from a trained model: python sample.py --budget 2.0        (every knob: python sample.py --help)
"""
import codecs
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from tinybubbles import Config, Tinybubbles
from train import choose_device, knob, read_flags, refuse


@dataclass
class Settings:
    out_dir: str = knob("out", "the folder of ckpt.pt")
    prompt: str = knob("\n", "text to continue, or FILE:path for a file's bytes", alias="start")
    num_samples: int = knob(1, "samples to draw", low=1)
    max_new_tokens: int = knob(500, "tokens (bytes) to add in each", low=0)
    temperature: float = knob(0.8, "below 1: safer, above 1: wilder; 0 = always the likeliest token", low=0)
    top_k: int = knob(0, "sample among the k likeliest tokens; 0 = all", low=0)
    budget: float = knob(None, "streams per token, 1 or more; default: as trained", "float", low=1)
    seed: int = knob(0, "the first sample's; the next ones count up from it", low=0)
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")


def load_model(path, device):
    """The model of a checkpoint that train.py wrote, or a refusal. No code inside the file is run."""
    if not path.is_file():
        refuse(f"there is no checkpoint {path}; run train.py first, or name its folder with --out_dir")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint["config"].keys() != {f.name for f in fields(Config)}:
            raise ValueError("its configuration is another version's")
        model = Tinybubbles(Config(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
        if model.config.vocab_size != 256:
            raise ValueError(f"its {model.config.vocab_size} tokens are not bytes")
    except Exception as error:                                        # whatever can be wrong with a file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        refuse(f"{path} is not a checkpoint of this train.py ({reason[0]}); train again or name another --out_dir")
    return model.eval()


def read_prompt(prompt):
    """The prompt's bytes, or a refusal."""
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


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip())
    device = choose_device(s.device)
    model = load_model(Path(s.out_dir) / "ckpt.pt", device)
    prompt = read_prompt(s.prompt)
    idx = torch.tensor([list(prompt)], device=device)
    sys.stdout.reconfigure(errors="replace")
    started, n_tokens, n_streams = time.perf_counter(), 0, 0
    for seed in range(s.seed, s.seed + s.num_samples):
        streams, utf8 = [], codecs.getincrementaldecoder("utf-8")("replace")
        print(utf8.decode(prompt), end="", flush=True)
        generator = torch.Generator(device).manual_seed(seed)
        for token in model.generate_steps(idx, s.max_new_tokens, temperature=s.temperature, top_k=s.top_k,
                                          budget=s.budget, generator=generator, streams=streams):
            print(utf8.decode(bytes([token.item()])), end="", flush=True)
            tok, _ = streams[-1]                                      # (1, N) of the last block: those that merge
            n_tokens, n_streams = n_tokens + (tok[0, -1] - tok[0, 0] + 1).item(), n_streams + tok.size(1)
            streams.clear()
        print(utf8.decode(b"", final=True) + "\n" + "-" * 80, flush=True)
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
