"""
Linux's source as a text to train on: python experiments/linux.py --tarball linux-6.1.tar.xz

At 260 MB it is not exhausted by a model of a few million parameters, as 5 MB of plays are. The tarball is kernel.org's,
or /usr/src/linux-source-6.1.tar.xz of Debian's package linux-source-6.1; nothing in it is run. What is taken: .c .h .S
.rst .txt in ASCII of at most 200 kB each, but no register headers that a program wrote. The files are shuffled, so that
the last tenth, which validates, is like the rest.
"""
import hashlib
import lzma
import random
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.files import make_folder, write_atomically  # noqa: E402
from tools.program import knob, read_flags, refuse, run_program  # noqa: E402

ENDINGS = ".c", ".h", ".S", ".rst", ".txt"
GENERATED = "/drivers/gpu/drm/amd/include/"


@dataclass
class Settings:
    tarball: str = knob("linux-6.1.tar.xz", "Linux's source, as kernel.org's linux-6.1.tar.xz")
    out: str = knob("data/linux.txt", "the text to write")
    megabytes: int = knob(260, "its size, in millions of bytes, up to a whole file", low=1)


def read_files(tarball):
    """The bytes of each file to take, by its name in the tarball."""
    files = {}
    with tarfile.open(tarball, "r|*") as archive:                     # a stream: it is read once, from end to end
        for member in archive:
            if (member.isfile() and member.size <= 200_000 and member.name.endswith(ENDINGS)
                    and GENERATED not in member.name):
                content = archive.extractfile(member).read()
                if content.isascii():
                    files[member.name.partition("/")[2]] = content    # without the folder that names the version
    return files


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    if Path(s.out).exists():
        refuse(f"--out {s.out} is there already, and runs may have been trained on it; remove it, or name another file")
    try:
        files = read_files(s.tarball)
    except (OSError, ValueError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        refuse(f"--tarball {s.tarball} cannot be read ({reason}); name the whole tarball of Linux's source")
    names = sorted(files)
    random.Random(0).shuffle(names)
    parts, size = [], 0
    for name in names:
        if size >= s.megabytes * 1_000_000:
            break
        parts.append(files[name])
        size += len(files[name])
    if size < s.megabytes * 1_000_000:
        refuse(f"--tarball {s.tarball} has {size:,} bytes of such text, less than --megabytes {s.megabytes}; name the "
               "whole tarball of Linux's source")
    text = b"".join(parts)
    make_folder(Path(s.out).parent, "--out")
    write_atomically(Path(s.out), lambda file: file.write(text))
    print(f"{s.out}: {len(text):,} bytes of {len(parts):,} files out of {len(names):,}, sha256 "
          f"{hashlib.sha256(text).hexdigest()}")


if __name__ == "__main__":
    run_program(main, "stopped")
