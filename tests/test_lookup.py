"""The task `--dataset lookup`: `python -m pytest tests/test_lookup.py`."""
import numpy as np
import pytest
import torch

import train
from tasks.lookup import Lookup
from tools.program import read_flags

FLAGS = ("--dataset lookup --n_layer 3 --n_head 1 --n_embd 16 --fork_layers 1,2 --learning_rate 1e-2 --min_lr 5e-4 "
         "--eval_iters 8 --batch_size 16 --device cpu").split()


@pytest.fixture
def small(monkeypatch):
    """A lookup of 2 groups of 2 slots with 2 values."""
    for name, value in dict(GROUPS=2, SIZE=2, VALUES=2, LISTS=2, QUERIES=12).items():
        monkeypatch.setattr(Lookup, name, value)


def settings(*flags):
    return read_flags(train.Settings, [*FLAGS, *flags], "")


def test_every_answer_is_the_number_of_questions_that_the_table_says_yes_to():
    """Read the tokens back by hand. Each query token asks about m groups, two slots of each, the same in every text."""
    data, seen = Lookup(settings()), {}
    assert (data.table == data.table.T).all() and 0 < data.table.sum() < data.table.size
    for row, answers, ms in zip(*data.make(np.random.default_rng(0))):
        context, queries = row[:data.n] - data.first_slot, row[data.n:] - data.first_query
        value = dict(divmod(token, data.VALUES) for token in context)
        assert sorted(value) == list(range(data.n)) and set(value.values()) <= set(range(data.VALUES))
        assert (answers[:data.n] == -1).all() and (np.bincount(ms) == [data.n] + [data.QUERIES // 4] * 4).all()
        for query, answer, m in zip(queries, answers[data.n:], ms[data.n:]):
            pairs = [tuple(pair) for pair, asked in zip(data.pair[query], data.asked[query]) if asked]
            assert m == query // data.LISTS + 1 == len(pairs) == len({a // data.SIZE for a, b in pairs})
            assert all(a != b and a // data.SIZE == b // data.SIZE for a, b in pairs)
            assert answer == sum(data.table[value[a], value[b]] for a, b in pairs)
            seen.setdefault(m, set()).add(answer)
    assert seen == {m: set(range(m + 1)) for m in (1, 2, 3, 4)}


def test_batches_depend_on_the_seed_and_the_step_and_validation_on_neither():
    data = Lookup(settings())
    same = [data.train_batch(np.random.default_rng((0, 7)))[0] for _ in range(2)]
    assert (same[0] == same[1]).all() and (same[0] != data.train_batch(np.random.default_rng((0, 8)))[0]).any()
    assert (data.val_batch(3)[0] == Lookup(settings("--seed", "5")).val_batch(3)[0]).all()


def test_the_training_batches_stay_as_they_were():
    """Results were measured on these batches: a sum over the first of them."""
    batch = Lookup(settings()).train_batch(np.random.default_rng((0, 0, 0)))
    sums = [int((tokens * np.arange(tokens.size).reshape(tokens.shape)).sum()) for tokens in batch]
    assert sums == [20380459, 211365]


def test_a_small_lookup_is_learned_and_reported_by_m(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    trainer = train.Trainer(settings("--max_iters", "800", "--log_interval", "400"))
    trainer.fit()
    accuracy, streams, weight = trainer.data.grade(trainer.model.eval(), 2.0, trainer.device)
    assert (accuracy > 0.95).all() and (streams >= weight).all() and (weight >= 1 - 1e-6).all()
    last = capsys.readouterr().out.split("validation loss")[-1]
    assert [float(x) for x in last.split("accuracy of queries with m = 1, 2")[1].split()[:2]] == [
        round(x, 3) for x in accuracy]


def test_no_validation_batch_is_trained_on():
    """A step's seed is (seed, step, number, purpose), and NumPy takes (0, 1) for 2 ** 32: small numbers are to try."""
    data = Lookup(settings("--batch_size", "1"))
    small = [(seed, step, number, use) for seed in (0, 1) for step in range(3) for number in range(3) for use in (0, 2)]
    train_rows = {data.train_batch(np.random.default_rng(key))[0].tobytes() for key in small}
    assert len(train_rows) == len(small) and not train_rows & {data.val_batch(i)[0].tobytes() for i in range(9)}
