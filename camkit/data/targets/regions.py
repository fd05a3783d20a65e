"""Regions of a mask, and the two forms that formats give them: runs of pixels, and polygons."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8

from camkit.data.sample import unique_values
from camkit.printing import short_repr

VOID = -1
"""Value of pixels without a label, in masks that are exported."""

Regions: TypeAlias = Literal["class", "component"]
"""One region per class of an image, or one per connected component of a class."""

Ring: TypeAlias = Integer[np.ndarray, "_ 2"]
"""A closed outline: x and y of pixel corners, counted from the corner of the image."""


@dataclass(frozen=True, eq=False)
class Region:
    """Pixels of one class.

    Attributes:
        value: of the class in the mask, or `VOID`.
        left: first column of the bounding box.
        top: first row of the bounding box.
        inside: True at the pixels of the region, cut to the bounding box.
        area: number of pixels.
    """

    value: int
    left: int
    top: int
    inside: Bool[np.ndarray, "h w"]
    area: int

    __repr__ = short_repr

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height, in pixels."""
        height, width = self.inside.shape
        return self.left, self.top, width, height

    def of(self, plane: np.ndarray) -> np.ndarray:
        """Return the values of the region's pixels in a plane of the image's size."""
        height, width = self.inside.shape
        window = plane[self.top : self.top + height, self.left : self.left + width]
        return window[self.inside]


def regions_of(mask: Int[np.ndarray, "H W"], kind: Regions) -> Iterator[Region]:
    """Yield the regions of a mask: classes in ascending order, components from the top.

    Components are connected across corners (8 neighbours). Void pixels are one region, in front.

    Args:
        mask: 0 for background, `VOID` for void.
        kind: of the regions.
    """
    for value in (unique_values(mask - VOID) + VOID).tolist():
        if value == 0:
            continue
        pixels = (mask == value).view(np.uint8)
        if kind == "class" or value == VOID:
            left, top, width, height = cv2.boundingRect(pixels)
            inside = pixels[top : top + height, left : left + width].view(np.bool_)
            yield Region(value, left, top, inside, int(np.count_nonzero(inside)))
            continue
        for _, left, top, inside in _components(pixels):
            yield Region(value, left, top, inside, int(np.count_nonzero(inside)))


def _components(
    pixels: UInt8[np.ndarray, "H W"],
) -> list[tuple[int, int, int, Bool[np.ndarray, "_ _"]]]:
    """Return label, left, top and pixels of each component, by label.

    Boxes come from outlines: OpenCV's own statistics take ten times longer than labels.
    """
    _, labels = cv2.connectedComponents(pixels, connectivity=8)
    contours, levels = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    components = []
    for contour, parent in zip(contours, levels[0][:, 3].tolist(), strict=True):
        if parent < 0:
            column, row = contour[0, 0].tolist()
            label = int(labels[row, column])
            left, top, width, height = cv2.boundingRect(contour)
            window = labels[top : top + height, left : left + width]
            components.append((label, left, top, window == label))
    return sorted(components, key=lambda component: component[0])


def without_specks(
    mask: Int[np.ndarray, "H W"], least_area: int
) -> tuple[Int[np.ndarray, "H W"], int]:
    """Make background of components of fewer pixels; return the mask, and how many pixels."""
    kept, removed = mask.copy(), 0
    for region in regions_of(mask, "component"):
        if region.value != VOID and region.area < least_area:
            left, top, width, height = region.box
            kept[top : top + height, left : left + width][region.inside] = 0
            removed += region.area
    return kept, removed


def run_lengths(region: Region, size: tuple[int, int]) -> list[int]:
    """Return the lengths of runs, outside and inside in turn, column by column, as COCO counts.

    Args:
        region: of an image.
        size: rows and columns of the image.
    """
    height, width = region.inside.shape
    columns = np.zeros((width, height + 2), np.int8)  # a run ends with its column
    columns[:, 1:-1] = region.inside.T
    column, row = np.nonzero(np.diff(columns, axis=1))
    ends = (region.left + column) * size[0] + region.top + row  # starts and stops in turn
    # a run that reaches the bottom of a column may go on at the top of the next
    apart = ends[1:-1:2] != ends[2::2]
    kept = np.concatenate([[True], np.repeat(apart, 2), [True]])
    bounds = np.concatenate([[0], ends[kept], [size[0] * size[1]]])
    lengths = np.diff(bounds)
    return (lengths if lengths[-1] else lengths[:-1]).tolist()


