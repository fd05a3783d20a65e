"""Coarse masks cut into the parts that are prompted one by one: connected components, merged."""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int

from camkit.printing import short_repr

_MOST = 256


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
        least: pixels below which a component is left out. Of more than 256 components, as of noise,
            the largest are taken.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = [place for place in range(1, count) if areas[place] >= least]
    places = sorted(sorted(kept, key=lambda place: -areas[place])[:_MOST])
    corners = stats[places, :2]  # column, row, columns, rows, pixels
    groups = _merged(np.concatenate([corners, corners + stats[places, 2:4] - 1], 1))
    return [
        Part(tuple(labels == places[piece] for piece in np.flatnonzero(groups == group)))
        for group in np.unique(groups)
    ]


def _merged(boxes: Int[np.ndarray, "n 4"]) -> Int[np.ndarray, " n"]:
    """Number boxes so that those that overlap, or whose groups do, have one number."""
    groups = np.arange(len(boxes))
    while True:
        hulls = np.empty_like(boxes)
        for group in np.unique(groups):
            members = groups == group
            hulls[members, :2] = boxes[members, :2].min(0)
            hulls[members, 2:] = boxes[members, 2:].max(0)
        first = np.maximum(hulls[:, None, :2], hulls[None, :, :2])
        last = np.minimum(hulls[:, None, 2:], hulls[None, :, 2:])
        meets = (first <= last).all(2)
        joined = np.where(meets, groups, len(boxes)).min(1, initial=len(boxes))
        if np.array_equal(joined, groups):
            return groups
        groups = joined


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
