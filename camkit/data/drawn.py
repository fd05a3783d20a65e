"""Masks drawn from annotations: outlines, run lengths, and how objects lie over each other."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from camkit.errors import DataError, require
from camkit.printing import short_repr

IGNORED_ID = -1
"""Id of pixels that are not scored."""

_FARTHEST = 10  # coordinates beyond this many image sizes are an error of the file


@dataclass(frozen=True, repr=False)
class CocoMask:
    """The mask of an image, drawn from its annotations in a file of COCO's form.

    pycocotools draws polygons and run lengths, as everywhere in the field. Crowd regions are
    ignored where no object lies. Where objects overlap, the smaller one is on top, of equal ones
    the later one.

    Attributes:
        image: file name of the photo, for errors.
        size: rows and columns.
        packed: the annotations, see `packed`.
    """

    image: str
    size: tuple[int, int]
    packed: bytes

    __repr__ = short_repr

    def read(self, path: Path, *, num_classes: int) -> Int[np.ndarray, "H W"]:
        """Draw the mask; ``path`` and ``num_classes`` are named in errors."""
        layers = []
        for number, value, crowd, segmentation in json.loads(zlib.decompress(self.packed)):
            source = f"{path}, annotation {number} of {self.image}"
            if not 0 < value <= num_classes:
                raise DataError(f"{source}: its class is none of the {num_classes} classes")
            pixels = coco_pixels(segmentation, self.size, source)
            layers.append((IGNORED_ID if crowd else value, pixels))
        return painted(by_area(layers), self.size)

    def digest(self, path: Path) -> str:  # noqa: ARG002 - the annotations are at hand
        """Identify the mask by its annotations."""
        content = repr(self.size).encode() + self.packed
        return hashlib.sha256(content).hexdigest()


def packed(annotations: Sequence[tuple[Any, int, bool, Any]]) -> bytes:
    """Pack the annotations of one image: id, class index + 1, crowd, segmentation.

    They take about as much memory as a third of their text, so a sample can bring its own to the
    processes that draw it.
    """
    text = json.dumps(annotations, separators=(",", ":"), allow_nan=True)
    return zlib.compress(text.encode(), 1)


def by_area(
    layers: Iterable[tuple[int, Bool[np.ndarray, "H W"]]],
) -> list[tuple[int, Bool[np.ndarray, "H W"]]]:
    """Order layers for `painted`: ignored regions first, then from the largest to the smallest."""
    return sorted(layers, key=lambda layer: (layer[0] != IGNORED_ID, -np.count_nonzero(layer[1])))


def painted(
    layers: Iterable[tuple[int, Bool[np.ndarray, "H W"]]], size: tuple[int, int]
) -> Int[np.ndarray, "H W"]:
    """Paint layers of an id and its pixels over each other; the last is on top."""
    ids = np.zeros(size, np.int64)
    for value, pixels in layers:
        ids[pixels] = value
    return ids


def coco_pixels(segmentation: Any, size: tuple[int, int], source: str) -> Bool[np.ndarray, "H W"]:
    """Draw polygons (by pycocotools) or run lengths of COCO's form.

    Args:
        segmentation: lists of x, y, x, y ...; or ``size`` with ``counts``, numbers or text.
            Polygons of fewer than three points cover nothing.
        size: rows and columns of the image.
        source: names the annotation in errors.

    Raises:
        DataError: it is something else, or does not fit the image.
        CamkitError: pycocotools is missing.
    """
    if isinstance(segmentation, dict):
        return _from_runs(_counts(segmentation, size, source), size)
    pixels = np.zeros(size, np.bool_)
    rings = _rings(segmentation, size, source)
    if rings:
        _check_pixels(rings, size, source)
        check_inside(rings, size, source)
    polygons = [ring.ravel().tolist() for ring in rings]
    if polygons:
        for runs in _pycocotools().frPyObjects(polygons, *size):
            # decoded here, as the decoder of pycocotools 2.0.11 warns with NumPy 2
            pixels |= _from_runs(_decoded(runs["counts"]), size)
    return pixels


def _pycocotools() -> Any:
    require("pycocotools", "polygons of COCO's form need", "export")
    from pycocotools import mask

    return mask


def _from_runs(counts: Int[np.ndarray, "n"], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Return the pixels of runs outside and inside in turn, column by column."""
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(size[1], size[0]).T


