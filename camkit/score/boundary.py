"""Boundary IoU: agreement of the outlines of masks, independent of the area inside them."""

import math

import cv2
import numpy as np
import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

from camkit.score.confusion import checked_mask
from camkit.tensors import IGNORE


def boundary_confusion(
    truth: Integer[Tensor, "H W"],
    predicted: Integer[Tensor, "H W"],
    *,
    num_classes: int,
    width: float = 0.02,
) -> Int[Tensor, "d d"]:
    """Count one image's pixels near the outline of each class, as a confusion matrix.

    Boundary IoU (Cheng et al. 2021): only the pixels of a class within a band inside its outline
    count, in the truth and in the prediction, each with its own outline. The edge of the image is
    an outline too. Ours: all pixels of a class are one object, the background included. Before
    bands are drawn, ignored pixels take the value of the nearest counted pixel, in both masks, and
    are then left out, so the ignored line around the objects of VOC is not an outline. A predicted
    255 is background elsewhere.

    Args:
        truth: values below ``num_classes``, or 255.
        predicted: the same.
        num_classes: number of classes, the background included.
        width: width of the band, as a share of the diagonal of the image; the paper's 2 % are
            at least one pixel.

    Returns:
        int64 counts; row = truth, column = prediction. The last class is "no outline", so that row
        sums do not depend on the prediction: a band that is wrongly predicted was no outline of
        that class. Leave it out of means: ``mean_iou(matrix, classes=range(num_classes))``.

    Raises:
        ValueError: the masks differ in size or hold a value that is not a class, or the width is
            out of range.
    """
    if not 0.0 < width <= 1.0:
        raise ValueError(
            f"`width` must be a share of the image diagonal in (0, 1], got {width}; 0.02 is usual"
        )
    if truth.shape != predicted.shape:
        raise ValueError(
            f"`truth` and `predicted` must have one size, got {truth.shape[0]}x{truth.shape[1]} "
            f"and {predicted.shape[0]}x{predicted.shape[1]}; resize the prediction"
        )
    confusion = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    counted = (truth != IGNORE).cpu().numpy()
    if not counted.any():
        return confusion
    pixels = max(1, round(width * math.hypot(*counted.shape)))
    classes, bands = [], []
    for name, mask in (("truth", truth), ("predicted", predicted)):
        values = checked_mask(mask, num_classes=num_classes, name=name, ignored=0)
        classes.append(_fill_ignored(values.cpu().numpy().astype(np.uint8), counted))
        bands.append(_band(classes[-1], pixels) & counted)
    agreed = bands[0] & bands[1] & (classes[0] == classes[1])
    hit, true, claimed = (
        torch.from_numpy(np.bincount(values[chosen], minlength=num_classes))
        for values, chosen in zip([classes[0], *classes], [agreed, *bands], strict=True)
    )
    confusion.diagonal()[:-1] = hit
    confusion[:-1, -1] = true - hit
    confusion[-1, :-1] = claimed - hit
    confusion[-1, -1] = int(counted.sum()) - (claimed - hit).sum()
    return confusion


def _band(classes: UInt8[np.ndarray, "H W"], pixels: int) -> np.ndarray:
    """Select pixels that have another class, or the image's edge, within a square around them."""
    square = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    shifted = classes + 1  # 0 is outside the image; the highest class is 254
    lowest = cv2.erode(shifted, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    highest = cv2.dilate(shifted, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(lowest != highest)


def _fill_ignored(classes: np.ndarray, counted: np.ndarray) -> UInt8[np.ndarray, "H W"]:
    """Give each ignored pixel the class of the nearest counted pixel."""
    if counted.all():
        return classes
    _, nearest = cv2.distanceTransformWithLabels(
        (~counted).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    by_label = np.zeros(int(nearest.max()) + 1, np.uint8)
    by_label[nearest[counted]] = classes[counted]
    return by_label[nearest]
