"""Slots with values, then queries that fetch several at once: batches made as they are needed, and graded."""
import numpy as np
import torch

from tools.program import refuse

VALIDATION = 0, 0, 0, 0, 1           # begins the seeds of validation batches; no (seed, step, number) is like it


class Lookup:
    """`s3=v1 s0=v2 ... q17 q4 ...`: each query token stands for a fixed ordered list of m = 1..4 slots, and its target
    is one token that says their values in that order, so it must fetch m things at once. One token is a slot with its
    value. Vocabulary: answers, slots with values, queries (LISTS for each m), shown as numbers."""
    SLOTS, VALUES, LISTS, QUERIES, LONGEST = 16, 3, 4, 32, 4
    vocabulary, size = [], "batches made as they are needed"

    def __init__(self, s):
        self.s, self.T = s, self.SLOTS + self.QUERIES
        if s.block_size < self.T:
            refuse(f"--dataset lookup needs a --block_size of {self.T} or more, not {s.block_size}")
        self.m = np.arange(self.LONGEST * self.LISTS) // self.LISTS + 1                         # of each query token
        self.lists = np.random.default_rng(0).random((len(self.m), self.SLOTS)).argsort(1)[:, :self.LONGEST]
        self.first_slot = (self.VALUES + 1) ** self.LONGEST           # answers are numbers; digit 0: the list is over
        self.first_query = self.first_slot + self.SLOTS * self.VALUES
        self.vocab_size = self.first_query + len(self.m)

    def make(self, rng):
        """idx, targets and m (B, T): but for queries, targets are -1 and m is 0."""
        B = self.s.batch_size
        slot = rng.random((B, self.SLOTS)).argsort(1)
        value, query = rng.integers(self.VALUES, size=slot.shape), rng.integers(len(self.lists), size=(B, self.QUERIES))
        context = self.first_slot + slot * self.VALUES + np.take_along_axis(value, slot, 1)
        digit = 1 + value[np.arange(B)[:, None, None], self.lists[query]]                       # (B, QUERIES, LONGEST)
        digit[np.arange(self.LONGEST) >= self.m[query][..., None]] = 0
        answer, none = digit @ (self.VALUES + 1) ** np.arange(self.LONGEST), np.full_like(context, -1)
        rows = (context, self.first_query + query), (none, answer), (none + 1, self.m[query])
        return tuple(np.concatenate(row, 1) for row in rows)

    def train_batch(self, rng):
        """idx and targets (B, T)."""
        return self.make(rng)[:2]

    def val_batch(self, i):
        """Validation batch i, whatever the seed."""
        return self.make(np.random.default_rng((*VALIDATION, i)))[:2]

    @torch.no_grad()
    def grade(self, model, budget, device):
        """For each m the share of right answers, and the streams of the query in the last block: (2, LONGEST)."""
        total = np.zeros((3, self.LONGEST + 1))
        for i in range(self.s.eval_iters):
            idx, targets, m = self.make(np.random.default_rng((*VALIDATION, i)))
            streams = []
            logits, _ = model(torch.from_numpy(idx).to(device), budget=budget, streams=streams)
            count = np.stack([np.bincount(tok[tok >= 0], minlength=self.T) for tok in streams[-1][0].cpu().numpy()])
            right = logits.argmax(-1).cpu().numpy() == targets
            for row, values in zip(total, (right, count, np.ones(m.shape))):
                row += np.bincount(m[m > 0], values[m > 0], self.LONGEST + 1)
        return total[:2, 1:] / total[2, 1:]

    def report(self, model, budget, device, length):
        """Accuracy and streams by m, two lines; `length` is for samples of a text."""
        by_m = ", ".join(map(str, range(1, self.LONGEST + 1)))
        return "\n".join(f"{what:8} of queries with m = {by_m}   " + "   ".join(f"{x:.3f}" for x in row)
                         for what, row in zip(("accuracy", "streams"), self.grade(model, budget, device)))
