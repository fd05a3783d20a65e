"""Sweeps over background scores, all counted in one pass: the best score, curve and precision."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from camkit.mask import strongest
from camkit.score.confusion import Definition, check_foreground, checked_mask, mean_iou

THRESHOLDS = torch.arange(96, dtype=torch.float64) / 100
"""0.00 to 0.95 in steps of 0.01, the usual step; published sweeps end at 0.60."""


@dataclass(frozen=True)
class Best:
    """The background score with the highest mean IoU, and that mean IoU in [0, 1]."""

    threshold: float
    mean_iou: float


@dataclass(frozen=True)
class Curve:
    """Mean IoU at each background score."""

    thresholds: tuple[float, ...]
    mean_iou: tuple[float, ...]

    @property
    def area(self) -> float:
        """Mean height of the curve, by trapezoids: the mean IoU of a randomly picked threshold.

        Curves over different ranges of background scores have no comparable area.
        """
        x, y = (
            torch.tensor(side, dtype=torch.float64) for side in (self.thresholds, self.mean_iou)
        )
        return float(torch.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else self.mean_iou[0]


def sweep_confusions(
    cam: Float[Tensor, "k H W"],
    classes: Int[Tensor, "k"],
    truth: Integer[Tensor, "H W"],
    *,
    thresholds: Float[Tensor, "s"] = THRESHOLDS,
    num_classes: int,
) -> Int[Tensor, "s c c"]:
    """Count one image's confusion matrix for every background score.

    Equal to `to_mask` and `confusion_matrix` at each score, ties included. As the strongest class
    of a pixel does not depend on the background score, winners are counted by the interval of their
    score, and a running sum over the intervals gives every matrix.

    Args:
        cam: maps of the requested classes in [0, 1], at the size of the truth.
        classes: the classes of the maps, -1 where a slot is padding.
        truth: 0 for background, class + 1, 255 where ignored.
        thresholds: background scores in [0, 1], ascending.
        num_classes: number of classes, the background included.

    Returns:
        One matrix per background score; add them over the images of a set.

    Raises:
        ValueError: maps and truth differ in size, or a class or threshold is out of range.
    """
    if not len(thresholds):
        raise ValueError("`thresholds` must hold at least one background score, got none")
    inside = ((thresholds >= 0.0) & (thresholds <= 1.0)).all()
    if not inside or (thresholds.diff() <= 0).any():
        raise ValueError(
            "`thresholds` must ascend within [0, 1], each score once, "
            f"got {[round(float(value), 4) for value in thresholds[:5]]}...; use torch.unique"
        )
    if cam.shape[1:] != truth.shape:
        raise ValueError(
            f"`cam` must have the size of `truth`, {truth.shape[0]}x{truth.shape[1]}, "
            f"got {cam.shape[1]}x{cam.shape[2]}; use camkit.resize_cam first"
        )
    if classes.numel() and int(classes.max()) + 1 >= num_classes:
        raise ValueError(
            f"class {int(classes.max())} needs `num_classes` of {int(classes.max()) + 2} or more, "
            f"got {num_classes}; the background counts too"
        )
    score, slot = strongest(cam[None], classes[None])
    rows = checked_mask(truth, num_classes=num_classes, name="truth", ignored=num_classes)
    # scores are compared in the dtype of the maps, as `to_mask` compares them
    steps = thresholds.to(cam.device, cam.dtype).contiguous()
    beaten = torch.bucketize(score[0].detach(), steps)  # number of thresholds below the score
    shape = (len(steps) + 1, num_classes + 1, len(classes))
    cells = slot[0].add(rows.add(beaten, alpha=shape[1]), alpha=shape[2])
    counts = torch.bincount(cells.flatten(), minlength=shape[0] * shape[1] * shape[2])
    counts = counts.view(shape)[:, :-1]  # the last row held the ignored pixels

    total = counts.sum(0)
    wins = total - counts.cumsum(0)[:-1]  # at threshold j the pixels win that beat more than j
    # a padded slot never wins, so its column may be that of the background
    columns = (classes.long() + 1).clamp_min(0)
    confusions = counts.new_zeros(len(steps), num_classes, num_classes)
    confusions.index_add_(2, columns, wins)
    confusions[..., 0] += (total - wins).sum(-1)
    return confusions


def best_threshold(
    confusions: Int[Tensor, "s c c"],
    thresholds: Float[Tensor, "s"] = THRESHOLDS,
    *,
    definition: Definition = "present",
    classes: Sequence[int] | None = None,
) -> Best:
    """Find the background score with the highest mean IoU; the lowest one where several tie.

    Choose on one split and report on another: a score chosen on the reported set flatters the maps.

    Args:
        confusions: one matrix per background score, summed over a set.
        thresholds: the background scores, as given to `sweep_confusions`.
        definition: which classes count, see `mean_iou`.
        classes: mask values to average over, 0 being the background; None takes all.

    Raises:
        ValueError: there is not one score for each matrix, or no class but the background has a
            true pixel.
    """
    _check_same_sweep(confusions, thresholds)
    check_foreground(confusions[0], classes)
    means = mean_iou(confusions, definition=definition, classes=classes)
    if means.isnan().all():
        raise ValueError("`confusions` hold no pixel of the chosen classes, so no mean IoU exists")
    step = int(means.nan_to_num(-1.0).argmax())
    return Best(threshold=float(thresholds[step]), mean_iou=float(means[step]))


def threshold_curve(
    confusions: Int[Tensor, "s c c"],
    thresholds: Float[Tensor, "s"] = THRESHOLDS,
    *,
    definition: Definition = "present",
    classes: Sequence[int] | None = None,
) -> Curve:
    """Compute the mean IoU at every background score.

    The arguments and errors are those of `best_threshold`.
    """
    _check_same_sweep(confusions, thresholds)
    check_foreground(confusions[0], classes)
    means = mean_iou(confusions, definition=definition, classes=classes)
    return Curve(tuple(thresholds.tolist()), tuple(means.tolist()))


def average_precision(
    confusions: Int[Tensor, "s c c"], thresholds: Float[Tensor, "s"] = THRESHOLDS
) -> Float[Tensor, "c-1"]:
    """Compute the pixel average precision of each class, without choosing a background score.

    Pixels are ranked by the score with which the class wins them; pixels that another class wins
    come last. As in information retrieval, precision is summed over the gains of recall, without
    interpolation. Scores between two neighbouring thresholds tie, so the error is about one step of
    the sweep.

    Args:
        confusions: one matrix per background score, as by `sweep_confusions`, summed over a set.
        thresholds: the background scores, as given to `sweep_confusions`.

    Returns:
        float64 in [0, 1], one for each class, without the background (which has no score of its
        own); NaN for a class without a true pixel.
    """
    _check_same_sweep(confusions, thresholds)
    counts = confusions.long()
    hit = counts.diagonal(dim1=-2, dim2=-1)[:, 1:]
    claimed = counts.sum(-2)[:, 1:]
    true = counts[0].sum(-1)[1:]
    everything = counts[0].sum().expand(1, len(true))
    # from the highest background score to the lowest, then all pixels that were never claimed
    hit = torch.cat([hit.flip(0), true[None]]).double()
    claimed = torch.cat([claimed.flip(0), everything]).double()
    precision = (hit / claimed).nan_to_num(0.0)  # no pixel claimed: recall has not moved yet
    gained = torch.cat([hit[:1], hit.diff(dim=0)]) / true
    return (precision * gained).sum(0)


def _check_same_sweep(confusions: Tensor, thresholds: Tensor) -> None:
    if len(thresholds) != len(confusions) or not len(thresholds):
        raise ValueError(
            f"`thresholds` must hold one score, at least one, for each of the {len(confusions)} "
            f"matrices, got {len(thresholds)}; pass those of sweep_confusions"
        )
