"""Seeing bubbles: sample.py's shading and map, and the figures: `python -m pytest tests/test_bubbles.py`."""
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from experiments import figures
from experiments.compare import GPT
from programs import ROOT, VERSE, a_run, exits, printed
from tinybubbles import Config, Tinybubbles
from tools import files, pictures

TINY = ("--dataset text.txt --block_size 16 --n_layer 3 --n_head 2 --n_embd 16 --batch_size 4 --max_iters 30 --device "
        "cpu --eval_iters 1 --learning_rate 1e-2").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two small runs, out and out-gpt."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("bubbles"))
        Path("text.txt").write_text(VERSE * 20, "utf-8")
        train.main([*TINY, "--fork_layers", "1,2", "--budget", "1.5"])
        train.main([*TINY, "--fork_layers", "none", "--out_dir", "out-gpt"])
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Tinybubbles(Config(vocab_size=40, block_size=12, n_embd=16, n_head=2, n_layer=5, fork_layers=(1, 3, 4)))
    for fork in model.forks.values():
        torch.nn.init.normal_(fork.score.weight)
        fork.bar.fill_(-1.0)
    return model.eval()


@pytest.mark.parametrize("budget", [1.0, 1.4, 2.3])
def test_the_map_counts_every_stream_and_every_deletion(model, budget):
    """Against what each fork layer chose, read from its answer which candidates survive."""
    idx, chosen = torch.randint(40, (1, 12)), {}
    for name, fork in model.forks.items():
        def select(logp, streams, budget, earlier_extras, moves_bar, fork=fork, layer=int(name)):
            survives = type(fork).select(fork, logp, streams, budget, earlier_extras, moves_bar)
            chosen[layer] = streams.owner[0], survives[0]
            return survives
        fork.select = select
    counts, deleted = pictures.read_bubbles(model, idx, budget)
    want, gone = torch.ones(12, dtype=torch.long), torch.zeros(5, 12, dtype=torch.long)
    for layer in range(5):
        if layer in chosen:
            owner, survives = chosen[layer]
            want = torch.tensor([int(survives[owner == t].sum()) for t in range(12)])
            gone[layer] = torch.tensor([int((~survives[owner == t, 1]).sum()) for t in range(12)])
        assert counts[layer].tolist() == want.tolist() and deleted[layer].tolist() == gone[layer].tolist()
    assert (deleted.sum() > 0) == (budget > 1)                        # with room for extras some give way


def test_past_the_context_half_of_it_is_read_again(model):
    idx = torch.randint(40, (1, 31))
    counts, _ = pictures.read_bubbles(model, idx, 2.0)
    windows = ((0, 12), (6, 18), (12, 24), (18, 30), (24, 31))
    parts = [pictures.read_bubbles(model, idx[:, a:b], 2.0)[0] for a, b in windows]
    assert torch.equal(counts, torch.cat([parts[0], *(part[:, 6:] for part in parts[1:])], dim=1))


def on_a_terminal(command):
    """What a command writes to a terminal of its own."""
    main, side = pty.openpty()
    done = subprocess.Popen(command, stdout=side, env={**os.environ, "TERM": "xterm", "NO_COLOR": ""})
    os.close(side)
    out = b""
    while True:
        try:
            out += os.read(main, 4096)
        except OSError:                                               # the command has ended
            break
    os.close(main)
    assert done.wait() == 0
    return out.decode().replace("\r\n", "\n")


def unshade(text):
    """A text without colours, and for each character the code of its colour, "" without one."""
    _, *parts = re.split(r"\x1b\[([\d;]*)m", "\33[0m" + text)         # a code and what it colours, in turns
    pairs = [(char, "" if code == "0" else code) for code, part in zip(parts[::2], parts[1::2]) for char in part]
    return "".join(char for char, _ in pairs), [code for _, code in pairs]


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), dict(isatty=lambda self: True))())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert pictures.shade("a", 2).startswith("\33[") and pictures.shade("a", 1) == "a"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert pictures.shade("a", 2) == "a"


