"""Find the compiled form of a source of this package: shipped, cached, or compiled now and kept."""

import contextlib
import ctypes
import functools
import logging
import multiprocessing
import os
import shlex
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from camkit.native import sources
from camkit.native.sources import compiler_command as compiler_command, digest as digest

_LOG = logging.getLogger("camkit")
_building = threading.Lock()


def load(name: str) -> ctypes.CDLL | None:
    """Return the compiled ``name``.cpp of this folder, or None if there is none.

    A wheel of this platform brings the library. Else it is compiled on first use, once for all
    processes, and cached (`named_cache`, or a folder of this user among the temporary files) under
    a name derived from source, flags and processor. With CAMKIT_NATIVE=0 in the environment nothing
    is compiled or loaded; with CAMKIT_NATIVE=cached nothing is compiled. The logger "camkit" warns
    once when a compiler starts, and once if plain torch is used instead.
    """
    if os.environ.get("CAMKIT_NATIVE") == "0":
        return None
    with _building:
        return _load(name)


def native_state(name: str) -> str:
    """Describe what `load` would return, and why; compile nothing."""
    if os.environ.get("CAMKIT_NATIVE") == "0":
        return "plain torch: switched off by CAMKIT_NATIVE=0"
    source = _source(name)
    for path in _libraries(source):
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path))
            shipped = path.parent == _shipped()
            return f"compiled{', shipped with camkit' if shipped else ' here'}: {path}"
    try:
        return f"compiled at first use by {' '.join(_compiler())}, kept in {writable_folders()[0]}"
    except OSError as error:
        return f"plain torch, slower: {error}"


def for_workers() -> dict[str, str]:
    """Return the environment for worker processes: they compile nothing that this one tried to."""
    return {"CAMKIT_NATIVE": "cached"} if _load.cache_info().currsize else {}


def _source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


def _shipped() -> Path:
    return Path(__file__).with_name("compiled")


@functools.cache
def _load(name: str) -> ctypes.CDLL | None:
    try:
        return _find_or_build(_source(name))
    except (OSError, subprocess.SubprocessError) as error:
        _tell("%s runs in plain torch, slower: %s", name, reason(error))
        return None


def _tell(message: str, *values: object) -> None:
    """Warn in the process that a user started; its workers would repeat it."""
    worker = multiprocessing.parent_process() is not None
    _LOG.log(logging.INFO if worker else logging.WARNING, message, *values)


def _find_or_build(source: Path) -> ctypes.CDLL:
    library = _first_that_loads(source)
    if library is not None:
        return library
    compiler, folders = " ".join(_compiler()), writable_folders()
    with locked(folders[0] / f"{source.stem}.lock"):
        library = _first_that_loads(source)  # another process may have compiled it meanwhile
        if library is not None:
            return library
        _tell(
            "compiling %s with %s, once, which takes ten seconds or so; it is kept in %s",
            *(source.stem, compiler, folders[0]),
        )
        with tempfile.TemporaryDirectory(dir=folders[0]) as build_folder:
            built = Path(build_folder) / "built.so"
            command = sources.command(source, built, wide=_wide())
            subprocess.run(command, check=True, capture_output=True, timeout=sources.SECONDS)
            return _kept(built.read_bytes(), sources.stem(source, wide=_wide()), folders)


def _first_that_loads(source: Path) -> ctypes.CDLL | None:
    """Return the first library that the system loads; a folder may forbid execution."""
    for path in _libraries(source):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    return None


def _libraries(source: Path) -> Iterator[Path]:
    """List the libraries of a source for this processor, the fastest first."""
    for wide in (True, False) if _wide() else (False,):
        stem = sources.stem(source, wide=wide)
        shipped = _shipped() / f"{stem}.so"
        if shipped.is_file():
            yield shipped
        yield from built_libraries(stem)


def _wide() -> bool:
    widest = torch.backends.cpu.get_cpu_capability()
    return sources.has_wide() and widest in ("AVX2", "AVX512")


def _kept(library: bytes, stem: str, folders: list[Path]) -> ctypes.CDLL:
    """Write a library to the first folder that it can be loaded from, and load it."""
    failure = OSError("no folder for compiled code")
    for folder in folders:
        path = folder / f"{stem}-{digest(library)}.so"
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            draft.write_bytes(library)
            draft.chmod(0o755)
            draft.replace(path)  # atomic
            return ctypes.CDLL(str(path))
        except OSError as error:
            failure = error
    raise OSError(
        f"compiled code cannot be loaded from {' or '.join(map(str, folders))} ({failure}); name a "
        "folder in CAMKIT_CACHE whose files may be executed"
    )


def built_libraries(stem: str) -> Iterator[Path]:
    """List the complete libraries in the caches whose name begins with ``stem``.

    A name ends in the digest of the file: loading an incomplete library can crash the process.
    """
    for folder in _caches():
        if not folder.is_dir() or _refused(folder):
            continue
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


def _caches() -> list[Path]:
    """Return the folders that compiled code is looked for in, whether they exist or not."""
    return [folder for folder in (named_cache(), _temporary_cache()) if folder is not None]


def writable_folders() -> list[Path]:
    """Return the folders that compiled code can be written to.

    Raises:
        OSError: there is none.
    """
    folders = [folder for folder in _caches() if _writable(folder) and folder in _caches()]
    if not folders:
        raise OSError(
            f"compiled code cannot be kept in {' or '.join(map(str, _caches())) or 'any folder'}; "
            "name a folder in CAMKIT_CACHE that can be written to"
        )
    return folders


def _compiler() -> list[str]:
    """Return the compiler if this process may use it.

    Raises:
        FileNotFoundError: it may not, or there is none.
    """
    if os.environ.get("CAMKIT_NATIVE") == "cached":
        raise FileNotFoundError("CAMKIT_NATIVE=cached, and no compiled library is in the cache")
    return compiler_command()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for, so that one compiles and the others load."""
    if sys.platform == "win32":
        raise OSError("camkit compiles nothing on Windows")
    import fcntl

    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "wb") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


def _temporary_cache() -> Path | None:
    """Return this user's folder among the temporary files; None if it is not theirs alone."""
    if sys.platform == "win32":
        return None
    folder = Path(tempfile.gettempdir()) / f"camkit-{os.getuid()}"
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return folder
    except OSError:
        return None
    # anybody may create a folder there; code is loaded from it only if nobody else can write it
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if private and not found.st_mode & 0o077 else None


def cache_folder() -> Path | None:
    """Return the folder of the cache, created; None if nothing can be written or trusted there."""
    folder = named_cache()
    return folder if folder is not None and _writable(folder) else None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return not _refused(folder)
    except OSError:
        return False


def reason(error: Exception) -> str:
    """Describe an error in one line, a failed compiler by its last line of output."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"{error.cmd[0]} failed with {error.returncode}: {last}"
    return str(error)
