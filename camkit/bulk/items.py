"""Images of a bulk run: keys, places of their bytes, classes, and failures."""

import hashlib
import os
import re
import stat
import unicodedata
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from camkit.errors import DataError

_LONGEST_NAME = 255  # bytes, the limit of file systems
_KEPT_BYTES = 160  # of a longer name, before its hash
_HASHED = re.compile(r"~[0-9a-f]{32}\Z")  # the end of a shortened name
_LIKE_A_RESULT = re.compile(r"\.(?:png|npy|npz)~*\Z")
_TO_ESCAPE = re.compile("[\0\ud800-\udfff]|\\\\(?=x[0-9a-f]{2}|u[0-9a-f]{4})")


@dataclass(frozen=True)
class Failure:
    """An image or file that could not be processed.

    Attributes:
        key: of the image, or the name of the file.
        stage: "list" (the source), "key" (two images of one name), "read", "model" or "write" in a
            bulk run; "list", "refine", "draw" or "score" for CAM files and masks.
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
        origin: which image of the source this is, whatever its key, the same in every run: two
            images with one key have different origins. None takes the text of the place.
    """

    key: str
    place: Place
    classes: tuple[int, ...] | None = None
    origin: str | None = None

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
    """A file in an uncompressed tar file, read by its offset."""

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
    r"""Escape what no database or terminal stores as text: invalid bytes, NUL, lone surrogates.

    Different texts stay different: a backslash is escaped where it would look like an escape.

    >>> printable(os.fsdecode(b"cat\xff")), printable(r"cat\xff"), printable("my\\cat")
    ('cat\\xff', 'cat\\x5cxff', 'my\\cat')
    """
    return _TO_ESCAPE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not valid text
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"


def without_suffix(key: str) -> str:
    """Remove the suffix of the last part of a key.

    >>> without_suffix("v1.5/a.b.jpg"), without_suffix(".jpg")
    ('v1.5/a.b', '.jpg')
    """
    return str(PurePosixPath(key).with_suffix(""))


def result_path(key: str, suffix: str, *, folds: bool = False) -> PurePosixPath:
    """Return the path of a result below the folder of its kind; each key has a path of its own.

    Names longer than a file system allows are shortened and end in a hash of the full name. A
    folder whose name could be that of a result, such as ``a.png``, gets a tilde.

    Args:
        key: of the image.
        suffix: of the file.
        folds: the file system takes names for equal that differ in case or in Unicode form, so
            that all but one form of a name also end in a hash.

    >>> str(result_path("a.png/b", ".png"))
    'a.png~/b.png'
    """
    *folders, last = key.split("/")
    marked = (name + "~" if _LIKE_A_RESULT.search(name) else name for name in folders)
    return PurePosixPath(
        *(_file_name(name, "", folds=folds) for name in marked),
        _file_name(last, suffix, folds=folds),
    )


def _file_name(name: str, suffix: str, *, folds: bool) -> str:
    raw = name.encode()
    fits = len(raw) + len(suffix) <= _LONGEST_NAME
    # a name that looks shortened gets a hash too, so that it is not that of a longer one
    if fits and not _HASHED.search(name) and not (folds and folded(name) != name):
        return name + suffix
    kept = raw[:_KEPT_BYTES].decode("utf-8", "ignore")
    return f"{kept}~{hashlib.sha256(raw).hexdigest()[:32]}{suffix}"


def folded(name: str) -> str:
    """Return the form that a name shares with all names some file systems take for equal."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFKC", name).casefold())
