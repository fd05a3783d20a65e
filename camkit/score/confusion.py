"""Confusion matrices of masks and their outlines, the mIoU definitions of the field, tables."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

from camkit.printing import short_repr
from camkit.tensors import IGNORE

Definition: TypeAlias = Literal["present", "union", "psa"]
"""Which classes a mean IoU averages over: see `mean_iou`."""

NO_FOREGROUND = (
    "no class but the background has a true pixel, so an empty mask would score 100 %; if the true "
    "masks mark objects with 255, which is ignored, write class + 1 there instead: 1 for the first "
    "class"
)
"""Why some true masks measure nothing, and what to do."""


class ScoreWarning(UserWarning):
    """A score that means nothing."""


def confusion_matrix(
    truth: Integer[Tensor, "*b H W"], predicted: Integer[Tensor, "*b H W"], *, num_classes: int
) -> Int[Tensor, "c c"]:
    """Count the pixels of each true class by the class predicted there.

    Pixels whose truth is 255 are left out. A predicted 255 counts as background, as leaving it out
    would reward a mask for ignoring hard pixels. Add the matrices of all images before taking an
    IoU.

    Args:
        truth: values below ``num_classes``, or 255.
        predicted: the same.
        num_classes: number of classes, the background included.

    Returns:
        int64 counts; row = truth, column = prediction.

    Raises:
        ValueError: the masks differ in size, or hold a value that is not a class.
    """
    if truth.shape != predicted.shape:
        sizes = " and ".join("x".join(map(str, mask.shape)) for mask in (truth, predicted))
        raise ValueError(
            f"`truth` and `predicted` must have one size, got {sizes}; "
            "resize the class maps to the size of the truth before drawing the mask"
        )
    rows = checked_mask(truth, num_classes=num_classes, name="truth", ignored=num_classes)
    columns = checked_mask(predicted, num_classes=num_classes, name="predicted", ignored=0)
    cells = (rows * num_classes + columns).flatten()
    counts = torch.bincount(cells, minlength=(num_classes + 1) * num_classes)
    return counts.view(num_classes + 1, num_classes)[:-1]  # the last row held the ignored pixels


def checked_mask(
    mask: Integer[Tensor, "*b H W"], *, num_classes: int, name: str, ignored: int
) -> Int[Tensor, "*b H W"]:
    """Check that a mask holds classes or 255, and replace 255 by ``ignored``.

    ``name`` is the name of the mask in an error.
    """
    _check_integers(name, mask)
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"`num_classes` must lie in 1 to {IGNORE}, got {num_classes}")
    values = mask.long()
    ignore = values == IGNORE
    if values.numel():
        low, high = (int(value) for value in values.masked_fill(ignore, 0).aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"`{name}` must hold 0 to {num_classes - 1}, or {IGNORE} to ignore, "
                f"got {low if low < 0 else high}; `num_classes` counts the background too"
            )
    return values.masked_fill(ignore, ignored)


@dataclass(frozen=True)
class Overlap:
    """Pixel counts of each class: correctly predicted, true, and predicted."""

    hit: Int[Tensor, "*n c"]
    true: Int[Tensor, "*n c"]
    predicted: Int[Tensor, "*n c"]

    __repr__ = short_repr

    @classmethod
    def of(cls, confusion: Int[Tensor, "*n c c"]) -> "Overlap":
        _check_integers("confusion", confusion)
        counts = confusion.long()
        return cls(counts.diagonal(dim1=-2, dim2=-1), counts.sum(-1), counts.sum(-2))

    def class_iou(self) -> Float[Tensor, "*n c"]:
        return self.hit.double() / (self.true + self.predicted - self.hit)

    def mean_iou(
        self, *, definition: Definition = "present", classes: Sequence[int] | None = None
    ) -> Float[Tensor, "*n"]:
        """Compute the mean IoU; see the function `mean_iou`."""
        iou = self.class_iou()
        if definition == "present":
            iou = iou.masked_fill(self.true == 0, torch.nan)
        elif definition == "psa":
            iou = iou.nan_to_num(0.0)
        elif definition != "union":
            raise ValueError(
                f'`definition` must be "present", "union" or "psa", got "{definition}"'
            )
        if classes is None:
            return iou.nanmean(-1)
        chosen, last = list(classes), iou.shape[-1] - 1
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"`classes` must name at least one class, none twice, got {chosen}")
        if min(chosen) < 0 or max(chosen) > last:
            raise ValueError(
                f"`classes` are mask values from 0 (background) to {last}, got {chosen}"
            )
        return iou[..., chosen].nanmean(-1)


def class_iou(confusion: Int[Tensor, "*n c c"]) -> Float[Tensor, "*n c"]:
    """Compute the IoU of each class, NaN for a class that is neither true nor predicted.

    Leading axes of the confusion matrices (row = truth, column = prediction) are kept.
    """
    return Overlap.of(confusion).class_iou()


def mean_iou(
    confusion: Int[Tensor, "*n c c"],
    *,
    definition: Definition = "present",
    classes: Sequence[int] | None = None,
) -> Float[Tensor, "*n"]:
    """Compute the mean IoU over classes, from one confusion matrix of a whole set.

    The definitions differ in how a class without a true pixel counts:

    - ``"present"`` leaves it out, predicted or not (AFA, ToCo, CLIP-ES and most others);
    - ``"union"`` leaves it out unless it is predicted, which scores 0 (IRN);
    - ``"psa"`` scores it 0 in any case (PSA, MCTformer, TransCAM).

    They agree where every class has a true pixel, as in a full benchmark set.

    Args:
        confusion: row = truth, column = prediction; leading axes are kept.
        definition: which classes count; the default is the field's commonest.
        classes: mask values to average over, 0 being the background; None takes all.

    Returns:
        float64 in [0, 1]; NaN where no class counts.

    Warns:
        ScoreWarning: a single matrix, of a whole set, in which no class but the background has a
            true pixel: whatever the definition, the score rewards empty masks.
    """
    mean = Overlap.of(confusion).mean_iou(definition=definition, classes=classes)
    if confusion.ndim == 2 and not mean.isnan() and not has_foreground(confusion, classes):
        warnings.warn(_nothing(classes), ScoreWarning, stacklevel=2)
    return mean


def has_foreground(confusion: Int[Tensor, "c c"], classes: Sequence[int] | None = None) -> bool:
    """Return whether any class but the background has a true pixel, or is not asked for.

    Args:
        confusion: row = truth, column = prediction, summed over a set.
        classes: mask values to average over, 0 being the background; None takes all.
    """
    chosen = range(len(confusion)) if classes is None else classes
    objects = [value for value in chosen if value > 0]
    return not objects or bool(confusion[objects].sum() > 0)


def check_foreground(confusion: Int[Tensor, "c c"], classes: Sequence[int] | None = None) -> None:
    """Raise a ValueError unless `has_foreground`."""
    if not has_foreground(confusion, classes):
        raise ValueError(_nothing(classes))


def _nothing(classes: Sequence[int] | None) -> str:
    if classes is None:
        return f"this mean IoU measures nothing: {NO_FOREGROUND}"
    return f"this mean IoU measures nothing: none of the classes {list(classes)} has a true pixel"


def _check_integers(name: str, values: Tensor) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(
            f"`{name}` must hold whole numbers of an integer dtype, got {values.dtype}; convert "
            f"what you know to be whole by {name}.long()"
        )


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class in [0, 1]; NaN where the divisor is 0.

    ``false_positives`` and ``false_negatives`` are shares of the union, so they add up to 1 with
    ``iou``, as the evaluators of PSA and SEAM report them. ``pixels`` counts the true pixels.
    """

    name: str
    iou: float
    precision: float
    recall: float
    false_positives: float
    false_negatives: float
    pixels: int


