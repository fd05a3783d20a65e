"""Photos inside tar and Parquet files, found by what a bulk run's manifest says of them."""

import re
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from camkit.errors import DataError, require

_IN_TAR = re.compile(r"(?P<path>.+\.tar):(?P<member>.+)", re.DOTALL)
_IN_PARQUET = re.compile(r"(?P<path>.+):group (?P<group>\d+), row (?P<row>\d+)", re.DOTALL)


@dataclass(frozen=True)
class PackedPhoto:
    """A photo inside another file.

    Attributes:
        path: the tar or Parquet file.
        member: its name in a tar file, or None.
        row: its group of rows and the row in it in a Parquet file.
    """

    path: Path
    member: str | None = None
    row: tuple[int, int] = (0, 0)

    @property
    def suffix(self) -> str:
        """The suffix of its name in a tar file, or nothing."""
        return "" if self.member is None else PurePosixPath(self.member).suffix.lower()

    def read(self) -> bytes:
        """Read its bytes.

        Raises:
            DataError: the file has changed since, or cannot be read.
        """
        try:
            if self.member is None:
                return _rows(self.path, self.row[0])[self.row[1]]
            offset, size = _members(self.path)[self.member]
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except (OSError, tarfile.TarError, KeyError, IndexError) as error:
            raise DataError(
                f"{self} cannot be read ({error}); give the folder of the photos (--images)"
            ) from error

    def __str__(self) -> str:
        return f"{self.path}:{self.member or 'group {}, row {}'.format(*self.row)}"


def packed_photo(source: str) -> PackedPhoto | None:
    """Return the photo that a manifest names as ``a.tar:member`` or ``a.parquet:group 0, row 1``.

    None if the text is neither, or the file does not exist.
    """
    parquet = _IN_PARQUET.fullmatch(source)
    if parquet is not None and Path(parquet["path"]).is_file():
        return PackedPhoto(Path(parquet["path"]), row=(int(parquet["group"]), int(parquet["row"])))
    shard = _IN_TAR.fullmatch(source)
    if shard is not None and Path(shard["path"]).is_file():
        return PackedPhoto(Path(shard["path"]), shard["member"])
    return None


@lru_cache(maxsize=2)  # images of a shard follow each other
def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Return the offset and size of each member of a tar file."""
    members = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep every member
            members[member.name] = (member.offset_data, member.size)
    return members


@lru_cache(maxsize=2)
def _rows(path: Path, group: int) -> list[bytes]:
    """Read the images of a group of rows: the column "image", else the first of bytes."""
    require("pyarrow", "Parquet needs", "parquet")
    import pyarrow as pa
    from pyarrow import parquet

    file = parquet.ParquetFile(path)

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    schema = file.schema_arrow
    columns = [name for name in schema.names if holds_bytes(schema.field(name).type)]
    if not columns:
        raise DataError(f"{path} holds no images; give the folder of the photos (--images)")
    column = "image" if "image" in columns else columns[0]
    values = file.read_row_group(group, columns=[column]).column(0).to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in values]
