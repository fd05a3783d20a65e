"""The images of a bulk run: folders, lists, data sets, tar and Parquet files, with their labels."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from camkit.bulk.items import (
    Failure,
    FilePlace,
    Item,
    printable,
    safe_key,
    without_suffix,
)
from camkit.bulk.parquet_rows import ParquetRows
from camkit.bulk.tars import COMPRESSED, TarShards
from camkit.data import DataSet, Sample
from camkit.data.labels import ImageLabels
from camkit.data.layouts import DATASET_FILES, find_layout, open_with
from camkit.data.names import split_line
from camkit.data.reading import Reading
from camkit.errors import DataError, nearby
from camkit.formats import find_image, is_image, missing_plugin

_READ = 1 << 20

SourceKind: TypeAlias = Literal["auto", "folder", "list", "dataset", "tar", "parquet"]


@runtime_checkable
class Source(Protocol):
    """Images in a fixed order; the text of a source is part of the settings of a run.

    A source is iterated several times. It should not hold a list of all images. Whatever it cannot
    offer as an `Item` it yields as a `Failure`, so that nothing is lost silently; the name of a
    failure is not the key of an image.
    """

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes that items give by index; None if there are none."""

    def __iter__(self) -> Iterator[Item | Failure]: ...


class _BelowRoot:
    """A source of photos below a folder, which identifies the source in the settings."""

    root: Path

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            hint = nearby(self.root) or "; give the folder of the photos"
            raise DataError(f"{self.root} is not a folder{hint}")

    def __str__(self) -> str:
        return f"folder {printable(os.fspath(self.root.resolve()))}"


@dataclass(frozen=True)
class PhotoFolder(_BelowRoot):
    """All photos below a folder, recognised by their suffix; links to folders are followed.

    Keys are paths below the folder without suffix. A photo keeps its suffix if another photo has
    the same name without suffix, or is called like that name.
    Left out are names that start with a dot, other suffixes, and pictures whose plug-in is missing.
    """

    root: Path
    classes: None = None

    def __iter__(self) -> Iterator[Item | Failure]:
        return _walk(self.root, "", (), Counter())

    def skipped(self) -> Counter[str]:
        """Count the files that are left out, by reason; this lists the whole folder.

        Reasons are a suffix, "without suffix", "HEIF without its plug-in" and the like, and
        "hidden": pictures and folders whose names start with a dot.
        """
        reasons = Counter[str]()
        for _ in _walk(self.root, "", (), reasons):
            pass
        return reasons


def _walk(
    folder: Path, prefix: str, above: tuple[str, ...], skipped: Counter[str]
) -> Iterator[Item | Failure]:
    try:
        real = os.path.realpath(folder)
        with os.scandir(folder) as entries:
            found = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        reason = f"{folder} cannot be listed ({error.strerror})"
        yield Failure(printable(prefix) or ".", "list", reason)
        return
    if real in above:
        reason = f"{folder} is a link to a folder that contains it"
        yield Failure(printable(prefix), "list", reason)
        return
    names = [(name, is_folder) for name, is_folder in found if name[0] != "."]
    hidden = sum(is_folder or is_image(name) for name, is_folder in found if name[0] == ".")
    skipped.update({"hidden": hidden} if hidden else {})
    photos = [name for name, is_folder in names if not is_folder and is_image(name)]
    stems = Counter(without_suffix(printable(name)) for name in photos)
    stems.update(printable(name) for name in photos)  # a.jpg.png beside a.jpg and a.png
    for name, is_folder in names:
        if is_folder:
            yield from _walk(folder / name, f"{prefix}{name}/", (*above, real), skipped)
        elif (kind := missing_plugin(name)) is not None:
            skipped[f"{kind} without its plug-in"] += 1
        elif is_image(name):
            stem = without_suffix(printable(name))
            key = printable(prefix) + (stem if stems[stem] == 1 else printable(name))
            yield Item(key, FilePlace(folder / name), origin="")
        else:
            skipped[printable(PurePosixPath(name).suffix.lower()) or "without suffix"] += 1


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


