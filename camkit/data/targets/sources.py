"""Where exported masks come from: results, bulk runs, folders of PNGs, data sets."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from camkit.data.camfiles import read_cam
from camkit.data.sample import DataSet, Sample, mask_ids, mask_values
from camkit.data.targets.packed import PackedPhoto, packed_photo
from camkit.data.targets.plan import MaskedImage
from camkit.data.targets.regions import VOID
from camkit.errors import DataError, require
from camkit.formats import find_image
from camkit.ops.images import resize_cam
from camkit.tensors import IGNORE, IGNORE_16
from camkit.untrusted import read_json

MANIFEST, _ERRORS, _JOURNAL = "manifest.jsonl", "errors.tsv", "journal.sqlite"
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
_CAMS = (".npy", ".npz", ".safetensors")


@runtime_checkable
class ResultLike(Protocol):
    """What an export reads of a `camkit.Result`."""

    @property
    def mask(self) -> Tensor: ...

    @property
    def cam(self) -> Tensor: ...

    @property
    def legend(self) -> dict[int, str]: ...

    @property
    def photo(self) -> Any: ...

    def picture(self) -> np.ndarray:
        """Return the photo."""


@dataclass(frozen=True)
class Entry:
    """An image of a source.

    Attributes:
        key: its name.
        split: if the source has splits.
        read: reads it.
    """

    key: str
    split: str | None
    read: Callable[[], MaskedImage]


@dataclass(frozen=True, eq=False)
class ResultMasks:
    """The masks of results that are in memory."""

    results: Sequence[ResultLike]

    @property
    def legend(self) -> Mapping[int, str]:
        """The name of each mask value."""
        return merged((result.legend, "the results") for result in self.results)

    def entries(self) -> Iterator[Entry]:
        """List the images, without reading them."""
        for number, result in enumerate(self.results):
            path = result.photo.path
            key = f"photo_{number:06d}" if path is None else path.stem
            yield Entry(key, None, partial(self._read, key, result))

    def _read(self, key: str, result: ResultLike) -> MaskedImage:
        mask, present = result.mask.cpu().numpy(), tuple(result.legend)
        values = with_void(mask, wide=mask.dtype != np.uint8)
        photo = result.photo.path or result.picture()
        return MaskedImage(key, values, photo, present, partial(_planes, present, result.cam[0]))


@dataclass(frozen=True, eq=False)
class RunMasks:
    """The masks of a folder that `camkit run` wrote.

    Attributes:
        root: the folder.
        images_folder: of the photos, where the manifest names none that exist.
    """

    root: Path
    images_folder: Path | None = None

    def _rows(self) -> Iterator[dict[str, Any]]:
        path = self.root / MANIFEST
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = read_json(line, path)
                    _check_row(row)
                except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
                    raise DataError(
                        f"{path}, line {number} is no line of a bulk run's manifest ({error!r}); "
                        "give the same command of `camkit run` again, which writes it anew"
                    ) from error
                if "mask" not in row:
                    raise DataError(
                        f"{path}, line {number}: {row['key']} has no mask; the run wrote class "
                        "maps only, so draw masks with `camkit mask` and export these"
                    )
                yield row

    @property
    def legend(self) -> Mapping[int, str]:
        path = str(self.root / MANIFEST)
        return merged((_legend_of(row), path) for row in self._rows())

    def entries(self) -> Iterator[Entry]:
        for row in self._rows():
            yield Entry(row["key"], None, partial(self._read, row))

    def _read(self, row: dict[str, Any]) -> MaskedImage:
        photo: Path | PackedPhoto | None = find_image(self.images_folder, row["key"])
        if photo is None and Path(row["source"]).is_file():
            photo = Path(row["source"])
        photo = photo or packed_photo(row["source"])
        maps = None if row.get("cam") is None else partial(self._maps, row)
        mask = read_values(self.root / row["mask"])
        return MaskedImage(row["key"], mask, photo, tuple(_legend_of(row)), maps)

    def _maps(self, row: dict[str, Any]) -> Mapping[int, Float[np.ndarray, "H W"]]:
        path, values = self.root / row["cam"], tuple(_legend_of(row))
        size = (int(row["size"][0]), int(row["size"][1]))
        if path.suffix == ".parquet":
            return _planes(values, _parquet_maps(path)[row["key"]], size)
        index = {c["index"]: value for c, value in zip(row["classes"], values, strict=True)}
        cam_file = read_cam(path)
        return _planes(tuple(index[c] for c in cam_file.classes), cam_file.cam, size)


@dataclass(frozen=True, eq=False)
class FolderMasks:
    """A folder of mask PNGs; folders such as ``train`` and ``val`` in it are splits.

    Attributes:
        root: the folder.
        legend: the name of each mask value.
        images_folder: of the photos, with the same names as the masks.
        cams: folder of CAM files with the same names, of which class i has the value i + 1.
    """

    root: Path
    legend: Mapping[int, str]
    images_folder: Path | None = None
    cams: Path | None = None

    def entries(self) -> Iterator[Entry]:
        for folder, folders, names in os.walk(self.root):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith(".png") and not name.startswith("."):
                    path = Path(folder, name)
                    key = path.relative_to(self.root).with_suffix("").as_posix()
                    first, _, rest = key.partition("/")
                    split = first if rest and first in _SPLITS else None
                    yield Entry(rest if split else key, split, partial(self._read, key, path))

    def _read(self, place: str, path: Path) -> MaskedImage:
        first, _, rest = place.partition("/")
        key = rest if first in _SPLITS and rest else place
        photo = find_image(self.images_folder, place) or find_image(self.images_folder, key)
        mask = read_values(path)
        size = (mask.shape[0], mask.shape[1])
        maps = None if self.cams is None else partial(self._maps, self.cams, key, size)
        return MaskedImage(key, mask, photo, maps=maps)

    def _maps(
        self, cams: Path, key: str, size: tuple[int, int]
    ) -> Mapping[int, Float[np.ndarray, "H W"]]:
        paths = [path for suffix in _CAMS if (path := cams / f"{key}{suffix}").is_file()]
        if not paths:
            raise DataError(f"{cams} has no file {key} ending in {', '.join(_CAMS)}; add it")
        cam_file = read_cam(paths[0])
        return _planes(tuple(c + 1 for c in cam_file.classes), cam_file.cam, size)


@dataclass(frozen=True, eq=False)
class DataSetMasks:
    """The true masks of a data set, in its splits.

    An image in two splits counts for train, val or test, else for the first.
    """

    data: DataSet

    @property
    def legend(self) -> Mapping[int, str]:
        return dict(enumerate(self.data.classes, start=1))

    def entries(self) -> Iterator[Entry]:
        seen: set[str] = set()
        splits = [split for split in self.data.splits if split not in ("trainval", "all")]
        # other lists, such as trainaug, hold images of these again
        splits.sort(key=lambda split: split not in _SPLITS)
        for split in splits or self.data.splits:
            for sample in self.data.split(split):
                if sample.mask is not None and sample.name not in seen:
                    seen.add(sample.name)
                    yield Entry(sample.name, split, partial(self._read, sample, sample.mask))

    def _read(self, sample: Sample, path: Path) -> MaskedImage:
        mask = mask_ids(path, size=None, num_classes=len(self.data.classes), form=sample.form)
        present = tuple(index + 1 for index in sample.classes)
        return MaskedImage(sample.name, mask.astype(np.int32), sample.photo, present)


MaskSource: TypeAlias = ResultMasks | RunMasks | FolderMasks | DataSetMasks
"""Masks to export: a ``legend``, which names mask values, and ``entries``, listed unread."""


def merged(legends: Iterable[tuple[Mapping[int, str], str]]) -> dict[int, str]:
    """Join legends, in the order of the values; two names of one value are a DataError."""
    whole: dict[int, str] = {}
    for legend, source in legends:
        for value, name in legend.items():
            if whole.setdefault(value, name) != name:
                raise DataError(
                    f"{source}: the mask value {value} stands for {whole[value]!r} and for "
                    f"{name!r}; export results of one list of classes at a time"
                )
    return dict(sorted(whole.items()))


def read_values(path: Path) -> Int[np.ndarray, "H W"]:
    """Read a mask of ids, with `VOID` for void."""
    values = mask_values(path)
    return with_void(values, wide=values.dtype != np.uint8)


def with_void(mask: Integer[np.ndarray, "H W"], *, wide: bool) -> Int[np.ndarray, "H W"]:
    """Put `VOID` in place of 255, or of 65535 in masks of more than 8 bits."""
    values = mask.astype(np.int32)
    values[values == (IGNORE_16 if wide else IGNORE)] = VOID
    return values


def check_values(image: MaskedImage, legend: Mapping[int, str]) -> None:
    """Raise DataError for values of a mask that have no name."""
    unknown = [value for value in image.values if value not in legend]
    if unknown:
        raise DataError(
            f"the mask of {image.key} holds {_in_short(unknown)}, but the classes name "
            f"{_in_short(list(legend))}; name every value in `classes` (--classes)"
        )


def _in_short(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "") or "none"


def _check_row(row: dict[str, Any]) -> None:
    """Raise for a line of a manifest that no bulk run writes, with files outside its folder."""
    _legend_of(row)
    for name in ("key", "source", "mask", "cam"):
        text = row[name] if name in ("key", "source") else row.get(name)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name} is no text")
    for path in map(PurePosixPath, (row.get("mask") or "", row.get("cam") or "")):
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{path} lies outside the folder")


def _legend_of(row: dict[str, Any]) -> dict[int, str]:
    return {int(value): name for value, name in row["legend"].items()}


def _planes(
    values: tuple[int, ...], cam: Tensor, size: tuple[int, int] | None = None
) -> Mapping[int, Float[np.ndarray, "H W"]]:
    """Return the map of each value, resized to the photo if it has another size."""
    if not values:
        return {}
    if size is not None and tuple(cam.shape[-2:]) != size:
        cam = resize_cam(cam[None], size)[0]
    return dict(zip(values, cam.float().cpu().numpy(), strict=True))


@lru_cache(maxsize=2)  # images of one file follow each other
def _parquet_maps(path: Path) -> dict[str, Tensor]:
    require("pyarrow", "class maps in Parquet need", "parquet")
    from pyarrow import parquet

    maps = {}
    for row in parquet.read_table(path).to_pylist():
        shape = (len(row["classes"]), row["height"], row["width"])
        maps[row["key"]] = torch.tensor(row["cam"], dtype=torch.float32).reshape(shape)
    return maps


def failed_images(root: Path) -> int:
    """Return how many images of a bulk run failed, and so have no mask."""
    path = root / _ERRORS
    if not path.is_file():
        return 0
    with path.open(encoding="utf-8") as file:
        return sum(1 for _ in file) - 1


def is_run(root: Path) -> bool:
    """Return whether a folder holds a bulk run; one that has not finished is a DataError."""
    if (root / _JOURNAL).is_file() and not (root / MANIFEST).is_file():
        if not (root / "masks").is_dir() and any(root.glob("*.png")):
            return False  # `camkit mask` keeps a journal too, and no manifest
        raise DataError(
            f"{root} holds a bulk run without {MANIFEST}, so it has not finished; give its command "
            "again, which does the rest"
        )
    return (root / MANIFEST).is_file()