def rings_of(region: Region) -> list[tuple[Ring, list[Ring]]]:
    """Return the outlines of a region: the outer one of each part, and those of its holes.

    Outlines follow the edges of pixels, so filling them gives back the region, exactly.
    """
    # contours of OpenCV go through the centres of pixels; with each pixel doubled, those at the
    # two sides of a pixel are told apart, and halves of them are its corners
    doubled = region.inside.view(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, levels = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts: dict[int, tuple[Ring, list[Ring]]] = {}
    parents = levels[0][:, 3].tolist()
    start = np.array([region.left, region.top])
    rings = [start + _corners(contour) for contour in contours]
    for index, parent in enumerate(parents):
        if parent < 0:
            parts[index] = (rings[index], [])
    for index, parent in enumerate(parents):
        if parent >= 0:
            parts[parent][1].append(rings[index])
    return list(parts.values())


def _corners(contour: Integer[np.ndarray, "_ 1 2"]) -> Ring:
    """Turn a contour of doubled pixels into corners, without those on a straight line."""
    ring = (contour[:, 0].astype(np.int64) + 1) // 2
    ring = ring[np.any(ring != np.roll(ring, 1, axis=0), axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    back = (before * after).sum(1) < 0  # a spike is no straight line
    return ring[turns | back]


def simplified(ring: Ring, tolerance: float) -> Ring:
    """Leave out corners that lie within ``tolerance`` pixels of the line between the others.

    An outline whose area would change by more than a tenth, as that of a speck, is returned whole.
    """
    if tolerance <= 0:
        return ring
    whole = ring.astype(np.int32)[:, None]
    short = cv2.approxPolyDP(whole, tolerance, closed=True)
    area = cv2.contourArea(whole)
    if len(short) < 3 or abs(cv2.contourArea(short) - area) > 0.1 * area:
        return ring
    return short[:, 0].astype(np.int64)


def joined(rings: Sequence[Ring]) -> Ring:
    """Join outlines to one, by bridges that are walked in both directions and so cover nothing.

    Holes stay holes and parts stay apart, as in formats with one outline per region, if the outline
    is filled by the even-odd rule, as pycocotools, OpenCV and PIL do.
    """
    whole = rings[0]
    for ring in rings[1:]:
        start, end = _nearest(whole, ring)
        there = np.roll(ring, -end, axis=0)
        detour = np.concatenate([there, there[:1], whole[start : start + 1]])
        whole = np.concatenate([whole[: start + 1], detour, whole[start + 1 :]])
    return whole


def _nearest(whole: Ring, ring: Ring) -> tuple[int, int]:
    """Return the places of a short bridge: from the outline so far, to the ring."""
    end = int(ring[:, 0].argmin())  # holes open to the left; all pairs would take too long
    return int(np.square(whole - ring[end]).sum(1).argmin()), end


def filled(rings: Sequence[Ring], region: Region) -> tuple[int, int]:
    """Fill outlines, and compare with the region they came from.

    A pixel is filled if an odd number of outlines is around its centre.

    Returns:
        How many pixels of the region the outlines miss, and how many others they cover.
    """
    left, top, width, height = region.box
    corners = [ring - (left, top) for ring in rings]
    crossings = np.zeros((height, width + 1), np.int64)
    for ring in corners:
        rows, x = _crossings(ring, height)
        places = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        np.add.at(crossings, (rows, places), 1)
    covered = (crossings.cumsum(1) % 2 == 1)[:, :width]
    lost = int(np.count_nonzero(region.inside & ~covered))
    return lost, int(np.count_nonzero(covered & ~region.inside))


def _crossings(ring: Ring, height: int) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Return rows, and the x at which an outline crosses the middle of each row."""
    start, end = ring, np.roll(ring, -1, axis=0)
    down = np.where(
        (start[:, 1] <= end[:, 1])[:, None, None],
        np.stack([start, end], 1),
        np.stack([end, start], 1),
    )
    high, low = down[:, 0], down[:, 1]
    counts = low[:, 1] - high[:, 1]  # corners are whole numbers, so no middle is on a corner
    edge = np.repeat(np.arange(len(ring)), counts)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = high[edge, 1] + step
    slope = (low[edge, 0] - high[edge, 0]) / counts[edge]
    x = high[edge, 0] + slope * (step + 0.5)
    kept = (rows >= 0) & (rows < height)
    return rows[kept], x[kept]