def class_scores(confusion: Int[Tensor, "c c"], names: Sequence[str]) -> tuple[ClassScore, ...]:
    """Score each class of a confusion matrix.

    Args:
        confusion: row = truth, column = prediction, summed over a set.
        names: one name per class, the background's first.
    """
    if len(names) != len(confusion):
        raise ValueError(
            f"`names` must name {len(confusion)} classes, the background too, got {len(names)}"
        )
    overlap = Overlap.of(confusion)
    counts = zip(
        names, overlap.hit.tolist(), overlap.true.tolist(), overlap.predicted.tolist(), strict=True
    )
    return tuple(
        ClassScore(
            name=name,
            iou=_share(hit, true + predicted - hit),
            precision=_share(hit, predicted),
            recall=_share(hit, true),
            false_positives=_share(predicted - hit, true + predicted - hit),
            false_negatives=_share(true - hit, true + predicted - hit),
            pixels=true,
        )
        for name, hit, true, predicted in counts
    )


def pixel_accuracy(confusion: Int[Tensor, "c c"]) -> float:
    """Compute the share of pixels with the correct class; NaN without pixels."""
    return _share(int(confusion.diagonal().sum()), int(confusion.sum()))


def class_table(scores: Sequence[ClassScore]) -> str:
    """Format scores as a table in %, one class per line; "-" stands for NaN."""
    width = max(len("class"), *(len(score.name) for score in scores))
    rows = [("class", ["IoU", "precision", "recall", "FP", "FN", "pixels"])]
    for s in scores:
        shares = (s.iou, s.precision, s.recall, s.false_positives, s.false_negatives)
        rows.append((s.name, [*map(percent, shares), str(s.pixels)]))
    return "\n".join(
        f"{name:<{width}}  " + "  ".join(f"{cell:>9}" for cell in cells) for name, cells in rows
    )


def percent(share: float) -> str:
    """Format a share in %, with two decimal places.

    >>> percent(0.12345), percent(float("nan"))
    ('12.35', '-')
    """
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


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
