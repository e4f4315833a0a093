"""
What train.py trains on. --dataset shakespeare or a path: a Text. --dataset lookup or kinship: a Task, whose batches are
made as they are needed and which grades a model.

A maker of a task has T (tokens in a row), vocab_size, vocabulary (see text.py's `decoder`), GRADE (what its questions
differ in), GRADES (its values) and `make(rng, B)`, which returns idx, targets and grades (B, T): targets are -1 but for
answers, and grades there index GRADES.
"""
from pathlib import Path

import numpy as np
import torch

from tasks.kinship import Kinship
from tasks.lookup import Lookup
from tasks.text import Text
from tools.program import refuse

TASKS = dict(lookup=Lookup, kinship=Kinship)
VALIDATION = 0, 0, 0, 0, 1           # begins the seeds of validation batches; no (seed, step, number) is like it


class Task:
    """The batches of one of TASKS, and how well a model does on them."""

    def __init__(self, s):
        self.s, self.maker, self.size = s, TASKS[s.dataset](), "batches made as they are needed"
        self.T, self.vocabulary, self.vocab_size = self.maker.T, self.maker.vocabulary, self.maker.vocab_size
        if s.block_size < self.T:
            refuse(f"--dataset {s.dataset} needs a --block_size of {self.T} or more, not {s.block_size}")

    def train_batch(self, rng):
        """idx and targets (B, T)."""
        return self.maker.make(rng, self.s.batch_size)[:2]

    def val_batch(self, i):
        return self.graded_batch(i)[:2]

    def graded_batch(self, i):
        """Validation batch i, whatever the seed: idx, targets and grades (B, T)."""
        return self.maker.make(np.random.default_rng((*VALIDATION, i)), self.s.batch_size)

    def report(self, model, budget, device, length):
        """Accuracy and streams by grade, two lines; `length` is for samples of a text."""
        name, grades = self.maker.GRADE, ", ".join(map(str, self.maker.GRADES))
        return "\n".join(f"{what:8} of questions with {name} = {grades}   " + "   ".join(f"{x:.3f}" for x in row)
                         for what, row in zip(("accuracy", "streams"), by_grade(self, model, budget, device)))


@torch.no_grad()
def by_grade(task, model, budget, device):
    """For each grade the share of right answers and the streams of their token in the last block, (2, grades)."""
    total = np.zeros((3, len(task.maker.GRADES)))
    for i in range(task.s.eval_iters):
        idx, targets, grades = task.graded_batch(i)
        streams, asked = [], targets >= 0
        logits, _ = model(torch.from_numpy(idx).to(device), budget=budget, streams=streams)
        count = np.stack([np.bincount(tok[tok >= 0], minlength=task.T) for tok in streams[-1][0].cpu().numpy()])
        right = logits.argmax(-1).cpu().numpy() == targets
        for row, values in zip(total, (right[asked], count[asked], np.ones(asked.sum()))):
            row += np.bincount(grades[asked], values, total.shape[1])
    return total[:2] / total[2]


def make_data(s):
    """The Task or the Text that --dataset names, or a refusal."""
    if s.dataset in TASKS:
        return Task(s)
    if s.dataset != "shakespeare" and not Path(s.dataset).exists():
        refuse(f"--dataset must be shakespeare, {', '.join(TASKS)}, a file or a folder, and there is no {s.dataset!r}")
    return Text(s)
