"""The task `--dataset kinship`: `python -m pytest tests/test_kinship.py`."""
import re
import time
from collections import defaultdict

import numpy as np
import pytest
import torch

import sample
import train
from tasks import Kinship, Task, by_grade, kinship
from tasks.text import encode
from tools.program import read_flags

FLAGS = "--dataset kinship --block_size 128 --eval_iters 8 --batch_size 16 --device cpu".split()


def settings(*flags):
    return read_flags(train.Settings, [*FLAGS, *flags], "")


def stories(n):
    """The first n batches read back as words: for each question of each story the facts told before it [(A, word, C)],
    its two names, the answer and the number of hops."""
    data = Task(settings())
    for i in range(n):
        for row, targets, grades in zip(*data.graded_batch(i)):
            facts, words = [], "".join(data.vocabulary[token] for token in row)
            asked = targets >= 0
            assert [data.vocabulary[token] for token in row[asked]] == ["? "] * words.count("?")
            assert (grades[~asked] == -1).all()
            answers = zip(targets[asked], grades[asked])
            sentences = re.findall(r"(\w+) is the (\w+) of (\w+) \. |what is (\w+) to (\w+) \? ", words)
            assert words == "".join(f"{a} is the {word} of {b} . " if word else f"what is {x} to {y} ? "
                                    for a, word, b, x, y in sentences)
            for a, word, b, x, y in sentences:
                if word:
                    facts.append((a, word, b))
                else:
                    answer, grade = next(answers)
                    yield tuple(facts), x, y, data.vocabulary[answer].strip(), Kinship.GRADES[grade]


# -- a slow twin that deduces everything from the facts ---------------------------------------------------------------

def closure(facts):
    """All that follows from facts [(A, word, C)] about immediate relations: sets of pairs (A, C), A the parent of C, or
    sibling, or spouse. In every family here children have two parents, a woman and a man, who are married once."""
    parent, sibling, spouse = set(), set(), set()
    for a, word, c in facts:
        assert (word in ("mother", "daughter", "sister", "wife")) == (a in kinship.WOMEN)
        if word in ("mother", "father"):
            parent.add((a, c))
        elif word in ("daughter", "son"):
            parent.add((c, a))
        else:
            (sibling if word in ("sister", "brother") else spouse).update([(a, c), (c, a)])
    while True:
        before = len(parent) + len(sibling) + len(spouse)
        parent |= {(p, d) for p, c in parent for b, d in sibling if b == c}             # siblings share their parents,
        parent |= {(q, c) for p, c in parent for o, q in spouse if o == p}              # spouses their children
        sibling |= {(a, d) for a, b in sibling for c, d in sibling if b == c and a != d}
        sibling |= {(a, b) for p, a in parent for q, b in parent if p == q and a != b}
        spouse |= {(p, q) for p, a in parent for q, b in parent if a == b and p != q}   # both parents of one child
        if before == len(parent) + len(sibling) + len(spouse):
            assert all((p in kinship.WOMEN) != (q in kinship.WOMEN) for p, q in spouse)
            return parent, sibling, spouse


def then(*steps):
    """Pairs (A, C) such that A is steps[0] of someone who is steps[1] of ... of C, all of them different persons."""
    chains = {(a, c) for a, c in steps[0]}
    for step in steps[1:]:
        chains = {(*chain, c) for chain in chains for b, c in step if chain[-1] == b and c not in chain}
    return {(chain[0], chain[-1]) for chain in chains}


def deduce(facts):
    """{(A, C): every word for what A is to C} for all persons of the facts; the names say who is a woman."""
    parent, sibling, spouse = closure(facts)
    child = {(c, p) for p, c in parent}
    aunt = then(sibling, parent) - parent
    aunt |= then(spouse, aunt) - parent
    niece = {(c, a) for a, c in aunt}
    kin = {("mother", "father"): parent, ("daughter", "son"): child, ("sister", "brother"): sibling,
           ("wife", "husband"): spouse, ("grandmother", "grandfather"): then(parent, parent),
           ("granddaughter", "grandson"): then(child, child), ("aunt", "uncle"): aunt, ("niece", "nephew"): niece,
           ("great-grandmother", "great-grandfather"): then(parent, parent, parent),
           ("great-granddaughter", "great-grandson"): then(child, child, child),
           ("cousin", "cousin"): then(child, sibling, parent), ("mother-in-law", "father-in-law"): then(parent, spouse),
           ("daughter-in-law", "son-in-law"): then(spouse, child),
           ("sister-in-law", "brother-in-law"): then(sibling, spouse) | then(spouse, sibling)}
    named = defaultdict(set)
    for (woman, man), pairs in kin.items():
        for a, c in pairs:
            named[a, c].add(woman if a in kinship.WOMEN else man)
    return named


