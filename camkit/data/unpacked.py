"""Archives and tables of images, unpacked once into the cache."""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from camkit.errors import DataError
from camkit.native.loader import cache_folder

_LOG = logging.getLogger("camkit")
_END = 65536  # bytes of both ends of a file that its fingerprint reads


def unpacked(files: Sequence[Path], write: Callable[[Path], None], version: str) -> Path:
    """Return the folder of the cache with what ``write`` makes of some files.

    The folder is made once, whole or not at all, under a fingerprint of names, sizes, times and
    both ends of the files. The logger "camkit" says so when it is made.

    Args:
        files: that are unpacked.
        write: fills a folder.
        version: of what it writes; part of the fingerprint.

    Raises:
        DataError: the cache cannot be written to.
    """
    cache = cache_folder()
    if cache is None:
        raise DataError(
            f"{files[0]} must be unpacked, but there is no folder to keep it in; name one in the "
            "environment variable CAMKIT_CACHE"
        )
    place = cache / "datasets" / _fingerprint(files, version)
    if place.is_dir():
        return place
    place.parent.mkdir(exist_ok=True)
    _LOG.warning("%s: unpacking %d files to %s, once", files[0].parent, len(files), place)
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