@dataclass(frozen=True)
class PhotoList(_BelowRoot):
    """The photos of a list file, one per line, or separated by NUL (``find -print0``).

    After the path of a photo, a line may contain the path of a mask (PSA) or class indices (CLIP-ES
    on COCO). Absolute paths must lie below ``root``; a name without suffix gets that of the file
    that exists.

    Attributes:
        path: the list.
        root: folder that relative paths start at.
    """

    path: Path
    root: Path
    classes: None = None

    def __iter__(self) -> Iterator[Item | Failure]:
        for number, line in enumerate(self._lines(), start=1):
            try:
                name, classes = split_line(line)
                relative = self._relative(name)
                key = safe_key(relative)
            except (DataError, ValueError) as error:
                reason = f"{self.path}, entry {number}: {error}"
                yield Failure(f"{printable(line)[:200]} (entry {number})/", "list", reason)
                continue
            stem = without_suffix(key) if is_image(key) else key
            yield Item(stem, FilePlace(self._existing(relative)), classes, key)

    def _existing(self, relative: str) -> Path:
        """Return the path of a photo, with the suffix of the file that exists if it has none."""
        path = self.root / relative
        if is_image(path.name):
            return path
        return find_image(path.parent, path.name) or path

    def _lines(self) -> Iterator[str]:
        """Yield the entries that are not blank; bytes that are not UTF-8 are kept."""
        try:
            with self.path.open("rb") as file:
                start = file.read(_READ)
                file.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
                null = b"\0" in start
                for raw in _between_nulls(file) if null else _split_lines(file):
                    if raw.strip():
                        yield os.fsdecode(raw.strip(b"\r\n") if null else raw.strip())
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}); check it") from error

    @cached_property
    def _roots(self) -> tuple[str, str]:
        """The root as text, as it was given and without links."""
        return os.fspath(self.root), os.fspath(self.root.resolve())

    def _relative(self, text: str) -> str:
        if not text.startswith("/"):
            return text
        for root in self._roots:
            if root and text.startswith(root.rstrip("/") + "/"):
                return text[len(root) :].lstrip("/")
        below = text.lstrip("/")  # PSA's lists start with a slash: /JPEGImages/a.jpg
        if os.path.exists(text) and not os.path.exists(self.root / below):  # noqa: PTH110 - as above
            raise DataError(f"{printable(text)} lies outside of {self.root}; give another --root")
        return below


def _split_lines(file: BinaryIO) -> Iterator[bytes]:
    for line in file:
        yield from line.splitlines()