def distance(facts, a, c):
    """Facts on the shortest path between two persons, None if there is no path; and how many such paths there are."""
    paths, seen, hops = {a: 1}, {a}, 0
    while c not in paths and paths:
        reached = defaultdict(int)
        for x, _, y in facts:
            for here, there in ((x, y), (y, x)):
                if there not in seen:
                    reached[there] += paths.get(here, 0)
        paths = {person: n for person, n in reached.items() if n}
        seen |= paths.keys()
        hops += 1
    return (hops, paths[c]) if paths else (None, 0)


def test_the_slow_twin_knows_a_small_family():
    facts = [("Ann", "mother", "Bob"), ("Cal", "brother", "Bob"), ("Dan", "son", "Cal"), ("Eva", "wife", "Bob")]
    named = deduce(facts)
    assert named["Ann", "Dan"] == {"grandmother"} and named["Eva", "Dan"] == {"aunt"} and named["Dan", "Bob"] == {
        "nephew"} and named["Cal", "Eva"] == {"brother-in-law"} and named["Ann", "Eva"] == {"mother-in-law"}
    assert distance(facts, "Dan", "Eva") == (3, 1) and distance(facts, "Ann", "Tom") == (None, 0)


def test_every_answer_follows_from_the_facts_told_before_it_and_hops_count_them():
    seen = set()
    for facts, a, c, answer, hops in stories(4):
        assert deduce(facts)[a, c] == {answer}, (facts, a, c)
        assert distance(facts, a, c) == (hops, 1)
        seen.add((answer, hops))
    assert len({answer for answer, _ in seen}) >= 25 and len(seen) >= 60          # of the 27 words for kin


def test_facts_tell_of_one_person_more_each_and_hops_of_all_numbers_are_asked():
    people, hops_asked = {}, []
    for facts, a, c, _, hops in stories(4):
        people[facts] = {person for x, _, y in facts for person in (x, y)}
        assert len(people[facts]) == len(facts) + 1 and a != c
        hops_asked.append(hops)
    count = np.bincount(hops_asked)[1:]
    assert len(count) == 5 and count.min() > 0.02 * count.sum() and max(map(len, people)) == Kinship.PERSONS - 1


def guesses(data):
    """For each number of hops, how often the best answer is right that knows only the hops and A's gender."""
    idx, targets, grades = data.maker.make(np.random.default_rng(0), 1000)
    rows, columns = np.nonzero(targets >= 0)
    asked, answer, grade = idx[rows, columns - 3], targets[rows, columns], grades[rows, columns]
    woman = np.isin(asked, [data.maker.token[name] for name in data.maker.names[0]])
    right = [[np.bincount(answer[(grade == n) & (woman == who)]).max() for who in (False, True)]
             for n in range(len(data.maker.GRADES))]
    return np.sum(right, 1) / np.bincount(grade)


def test_answers_cannot_be_guessed_from_the_hops_and_the_name_asked_for():
    assert (guesses(Task(settings())) < 0.36).all()


def test_a_small_kinship_is_learned(tmp_path, monkeypatch):
    """Families of three, questions of one or two hops: more than 60 % right, a quarter more than can be guessed."""
    monkeypatch.chdir(tmp_path)
    for name, value in dict(PERSONS=3, NAMES=3, GENERATIONS=2, CHILDREN=2, GRADES=(1, 2)).items():
        monkeypatch.setattr(Kinship, name, value)
    torch.set_num_threads(1)
    trainer = train.Trainer(settings(*("--n_layer 3 --n_head 2 --n_embd 32 --fork_layers 1,2 --batch_size 32 --min_lr 1e-4 "
                                       "--max_iters 900 --learning_rate 4e-3 --eval_interval 900").split()))
    trainer.fit()
    accuracy, streams = by_grade(trainer.data, trainer.model.eval(), 2.0, trainer.device)
    assert (accuracy > 0.6).all() and (accuracy > guesses(trainer.data) + 0.25).all() and (streams >= 1).all()


