"""What all targets share: options, classes, counts, photos in their places, JSON in a stream."""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt16
from PIL import Image

from camkit.data.names import has_image_suffix
from camkit.data.sample import unique_values
from camkit.data.targets.packed import PackedPhoto
from camkit.data.targets.regions import VOID, Region, Regions, regions_of
from camkit.errors import DataError
from camkit.levels import orientation, upright_size
from camkit.manifest import unfinished
from camkit.photo import opened, opened_bytes, read_levels
from camkit.printing import short_repr
from camkit.tensors import IGNORE, IGNORE_16

Photos: TypeAlias = Literal["copy", "link", "none"]


@dataclass(frozen=True)
class ExportOptions:
    """Settings of `export`.

    Attributes:
        regions: an annotation is all pixels of a "class" in an image, or a connected "component"
            of them. None takes "component" for YOLO and LabelMe, where an annotation is one
            outline, and "class" elsewhere. Masks of classes are the same either way.
        tolerance: outlines may be this many pixels off, which makes them short; 0 keeps every
            corner. 1 is below what annotators draw.
        least_area: components of fewer pixels become background, to remove the specks of pseudo
            masks; 1 keeps all.
        cams: folder of CAM files of a folder of masks, for confidences; bulk runs and results bring
            their own maps.
        splits: folder of lists such as ``train.txt``, one name per line; images on none of them are
            left out.
        val: share of the images that become the split "val", in [0, 1); the others are "train".
            None keeps the splits of the source, or puts all images into "train".
        rng_seed: of the choice of these images, which depends on nothing else but their names.
        photos: "copy" them, "link" to them, or "none": write annotations only.
        overwrite: remove an earlier export in the folder.
    """

    regions: Regions | None = None
    tolerance: float = 1.0
    least_area: int = 1
    cams: Path | None = None
    splits: Path | None = None
    val: float | None = None
    rng_seed: int = 0
    photos: Photos = "copy"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.regions not in (None, "class", "component"):
            raise ValueError(f'`regions` must be "class" or "component", got {self.regions!r}')
        if not self.tolerance >= 0:
            raise ValueError(f"`tolerance` must be at least 0 pixels, got {self.tolerance}")
        if self.least_area < 1:
            raise ValueError(f"`least_area` must be at least 1 pixel, got {self.least_area}")
        if self.val is not None and not 0 <= self.val < 1:
            raise ValueError(f"`val` must be a share in [0, 1), got {self.val}")
        if self.val is not None and self.splits is not None:
            raise ValueError("`val` makes splits and `splits` names them; give one of them")
        if self.photos not in ("copy", "link", "none"):
            raise ValueError(f'`photos` must be "copy", "link" or "none", got {self.photos!r}')


@dataclass(frozen=True, eq=False)
class MaskedImage:
    """An image to export.

    Attributes:
        key: its name, with slashes for folders.
        mask: 0 for background, `VOID` for void, else the values of the legend.
        photo: its file, its place in a tar or Parquet file, its colours in 0..255, or None if there
            is no photo.
        present: values of the classes that the image is known to hold, whatever the mask shows.
        maps: the class map of each value at the size of the mask, read when called.
    """

    key: str
    mask: Int[np.ndarray, "H W"]
    photo: Path | PackedPhoto | UInt8[np.ndarray, "H W 3"] | None = None
    present: tuple[int, ...] = ()
    maps: Callable[[], Mapping[int, Float[np.ndarray, "H W"]]] | None = None

    __repr__ = short_repr

    @property
    def name(self) -> str:
        """The name of its files, without suffix."""
        return file_name(self.key)

    @cached_property
    def values(self) -> list[int]:
        """The values in the mask, ascending, without background and void."""
        held = (unique_values(self.mask - VOID) + VOID).tolist()
        return [value for value in held if value > 0]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.mask.shape
        return rows, columns

    def confidence(self) -> Callable[[Region], float | None]:
        """Return the function that averages the class map of a region over its pixels."""
        maps = {} if self.maps is None else self.maps()

        def of(region: Region) -> float | None:
            plane = maps.get(region.value)
            return None if plane is None else round(float(region.of(plane).mean()), 4)

        return of


