"""Archives and tables of images, unpacked once into the cache."""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from camkit.errors import DataError
from camkit.native.loader import cache_folder, others_write
from camkit.printing import several

_LOG = logging.getLogger("camkit")
_NAME = re.compile(r"[0-9a-f]{32}|\.draft-.+")
_DAY = 24 * 3600
_UNUSED = 90 * _DAY  # seconds after which a folder is removed
_RECENT = 7 * _DAY  # a run may still read what was opened since
_MOST_BYTES = 100 * 2**30  # of all folders together
_END = 65536  # bytes of both ends of a file that its fingerprint reads


def unpacked(files: Sequence[Path], write: Callable[[Path], None], version: str) -> Path:
    """Return the folder of the cache with what ``write`` makes of some files.

    The folder is made once, whole or not at all, under a fingerprint of names, sizes, times and
    both ends of the files. The logger "camkit" says so when it is made. Then folders are removed
    that nobody opened for 90 days, and the oldest while all together have more than 100 GiB; those
    opened in the last 7 days are kept.

    Args:
        files: that are unpacked.
        write: fills a folder.
        version: of what it writes; part of the fingerprint.

    Raises:
        DataError: the cache cannot be written to, or others may write to the folder.
    """
    cache = cache_folder()
    if cache is None:
        raise DataError(
            f"{files[0]} must be unpacked, but there is no folder to keep it in; name one in the "
            "environment variable CAMKIT_CACHE"
        )
    place = cache / "datasets" / _fingerprint(files, version)
    place.parent.mkdir(mode=0o700, exist_ok=True)
    for folder in (place.parent, place):
        if folder.is_dir() and (reason := others_write(folder)) is not None:
            raise DataError(f"{folder} is not used: {reason}")
    if place.is_dir():
        with suppress(OSError):  # a cache that is only read
            os.utime(place)
        return place
    prune(place.parent)
    _LOG.warning(
        "%s: unpacking %s to %s, once", files[0].parent, several(len(files), "file"), place
    )
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=place.parent))
    try:
        write(draft)
        try:
            draft.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was faster
                raise
    except OSError as error:
        raise DataError(f"{files[0]} cannot be unpacked to {place} ({error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def prune(folder: Path, *, most: int = _MOST_BYTES) -> None:
    """Remove what was unpacked long ago.

    Args:
        folder: holds the unpacked folders; anything else in it stays.
        most: bytes of all together; folders opened in the last 7 days may exceed it.
    """
    now = time.time()
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    ages = {path: now - path.stat().st_mtime for path in found}
    sizes = {path: _size(path) for path in found}
    total = sum(sizes.values())
    for path in sorted(ages, key=ages.__getitem__, reverse=True):
        draft = path.name.startswith(".")
        spare = draft or total > most or ages[path] > _UNUSED
        if ages[path] > _RECENT and spare:
            _LOG.info("removing %s, last used %d days ago", path, ages[path] // _DAY)
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def _size(folder: Path) -> int:
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files)


def _fingerprint(files: Sequence[Path], version: str) -> str:
    digest = hashlib.sha256(version.encode())
    for path in files:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
                digest.update(file.read(_END))
                file.seek(max(0, status.st_size - _END))
                digest.update(file.read(_END))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check it") from error
    return digest.hexdigest()[:32]
