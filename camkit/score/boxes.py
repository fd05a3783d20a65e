"""Localisation scores for data sets that have boxes but no masks: MaxBoxAccV2."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from camkit.ops.finite import finite_range

BOX_IOUS = (0.3, 0.5, 0.7)
"""The overlaps with a true box that MaxBoxAccV2 averages over."""
BOX_THRESHOLDS = torch.from_numpy(np.arange(0, 1, 0.001))
"""0.000 to 0.999: the paper's own."""


@dataclass(frozen=True)
class BoxAccuracy:
    """Share of images with a correct box, in [0, 1].

    Attributes:
        mean: mean over the overlaps; with the defaults, MaxBoxAccV2.
        by_iou: the share at each overlap, at the best threshold.
        thresholds: the best threshold for each overlap; the lowest one where several tie.
    """

    mean: float
    by_iou: tuple[float, ...]
    thresholds: tuple[float, ...]


def box_hits(
    cam: Float[Tensor, "H W"],
    boxes: Int[Tensor, "n 4"],
    *,
    ious: Sequence[float] = BOX_IOUS,
    thresholds: Float[Tensor, "s"] = BOX_THRESHOLDS,
    components: Literal["all", "largest"] = "all",
) -> Bool[Tensor, "i s"]:
    """Test at which thresholds a map yields one of the true boxes of its class.

    MaxBoxAccV2 (Choe et al. 2020), as in the code of the paper: the map is rounded down to 256
    levels; the pixels above a share of its highest level form components; each outline, also of a
    hole, gives a box, which is one pixel wider and higher than the outline where the image has
    room. The paper has maps at 224x224.

    Args:
        cam: the map of the true class in [0, 1], usually with lowest value 0 and highest 1.
        boxes: left, top, right, bottom of each true object in pixels of the map, the last ones
            included; see `resize_boxes`.
        ious: overlaps from which a box is correct, each counted separately.
        thresholds: shares of the highest level, in [0, 1).
        components: "all" takes the best box of all components, as MaxBoxAccV2 does; "largest" only
            the component with the largest area, as the older MaxBoxAcc (with ``ious=(0.5,)``).

    Raises:
        ValueError: map, boxes, overlaps or thresholds are out of range.
    """
    _check(cam, boxes, ious, thresholds)
    if components not in ("all", "largest"):
        raise ValueError(f'`components` must be "all" or "largest", got "{components}"')
    levels = (cam.detach().cpu().double().numpy() * 255).astype(np.uint8)
    cuts = (thresholds.cpu().numpy() * levels.max()).astype(np.int64)
    distinct, place = np.unique(cuts, return_inverse=True)
    best = np.array([_best_iou(levels > cut, boxes.cpu().numpy(), components) for cut in distinct])
    return torch.from_numpy(best[place][None] >= np.array(ious)[:, None])


def box_accuracy(
    hits: Bool[Tensor, "n i s"], thresholds: Float[Tensor, "s"] = BOX_THRESHOLDS
) -> BoxAccuracy:
    """Compute the share of images with a correct box, at the best threshold for each overlap.

    The threshold is picked on the scored images, as the paper defines it: the figure is an upper
    bound, comparable only with others of the same kind.

    Args:
        hits: results of `box_hits`, stacked over images.
        thresholds: as given to `box_hits`.
    """
    if not len(hits) or hits.shape[-1] != len(thresholds):
        raise ValueError(
            f"`hits` must hold at least one image at {len(thresholds)} thresholds, "
            f"got shape {tuple(hits.shape)}; pass the thresholds of box_hits"
        )
    shares, steps = hits.double().mean(0).max(-1)
    return BoxAccuracy(
        float(shares.mean()), tuple(shares.tolist()), tuple(thresholds[steps].tolist())
    )


def resize_boxes(
    boxes: Float[Tensor, "n 4"], *, size: tuple[int, int], new_size: tuple[int, int] = (224, 224)
) -> Int[Tensor, "n 4"]:
    """Scale boxes to a map of another size, rounding down as the code of the paper does.

    Args:
        boxes: left, top, right, bottom in pixels of the image.
        size: rows and columns of the image.
        new_size: rows and columns of the map.
    """
    old, new = (torch.tensor(side[::-1] * 2, dtype=torch.float64) for side in (size, new_size))
    return (boxes.double() * new / old).long()


def _best_iou(above: np.ndarray, truth: np.ndarray, components: str) -> float:
    """Return the highest IoU of any estimated box with any true one."""
    outlines = cv2.findContours(above.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if components == "largest" and outlines:
        outlines = [max(outlines, key=cv2.contourArea)]
    rows, cols = above.shape
    boxes = np.zeros((1, 4), np.int64)  # without outlines, the paper's code takes the first pixel
    if outlines:
        corners = np.array([cv2.boundingRect(outline) for outline in outlines], np.int64)
        corners[:, 2:] += corners[:, :2]
        boxes = np.minimum(corners, [cols, rows, cols - 1, rows - 1])
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    shared = (high - low + 1).clip(0).prod(-1)
    areas = [(side[:, 2:] - side[:, :2] + 1).prod(-1) for side in (boxes, truth)]
    return float((shared / (areas[0][:, None] + areas[1][None] - shared)).max())


def _check(cam: Tensor, boxes: Tensor, ious: Sequence[float], thresholds: Tensor) -> None:
    low, high = finite_range("cam", cam, ()) or (-1.0, -1.0)  # a map without pixels is refused
    if low < 0 or high > 1:
        raise ValueError("`cam` must lie in [0, 1] and hold pixels; normalise it first")
    if not len(boxes) or bool((boxes[:, 2:] < boxes[:, :2]).any()):
        raise ValueError(
            "`boxes` must hold at least one box as left, top, right, bottom, "
            f"got {boxes.tolist()}; right and bottom are pixels, not width and height"
        )
    if not ious or not len(thresholds) or float(thresholds.min()) < 0 or thresholds.max() >= 1:
        raise ValueError(
            "`ious` and `thresholds` must hold at least one value each, thresholds in [0, 1), "
            f"got {len(ious)} and {len(thresholds)}"
        )