def test_characters_are_shaded_by_their_streams_on_a_terminal_only(folder, capsys):
    """The shade of every character, given or generated, is that of its streams when the whole text is read."""
    flags = ["--prompt", "The br", "--max_new_tokens", "9", "--temperature", "0", "--show_bubbles"]
    shaded, codes = unshade(on_a_terminal([sys.executable, str(ROOT / "sample.py"), *flags]))
    plain, without = printed(capsys, sample, *flags), printed(capsys, sample, *flags[:-1])
    assert "\33" not in plain
    assert [text.split("\nstreams:")[0] for text in (shaded, plain)] == [without.split("\n" + "-" * 80)[0]] * 2
    _, model = files.load_checkpoint(Path("out/best.pt"), "cpu")
    text = without.split("\n" + "-" * 80)[0].encode()
    assert len(text) == 15                                            # bytes, none of them outside ASCII
    counts = pictures.read_bubbles(model.eval(), torch.tensor([list(text)]), None)[0, -1]
    for char, code, n in zip(shaded, codes, counts.tolist()):
        assert code == ("" if char == "\n" else pictures.SHADES[n - 1])
    assert len(set(counts.tolist())) > 1
    share = {int(n): int(x) for n, x in re.findall(r" (\d) +(\d+)%", plain.split("streams:")[1])}
    assert share == {n: round(100 * (counts == n).float().mean().item()) for n in set(counts.tolist())}


def test_a_given_text_comes_back_as_it_was(folder, capsys):
    Path("given.txt").write_text(VERSE, "utf-8")
    said = printed(capsys, sample, "--show_bubbles", "--prompt", "FILE:given.txt", "--max_new_tokens", "0")
    assert said.startswith(VERSE + "\nstreams: ")


def test_the_map_is_drawn_and_a_bad_path_is_refused_before_anything_is_done(folder, capsys):
    for name in ("bubbles.png", "bubbles.svg"):
        sample.main(["--plot", name, "--max_new_tokens", "100", "--prompt", "$x$ \u2014 O\n"])
        assert Path(name).stat().st_size > 5000
    Path("folder.png").mkdir()
    for bad in ("bubbles.doc", "no/such/folder.png", "folder.png"):
        out, err = exits(capsys, sample.main, ["--plot", bad])
        assert out == "" and repr(bad) in err and len(err.splitlines()) == 1


def test_a_word_of_mathematics_is_drawn_as_it_is(model, folder):
    pictures.plot("words.png", model, [1, 2, 3], ["$x_$", "$$", "a"], 2.0)
    assert Path("words.png").stat().st_size > 5000


def test_the_picture_of_the_method_is_drawn_from_what_fork_layers_do(folder):
    levels = figures.worked_example()
    assert [owner for owner, _, _ in levels] == [[0, 1, 2, 3], [0, 0, 1, 2, 2, 3], [0, 0, 1, 2, 3, 3]]
    assert levels[2][1] == pytest.approx([.56, 1, 1, 1, .8, 1], rel=1e-4)
    assert levels[2][2] == [(0, False), (1, False), (2, False), (4, False), (5, True), (5, False)]
    assert figures.fates(levels, 1) == [["forks, 0.7"], ["fork 0.9: full"], ["forks, 0.6"], ["fork 0.8: full"]]
    assert figures.fates(levels, 2) == [["stays, 0.56", "fork 0.63: full"], ["fork 0.4 < 0.5"], ["fork 0.2 < 0.5"],
                                        ["stay 0.06 < 0.5", "fork 0.12 < 0.5"], ["fork 0.3 < 0.5"], ["forks, 0.8"]]
    figures.main(["--results", "results"])
    assert Path("results/method.png").stat().st_size > 10000


# -- figures of a trained model --------------------------------------------------------------------------------------

