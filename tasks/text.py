"""A text as batches of tokens: the bytes of a file, or the numbers in a folder as nanoGPT's prepare.py writes them."""
import codecs
import hashlib
import os
import pickle
import re
from pathlib import Path

import numpy as np
import torch

from tasks.plays import shakespeare
from tasks.urns import Urns
from tools.program import refuse, say


def load_text(path):
    """The bytes of a file as two arrays of tokens, uint8, mapped rather than read: the first 90 % to train on, and the
    rest to validate."""
    text = map_file(path, np.uint8)
    return np.split(text, [len(text) - len(text) // 10])


def load_folder(path, vocab_size):
    """A folder's train.bin and val.bin, mapped rather than read. Their numbers are uint16, as nanoGPT's prepare.py
    writes them, or, for a vocabulary of more than 65,536 tokens, uint32."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    data = [map_file(path / name, dtype) for name in ("train.bin", "val.bin")]
    if dtype == np.uint16 and all(len(tokens) > 1 and not tokens[1:10**6:2].any() for tokens in data) and any(
            tokens[:10**6].any() for tokens in data):
        refuse(f"every second number in {path} is 0, so its files seem to hold uint32; with a vocabulary of {vocab_size} "
               "they must be uint16: write them anew, or give the vocabulary's true size by --vocab_size")
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
        "".join(vocabulary).encode()                                  # half of a surrogate pair is no text
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
        number = {word: token for token, word in enumerate(vocabulary[:vocab_size])}
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
        path = shakespeare(Path("data") / "shakespeare.txt") if s.dataset == "shakespeare" else Path(s.dataset)
        self.s, self.T, self.path, self.vocabulary, self.found = s, s.block_size, path, None, None
        if path.is_dir():
            self.vocabulary = read_vocabulary(path)
            self.vocab_size = s.vocab_size or len(self.vocabulary)
            if not self.vocab_size:
                refuse(f"{path} has no meta.pkl; put it there, or say how many tokens there are, as "
                       "--vocab_size 50304 for GPT-2's")
            self.train, self.val = load_folder(path, self.vocab_size)
        else:
            self.vocab_size = 256
            if s.vocab_size not in (None, 256):
                refuse(f"--vocab_size {s.vocab_size} is for folders, and {path} is a text, of 256 bytes; leave it out")
            self.train, self.val = load_text(path)
        if min(len(self.train), len(self.val)) < self.T + 1:
            refuse(f"{path} has {len(self.train)} tokens to train on and {len(self.val)} to validate, too few for one "
                   f"window of block_size + 1 = {self.T + 1}; use longer data or a smaller --block_size")
        self.size = f"{len(self.train):,} tokens to train on, {len(self.val):,} to validate"

    def fingerprint(self):
        """What tells this data from other data, wherever it lies: a hash of each part's size and of its tokens, or, if
        they are more than 16 million, of 64 pieces spread over them."""
        if self.found is None:
            found, piece = hashlib.sha256(), 2**18
            for tokens in (self.train, self.val):
                found.update(f"{tokens.dtype} {len(tokens)}".encode())
                for start in range(0, len(tokens), max(piece, len(tokens) // 64)):
                    found.update(tokens[start:start + piece])
            self.found = found.hexdigest()
        return self.found

    def scan(self):
        """Refuse a token outside the vocabulary, wherever it is. The files are read from end to end, in pieces."""
        if self.vocabulary is None:                                   # a byte cannot be outside
            return
        for tokens in (self.train, self.val):
            piece, done, is_large = np.empty(2**21, tokens.dtype), 0, tokens.nbytes > 2**30
            if is_large:
                say(f"looking for tokens outside the vocabulary in {tokens.filename}, {tokens.nbytes / 1e9:.0f} GB")
            with open(tokens.filename, "rb") as file:
                while count := file.readinto(piece) // tokens.itemsize:
                    if piece[:count].max() >= self.vocab_size:
                        place = int((piece >= self.vocab_size).argmax())
                        refuse(f"{tokens.filename} has a token {piece[place]} at place {done + place}, counted from 0; "
                               f"--vocab_size must be above that, not {self.vocab_size}")
                    if is_large and hasattr(os, "posix_fadvise"):     # else it would push all else out of memory
                        os.posix_fadvise(file.fileno(), done * tokens.itemsize, piece.nbytes, os.POSIX_FADV_DONTNEED)
                    done += count

    def windows(self, data, starts):
        tokens = np.stack([data[start:start + self.s.block_size + 1] for start in starts]).astype(np.int64)
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
    if not s.dataset or s.dataset != "shakespeare" and not Path(s.dataset).exists():
        refuse(f"--dataset must be shakespeare, urns, a file or a folder, and there is no {s.dataset!r}")
    return Text(s)
