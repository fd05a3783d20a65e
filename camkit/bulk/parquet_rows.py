"""Images in rows of Parquet files."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from camkit.bulk.items import Failure, Item, printable, safe_key
from camkit.bulk.tars import class_indices, common_folder
from camkit.errors import DataError, one_line, require
from camkit.printing import several


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
        common = Path(os.path.commonpath([path.resolve().parent for path in self.paths]))
        for path in self.paths:
            shard = printable(path.name.removesuffix(".parquet"))
            try:
                file = _open_parquet(path)
                self._check_rows(path, file)
                if path != self.paths[0]:
                    self._check_columns(path, file)
            except DataError as error:
                yield Failure(shard, "list", str(error))
                continue
            self._check_columns(path, file)  # a wrong name of a column ends the run at once
            yield from self._rows(path, shard, str(path.resolve().relative_to(common)), file)

    def _check_columns(self, path: Path, file: Any) -> None:
        names = file.schema_arrow.names
        for column in (self.image, self.key, self.labels):
            if column is not None and column not in names:
                known = one_line(", ".join(names))
                raise DataError(f"{path} has no column {column!r}; it has {known}")

    def _check_rows(self, path: Path, file: Any) -> None:
        stated = file.metadata.num_rows
        rows = sum(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups))
        if rows != stated:
            raise DataError(f"{path} states {several(stated, 'row')} and has {rows}; copy it again")

    def _rows(self, path: Path, shard: str, origin: str, file: Any) -> Iterator[Item | Failure]:
        columns = [column for column in (self.key, self.labels) if column is not None]
        seen = Counter[str]()
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            try:
                table = _columns(path, file, group, columns)
            except DataError as error:
                failed = f"rows {number + 1} to {number + rows}"
                number += rows
                yield Failure(f"{shard}, {failed}", "list", f"{failed} of {error}")
                continue
            for row in range(rows):
                own = number if self.key is None else table[self.key][row]
                number += 1
                if own is None:
                    problem = f"{path}: {self.key} is null; give the image a name"
                    yield Failure(f"{shard}, row {number}", "list", problem)
                    continue
                name = str(own)
                try:
                    key = f"{shard}/{safe_key(name)}"
                    classes = (
                        None if self.labels is None else class_indices(table[self.labels][row])
                    )
                except (DataError, ValueError, TypeError) as error:
                    yield Failure(f"{shard}, row {number}", "list", f"{path}: {error}")
                    continue
                if self.key is not None:
                    seen[name] += 1
                copy = f" ({seen[name]})" if seen[name] > 1 else ""
                place = RowPlace(path, self.image, group, row)
                yield Item(key, place, classes, printable(f"{origin}:{name}{copy}"))

    def __str__(self) -> str:
        return (
            f"rows in {common_folder(self.paths)}, columns {self.image}, {self.key}, {self.labels}"
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
    return _read_group(path, _open_parquet(path), group, [column]).column(0)


def _columns(path: Path, file: Any, group: int, columns: list[str]) -> dict[str, list[Any]]:
    """Return the values of columns of a group of rows."""
    if not columns:
        return {}
    try:
        return _read_group(path, file, group, columns).to_pydict()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read ({error}); give a column of text") from error


def _read_group(path: Path, file: Any, group: int, columns: list[str]) -> Any:
    from pyarrow import ArrowException

    try:
        return file.read_row_group(group, columns=columns)
    except (OSError, ArrowException) as error:
        raise DataError(
            f"{path} cannot be read ({one_line(error)}); copy it again and run with --retry"
        ) from error


def _open_parquet(path: Path) -> Any:
    require("pyarrow", "Parquet needs", "parquet")
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({one_line(error)}); copy it again and run with "
            "--retry"
        ) from error