def test_attention_is_what_the_model_attends_to(model):
    """Against attention computed with values that tell keys apart: a mean over the streams of a kind, by loops."""
    idx, trace, probe = torch.randint(40, (1, 12)), [], []
    found = figures.attention(model, torch.cat((idx, idx)), 2.0)
    assert list(found) == ["block 1", "block 2", "block 3", "block 4"]
    real = torch.nn.functional.scaled_dot_product_attention

    def look(q, k, v, attn_mask, is_causal, dropout_p):
        one_hot = torch.eye(k.size(2)).expand(*k.shape[:3], -1)
        probe.append(real(q, k, one_hot, attn_mask, dropout_p, is_causal)[0].mean(0))
        return real(q, k, v, attn_mask, dropout_p, is_causal)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
        model(idx, budget=2.0, trace=trace)
    for layer in range(1, 5):
        owner, values = trace[layer][0][0].tolist(), {name: [] for name in found[f"block {layer}"]}
        last = {t: i for i, t in enumerate(owner) if t >= 0}
        for t, i in last.items():
            own = [j for j in range(i) if owner[j] == t]
            if own:
                before = [j for j in range(i) if 0 <= owner[j] < t]
                values["its own fork"] += [probe[layer][i, j].item() for j in own]
                values["the token before"] += [probe[layer][i, last[t - 1]].item()] if t else []
                values["a stream of any earlier token"] += [probe[layer][i, j].item() for j in before]
        for name, numbers in values.items():
            mean, low, high = found[f"block {layer}"][name]
            assert mean == pytest.approx(np.mean(numbers), abs=1e-6) and low <= mean + 1e-9 and mean <= high + 1e-9


def test_entropy_is_set_against_streams(model):
    found = figures.entropy(model, model, torch.randint(40, (32, 12)), 1.4)
    for line in found.values():
        assert line["entropy"] == sorted(line["entropy"]) and all(low <= mean <= high for mean, low, high in
                                                                  line["streams"])
        rho, low, high = line["rho"]
        assert low <= rho <= high
    a, b = np.array([1.0, 2, 3, 4]), np.array([10.0, 10, 30, 20])
    assert figures.spearman(a, a ** 3) == pytest.approx(1) and figures.spearman(a, -a) == pytest.approx(-1)
    assert figures.spearman(a, b) == pytest.approx(0.7378648)         # ranks 1 2 3 4 against 1.5 1.5 4 3


def test_streams_are_counted_by_kind_of_byte():
    model = Tinybubbles(Config(block_size=16, n_embd=16, n_head=2, n_layer=3)).eval()
    idx = torch.tensor(list(b"\tif (a_1)\n\t\tb")).repeat(3, 1)
    found = figures.kinds(model, idx, (2.5,))["budget 2.5"]["kinds"]
    count = figures.read_windows(model, idx[:1], 2.5)[0][0]
    places = dict(tab=[0, 10, 11], newline=[9], blank=[3], underscore=[6], letter=[1, 2, 5, 12], digit=[7], other=[4, 8])
    assert found.keys() == places.keys() and len(set(count)) > 1
    for name, where in places.items():
        assert found[name] == pytest.approx([count[where].mean()] * 3)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no disk that is always full")
def test_a_sample_that_cannot_be_printed_is_one_sentence(folder):
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, ROOT / "sample.py", "--max_new_tokens", "3", "--device", "cpu"], stdout=full,
                               stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "cannot be printed" in ended.stderr, ended.stderr