@dataclass
class Tally:
    """What an export has written so far, and what it lost."""

    images: dict[str, int]
    annotations: int = 0
    area: int = 0
    missed: int = 0
    added: int = 0
    void_dropped: int = 0
    reencoded: int = 0
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a target writes.

    Attributes:
        out: the folder.
        legend: the name of each mask value, in ascending order.
        splits: their names.
        kind: of the regions.
        options: of the export.
        tally: counts, filled while images are added.
    """

    out: Path
    legend: Mapping[int, str]
    splits: tuple[str, ...]
    kind: Regions
    options: ExportOptions
    tally: Tally = field(repr=False)

    @property
    def numbers(self) -> dict[int, int]:
        """The values renumbered without gaps, from 1, as targets need that number by place."""
        return {value: place for place, value in enumerate(self.legend, start=1)}

    def regions(self, image: MaskedImage) -> Iterator[Region]:
        """Yield the regions of an image and count them; void comes first and is not counted."""
        for region in regions_of(image.mask, self.kind):
            if region.value != VOID:
                self.tally.area += region.area
                self.tally.annotations += 1
            yield region

    def ids(self, image: MaskedImage) -> UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"]:
        """Return the numbers of the classes; void is 255, or 65535 if a number needs 16 bits."""
        wide = len(self.legend) >= IGNORE
        table = np.zeros(max(self.legend, default=0) + 2, np.uint16 if wide else np.uint8)
        for value, number in self.numbers.items():
            table[value] = number
        table[VOID] = IGNORE_16 if wide else IGNORE
        return table[image.mask]

    def check_room(self, target: str) -> None:
        """Raise DataError for more classes than a mask of 8 bits can hold."""
        if len(self.legend) >= IGNORE:
            raise DataError(
                f"{target} holds masks of 8 bits with at most {IGNORE - 1} classes, got "
                f"{len(self.legend)}; export to coco or hf, which hold more"
            )


Writer: TypeAlias = Callable[[Plan], AbstractContextManager[Callable[[MaskedImage, str], None]]]
"""Opens the files of a target; the function it yields adds an image to a split."""


def file_name(key: str) -> str:
    """Return a key as a file name: formats have no folders within a split.

    >>> file_name("more/cat.avif")
    'more__cat_avif'
    """
    return without_suffix(key).replace("/", "__")


def without_suffix(key: str) -> str:
    """Return a key without the dot of an image suffix, which readers would cut off.

    Keys end in a suffix where photos of one folder differ in nothing else.
    """
    if not has_image_suffix(key.rpartition("/")[2]):
        return key
    start, _, suffix = key.rpartition(".")
    return f"{start}_{suffix}"


def png_bytes(ids: np.ndarray, palette: list[int] | None = None) -> bytes:
    """Encode ids or colours as PNG."""
    image = Image.fromarray(ids)
    if palette is not None and ids.dtype == np.uint8:
        image.putpalette(palette)
    buffer = io.BytesIO()
    # colours take a third less time with the least effort; ids stay small with PIL's default
    level = 1 if image.mode == "RGB" else 6
    image.save(buffer, format="PNG", compress_level=level)
    return buffer.getvalue()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all; its folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as draft:
        draft.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a small text file in UTF-8, whole or not at all."""
    write_bytes(path, content.encode())


def place_photo(image: MaskedImage, folder: Path, plan: Plan, *, jpeg: bool = False) -> str:
    """Put the photo of an image into a folder, and return its file name.

    With ``photos="none"`` nothing is written, and the name is what the photo would have.

    Args:
        image: the image.
        folder: created if needed.
        plan: of the export.
        jpeg: photos of other formats are encoded again, for targets that want all suffixes equal.

    Raises:
        DataError: there is no photo, it cannot be read, or it has another size than the mask.
    """
    photo = image.photo
    if plan.options.photos == "none":
        kept = isinstance(photo, Path | PackedPhoto) and not jpeg
        suffix = photo.suffix if isinstance(photo, Path | PackedPhoto) and kept else ""
        return image.name + (suffix or ".jpg")
    suffix, content = encoded_photo(image, plan, jpeg=jpeg)
    path = folder / (image.name + suffix)
    if content is not None:
        write_bytes(path, content)
    elif isinstance(photo, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path) as draft:
            if plan.options.photos == "link":
                draft.symlink_to(photo.absolute())
            else:
                shutil.copyfile(photo, draft)
    return path.name


def encoded_photo(
    image: MaskedImage, plan: Plan, *, jpeg: bool = False
) -> tuple[str, bytes | None]:
    """Return the suffix of a photo, and its bytes if the photo's own file cannot serve.

    Photos that EXIF turns are encoded again, upright: masks are upright, and many trainers ignore
    EXIF.
    """
    if image.photo is None:
        raise DataError(
            f"{image.key} has no photo; give the folder of the photos (`images`, --images), or "
            'write annotations only (photos="none", --photos none)'
        )
    if isinstance(image.photo, np.ndarray):
        if image.photo.shape[:2] != image.size:
            raise DataError(_other_size(image, image.photo.shape[:2]))
        return (".jpg", _jpeg(image.photo)) if jpeg else (".png", png_bytes(image.photo))
    content = image.photo.read() if isinstance(image.photo, PackedPhoto) else None
    opening = (
        opened(image.photo)
        if isinstance(image.photo, Path)
        else opened_bytes(content or b"", str(image.photo))
    )
    with opening as picture:
        size = upright_size(picture)
        if size != image.size:
            raise DataError(_other_size(image, size))
        if orientation(picture) == 1 and (picture.format == "JPEG" or not jpeg):
            stated = ".jpg" if picture.format == "JPEG" else f".{picture.format}".lower()
            return ".jpg" if jpeg else image.photo.suffix.lower() or stated, content
    source = image.photo.open("rb") if isinstance(image.photo, Path) else io.BytesIO(content or b"")
    with source as file:
        read = read_levels(file, str(image.photo))
    for note in read.notes:
        plan.tally.notes[note] = plan.tally.notes.get(note, 0) + 1
    plan.tally.reencoded += 1
    return ".jpg", _jpeg(read.levels)


def _jpeg(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    buffer = io.BytesIO()
    # the highest quality that PIL advises, and colours at full size
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _other_size(image: MaskedImage, size: tuple[int, ...]) -> str:
    return (
        f"the mask of {image.key} has {image.size[0]}x{image.size[1]} pixels (rows x columns) but "
        f"its photo has {size[0]}x{size[1]}; export masks at the size of their photos"
    )


class JsonList:
    """A JSON file that ends in a long list or object, written item by item."""

    def __init__(self, file: TextIO, head: str) -> None:
        self._file, self._between = file, "\n"
        file.write(head)

    def add(self, item: Any) -> None:
        self._file.write(self._between + json.dumps(item, ensure_ascii=False))
        self._between = ",\n"

    def add_entry(self, key: str, item: Any) -> None:
        """Add to an object instead of a list."""
        text = f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(item, ensure_ascii=False)}"
        self._file.write(self._between + text)
        self._between = ",\n"


@contextmanager
def stream(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
        yield file
