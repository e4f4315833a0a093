"""A text as batches of tokens: the bytes of a file, or the numbers in a folder as nanoGPT's prepare.py writes them."""
import codecs
import pickle
import re
from pathlib import Path

import numpy as np
import torch

from tasks.plays import shakespeare
from tasks.urns import Urns
from tools.program import refuse


def load_data(dataset, block_size):
    """Two arrays of tokens, to train and to validate, mapped rather than read: the first 90 % of a text's bytes and the
    rest, uint8; or a folder's train.bin and val.bin, uint16, as nanoGPT's prepare.py writes them."""
    path = shakespeare(Path("data") / "shakespeare.txt") if dataset == "shakespeare" else Path(dataset)
    if path.is_dir():
        data = [map_file(path / name, np.uint16) for name in ("train.bin", "val.bin")]
    else:
        text = map_file(path, np.uint8)
        data = np.split(text, [len(text) - len(text) // 10])
    if min(map(len, data)) < block_size + 1:
        refuse(f"{path} has {len(data[0])} tokens to train on and {len(data[1])} to validate, too few for one window "
               f"of block_size + 1 = {block_size + 1}; use longer data or a smaller --block_size")
    return data


def map_file(path, dtype):
    """The numbers in a file, as a read-only array that is mapped into memory."""
    try:
        if not path.stat().st_size:
            refuse(f"{path} is empty; name a file with data in it")
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        refuse(f"--dataset cannot read {path} ({getattr(error, 'strerror', None) or error}); name another one")


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; a pickle that names a class or a function is refused before it acts."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_vocabulary(folder):
    """The strings of a folder's tokens, a list in their order, from its meta.pkl as nanoGPT writes it; [] without."""
    path = Path(folder) / "meta.pkl"
    if not path.exists():
        return []
    try:
        with open(path, "rb") as file:
            itos = PlainUnpickler(file).load()["itos"]
        vocabulary = [itos[token] for token in range(len(itos))]
        if not vocabulary or not all(isinstance(word, str) for word in vocabulary):
            raise ValueError("its itos does not list strings")
    except Exception as error:                                        # whatever can be wrong with a file
        refuse(f"{path} is not a meta.pkl as nanoGPT writes it ({type(error).__name__}: {error}); mend or remove it")
    return vocabulary


def decoder(vocabulary):
    """A function that is told one token after another, None at the end, and returns text. vocabulary: None for the
    bytes of UTF-8, a list of each token's string, or [] to show numbers."""
    if vocabulary is None:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: utf8.decode(b"" if token is None else bytes([token]), final=token is None)
    known = dict(enumerate(vocabulary))
    return lambda token: "" if token is None else known.get(token, "\ufffd") if known else f"{token} "


def encode(prompt, vocabulary, vocab_size):
    """The tokens of the prompt's bytes, a list (see `decoder`), or a refusal. At each place the longest string of the
    vocabulary is taken."""
    if vocabulary is None:
        return list(prompt)
    try:
        text = prompt.decode()
        number = {word: token for token, word in enumerate(vocabulary)}
        longest_first = map(re.escape, sorted(filter(None, number), key=len, reverse=True))
        pattern = "|".join([*longest_first, "."])                     # last: what no string matches
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


class Text:
    """A text as tokens, in windows of block_size with the next tokens as targets: (B, T) each."""
    def __init__(self, s):
        self.s, self.T, (self.train, self.val) = s, s.block_size, load_data(s.dataset, s.block_size)
        folder = s.dataset != "shakespeare" and Path(s.dataset).is_dir()
        self.vocabulary = read_vocabulary(s.dataset) if folder else None
        self.vocab_size = 256 if self.vocabulary is None else s.vocab_size or len(self.vocabulary)
        if s.vocab_size and s.vocab_size != self.vocab_size:
            refuse(f"--vocab_size is a folder's; the bytes of a text have 256, not {s.vocab_size}")
        if not self.vocab_size:
            refuse(f"{s.dataset} has no meta.pkl; say how many tokens there are, as --vocab_size 50304 for GPT-2's")
        self.size = f"{len(self.train):,} tokens to train on, {len(self.val):,} to validate"

    def windows(self, data, starts):
        tokens = np.stack([data[start:start + self.s.block_size + 1] for start in starts]).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            refuse(f"{self.s.dataset} has a token {tokens.max()}; --vocab_size must be above that, not "
                   f"{self.vocab_size}")
        return tokens[:, :-1], tokens[:, 1:]

    def train_batch(self, rng):
        return self.windows(self.train, rng.integers(len(self.train) - self.s.block_size, size=self.s.batch_size))

    def val_batch(self, i):
        """Windows spread evenly over the data: batch i of eval_iters."""
        s, last = self.s, len(self.val) - self.s.block_size - 1
        starts = np.linspace(0, last, s.eval_iters * s.batch_size).astype(int).reshape(s.eval_iters, -1)
        return self.windows(self.val, starts[i])

    def report(self, model, budget, device, length):
        """A sample of `length` tokens: of a text it begins on a new line, of a folder with its first token."""
        first = ord("\n") if self.vocabulary is None else int(self.val[0])
        generator = torch.Generator(device).manual_seed(self.s.seed)
        tokens = model.generate(torch.full((1, 1), first, device=device), length, temperature=0.8, budget=budget,
                                generator=generator)
        text = "".join(map(decoder(self.vocabulary), [*tokens[0].tolist(), None]))
        return "\n".join(["-" * 80, text.strip("\n"), "-" * 80])


def make_data(s):
    """What --dataset names, a Text or Urns, or a refusal. Both have T (tokens in a row), vocab_size, vocabulary,
    size (in words), train_batch, val_batch and report."""
    if s.dataset == "urns":
        return Urns(s)
    if s.dataset != "shakespeare" and not Path(s.dataset).exists():
        refuse(f"--dataset must be shakespeare, urns, a file or a folder, and there is no {s.dataset!r}")
    return Text(s)
