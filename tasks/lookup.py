"""Slots with values, then queries that fetch several at once."""
import numpy as np


class Lookup:
    """Slots with values, then queries: `s3=v1 s0=v2 ... q17 q4 ...`. Each query token stands for a fixed ordered list
    of m = 1..4 slots, and its target is one token that says their values in that order: it must fetch m things at once.
    One token is a slot with its value. Vocabulary: answers, slots with values, queries (LISTS for each m)."""
    SLOTS, VALUES, LISTS, QUERIES, LONGEST = 16, 3, 4, 32, 4
    GRADE, vocabulary = "m", []

    def __init__(self):
        self.T, self.GRADES = self.SLOTS + self.QUERIES, range(1, self.LONGEST + 1)
        self.m = np.arange(self.LONGEST * self.LISTS) // self.LISTS + 1                         # of each query token
        self.lists = np.random.default_rng(0).random((len(self.m), self.SLOTS)).argsort(1)[:, :self.LONGEST]
        self.first_slot = (self.VALUES + 1) ** self.LONGEST           # answers are numbers; digit 0: the list is over
        self.first_query = self.first_slot + self.SLOTS * self.VALUES
        self.vocab_size = self.first_query + len(self.m)

    def make(self, rng, B):
        """idx, targets and grades (B, SLOTS + QUERIES); only queries have a target."""
        slot = rng.random((B, self.SLOTS)).argsort(1)
        value, query = rng.integers(self.VALUES, size=slot.shape), rng.integers(len(self.lists), size=(B, self.QUERIES))
        context = self.first_slot + slot * self.VALUES + np.take_along_axis(value, slot, 1)
        digit = 1 + value[np.arange(B)[:, None, None], self.lists[query]]                       # (B, QUERIES, LONGEST)
        digit[np.arange(self.LONGEST) >= self.m[query][..., None]] = 0
        answer, none = digit @ (self.VALUES + 1) ** np.arange(self.LONGEST), np.full_like(context, -1)
        rows = (context, self.first_query + query), (none, answer), (none, self.m[query] - 1)
        return tuple(np.concatenate(row, 1) for row in rows)
