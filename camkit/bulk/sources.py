"""The images of a bulk run: folders, lists, data sets, tar and Parquet files, with their labels."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from camkit.bulk.items import (
    Failure,
    FilePlace,
    Item,
    TarPlace,
    printable,
    safe_key,
    without_suffix,
)
from camkit.data import DataSet
from camkit.data.labels import ImageLabels
from camkit.data.layouts import DATASET_FILES, find_layout, open_with
from camkit.data.names import split_line
from camkit.data.reading import Reading
from camkit.errors import CamkitError, DataError, nearby
from camkit.formats import find_image, is_image, missing_plugin

_MAX_LABEL_BYTES = 65536  # of a label file in a tar file

Members = dict[str, tarfile.TarInfo]
SourceKind: TypeAlias = Literal["auto", "folder", "list", "dataset", "tar", "parquet"]


@runtime_checkable
class Source(Protocol):
    """Images in a fixed order; the text of a source is part of the settings of a run.

    A source is iterated several times. It should not hold a list of all images.
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

    Keys are paths below the folder without suffix. Photos that differ only in their suffix keep it.
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
    for name, is_folder in names:
        if is_folder:
            yield from _walk(folder / name, f"{prefix}{name}/", (*above, real), skipped)
        elif (kind := missing_plugin(name)) is not None:
            skipped[f"{kind} without its plug-in"] += 1
        elif is_image(name):
            stem = without_suffix(printable(name))
            key = printable(prefix) + (stem if stems[stem] == 1 else printable(name))
            yield Item(key, FilePlace(folder / name))
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
        seen: dict[str, int] = {}
        for number, line in enumerate(self._lines(), start=1):
            try:
                name, classes = split_line(line)
                relative = self._relative(name)
                key = safe_key(relative)
            except DataError as error:
                reason = f"{self.path}, entry {number}: {error}"
                yield Failure(printable(line), "list", reason)
                continue
            key = without_suffix(key) if is_image(key) else key
            if key in seen:
                reason = f"is entry {seen[key]} of {self.path} already; remove one"
                yield Failure(f"{key} (entry {number})", "list", reason)
                continue
            seen[key] = number
            path = self.root / relative
            if not is_image(path.name):
                path = find_image(path.parent, path.name) or path
            yield Item(key, FilePlace(path), classes)

    def _lines(self) -> Iterator[str]:
        """Yield the entries that are not blank; bytes that are not UTF-8 are kept."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}); check it") from error
        data = data.removeprefix(b"\xef\xbb\xbf")
        for raw in data.split(b"\0") if b"\0" in data else data.splitlines():
            if raw.strip():
                yield os.fsdecode(raw.strip(b"\r\n") if b"\0" in data else raw.strip())

    def _relative(self, text: str) -> str:
        path = PurePosixPath(text)
        if not path.is_absolute():
            return text
        for root in (self.root, self.root.resolve()):
            if path.is_relative_to(root):
                return str(path.relative_to(root))
        below = text.lstrip("/")  # PSA's lists start with a slash: /JPEGImages/a.jpg
        if Path(text).exists() and not (self.root / below).exists():
            raise DataError(f"{printable(text)} lies outside of {self.root}; give another --root")
        return below


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
            Failure(f"{self.split}, entry {number}", "list", str(entry))
            if isinstance(entry, DataError)
            else Item(printable(entry.name), FilePlace(entry.photo), entry.classes)
            for number, entry in enumerate(self.dataset.entries(self.split), start=1)
        )

    def __str__(self) -> str:
        return f"data set {printable(os.fspath(self.dataset.root.resolve()))}"


@dataclass(frozen=True)
class TarShards:
    """WebDataset: tar files in which the files of an image follow each other, with equal stems.

    The key of an image is ``shard/path without suffixes``. Classes come from ``.cls`` (numbers
    separated by spaces or commas), else from ``.json``: ``{"classes": [numbers]}``,
    ``{"cls": number}``.

    Attributes:
        paths: uncompressed tar files.
    """

    paths: tuple[Path, ...]
    classes: None = None

    def __iter__(self) -> Iterator[Item | Failure]:
        for path in self.paths:
            shard, seen = printable(path.name.removesuffix(".tar")), set[str]()
            try:
                with tarfile.open(path, "r:") as tar:
                    for name, members in _samples(tar):
                        try:
                            item = _tar_item(path, tar, shard, name, members)
                        except DataError as error:
                            yield Failure(printable(f"{shard}/{name}"), "list", f"{path}: {error}")
                            continue
                        if item is None:
                            continue
                        if item.key in seen:
                            reason = f"{path} contains it more than once"
                            yield Failure(f"{item.key} (again)", "list", reason)
                            continue
                        seen.add(item.key)
                        yield item
            except (OSError, tarfile.TarError, EOFError) as error:
                reason = f"{path} cannot be read to its end as a tar file ({error}); unpack"
                yield Failure(shard, "list", f"{reason} compressed files first (gunzip)")

    def __str__(self) -> str:
        return f"shards in {_common_folder(self.paths)}"


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
    """Yield the files of each image: the name up to the first dot, and the files by suffix."""
    name, members = "", Members()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # it would keep every member
        if not member.isfile():
            continue
        folder, slash, last = member.name.rpartition("/")
        stem, _, suffix = last.partition(".")
        sample = folder + slash + stem
        if members and (sample != name or suffix.lower() in members):
            yield name, members
            members = {}
        name = sample
        members[suffix.lower()] = member
    if members:
        yield name, members


def _tar_item(
    path: Path, tar: tarfile.TarFile, shard: str, name: str, members: Members
) -> Item | None:
    photos = [member for suffix, member in members.items() if is_image(f"a.{suffix}")]
    if not photos:
        return None
    key = safe_key(name)
    if len(photos) > 1:
        names = ", ".join(photo.name for photo in photos)
        raise DataError(f"{key} has {len(photos)} images: {names}")
    photo, classes = photos[0], None
    suffix = "cls" if "cls" in members else "json"
    if suffix in members:
        member = members[suffix]
        file = tar.extractfile(member)
        if file is None or member.size > _MAX_LABEL_BYTES:
            raise DataError(f"{member.name} is too large for labels, {member.size} bytes")
        text = file.read().decode("utf-8", "replace")
        try:
            labels: Any = text.replace(",", " ").split() if suffix == "cls" else json.loads(text)
            if isinstance(labels, dict):
                labels = labels.get("classes", labels.get("cls"))
            classes = _class_indices(labels)
        except ValueError as error:
            raise DataError(f"{member.name} holds no class indices ({error})") from error
    place = TarPlace(path, photo.name, photo.offset_data, photo.size)
    return Item(f"{shard}/{key}", place, classes)


def _class_indices(labels: Any) -> tuple[int, ...] | None:
    """Return the sorted indices of a whole number, or of a sequence of whole numbers or digits."""
    if labels is None:
        return None
    row = labels if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
    return tuple(sorted({_class_index(label) for label in row}))


def _class_index(label: Any) -> int:
    whole = type(label) is int or (isinstance(label, float) and label.is_integer())
    if not whole and not (isinstance(label, str) and label.strip().isdecimal()):
        raise ValueError(f"expected whole numbers from 0, got {label!r}")
    if int(label) < 0:
        raise ValueError(f"expected indices from 0, got {label}")
    return int(label)


@dataclass(frozen=True)
class ParquetRows:
    """Parquet files with a column of image bytes, plain or as ``bytes`` of a struct (Hugging Face).

    The key of an image is ``file/`` and the text of its key column, or the number of its row.

    Attributes:
        paths: the files.
        image: column of bytes.
        key: column of names; None numbers the rows.
        labels: column of class indices, a number or a list; None if there is none.
    """

    paths: tuple[Path, ...]
    image: str = "image"
    key: str | None = None
    labels: str | None = None
    classes: None = None

    def __iter__(self) -> Iterator[Item | Failure]:
        for path in self.paths:
            shard = printable(path.name.removesuffix(".parquet"))
            try:
                file = _open_parquet(path)
            except DataError as error:
                yield Failure(shard, "list", str(error))
                continue
            names = file.schema_arrow.names
            for column in (self.image, self.key, self.labels):
                if column is not None and column not in names:
                    raise DataError(f"{path} has no column {column!r}; it has {', '.join(names)}")
            yield from self._rows(path, shard, file)

    def _rows(self, path: Path, shard: str, file: Any) -> Iterator[Item | Failure]:
        columns = [column for column in (self.key, self.labels) if column is not None]
        seen: set[str] = set()
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            table = file.read_row_group(group, columns=columns).to_pydict() if columns else {}
            for row in range(rows):
                name = str(number) if self.key is None else str(table[self.key][row])
                number += 1
                try:
                    key = f"{shard}/{safe_key(name)}"
                    labels = None if self.labels is None else table[self.labels][row]
                    item = Item(key, RowPlace(path, self.image, group, row), _class_indices(labels))
                except (DataError, ValueError, TypeError) as error:
                    yield Failure(f"{shard}/row {number}", "list", str(error))
                    continue
                if key in seen:
                    reason = f"{path} contains the key {key!r} twice; keys must differ"
                    yield Failure(f"{shard}/row {number}", "list", reason)
                    continue
                seen.add(key)
                yield item

    def __str__(self) -> str:
        return (
            f"rows in {_common_folder(self.paths)}, columns {self.image}, {self.key}, {self.labels}"
        )


@dataclass(frozen=True)
class RowPlace:
    """The bytes in a row of a Parquet file."""

    path: Path
    column: str
    group: int
    row: int

    def open(self) -> BytesIO:
        """Read the row; its group of rows is read as a whole and cached for the next rows."""
        value = _row_group(self.path, self.column, self.group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"{self} holds {type(data).__name__}, expected the bytes of an image")
        return BytesIO(data)

    def __str__(self) -> str:
        return f"{printable(os.fspath(self.path))}:group {self.group}, row {self.row}"


@lru_cache(maxsize=1)
def _row_group(path: Path, column: str, group: int) -> Any:
    return _open_parquet(path).read_row_group(group, columns=[column]).column(0)


def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CamkitError("Parquet needs pyarrow; install it with `pip install pyarrow`") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); copy it again") from error


def _common_folder(paths: Sequence[Path]) -> str:
    return printable(os.path.commonpath([path.resolve().parent for path in paths]))


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
    paths = tuple(sorted(path.glob(f"*.{kind}"))) if path.is_dir() else (path,)
    if not paths:
        raise DataError(f"{path} contains no .{kind} files directly")
    return TarShards(paths) if kind == "tar" else ParquetRows(paths, image, key, labels)


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
    for suffix, kind in kinds.items():
        if next(path.glob(f"*{suffix}"), None):
            return kind
    return "folder" if find_layout(path) is None else "dataset"
