"""Coarse masks cut into the parts that are prompted one by one: connected components, merged."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from jaxtyping import Bool, Float

from camkit.printing import short_repr


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a coarse mask, for which a segmenter is asked.

    Attributes:
        pieces: connected components whose boxes overlap.
    """

    pieces: tuple[Bool[np.ndarray, "H W"], ...]

    __repr__ = short_repr

    @cached_property
    def mask(self) -> Bool[np.ndarray, "H W"]:
        """All pieces together."""
        return np.logical_or.reduce(self.pieces)

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """First column, first row, last column, last row."""
        return box_of(self.mask)


def box_of(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """Return the first column, first row, last column and last row of a mask with any pixel."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(cols[0]), int(rows[0]), int(cols[-1]), int(rows[-1])


def parts_of(mask: Bool[np.ndarray, "H W"], least: float) -> list[Part]:
    """Split a mask into connected components, and merge those whose boxes overlap.

    Components touch at sides or corners. SAMRefiner splits and merges semantic masks like this; the
    limit is ours.

    Args:
        mask: a coarse mask.
        least: pixels below which a component is left out.
    """
    count, labels, sizes, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    areas = sizes[:, cv2.CC_STAT_AREA]
    pieces = [labels == place for place in range(1, count) if areas[place] >= least]
    return [Part(tuple(group)) for group in _merged([[piece] for piece in pieces])]


def _merged(groups: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Join groups whose boxes overlap until no two do."""
    boxes = [box_of(np.logical_or.reduce(group)) for group in groups]
    for first in range(len(groups)):
        for second in range(first + 1, len(groups)):
            if _overlap(boxes[first], boxes[second]):
                joined = groups[first] + groups[second]
                others = [g for place, g in enumerate(groups) if place not in (first, second)]
                return _merged([*others, joined])
    return groups


def _overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    return all(
        max(one[axis], other[axis]) <= min(one[axis + 2], other[axis + 2]) for axis in (0, 1)
    )


def depth(mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Return the distance of each pixel of a mask to the nearest pixel outside of it; 0 outside.

    The edge of the picture is no edge of the mask, unless the mask fills the picture.
    """
    filled = bool(mask.all())
    plane = np.pad(mask, 1) if filled else mask
    distance = cv2.distanceTransform(plane.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance[1:-1, 1:-1] if filled else distance


def highest(values: Float[np.ndarray, "H W"], *, among: Bool[np.ndarray, "H W"]) -> tuple[int, int]:
    """Return column and row of the highest value among some pixels; the first of equal ones."""
    row, col = np.unravel_index(np.where(among, values, -np.inf).argmax(), values.shape)
    return int(col), int(row)
