"""Images of a bulk run: keys, places of their bytes, classes, and failures."""

import hashlib
import os
import stat
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from camkit.errors import DataError

_LONGEST_NAME = 255  # bytes, the limit of file systems
_KEPT_BYTES = 160  # of a longer name, before its hash


@dataclass(frozen=True)
class Failure:
    """An image or file that could not be processed.

    Attributes:
        key: of the image, or the name of the file.
        stage: "list" (the source), "read", "model" or "write" in a bulk run; "list", "refine",
            "draw" or "score" for CAM files and masks.
        reason: in one line.
    """

    key: str
    stage: str
    reason: str


@runtime_checkable
class Place(Protocol):
    """Where the bytes of an image are. Picklable; its text appears in errors and manifests."""

    def open(self) -> BufferedReader | BytesIO: ...


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        key: unique name of the image and of its results, with slashes for folders.
        place: where its bytes are.
        classes: from 0; None if the source has no labels.
    """

    key: str
    place: Place
    classes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class FilePlace:
    """An image file."""

    path: Path

    def open(self) -> BufferedReader | BytesIO:
        """Open the file. Pipes and devices are refused, because reading them may never end."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise DataError(f"{self} is not a regular file; name an image file")
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self} cannot be read ({error.strerror}); check it") from error

    def __str__(self) -> str:
        return printable(os.fspath(self.path))


@dataclass(frozen=True)
class TarPlace:
    """A member of an uncompressed tar file, read by its offset."""

    path: Path
    member: str
    offset: int
    size: int

    def open(self) -> BufferedReader | BytesIO:
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


def safe_key(text: str) -> str:
    """Turn a path from outside into a key that cannot name anything outside the results folder.

    Raises:
        DataError: the path is absolute, contains "..", or is empty.

    >>> safe_key("./cats//a.jpg")
    'cats/a.jpg'
    """
    parts = PurePosixPath(text).parts
    if text.startswith("/") or ".." in parts:
        raise DataError(
            f"{printable(text)!r} points outside the results folder; give a path relative to the "
            "folder of the images, without .."
        )
    if not parts:
        raise DataError(f"{text!r} names no image; remove the entry")
    return printable("/".join(parts))


def printable(text: str) -> str:
    """Escape bytes that are not valid text, and NUL, so that a database can store the text."""
    raw = text.encode("utf-8", "surrogateescape").replace(b"\0", b"\\x00")
    return raw.decode("utf-8", "backslashreplace")


def without_suffix(key: str) -> str:
    """Remove the suffix of the last part of a key.

    >>> without_suffix("v1.5/a.b.jpg"), without_suffix(".jpg")
    ('v1.5/a.b', '.jpg')
    """
    return str(PurePosixPath(key).with_suffix(""))


def result_path(key: str, suffix: str) -> PurePosixPath:
    """Return the path of a result below the folder of its kind.

    Names longer than a file system allows are shortened and end in a hash of the full name, so
    that different keys have different files.
    """
    *folders, last = key.split("/")
    return PurePosixPath(*(_shortened(name, "") for name in folders), _shortened(last, suffix))


def _shortened(name: str, suffix: str) -> str:
    raw = name.encode()
    if len(raw) + len(suffix) <= _LONGEST_NAME:
        return name + suffix
    kept = raw[:_KEPT_BYTES].decode("utf-8", "ignore")
    return f"{kept}~{hashlib.sha256(raw).hexdigest()[:16]}{suffix}"
