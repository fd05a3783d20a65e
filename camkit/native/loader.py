"""Compile a source of this package once, cache the library in a folder, and load it."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

_LOG = logging.getLogger("camkit")
# No -ffast-math and no fused products: rounding decides the simplex of a pixel on a border. The two
# -fno flags change no value; they allow the compiler to vectorise loops that might raise a signal.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]
_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_SECONDS = 300  # a compiler that takes longer has failed
_building = threading.Lock()


def load(name: str) -> ctypes.CDLL | None:
    """Return the compiled ``name``.cpp of this folder, or None if it cannot be compiled.

    The source is compiled on first use and cached (`named_cache`) under a name derived from source,
    flags, compiler and processor; several processes may build at the same time. With
    CAMKIT_NATIVE=0 in the environment nothing is built or loaded. The logger "camkit" reports a
    failure once, at INFO.
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
    flags = list(_FLAGS)
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if wide and platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mavx2")  # eight lanes; results have the same bits
    headers = sorted(source.parent.glob("*.hpp"))
    texts = [path.read_bytes() for path in (source, *headers)]
    version = [*compiler, "--version"]
    compiled_by = subprocess.run(version, check=True, capture_output=True, timeout=_SECONDS).stdout
    settings = " ".join(flags).encode(), platform.machine().encode(), compiled_by
    stem = f"{source.stem}-{digest(*texts, *settings)}"
    for path in built_libraries(stem):
        return ctypes.CDLL(str(path))
    folder = cache_folder()
    with tempfile.TemporaryDirectory(dir=folder) as build_folder:
        built = Path(build_folder) / f"{stem}.so"
        command = [*compiler, *flags, str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        if folder is None:
            return ctypes.CDLL(str(built))  # stays loaded after its file is deleted
        path = folder / f"{stem}-{digest(built.read_bytes())}.so"
        built.chmod(0o755)
        built.replace(path)  # atomic
    return ctypes.CDLL(str(path))


def built_libraries(stem: str) -> Iterator[Path]:
    """List the complete libraries in the cache whose name begins with ``stem``.

    A name ends in the digest of the file: loading an incomplete library can crash the process.
    """
    folder = named_cache()
    if folder is None or not folder.is_dir() or _refused(folder):
        return
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if not _refused(path) and path.stem.rpartition("-")[2] == digest(path.read_bytes()):
            yield path


def _refused(path: Path) -> bool:
    """Return whether to leave a folder or a library alone, and warn about it once."""
    reason = others_write(path)
    if reason is not None:
        _warn(f"{path} is not used: {reason}")
    return reason is not None


@functools.cache
def _warn(text: str) -> None:
    _LOG.warning("%s", text)


def others_write(path: Path) -> str | None:
    """Return why another user could have put code there, and what to do; None if none could.

    What is loaded from the cache runs as this user. Its folder and files must belong to the user or
    to root, and neither group nor others may write to them; no folder above may be open to all.
    """
    if not hasattr(os, "getuid"):
        return None
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        return "it belongs to another user; name a folder of your own in CAMKIT_CACHE"
    if status.st_mode & 0o022:
        return f"others may write to it; run `chmod go-w {shlex.quote(str(path))}`"
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:
            return f"anybody may replace it in {folder}; name another folder in CAMKIT_CACHE"
    return None


def compiler_command() -> list[str]:
    """Return the C++ compiler as a command: CXX with its arguments, else c++, g++ or clang++.

    Raises:
        FileNotFoundError: there is none.
    """
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C++ compiler found; install g++ or clang++, or name one in CXX")


def named_cache() -> Path | None:
    """Return $CAMKIT_CACHE, $XDG_CACHE_HOME/camkit or ~/.cache/camkit; None without a home."""
    if os.environ.get("CAMKIT_CACHE"):
        return Path(os.environ["CAMKIT_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "camkit"
    try:
        return Path("~/.cache/camkit").expanduser()
    except RuntimeError:  # this user has no home folder
        return None


def cache_folder() -> Path | None:
    """Return the folder of the cache, created; None if nothing can be written or trusted there."""
    folder = named_cache()
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None if _refused(folder) else folder
    except OSError:
        return None


def digest(*parts: bytes) -> str:
    """Return sixteen characters that change with any of the parts."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def reason(error: Exception) -> str:
    """Describe an error in one line, a failed compiler by its last line of output."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"{error.cmd[0]} failed with {error.returncode}: {last}"
    return str(error)
