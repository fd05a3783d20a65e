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

from camkit.bulk.items import Item, Refused, printable, safe_key, tar_place
from camkit.bulk.sources import ENDINGS
from camkit.errors import CamkitError, DataError

_MOST_LABEL_BYTES = 65536  # of a label file within a shard
_LABEL_ENDINGS = ("cls", "json")


@dataclass(frozen=True)
class TarShards:
    """WebDataset: tar files in which the files of one image stand together, alike but for endings.

    The key of an image is ``shard/path without its endings``. Classes come from ``.cls`` (numbers
    between spaces or commas), else from ``.json``: ``{"classes": [numbers]}``, ``{"cls": number}``.

    Attributes:
        paths: uncompressed tar files.
    """

    paths: tuple[Path, ...]
    classes: None = None

    def __iter__(self) -> Iterator[Item | Refused]:
        for path in self.paths:
            yield from _tar_items(path, printable(path.name.removesuffix(".tar")))

    def __str__(self) -> str:
        return f"shards in {_folder(self.paths)}"


def _tar_items(path: Path, shard: str) -> Iterator[Item | Refused]:
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for sample, members in _samples(tar):
                try:
                    item = _sample(path, tar, shard, sample, members)
                except DataError as error:
                    yield Refused(printable(f"{shard}/{sample}"), f"{path}: {error}")
                    continue
                if item is None:
                    continue
                if item.key in seen:
                    yield Refused(f"{item.key} (again)", f"{path} holds it more than once")
                    continue
                seen.add(item.key)
                yield item
    except (OSError, tarfile.TarError, EOFError) as error:
        yield Refused(
            shard,
            f"{path} cannot be read as a tar file, or not to its end ({error}); compressed ones "
            "have to be unpacked (gunzip)",
        )


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The files that stand together: the name up to the first dot of its last part, and endings."""
    name, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # it keeps every one it has seen
        if not member.isfile():
            continue
        folder, slash, last = member.name.rpartition("/")
        stem, _, ending = last.partition(".")
        sample = folder + slash + stem
        if members and (sample != name or ending.lower() in members):
            yield name, members
            members = {}
        name = sample
        members[ending.lower()] = member
    if members:
        yield name, members


def _sample(
    path: Path, tar: tarfile.TarFile, shard: str, sample: str, members: dict[str, tarfile.TarInfo]
) -> Item | None:
    photos = [one for end, one in members.items() if f".{end.rpartition('.')[2]}" in ENDINGS]
    if not photos:
        return None
    key = safe_key(sample)
    if len(photos) > 1:
        raise DataError(f"{key} has {len(photos)} images: {', '.join(p.name for p in photos)}")
    classes = None
    for ending in _LABEL_ENDINGS:
        if ending in members and classes is None:
            classes = _classes(tar, members[ending], ending)
    return Item(f"{shard}/{key}", tar_place(path, photos[0]), classes)


def _classes(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> tuple[int, ...] | None:
    file = tar.extractfile(member)
    if file is None or member.size > _MOST_LABEL_BYTES:
        raise DataError(f"{member.name} is too large for labels, {member.size} bytes")
    text = file.read().decode("utf-8", "replace")
    try:
        found: Any = text.replace(",", " ").split() if ending == "cls" else json.loads(text)
        if isinstance(found, dict):
            found = found.get("classes", found.get("cls"))
        return as_classes(found)
    except ValueError as error:
        raise DataError(f"{member.name} holds no class indices ({error})") from error


def as_classes(found: Any) -> tuple[int, ...] | None:
    """Class indices, ascending, of a number or a row of numbers; None of nothing.

    Raises:
        ValueError: they are no indices from 0.
    """
    if found is None:
        return None
    row = found if isinstance(found, Sequence) and not isinstance(found, str) else [found]
    indices = sorted({int(one) for one in row})
    if indices and indices[0] < 0:
        raise ValueError(f"expected indices from 0, got {indices[0]}")
    return tuple(indices)


@dataclass(frozen=True)
class ParquetRows:
    """Parquet files with a column of image bytes, plain or as ``bytes`` of a struct (Hugging Face).

    The key of an image is ``file/`` and its text in the key column, or its row number without one.

    Attributes:
        paths: the files.
        image: the column of bytes.
        key: the column of names; None numbers the rows.
        labels: the column of class indices, one number or a list; None where there is none.
    """

    paths: tuple[Path, ...]
    image: str = "image"
    key: str | None = None
    labels: str | None = None
    classes: None = None

    def __iter__(self) -> Iterator[Item | Refused]:
        for path in self.paths:
            shard = printable(path.name.removesuffix(".parquet"))
            try:
                file = _parquet(path)
            except DataError as error:
                yield Refused(shard, str(error))
                continue
            self._check_columns(path, file.schema_arrow.names)
            yield from self._rows(path, shard, file)

    def _check_columns(self, path: Path, names: Sequence[str]) -> None:
        for column in (self.image, self.key, self.labels):
            if column is not None and column not in names:
                raise DataError(f"{path} has no column {column!r}; it has {', '.join(names)}")

    def _rows(self, path: Path, shard: str, file: Any) -> Iterator[Item | Refused]:
        columns = [one for one in (self.key, self.labels) if one is not None]
        seen: set[str] = set()
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            table = file.read_row_group(group, columns=columns).to_pydict() if columns else {}
            for row in range(rows):
                name = str(number) if self.key is None else str(table[self.key][row])
                number += 1
                try:
                    key = _new(f"{shard}/{safe_key(name)}", seen, path)
                    found = None if self.labels is None else as_classes(table[self.labels][row])
                except (DataError, ValueError, TypeError) as error:
                    yield Refused(f"{shard}/row {number}", str(error))
                    continue
                yield Item(key, RowPlace(path, self.image, group, row), found)

    def __str__(self) -> str:
        columns = ", ".join(f"{one}" for one in (self.image, self.key, self.labels))
        return f"rows in {_folder(self.paths)}, columns {columns}"


@dataclass(frozen=True)
class RowPlace:
    """The bytes in a row of a Parquet file."""

    path: Path
    column: str
    group: int
    row: int

    def open(self) -> BytesIO:
        """Read the row; a group of rows is read at once, and kept for those that follow.

        Raises:
            DataError: the row holds no bytes.
        """
        value = _column(self.path, self.column, self.group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"{self} holds {type(data).__name__}, expected the bytes of an image")
        return BytesIO(data)

    def __str__(self) -> str:
        return f"{printable(os.fspath(self.path))}:group {self.group}, row {self.row}"


@lru_cache(maxsize=1)
def _column(path: Path, column: str, group: int) -> Any:
    return _parquet(path).read_row_group(group, columns=[column]).column(0)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CamkitError("Parquet needs pyarrow; install it with `pip install pyarrow`") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); copy it again") from error


def _new(key: str, seen: set[str], path: Path) -> str:
    if key in seen:
        raise DataError(f"{path} holds the key {key!r} more than once; keys must differ")
    seen.add(key)
    return key


def _folder(paths: Sequence[Path]) -> str:
    """The folder that all the paths lie in."""
    return printable(os.path.commonpath([path.resolve().parent for path in paths]))
