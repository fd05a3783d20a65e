"""Images in large files: WebDataset tar shards, and Parquet with a column of image bytes."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from camkit.bulk.items import Failure, Item, TarPlace, is_image, printable, safe_key
from camkit.errors import CamkitError, DataError

_MAX_LABEL_BYTES = 65536  # of a label file in a shard

Members = dict[str, tarfile.TarInfo]


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
    """Return the sorted indices of a number or a sequence of numbers."""
    if labels is None:
        return None
    row = labels if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
    indices = sorted({int(label) for label in row})
    if indices and indices[0] < 0:
        raise ValueError(f"expected indices from 0, got {indices[0]}")
    return tuple(indices)


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
