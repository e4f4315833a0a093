"""Seeing bubbles: sample.py's shading and map, and the figures: `python -m pytest tests/test_bubbles.py`."""
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from experiments import figures
from tinybubbles import Config, Tinybubbles
from tools import files, pictures

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--dataset text.txt --block_size 16 --n_layer 3 --n_head 2 --n_embd 16 --batch_size 4 --max_iters 30 --device "
        "cpu --eval_iters 1 --learning_rate 1e-2").split()
VERSE = "O for a Muse of fire, that would ascend\nThe brightest heaven of invention \u2014\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with four small runs: out, out-gpt, out-topk and out-elastic."""
    torch.set_num_threads(1)
    folder, here = tmp_path_factory.mktemp("bubbles"), os.getcwd()
    os.chdir(folder)
    Path("text.txt").write_text(VERSE * 20, "utf-8")
    for out, flags in {"out": "--budget 1.5", "out-gpt": "--fork_layers none", "out-elastic": "--budget 1,2",
                       "out-topk": "--paper"}.items():
        train.main([*TINY, "--fork_layers", "1,2", *flags.split(), "--out_dir", out])
    yield folder
    os.chdir(here)


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
    """Against what each fork layer chose, kept and forked, read from the mask of its survivors."""
    idx, chosen = torch.randint(40, (1, 12)), {}
    for l, fork in model.forks.items():
        def select(logp, stays, streams, *rest, fork=fork, l=int(l)):
            survives = type(fork).select(fork, logp, stays, streams, *rest)
            chosen[l] = streams.tok[0], survives[0, 0::2], survives[0, 1::2]
            return survives
        fork.select = select
    counts, deleted = pictures.read_bubbles(model, idx, budget)
    want, gone = torch.ones(12, dtype=torch.long), torch.zeros(5, 12, dtype=torch.long)
    for l in range(5):
        if l in chosen:
            tok, forks, keeps = chosen[l]
            want = torch.tensor([int((forks | keeps)[tok == t].sum() + (forks & keeps)[tok == t].sum())
                                 for t in range(12)])
            gone[l] = torch.tensor([int((~keeps)[tok == t].sum()) for t in range(12)])
        assert counts[l].tolist() == want.tolist() and deleted[l].tolist() == gone[l].tolist()
    assert (deleted.sum() > 0) == (budget > 1)                        # with room for extras some give way


def test_past_the_context_half_of_it_is_read_again(model):
    idx = torch.randint(40, (1, 31))
    counts, _ = pictures.read_bubbles(model, idx, 2.0)
    windows = ((0, 12), (6, 18), (12, 24), (18, 30), (24, 31))
    parts = [pictures.read_bubbles(model, idx[:, a:b], 2.0)[0] for a, b in windows]
    assert torch.equal(counts, torch.cat([parts[0], *(part[:, 6:] for part in parts[1:])], dim=1))


def on_a_terminal(command, **env):
    """What a command writes to a terminal of its own."""
    main, side = pty.openpty()
    done = subprocess.Popen(command, stdout=side, env={**os.environ, "TERM": "xterm", "NO_COLOR": "", **env})
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
    chars, codes, code = [], [], ""
    for new, char in re.findall(r"\x1b\[([\d;]*)m|(.)", text, flags=re.S):
        if char:
            chars.append(char)
            codes.append(code)
        else:
            code = "" if new == "0" else new
    return "".join(chars), codes


def test_characters_are_shaded_by_their_streams_on_a_terminal_only(folder):
    """The shade of every character, given or generated, is that of its streams when the whole text is read."""
    flags = [sys.executable, str(ROOT / "sample.py"), "--prompt", "The br", "--max_new_tokens", "9",
             "--temperature", "0", "--show_bubbles"]
    shaded, codes = unshade(on_a_terminal(flags))
    plain = subprocess.run(flags, capture_output=True, text=True, check=True).stdout
    without = subprocess.run(flags[:-1], capture_output=True, text=True, check=True).stdout
    assert "\33" not in plain + on_a_terminal(flags, NO_COLOR="1") + on_a_terminal(flags, TERM="dumb")
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
    sample.main(["--show_bubbles", "--prompt", "FILE:given.txt", "--max_new_tokens", "0"])
    assert capsys.readouterr().out.startswith(VERSE + "\nstreams: ")


def test_the_map_is_drawn_and_a_bad_path_is_refused_before_anything_is_done(folder, capsys):
    for name in ("bubbles.png", "bubbles.svg"):
        sample.main(["--plot", name, "--max_new_tokens", "100", "--prompt", "$x$ \u2014 O\n"])
        assert Path(name).stat().st_size > 5000
    for bad in ("bubbles.doc", "no/such/folder.png"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            sample.main(["--plot", bad])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "" and repr(bad) in err and len(err.splitlines()) == 1


def test_the_picture_of_the_method_is_drawn_from_what_fork_layers_do(folder):
    rows = figures.worked_example()
    assert [tok for tok, _, _ in rows] == [[0, 1, 2, 3], [0, 0, 1, 2, 2, 3], [0, 0, 1, 2, 3, 3]]
    assert rows[2][1] == pytest.approx([.56, 1, 1, 1, .8, 1], rel=1e-4)
    assert rows[2][2] == [(0, False), (1, False), (2, False), (4, False), (5, True), (5, False)]
    figures.main(["--results", "results"])
    assert Path("results/method.png").stat().st_size > 10000
