"""Slots with values, then queries that ask one thing or several: batches made as they are needed, and graded."""
import numpy as np
import torch

from tools.program import refuse

VALIDATION = 0, 0, 0, 0, 1           # begins the seeds of validation batches; no (seed, step, number) is like it


class Lookup:
    """`s3=v1 s0=v2 ... q17 q4 ...`. A question is about two slots of one group: does a fixed table say yes to their
    values? A query token stands for a fixed list of m = 1..GROUPS questions, each about another group, and its target
    is how many are answered yes. So what answers m = 1 would answer all, if m streams ran it side by side. Each m has
    the same share of every row's queries. One token is a slot with its value. Vocabulary: answers, slots with values,
    queries (LISTS for each m), shown as numbers."""
    GROUPS, SIZE, VALUES, LISTS, QUERIES = 4, 4, 4, 8, 32
    vocabulary, size = [], "batches made as they are needed"

    def __init__(self, s):
        self.s, self.n, rng = s, self.GROUPS * self.SIZE, np.random.default_rng(0)
        self.T = self.n + self.QUERIES
        if s.block_size < self.T:
            refuse(f"--dataset lookup needs a --block_size of {self.T} or more, not {s.block_size}")
        self.m = np.arange(self.GROUPS * self.LISTS) // self.LISTS + 1                          # of each query token
        self.asked = rng.random((len(self.m), self.GROUPS)).argsort(1) < self.m[:, None]       # which groups
        pair = rng.random((len(self.m), self.GROUPS, self.SIZE)).argsort(2)[..., :2]
        self.pair = pair + self.SIZE * np.arange(self.GROUPS)[:, None]                          # which slots of them
        half = rng.permutation(self.VALUES * (self.VALUES + 1) // 2) % 2
        upper = np.zeros((self.VALUES, self.VALUES), dtype=bool)
        upper[np.triu_indices(self.VALUES)] = half
        self.table = upper | upper.T
        self.first_slot = self.GROUPS + 1
        self.first_query = self.first_slot + self.n * self.VALUES
        self.vocab_size = self.first_query + len(self.m)

    def make(self, rng):
        """idx, targets and m (B, T): but for queries, targets are -1 and m is 0."""
        B = self.s.batch_size
        slot, m = rng.random((B, self.n)).argsort(1), rng.random((B, self.QUERIES)).argsort(1) % self.GROUPS + 1
        value = rng.integers(self.VALUES, size=slot.shape)
        query = (m - 1) * self.LISTS + rng.integers(self.LISTS, size=m.shape)
        context = self.first_slot + slot * self.VALUES + np.take_along_axis(value, slot, 1)
        a, b = np.moveaxis(value[np.arange(B)[:, None, None, None], self.pair[query]], -1, 0)   # (B, QUERIES, GROUPS)
        answer, none = (self.table[a, b] & self.asked[query]).sum(-1), np.full_like(context, -1)
        rows = (context, self.first_query + query), (none, answer), (none + 1, m)
        return tuple(np.concatenate(row, 1) for row in rows)

    def train_batch(self, rng):
        """idx and targets (B, T)."""
        return self.make(rng)[:2]

    def val_batch(self, i):
        """Validation batch i, whatever the seed."""
        return self.make(np.random.default_rng((*VALIDATION, i)))[:2]

    @torch.no_grad()
    def grade(self, model, budget, device):
        """For each m the share of right answers; in the last block, the streams of a query and the sum of their P:
        (3, GROUPS)."""
        total = np.zeros((4, self.GROUPS + 1))
        for i in range(self.s.eval_iters):
            idx, targets, m = self.make(np.random.default_rng((*VALIDATION, i)))
            streams = []
            logits, _ = model(torch.from_numpy(idx).to(device), budget=budget, streams=streams)
            tok, logp = (x.cpu().numpy() for x in streams[-1])
            row, P = np.arange(len(idx))[:, None] * self.T + tok, np.exp(logp)
            count, weight = (np.bincount(row[tok >= 0], w[tok >= 0], idx.size) for w in (np.ones_like(P), P))
            right = logits.argmax(-1).cpu().numpy() == targets
            for part, values in zip(total, (right.ravel(), count, weight, np.ones(idx.size))):
                part += np.bincount(m.ravel(), values, self.GROUPS + 1)
        return total[:3, 1:] / total[3, 1:]

    def report(self, model, budget, device, length):
        """Accuracy, streams and their P by m, three lines; `length` is for samples of a text."""
        by_m = ", ".join(map(str, range(1, self.GROUPS + 1)))
        names, grades = ("accuracy", "streams", "sum of P"), self.grade(model, budget, device)
        return "\n".join(f"{name:8} of queries with m = {by_m}   " + "   ".join(f"{x:.3f}" for x in row)
                         for name, row in zip(names, grades))