def test_batches_depend_on_the_seed_and_the_step_and_validation_on_neither():
    data = Task(settings())
    same = [data.train_batch(np.random.default_rng((0, 7, 0)))[0] for _ in range(2)]
    assert (same[0] == same[1]).all() and (same[0] != data.train_batch(np.random.default_rng((0, 8, 0)))[0]).any()
    assert (data.val_batch(3)[0] == Task(settings("--seed", "5")).val_batch(3)[0]).all()


@pytest.mark.parametrize("task", ["lookup", "kinship"])
def test_no_validation_batch_is_trained_on(task):
    """A step's seed is (seed, step, number), and NumPy takes (0, 1) for 2 ** 32: small numbers are the ones to try."""
    data = Task(settings("--batch_size", "1", "--dataset", task))
    small = [(seed, step, number) for seed in (0, 1) for step in range(3) for number in range(3)]
    train_rows = {data.train_batch(np.random.default_rng(key))[0].tobytes() for key in small}
    assert len(train_rows) == len(small) and not train_rows & {data.val_batch(i)[0].tobytes() for i in range(9)}


def test_a_batch_is_made_in_less_than_the_time_of_a_step():
    data, times = Task(settings()), []
    for i in range(10):
        started = time.process_time()
        data.val_batch(i)
        times.append(time.process_time() - started)
    assert np.median(times) < 0.015


@pytest.mark.parametrize("flags, part", [("--block_size 83", "--block_size of 84"), ("--n_embd 30", "n_embd")])
def test_bad_settings_are_refused_in_one_sentence(flags, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        train.main([*FLAGS, *flags.split()])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and part in said


# -- prompts in words -------------------------------------------------------------------------------------------------

def test_the_longest_string_of_a_vocabulary_is_taken_and_white_space_between_words_does_not_matter():
    spaced = ["ann ", "annie ", "? "]
    assert encode(b"annie\n ann?", ["ann", "annie", "\n ", "?"], 4) == [1, 2, 0, 3]
    assert encode(b"ann  annie\t?", spaced, 3) == [0, 1, 2] == encode(b"ann annie?", spaced, 3)
    assert [0, 1, 2] == encode(b" ann annie ? ", spaced, 3)
    assert encode("h\u00e9!".encode(), ["!", "h", "\u00e9"], 3) == [1, 2, 0]


@pytest.mark.parametrize("prompt, vocabulary, part", [
    ("ann is", ["ann "], "'is'"), ("anna", ["ann "], "'anna'"), ("ab", ["a", "bc"], "'b'"), ("a b", ["a", "b"], "' '")])
def test_what_is_not_in_the_vocabulary_is_named(prompt, vocabulary, part, capsys):
    with pytest.raises(SystemExit) as end:
        encode(prompt.encode(), vocabulary, len(vocabulary))
    assert end.value.code == 2 and f"holds {part}, which is not in" in capsys.readouterr().err


def test_a_run_reports_by_hops_and_the_sampler_answers_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = train.Trainer(settings(*"--n_layer 2 --n_head 2 --n_embd 16 --fork_layers 0,1 --max_iters 2".split()))
    trainer.fit()
    said = capsys.readouterr().out.split("validation loss")[-1]
    for name, row in zip(("accuracy", "streams"), by_grade(trainer.data, trainer.model.eval(), 2.0, trainer.device)):
        printed = re.search(rf"^{name} +of questions with hops = 1, 2, 3, 4, 5   (.*)$", said, flags=re.M).group(1)
        assert [float(x) for x in printed.split()] == [round(x, 3) for x in row]
    prompt = "Ann is the mother of Bob . Bob is the father of Cal . what is Ann to Cal ?"
    sample.main(["--prompt", prompt, "--max_new_tokens", "1", "--temperature", "0", "--device", "cpu"])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(prompt + " ") and line[len(prompt) + 1:] in trainer.data.vocabulary
