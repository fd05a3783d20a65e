"""Compile a source of this package once, keep the result in a cache folder, and load it."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

_LOG = logging.getLogger("camkit")
# No -ffast-math and no fused products: rounding decides the simplex of a pixel on a border. The two
# -fno flags change no value; they let loops be vectorised that would have to raise a signal.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]
_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_SECONDS = 300  # for a compiler to answer
_building = threading.Lock()


def load(name: str) -> ctypes.CDLL | None:
    """The compiled ``name``.cpp of this folder, or None where it cannot be had.

    Built on first use by the compiler that CXX names or else c++, g++ or
    clang++. It is kept in $CAMKIT_CACHE, $XDG_CACHE_HOME/camkit or ~/.cache/camkit, under a name
    made of source, flags, compiler and processor; processes that build at the same time do not
    disturb each other. With CAMKIT_NATIVE=0 in the environment nothing is built or loaded. What
    stands in the way is told once, at INFO, by the logger "camkit".
    """
    if os.environ.get("CAMKIT_NATIVE") == "0":
        return None
    with _building:
        return _load(name)


@functools.cache
def _load(name: str) -> ctypes.CDLL | None:
    try:
        return _find_or_build(Path(__file__).with_name(f"{name}.cpp"))
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.info("%s runs in plain torch, slower: %s", name, reason(error))
        return None


def _find_or_build(source: Path) -> ctypes.CDLL:
    compiler = compiler_command()
    flags = [*_FLAGS, *_processor_flags()]
    headers = sorted(source.parent.glob("*.hpp"))
    read = [path.read_bytes() for path in (source, *headers)]
    key = digest(*read, " ".join(flags).encode(), platform.machine().encode(), _says(compiler))
    stem = f"{source.stem}-{key}"
    named = named_cache()
    for path in sorted(named.glob(f"{stem}-*.so")) if named else []:
        # the name tells what the file must hold: loading half a library can end the process
        if path.name == f"{stem}-{digest(path.read_bytes())}.so":
            return ctypes.CDLL(str(path))
    folder = cache_folder()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        built = Path(place) / f"{stem}.so"
        command = [*compiler, *flags, str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        if folder is None:
            return ctypes.CDLL(str(built))  # stays loaded when its file is gone
        path = folder / f"{stem}-{digest(built.read_bytes())}.so"
        built.replace(path)  # at once, or not at all
    return ctypes.CDLL(str(path))


def compiler_command() -> list[str]:
    """The C++ compiler of this machine, with the arguments that CXX names."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C++ compiler found; install g++ or clang++, or name one in CXX")


def _says(compiler: list[str]) -> bytes:
    command = [*compiler, "--version"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
    return done.stdout


def _processor_flags() -> list[str]:
    """Eight lanes where this processor has them; the results are the same digits."""
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return ["-mavx2"] if wide and platform.machine() in ("x86_64", "AMD64") else []


def named_cache() -> Path | None:
    """Where builds are looked for: CAMKIT_CACHE, else a folder in the user's cache, if any."""
    if os.environ.get("CAMKIT_CACHE"):
        return Path(os.environ["CAMKIT_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "camkit"
    try:
        return Path("~/.cache/camkit").expanduser()
    except RuntimeError:  # nobody's home
        return None


def cache_folder() -> Path | None:
    """Where builds are kept; None where nothing can be written."""
    folder = named_cache()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def digest(*parts: bytes) -> str:
    """Sixteen characters that change with any of the parts."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def reason(error: Exception) -> str:
    """One line; of a compiler that failed the last it said."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{error.cmd[0]} failed with {error.returncode}: {last}"
    return str(error)
