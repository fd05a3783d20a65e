"""Which source a path is: a folder, a list, a data set, tar shards, Parquet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from camkit.bulk.shards import ParquetRows, TarShards
from camkit.bulk.sources import DataSetPhotos, PhotoFolder, PhotoList, Source
from camkit.data.folders import find_layout, open_dataset
from camkit.errors import DataError

SourceKind: TypeAlias = Literal["auto", "folder", "list", "dataset", "tar", "parquet"]


@dataclass(frozen=True)
class Opening:
    """How a path is opened as a source.

    Attributes:
        kind: what the path is; "auto" tells it by its ending, or by what lies in the folder.
        split: of a data set; None where it has only one.
        root: folder that the paths of a list begin at; None is the folder of the list.
        image: column of image bytes in Parquet.
        key: column of names in Parquet; None numbers the rows.
        labels: column of class indices in Parquet.
    """

    kind: SourceKind = "auto"
    split: str | None = None
    root: Path | None = None
    image: str = "image"
    key: str | None = None
    labels: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(SourceKind):
            known = ", ".join(get_args(SourceKind))
            raise ValueError(f"`kind` must be one of {known}, got {self.kind!r}")

    def __call__(self, path: Path) -> Source:
        """Open a path.

        Raises:
            DataError: it is not there, or not what it is said to be.
        """
        if not path.exists():
            raise DataError(f"{path} does not exist; name a folder, a list or shards of images")
        kind = _kind(path) if self.kind == "auto" else self.kind
        if kind == "folder":
            return PhotoFolder(path)
        if kind == "list":
            return PhotoList(path, path.parent if self.root is None else self.root)
        if kind == "tar":
            return TarShards(_files(path, ".tar"))
        if kind == "parquet":
            return ParquetRows(_files(path, ".parquet"), self.image, self.key, self.labels)
        return self._dataset(path)

    def _dataset(self, path: Path) -> DataSetPhotos:
        dataset = open_dataset(path)
        split = self.split or (dataset.splits[0] if len(dataset.splits) == 1 else None)
        if split not in dataset.splits:
            raise DataError(
                f"{path} has the splits {', '.join(dataset.splits)}; name one (--split), "
                f"got {split}"
            )
        return DataSetPhotos(dataset, split)


def _kind(path: Path) -> SourceKind:
    if path.is_dir():
        if next(path.glob("*.tar"), None):
            return "tar"
        if next(path.glob("*.parquet"), None):
            return "parquet"
        return "folder" if find_layout(path) is None else "dataset"
    suffixes: dict[str, SourceKind] = {".tar": "tar", ".parquet": "parquet"}
    return suffixes.get(path.suffix.lower(), "list")


def _files(path: Path, suffix: str) -> tuple[Path, ...]:
    found = tuple(sorted(path.glob(f"*{suffix}"))) if path.is_dir() else (path,)
    if not found:
        raise DataError(f"{path} holds no {suffix} files directly within it")
    return found