def test_the_figures_are_drawn_with_their_numbers_beside_them(folder, capsys):
    said = exits(capsys, figures.main, ["--figure", "budgets", "--results", "results"]).err
    assert "text.json" in said
    for name, budgets in (("kinds", "1,2,3,4"), ("entropy", "1.5,2")):
        assert "at most" in exits(capsys, figures.main, ["--figure", name, "--budget", budgets]).err
    assert "out holds" in exits(capsys, figures.main, ["--figure", "entropy", "--gpt_dir", "out"]).err
    Path("taken/method.png").mkdir(parents=True)
    assert "method.png is not a file" in exits(capsys, figures.main, ["--results", "taken"]).err
    assert "out-gpt holds" in exits(capsys, figures.main, ["--figure", "attention", "--out_dir", "out-gpt"]).err
    train.main([*TINY, "--block_size", "8", "--max_iters", "1", "--fork_layers", "none", "--out_dir", "short"])
    assert "block_size" in exits(capsys, figures.main, ["--figure", "entropy", "--gpt_dir", "short"]).err
    Path("text.txt").rename("moved.txt")
    assert "out was trained on text.txt, which is not here" in exits(capsys, figures.main, ["--figure", "kinds"]).err
    Path("moved.txt").rename("text.txt")
    run = lambda arm, seed, loss: a_run(arm, seed, {"9": loss}, 500 if arm == GPT else 520)
    runs = [run(GPT, 0, {"1": 1.0}), run(GPT, 1, {"1": 2.0}), run("bubbles, r = 2", 0, {"2": 0.9, "1": 1.1}),
            run("bubbles, r = 2", 1, {"2": 1.7, "1": 2.1}), run("bubbles, elastic", 0, {"2": 0.5})]
    Path("results/text.json").write_text(json.dumps(dict(runs=runs, measured={
        GPT: dict(flops={"1": 2e6}), "bubbles, r = 2": dict(flops={"2": 3e6, "1": 2e6})})))
    Path("results/scale.json").write_text(Path("results/text.json").read_text())
    graded = lambda arm, seed, *grades: a_run(arm, seed, {"9": {"1": 1.0}}) | dict(grade=dict(zip("59", grades)))
    none, some = [[0.5, 2.0], [1, 1], [1, 1]], [[0.5, 1.5], [1.5, 3], [1.25, 2]]
    runs = [graded(arm, seed, none, last) for arm, last in ((GPT, none), ("mixture by hand", some)) for seed in (0, 1)]
    Path("results/selection.json").write_text(json.dumps(dict(runs=runs, measured={})))
    for name in ("rivals", "entropy", "kinds", "attention", "budgets", "placement", "sizes"):
        figures.main(["--figure", name, "--results", "results", "--windows", "8", "--device", "cpu"])
        assert Path(f"results/{name}.png").stat().st_size > 10000
    figures.main(["--figure", "kinds", "--results", "results", "--windows", str(10**11), "--device", "cpu"])
    windows = len(Path("text.txt").read_bytes()) // 10 // 16
    assert f" {windows} validation windows" in json.loads(Path("results/kinds.json").read_text())["about"]
    found = json.loads(Path("results/budgets.json").read_text())["found"]
    assert found["bubbles, r = 2"]["1"] == pytest.approx([0.1, 0.0], abs=1e-9)
    assert found["bubbles, r = 2"]["2"] == pytest.approx([-0.2, 12.7062 * 0.1], rel=1e-4)
    Path("results/scale.json").write_text(json.dumps(dict(runs=runs[:1], measured={})))      # a GPT alone
    before = Path("results/sizes.json").read_text()
    assert "lack what the figure sizes shows" in exits(capsys, figures.main, ["--figure", "sizes", "--results", "results"]).err
    assert Path("results/sizes.json").read_text() == before
    found = json.loads(before)["found"]
    assert found == {"bubbles, r = 2": {"500": pytest.approx([-0.2, 12.7062 * 0.1], rel=1e-4)}}
    found = json.loads(Path("results/rivals.json").read_text())["found"]
    assert found["bubbles, r = 2"][:2] == pytest.approx([1.5, -0.2]) and found[GPT] == [1, 0, 0]
    found = json.loads(Path("results/placement.json").read_text())["found"]
    assert found[GPT]["9"][2] == [2.0, 0.0] and found["mixture by hand"]["9"] == [[1.5, 0.0], [2.0, 0.0], [1.5, 0.0]]