def _decoded(text: bytes) -> Int[np.ndarray, "n"]:
    """Decode COCO's compressed run lengths, numbers in digits of five bits.

    A bit of 32 says that digits follow, one of 16 in the last digit that the number is negative.
    From the fourth on, numbers are differences to the run before the last. Damaged text becomes
    runs of another sum.
    """
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(digits & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    if not len(last) or last[-1] != len(digits) - 1 or (last - first).max() > _MOST_DIGITS:
        return np.zeros(0, np.int64)
    shift = 5 * (np.arange(len(digits)) - np.repeat(first, last - first + 1))
    counts = np.add.reduceat((digits & 31) << shift, first)
    counts -= (digits[last] & 16) << (shift[last] + 1)
    counts[1::2], counts[2::2] = counts[1::2].cumsum(), counts[2::2].cumsum()
    return counts


_MOST_DIGITS = 10  # of a number; pictures have fewer than 2**50 pixels


def _counts(segmentation: Any, size: tuple[int, int], source: str) -> Int[np.ndarray, "n"]:
    """Return the runs of an annotation, which must cover the image."""
    counts, own = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(own, list) or tuple(own) != size:
        raise DataError(
            f"{source}: its run lengths are of size {own}, but the image has {list(size)} (rows, "
            "columns); export again"
        )
    runs = np.zeros(0, np.int64)
    if isinstance(counts, str):
        runs = _decoded(counts.encode("ascii", "replace"))
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = np.array(counts, np.int64)
    pixels = size[0] * size[1]
    if runs.size == 0 or runs.min() < 0 or runs.max() > pixels or runs.sum() != pixels:
        raise DataError(
            f"{source}: its run lengths are no whole numbers that add up to the {size[0]}x{size[1]}"
            " pixels of the image; export again"
        )
    return runs


def _rings(segmentation: Any, size: tuple[int, int], source: str) -> list[np.ndarray]:
    """Return the polygons of an annotation with at least three points."""
    if not isinstance(segmentation, list):
        kind = type(segmentation).__name__
        raise DataError(f"{source}: its segmentation is {kind}; expected {_LISTS}")
    rings = []
    for polygon in segmentation:
        try:
            numbers = np.array(polygon, np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{source}: its polygon is {error}; expected {_LISTS}") from error
        if numbers.ndim != 1 or numbers.size % 2:
            raise DataError(f"{source}: a polygon has {numbers.size} numbers; expected {_LISTS}")
        ring = numbers.reshape(-1, 2)
        check_ring(ring, size, source)
        rings += [ring] if len(ring) > 2 else []
    return rings


_LISTS = "lists of x, y, x, y, ... or run lengths"


def check_ring(ring: Float[np.ndarray, "n 2"], size: tuple[int, int], source: str) -> None:
    """Raise DataError for coordinates that are no numbers, or lie far outside of the image."""
    reach = _FARTHEST * max(size)
    if not (np.abs(ring) <= reach).all():  # NaN is not
        raise DataError(
            f"{source}: a polygon has points far outside of the image of {size[0]}x{size[1]} "
            "(rows x columns); correct it"
        )


def _check_pixels(
    rings: Sequence[Float[np.ndarray, "_ 2"]], size: tuple[int, int], source: str
) -> None:
    """Raise DataError for outlines that are shares of the size of the image."""
    points = np.concatenate([*rings])
    shares = points.min() >= 0 and points.max() <= 1 and bool((points % 1).any())
    if shares and min(size) > 1:
        raise DataError(
            f"{source}: all its points lie between 0 and 1, as shares of width and height; write "
            "them in pixels"
        )


def check_inside(
    rings: Sequence[Float[np.ndarray, "_ 2"]], size: tuple[int, int], source: str
) -> None:
    """Raise DataError if all outlines of an object lie wholly outside of the image."""
    if all((ring.max(0) < 0).any() or (ring.min(0) >= size[::-1]).any() for ring in rings):
        raise DataError(
            f"{source}: its outline lies wholly outside of the image of {size[0]}x{size[1]} (rows "
            "x columns); correct or remove it"
        )


def check_picture(size: Any, source: str) -> tuple[int, int]:
    """Return rows and columns that an annotation file gives, or raise DataError."""
    whole = len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not whole or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise DataError(
            f"{source}: rows and columns are {size[0]!r} and {size[1]!r}; expected the size of the "
            "photo in pixels"
        )
    return size[0], size[1]


def filled(
    rings: Iterable[Float[np.ndarray, "_ 2"]], size: tuple[int, int]
) -> Bool[np.ndarray, "H W"]:
    """Fill outlines: a pixel is inside if an odd number of them is around its centre.

    Args:
        rings: x and y of their corners; 0 is the edge of the first pixel, so its centre is 0.5.
        size: rows and columns.
    """
    rows, columns = size
    crossings = np.zeros((rows, columns + 1), np.int64)
    for ring in rings:
        start, end = ring, np.roll(ring, -1, axis=0)
        down = (start[:, 1] <= end[:, 1])[:, None]
        high, low = np.where(down, start, end), np.where(down, end, start)
        first, last = (np.clip(np.ceil(p[:, 1] - 0.5), 0, rows).astype(int) for p in (high, low))
        counts = last - first
        edge = np.repeat(np.arange(len(ring)), counts)
        row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
        across, along = (low - high)[edge].T
        x = high[edge, 0] + (row + 0.5 - high[edge, 1]) * across / along
        np.add.at(crossings, (row, np.clip(np.ceil(x - 0.5), 0, columns).astype(int)), 1)
    return crossings.cumsum(1)[:, :columns] % 2 == 1