def _between_nulls(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while block := file.read(_READ):
        *entries, rest = (rest + block).split(b"\0")
        yield from entries
    yield rest


@dataclass(frozen=True, eq=False)
class DataSetPhotos:
    """A split of a data set in a known layout, with its image-level labels."""

    dataset: DataSet
    split: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    def __iter__(self) -> Iterator[Item | Failure]:
        return iter(self._entries)

    @cached_property  # without a label file, the labels are read from every mask
    def _entries(self) -> tuple[Item | Failure, ...]:
        return tuple(
            Failure(f"{self.split}, entry {number}/", "list", str(entry))
            if isinstance(entry, DataError)
            else Item(
                printable(entry.name), FilePlace(entry.photo), entry.classes, self._origin(entry)
            )
            for number, entry in enumerate(self.dataset.entries(self.split), start=1)
        )

    def _origin(self, entry: Sample) -> str:
        photo, root = entry.photo, self.dataset.root
        return printable(str(photo.relative_to(root) if photo.is_relative_to(root) else photo))

    def __str__(self) -> str:
        return f"data set {printable(os.fspath(self.dataset.root.resolve()))}"


@dataclass(frozen=True, eq=False)
class Labelled:
    """The images of another source with the classes of a label file.

    Attributes:
        source: of the images.
        labels: found by the key, as `ImageLabels.entry` does.
        partial: images without an entry have unknown classes, instead of being failures.
    """

    source: Source
    labels: ImageLabels
    partial: bool = False

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.labels.classes

    def __iter__(self) -> Iterator[Item | Failure]:
        for entry in self.source:
            if isinstance(entry, Failure):
                yield entry
                continue
            key = entry.key
            try:
                yield replace(entry, classes=self.labels.of(key))
            except DataError as error:
                yield entry if self.partial else Failure(key, "list", str(error))

    def __str__(self) -> str:
        return str(self.source)


def open_source(  # noqa: PLR0913 - each kind of source has its own settings
    path: Path,
    *,
    kind: SourceKind = "auto",
    split: str | None = None,
    root: Path | None = None,
    image: str = "image",
    key: str | None = None,
    labels: str | None = None,
    reading: Reading | None = None,
) -> Source:
    """Open a folder, a list, a data set or shards.

    Args:
        path: of the source.
        kind: what the path is; "auto" decides by its suffix or by what the folder contains.
        split: of a data set; may be omitted if it has only one.
        root: folder that the paths of a list start at; None is the folder of the list.
        image: Parquet column with the bytes of the images.
        key: Parquet column with the names; None numbers the rows.
        labels: Parquet column with class indices.
        reading: settings of a data set.

    Raises:
        DataError: the path does not exist, or is not of this kind.
    """
    if kind not in get_args(SourceKind):
        known = ", ".join(get_args(SourceKind))
        raise ValueError(f"`kind` must be one of {known}, got {kind!r}")
    if not path.exists():
        hint = nearby(path) or "; give a folder, a list or shards of images"
        raise DataError(f"{path} does not exist{hint}")
    asked = kind == "dataset"
    kind = _kind(path) if kind == "auto" else kind
    _check_reading(path, kind, reading)
    if kind == "folder":
        return PhotoFolder(path)
    if kind == "list":
        return PhotoList(path, path.parent if root is None else root)
    if kind == "dataset":
        dataset = _open_dataset(path, reading or Reading(), asked=asked)
        split = split or (dataset.splits[0] if len(dataset.splits) == 1 else None)
        if split not in dataset.splits:
            raise DataError(
                f"{path} has the splits {', '.join(dataset.splits)}; choose one (--split), "
                f"got {split}"
            )
        return DataSetPhotos(dataset, split)
    paths = tuple(sorted(_shards_in(path, kind))) if path.is_dir() else (path,)
    if not paths:
        raise DataError(f"{path} contains no .{kind} files directly")
    return TarShards(paths) if kind == "tar" else ParquetRows(paths, image, key, labels)


def _shards_in(folder: Path, kind: str) -> Iterator[Path]:
    """Yield the shards of a folder, also those that are compressed, which become failures."""
    for path in folder.iterdir():
        name = path.name.lower()
        packed = kind == "tar" and name.endswith(COMPRESSED)
        tar_inside = ".tar." in name or name.endswith((".tgz", ".tbz2", ".txz"))
        if path.name[0] != "." and (name.endswith(f".{kind}") or (packed and tar_inside)):
            yield path


def _check_reading(path: Path, kind: SourceKind, reading: Reading | None) -> None:
    """Refuse settings of a data set for anything else."""
    if kind != "dataset" and reading not in (None, Reading()):
        raise ValueError(
            f"{path} is read as a {kind}, to which no settings of a data set apply; leave out "
            "--layout, --data-classes, --void, --zero and --mask-values, or say --as dataset"
        )


def _open_dataset(path: Path, reading: Reading, *, asked: bool) -> DataSet:
    """Open a data set; where nobody asked for one, errors say how its photos alone are read."""
    try:
        return open_with(path, reading)
    except DataError as error:
        if asked or not path.is_dir():
            raise
        raise DataError(f"{error}; to read its photos only, say so (--as folder)") from error


def _kind(path: Path) -> SourceKind:
    kinds: dict[str, SourceKind] = {".tar": "tar", ".parquet": "parquet"}
    if not path.is_dir():
        suffix = path.suffix.lower()
        return "dataset" if suffix in DATASET_FILES else kinds.get(suffix, "list")
    for kind in kinds.values():
        if next(_shards_in(path, kind), None):
            return kind
    return "folder" if find_layout(path) is None else "dataset"
