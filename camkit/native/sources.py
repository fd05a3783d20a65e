"""How C++ of this package is compiled: files, flags, compiler and the name of the result.

Wheels and builds at first use share it. It needs only the standard library, as wheels are built
where neither camkit nor torch is installed.
"""

import hashlib
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

# No -ffast-math and no fused products: rounding decides the simplex of a pixel on a border. The two
# -fno flags change no value; they allow the compiler to vectorise loops that might raise a signal.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WIDE = ["-mavx2"]  # eight lanes; results have the same bits
SECONDS = 300  # a compiler that takes longer has failed


def has_wide() -> bool:
    """Whether processors of this machine's kind may have AVX2."""
    return platform.machine() in ("x86_64", "AMD64")


def flags(*, wide: bool) -> list[str]:
    """Return the compiler flags, for processors with AVX2 or for all of this kind."""
    return FLAGS + WIDE if wide else FLAGS


def stem(source: Path, *, wide: bool) -> str:
    """Return the name of a compiled source: it changes with the source, its headers and the flags.

    The compiler is not part of it: a library is used after its compiler was updated or removed.
    """
    headers = sorted(source.parent.glob("*.hpp"))
    texts = [path.read_bytes() for path in (source, *headers)]
    settings = f"{sys.platform} {platform.machine()} {' '.join(flags(wide=wide))}"
    variant = "avx2" if wide else "baseline"
    return f"{source.stem}-{variant}-{digest(*texts, settings.encode())}"


def command(source: Path, target: Path, *, wide: bool) -> list[str]:
    """Return the command that compiles a source.

    Raises:
        FileNotFoundError: there is no compiler.
    """
    return [*compiler_command(), *flags(wide=wide), str(source), "-o", str(target)]


def compiler_command() -> list[str]:
    """Return the C++ compiler as a command: CXX with its arguments, else c++, g++ or clang++.

    Raises:
        FileNotFoundError: there is none, or camkit supports none on this system.
    """
    if sys.platform == "win32":
        raise FileNotFoundError("camkit compiles nothing on Windows")
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C++ compiler found; install g++ or clang++, or name one in CXX")


def digest(*parts: bytes) -> str:
    """Return sixteen characters that change with any of the parts."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
