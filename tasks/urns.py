"""Tokens that name urns, and balls drawn from them: batches made as they are needed, and graded."""
import math

import numpy as np
import torch

from tools.program import refuse

VALIDATION = 0, 0, 0, 0, 1           # begins the seeds of validation batches; no (seed, step, number) is like it


class Urns:
    """Each token names an urn; its target is a ball drawn from it. Every eighth token is hard: one of HARD urns, each
    with EACH different balls, so the best prediction gives them equal shares. The others name one of EASY urns, of one
    kind of ball each. So no token needs another, and what hard ones need is not depth: all logits are the product of
    two matrices of rank n_embd, which cannot put any EACH of BALLS on top (the softmax bottleneck, arXiv 1711.03953). A
    mixture of several predictions can. Vocabulary: balls, easy urns, hard urns, shown as numbers."""
    BALLS, EASY, HARD, EACH = 128, 8, 256, 4
    vocabulary, size = [], "batches made as they are needed"

    def __init__(self, s):
        self.s, self.T, rng = s, s.block_size, np.random.default_rng(0)
        if self.T < 8:
            refuse(f"--dataset urns needs --block_size 8 or more, not {self.T}, as every eighth token is hard")
        if s.vocab_size:
            refuse(f"--dataset urns has a vocabulary of its own; leave out --vocab_size {s.vocab_size}")
        hard = rng.random((self.HARD, self.BALLS)).argsort(1)[:, :self.EACH]
        easy = rng.integers(self.BALLS, size=(self.EASY, 1)).repeat(self.EACH, 1)
        self.urns = np.concatenate((easy, hard))                                     # (EASY + HARD, EACH), balls
        self.vocab_size = self.BALLS + len(self.urns)
        self.hard = np.arange(self.T) % 8 == 7                                       # (T,)

    def fingerprint(self):
        return "urns"

    def scan(self):
        """All tokens are in the vocabulary."""

    def train_batch(self, rng):
        """idx and targets (B, T)."""
        urn = np.where(self.hard, rng.integers(self.EASY, len(self.urns), size=(self.s.batch_size, self.T)),
                       rng.integers(self.EASY, size=(self.s.batch_size, self.T)))
        return self.BALLS + urn, self.urns[urn, rng.integers(self.EACH, size=urn.shape)]

    def val_batch(self, i):
        """Validation batch i, whatever the seed."""
        return self.train_batch(np.random.default_rng((*VALIDATION, i)))

    @torch.no_grad()
    def grade(self, model, budget, device):
        """Of easy and of hard tokens: the nats that their expected loss is above the least one, 0 and log(EACH); in the
        last block their streams, and the sum of their P: (3, 2)."""
        total = np.zeros((3, 2))
        for i in range(self.s.eval_iters):
            idx, trace = self.val_batch(i)[0], []
            logits = model(torch.from_numpy(idx).to(device), budget=budget, trace=trace)[0]
            log_probs = logits.log_softmax(-1).cpu().numpy()
            loss = -np.take_along_axis(log_probs, self.urns[idx - self.BALLS], 2).mean(2) - math.log(
                self.EACH) * self.hard                                               # (B, T)
            owner, logp = (x.cpu().numpy() for x in trace[-1])                       # (B, N)
            place, P = (np.arange(len(idx))[:, None] * self.T + owner)[owner >= 0], np.exp(logp[owner >= 0])
            for part, of in enumerate((loss.ravel(), *(np.bincount(place, w, idx.size) for w in (P > -1, P)))):
                of = of.reshape(idx.shape)
                total[part] += of[:, ~self.hard].mean(), of[:, self.hard].mean()
        return total / self.s.eval_iters

    def report(self, model, budget, device, length):
        """The grade in three lines; `length` is for samples of a text."""
        names = "nats above the least possible", "streams", "sum of their P"
        return "\n".join(f"{name:29} of easy, hard tokens   {easy:.3f}   {hard:.3f}"
                         for name, (easy, hard) in zip(names, self.grade(model, budget, device)))
