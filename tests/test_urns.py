"""The task `--dataset urns`: `python -m pytest tests/test_urns.py`."""
import math

import numpy as np
import pytest
import torch

import train
from experiments.rivals import HandMixture
from tasks.urns import Urns
from tinybubbles import Tinybubbles
from tools.program import read_flags

FLAGS = ("--dataset urns --block_size 16 --n_layer 2 --n_head 1 --n_embd 16 --fork_layers 1 --batch_size 16 "
         "--eval_iters 4 --learning_rate 2e-2 --device cpu").split()


def settings(*flags):
    return read_flags(train.Settings, [*FLAGS, *flags], "")


def test_balls_come_from_the_urn_that_is_named_and_every_eighth_token_is_hard():
    data, seen = Urns(settings()), {}
    for i in range(400):
        for urn, ball in zip(*map(np.ravel, data.train_batch(np.random.default_rng(i)))):
            seen.setdefault(urn, []).append(ball)
    idx = data.val_batch(0)[0]
    assert ((idx >= data.BALLS + data.EASY) == (np.arange(16) % 8 == 7)).all() and idx.max() < data.vocab_size == 392
    assert sorted(seen) == list(range(data.BALLS, data.vocab_size))
    for urn, balls in seen.items():
        counts = np.bincount(balls)[np.unique(balls)]
        assert len(counts) == (1 if urn < data.BALLS + data.EASY else 4) and max(balls) < data.BALLS
        assert abs(counts / counts.sum() - 1 / len(counts)).max() < 0.25


def test_batches_depend_on_the_seed_and_the_step_and_validation_on_neither():
    data = Urns(settings())
    same = [data.train_batch(np.random.default_rng((0, 7)))[0] for _ in range(2)]
    assert (same[0] == same[1]).all() and (same[0] != data.train_batch(np.random.default_rng((0, 8)))[0]).any()
    assert (data.val_batch(3)[0] == Urns(settings("--seed", "5")).val_batch(3)[0]).all()
    small = [(seed, step, number, use) for seed in (0, 1) for step in range(3) for number in range(3) for use in (0, 2)]
    rows = {data.train_batch(np.random.default_rng(key))[0].tobytes() for key in small}
    assert len(rows) == len(small) and not rows & {data.val_batch(i)[0].tobytes() for i in range(9)}


def test_the_grade_is_the_expected_loss_above_the_least():
    """Of a model that knows the urns it is 0; of one that was trained, it and the streams agree with its own loss."""
    torch.set_num_threads(1)
    trainer = train.Trainer(settings("--max_iters", "150"))
    data, model = trainer.data, trainer.model
    shares = torch.from_numpy(np.stack([np.bincount(urn, minlength=data.vocab_size) / 4 for urn in data.urns]))

    def knows(idx, budget, trace):
        trace.append((torch.arange(16).repeat(len(idx), 1), torch.zeros(idx.shape)))
        return shares.log()[idx - data.BALLS], None
    assert data.grade(knows, 2.0, "cpu") == pytest.approx(np.array([[0, 0], [1, 1], [1, 1]]), abs=1e-6)
    for _ in range(150):
        trainer.train_step()
    (easy, hard), streams, P = data.grade(model.eval(), 2.0, "cpu")
    assert easy < 0.1 < hard < 4 and (streams >= P).all() and (P >= 1 - 1e-6).all()
    loss = 7 / 8 * easy + (hard + math.log(4)) / 8
    assert trainer.evaluate(2.0) == pytest.approx(loss, abs=0.05)
    report = data.report(model, 2.0, "cpu", 16)
    assert [float(x) for x in report.split("tokens")[1].split()[:2]] == [round(easy, 3), round(hard, 3)]


def test_forks_at_the_hard_tokens_lower_their_loss_where_streams_are_mixed():
    """It shows that forks can pay: put by hand at the hard tokens, each stream predicting for itself. It does not show
    that a model learns to put them there; trained by the loss alone it does not."""
    flags = ("--dataset urns --block_size 16 --n_layer 2 --n_head 1 --n_embd 8 --batch_size 32 --eval_iters 20 "
             "--device cpu --budget 1.5 --max_iters 1000 --warmup_iters 50 --optimizer adamw --learning_rate 16e-3").split()
    torch.set_num_threads(1)
    losses, streams = [], []
    for fork_layers, kind in (("none", Tinybubbles), ("0,1", HandMixture)):
        chosen = read_flags(train.Settings, [*flags, "--fork_layers", fork_layers], "")
        trainer = train.Trainer(chosen, make=lambda config, paper: kind(config))
        for _ in range(1000):
            trainer.train_step()
        (easy, hard), spent, _ = trainer.data.grade(trainer.model.eval(), 1.5, "cpu")
        assert easy < 0.01
        losses.append(hard)
        streams.append(spent.tolist())
    assert streams == [[1, 1], [1, 4]]
    assert losses[1] < losses[0] - 0.05, losses
