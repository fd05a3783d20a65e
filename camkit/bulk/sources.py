"""Where the images of a bulk run come from: folders, lists, data sets, shards; and their labels."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from camkit.bulk.camfiles import PHOTO_ENDINGS, ImageLabels
from camkit.bulk.items import FilePlace, Item, Refused, printable, safe_key, without_ending
from camkit.data import DataSet
from camkit.errors import DataError

ENDINGS = (*PHOTO_ENDINGS, ".gif", ".jfif", ".avif")


@runtime_checkable
class Source(Protocol):
    """Images in an order that is always the same; its text is part of the settings of a run.

    It may be gone through many times, and holds no list of all images where it can do without.
    """

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names that the classes of the items count; None where items have none."""

    def __iter__(self) -> Iterator[Item | Refused]: ...


@dataclass(frozen=True)
class PhotoFolder:
    """All photos below a folder, told by their endings; links to folders are followed.

    Keys are paths below the folder without their endings. Of two photos that differ by their ending
    alone both keep it. Entries whose name begins with a dot are left out.
    """

    root: Path
    classes: None = None

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise DataError(f"{self.root} is not a folder; name the one that holds the photos")

    def __iter__(self) -> Iterator[Item | Refused]:
        return _walk(self.root, "", ())

    def __str__(self) -> str:
        return f"folder {printable(os.fspath(self.root.resolve()))}"


def _walk(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[Item | Refused]:
    try:
        real = os.path.realpath(folder)
        with os.scandir(folder) as entries:
            names = sorted((one.name, _is_folder(one)) for one in entries if one.name[0] != ".")
    except OSError as error:
        yield Refused(printable(prefix) or ".", f"{folder} cannot be listed ({error.strerror})")
        return
    if real in above:
        yield Refused(printable(prefix), f"{folder} is a link to a folder that it lies in")
        return
    photos = [name for name, is_folder in names if not is_folder and _is_photo(name)]
    counts: dict[str, int] = {}
    for name in photos:
        stem = without_ending(printable(name))
        counts[stem] = counts.get(stem, 0) + 1
    for name, is_folder in names:
        if is_folder:
            yield from _walk(folder / name, f"{prefix}{name}/", (*above, real))
        elif _is_photo(name):
            stem = without_ending(printable(name))
            kept = stem if counts[stem] == 1 else printable(name)
            yield Item(printable(prefix) + kept, FilePlace(folder / name))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_photo(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ENDINGS  # noqa: PTH122 - millions of names


@dataclass(frozen=True)
class PhotoList:
    """The photos that a list names, one a line, or between NUL characters as of ``find -print0``.

    A line may hold the path of a mask behind that of the photo (PSA), or class indices (CLIP-ES on
    COCO). Paths begin at ``root``, absolute ones too where they lie below it; a name without an
    ending gets the one of the file that is there.

    Attributes:
        path: the list.
        root: folder of the photos.
    """

    path: Path
    root: Path
    classes: None = None

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise DataError(f"{self.root} is not a folder; name the one that holds the photos")

    def __iter__(self) -> Iterator[Item | Refused]:
        seen: dict[str, int] = {}
        for number, line in enumerate(_lines(self.path), start=1):
            try:
                item = self._item(line)
            except DataError as error:
                yield Refused(printable(line), f"{self.path}, entry {number}: {error}")
                continue
            if item.key in seen:
                reason = f"is entry {seen[item.key]} of {self.path} already; remove one"
                yield Refused(f"{item.key} (entry {number})", reason)
                continue
            seen[item.key] = number
            yield item

    def _item(self, line: str) -> Item:
        first, *others = line.split()
        indices = bool(others) and all(other.isdigit() for other in others)
        if not indices and not _is_photo(first):
            first = line  # a name with spaces in it
        relative = self._relative(first)
        key = safe_key(relative)
        return Item(
            without_ending(key) if _is_photo(key) else key,
            FilePlace(_with_ending(self.root / relative)),
            tuple(sorted({int(other) for other in others})) if indices else None,
        )

    def _relative(self, text: str) -> str:
        path = PurePosixPath(text)
        if not path.is_absolute():
            return text
        for root in (self.root, self.root.resolve()):
            if path.is_relative_to(root):
                return str(path.relative_to(root))
        below = text.lstrip("/")  # lists of PSA begin with a slash: /JPEGImages/a.jpg
        if Path(text).exists() and not (self.root / below).exists():
            raise DataError(f"{printable(text)} lies outside of {self.root}; name another --root")
        return below

    def __str__(self) -> str:
        return f"folder {printable(os.fspath(self.root.resolve()))}"


def _lines(path: Path) -> Iterator[str]:
    """The entries of a list that are not blank; bytes that are no UTF-8 stay what they are."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check it") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    for raw in data.split(b"\0") if b"\0" in data else data.splitlines():
        if raw.strip():
            yield os.fsdecode(raw.strip(b"\r\n") if b"\0" in data else raw.strip())


def _with_ending(path: Path) -> Path:
    if _is_photo(path.name):
        return path
    found = [path.with_name(path.name + ending) for ending in ENDINGS]
    return next((one for one in found if one.is_file()), path)


@dataclass(frozen=True, eq=False)
class DataSetPhotos:
    """A split of a data set in a known layout, with its image-level labels."""

    dataset: DataSet
    split: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    def __iter__(self) -> Iterator[Item | Refused]:
        return iter(self._entries)

    @cached_property  # without a file of labels, every mask is read for them
    def _entries(self) -> tuple[Item | Refused, ...]:
        return tuple(
            Refused(f"{self.split}, entry {number}", str(entry))
            if isinstance(entry, DataError)
            else Item(printable(entry.name), FilePlace(entry.photo), entry.classes)
            for number, entry in enumerate(self.dataset.entries(self.split), start=1)
        )

    def __str__(self) -> str:
        return f"data set {printable(os.fspath(self.dataset.root.resolve()))}"


@dataclass(frozen=True, eq=False)
class Labelled:
    """The images of another source, with the classes that a file of labels gives their names.

    Attributes:
        source: of the images.
        labels: by the last part of a key, or by the whole.
    """

    source: Source
    labels: ImageLabels
    classes: None = None

    def __iter__(self) -> Iterator[Item | Refused]:
        for one in self.source:
            if isinstance(one, Refused):
                yield one
                continue
            name = one.key if one.key in self.labels.classes else one.key.rpartition("/")[2]
            try:
                yield replace(one, classes=self.labels.of(name))
            except DataError as error:
                yield Refused(one.key, str(error))

    def __str__(self) -> str:
        return str(self.source)
