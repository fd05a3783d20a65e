"""One image of a bulk run: its key, where its bytes are, and what it shows."""

import hashlib
import os
import stat
import tarfile
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from camkit.errors import DataError

_LONGEST = 255  # bytes that file systems allow a name
_KEPT = 160  # bytes of a longer name that stay readable


@runtime_checkable
class Place(Protocol):
    """Where the bytes of an image are; picklable, its text is what errors and manifests say."""

    def open(self) -> BufferedReader | BytesIO: ...


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        key: names the image and its results, with slashes for folders; no two of a run are alike.
        place: where its bytes are.
        classes: what it shows, from 0; None where the source does not say.
    """

    key: str
    place: Place
    classes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class Refused:
    """An entry of a source that cannot be an image of the run: its key, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True)
class FilePlace:
    """A file of its own."""

    path: Path

    def open(self) -> BufferedReader | BytesIO:
        """Open the file; a pipe or device, which may never end, is refused.

        Raises:
            DataError: it is no regular file, or cannot be read.
        """
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise DataError(f"{self} is no regular file; name an image file")
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self} cannot be read ({error.strerror}); check it") from error

    def __str__(self) -> str:
        return printable(os.fspath(self.path))


@dataclass(frozen=True)
class TarPlace:
    """A member of a tar file, read where it lies."""

    path: Path
    member: str
    offset: int
    size: int

    def open(self) -> BufferedReader | BytesIO:
        """Read the member.

        Raises:
            DataError: the tar file is gone or shorter than it was.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self} cannot be read ({error.strerror}); check it") from error
        if len(data) < self.size:
            raise DataError(f"{self} ends after {len(data)} of {self.size} bytes; copy it again")
        return BytesIO(data)

    def __str__(self) -> str:
        return printable(f"{self.path}:{self.member}")


def tar_place(path: Path, member: tarfile.TarInfo) -> TarPlace:
    """Where a member of an uncompressed tar file lies."""
    return TarPlace(path, member.name, member.offset_data, member.size)


def safe_key(text: str) -> str:
    """Make a key of a path that came from outside: it can name results, and only below a folder.

    Raises:
        DataError: the path is absolute, leads upwards, or names nothing.

    >>> safe_key("./cats//a.jpg")
    'cats/a.jpg'
    """
    parts = PurePosixPath(text).parts
    if text.startswith("/") or ".." in parts:
        raise DataError(
            f"{printable(text)!r} leads out of the folder of the results; give paths from the "
            "folder of the images downwards, without .."
        )
    if not parts:
        raise DataError(f"{text!r} names no image; remove the entry")
    return printable("/".join(parts))


def printable(text: str) -> str:
    """The text with bytes that are no text, and the NUL, spelled out: what a database can keep."""
    raw = text.encode("utf-8", "surrogateescape").replace(b"\0", b"\\x00")
    return raw.decode("utf-8", "backslashreplace")


def without_ending(key: str) -> str:
    """A key without the ending of its last part.

    >>> without_ending("v1.5/a.b.jpg"), without_ending(".jpg")
    ('v1.5/a.b', '.jpg')
    """
    return str(PurePosixPath(key).with_suffix(""))


def result_path(key: str, suffix: str) -> PurePosixPath:
    """Where results of a key go, below the folder of their kind; names too long are cut.

    A cut name ends in a hash of the whole one, so that two of them stay apart.
    """
    *folders, last = key.split("/")
    return PurePosixPath(*(_fitting(one, "") for one in folders), _fitting(last, suffix))


def _fitting(name: str, suffix: str) -> str:
    raw = name.encode()
    if len(raw) + len(suffix) <= _LONGEST:
        return name + suffix
    kept = raw[:_KEPT].decode("utf-8", "ignore")
    return f"{kept}~{hashlib.sha256(raw).hexdigest()[:16]}{suffix}"
