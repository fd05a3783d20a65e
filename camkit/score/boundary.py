"""Boundary IoU: how well the outlines of masks agree, whatever the size of their insides."""

import math

import cv2
import numpy as np
import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

from camkit.mask import IGNORE
from camkit.score.confusion import Overlap, mask_values


def boundary_overlap(
    truth: Integer[Tensor, "H W"],
    predicted: Integer[Tensor, "H W"],
    *,
    num_classes: int,
    width: float = 0.02,
) -> Overlap:
    """Count one image's pixels near the outline of each class: hit, true and predicted.

    Boundary IoU (Cheng et al. 2021): of each class only the pixels count that lie within a band
    inside its own outline, in the truth and in the prediction, each with its own. The edge of the
    image is an outline too. These steps are the paper's; it measures single objects, we take all
    pixels of a class for one, the background included.

    What lies under an ignored pixel is unknown, so the outline there is too. Our choice: before
    bands are drawn, ignored pixels take the value of the nearest counted pixel, in both masks, and
    then count nowhere. So a prediction may do there what it likes, and the ignored line around the
    objects of VOC is no outline of its own. A predicted 255 is background elsewhere.

    Args:
        truth: values below ``num_classes``, or 255.
        predicted: the same.
        num_classes: how many classes there are, the background included.
        width: how wide the band is, as a share of the diagonal of the image; the paper's 2 % are
            at least one pixel.

    Returns:
        int64 counts of each class; add those of all images before taking an IoU.
    """
    hit, true, claimed, _ = _counts(truth, predicted, num_classes, width)
    return Overlap(hit, true, claimed)


def boundary_confusion(
    truth: Integer[Tensor, "H W"],
    predicted: Integer[Tensor, "H W"],
    *,
    num_classes: int,
    width: float = 0.02,
) -> Int[Tensor, "d d"]:
    """Write `boundary_overlap` as a matrix that `mean_iou` and `paired_gain` take.

    A last class "no outline" is added, so that each row adds up to the same for any prediction:
    a band is hit by its own class or missed, and what a band claims wrongly was no outline of that
    class. Leave it out of means: ``mean_iou(matrices.sum(0), classes=range(num_classes))``.

    Args:
        truth: values below ``num_classes``, or 255.
        predicted: the same.
        num_classes: how many classes there are, the background included.
        width: how wide the band is, as a share of the diagonal of the image.

    Returns:
        int64 counts; row = truth, column = prediction.
    """
    hit, true, claimed, counted = _counts(truth, predicted, num_classes, width)
    confusion = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    confusion.diagonal()[:-1] = hit
    confusion[:-1, -1] = true - hit
    confusion[-1, :-1] = claimed - hit
    confusion[-1, -1] = counted - (claimed - hit).sum()
    return confusion


def _counts(
    truth: Tensor, predicted: Tensor, num_classes: int, width: float
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Hit, true and predicted pixels of each class, and how many pixels are not ignored."""
    if not 0.0 < width <= 1.0:
        raise ValueError(
            f"`width` must be a share of the image diagonal in (0, 1], got {width}; 0.02 is usual"
        )
    if truth.shape != predicted.shape:
        raise ValueError(
            f"`truth` and `predicted` must have one size, got {truth.shape[0]}x{truth.shape[1]} "
            f"and {predicted.shape[0]}x{predicted.shape[1]}; resize the prediction"
        )
    counted = (truth != IGNORE).cpu().numpy()
    if not counted.any():
        nothing = torch.zeros(num_classes, dtype=torch.int64)
        return nothing, nothing, nothing, 0
    classes = {}
    bands = {}
    for name, mask in (("truth", truth), ("predicted", predicted)):
        values = mask_values(mask, num_classes=num_classes, name=name, ignored=0)
        classes[name] = _filled(values.cpu().numpy().astype(np.uint8), counted)
        bands[name] = _band(classes[name], _pixels(width, counted.shape)) & counted
    agreed = bands["truth"] & bands["predicted"] & (classes["truth"] == classes["predicted"])
    hit, true, claimed = (
        torch.from_numpy(np.bincount(classes[name][chosen], minlength=num_classes))
        for name, chosen in (
            ("truth", agreed),
            ("truth", bands["truth"]),
            ("predicted", bands["predicted"]),
        )
    )
    return hit, true, claimed, int(counted.sum())


def _pixels(width: float, size: tuple[int, ...]) -> int:
    return max(1, round(width * math.hypot(*size)))


def _band(classes: UInt8[np.ndarray, "H W"], pixels: int) -> np.ndarray:
    """Pixels with another class, or none, within a square of some pixels around them."""
    square = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    shifted = classes + 1  # 0 stands outside of the image; the highest class is 254
    lowest = cv2.erode(shifted, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    highest = cv2.dilate(shifted, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(lowest != highest)


def _filled(classes: np.ndarray, counted: np.ndarray) -> UInt8[np.ndarray, "H W"]:
    """Give each pixel that does not count the class of the nearest one that does."""
    if counted.all():
        return classes
    _, nearest = cv2.distanceTransformWithLabels(
        (~counted).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    by_label = np.zeros(int(nearest.max()) + 1, np.uint8)
    by_label[nearest[counted]] = classes[counted]
    return by_label[nearest]
