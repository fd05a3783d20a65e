"""The whole curve over background scores: mean IoU, its area, and pixel average precision."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.score.confusion import Definition, mean_iou
from camkit.score.sweep import THRESHOLDS


@dataclass(frozen=True)
class Curve:
    """Mean IoU at each background score, both in [0, 1]."""

    thresholds: tuple[float, ...]
    mean_iou: tuple[float, ...]

    @property
    def area(self) -> float:
        """Mean height of the curve, by trapezoids: what a background score picked blindly gives.

        Curves over different ranges of background scores have no comparable area.
        """
        x, y = (
            torch.tensor(side, dtype=torch.float64) for side in (self.thresholds, self.mean_iou)
        )
        return float(torch.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else self.mean_iou[0]


def threshold_curve(
    confusions: Int[Tensor, "s c c"],
    thresholds: Float[Tensor, "s"] = THRESHOLDS,
    *,
    definition: Definition = "present",
    classes: Sequence[int] | None = None,
) -> Curve:
    """Mean IoU over background scores.

    Args:
        confusions: one matrix per background score, as by `sweep_confusions`, summed over a set.
        thresholds: the background scores, as given to `sweep_confusions`.
        definition: which classes count, see `mean_iou`.
        classes: mask values to average over, 0 being the background; None takes all.

    Returns:
        The curve; NaN where no class counts.
    """
    _check(confusions, thresholds)
    means = mean_iou(confusions, definition=definition, classes=classes)
    return Curve(tuple(thresholds.tolist()), tuple(means.tolist()))


def average_precision(
    confusions: Int[Tensor, "s c c"], thresholds: Float[Tensor, "s"] = THRESHOLDS
) -> Float[Tensor, "c-1"]:
    """Pixel average precision of each class, without choosing a background score.

    Pixels are ranked by the score with which the class wins them; pixels that another class wins
    come last. As in information retrieval, precision is summed over the gains of recall, without
    interpolation. Scores between two neighbouring thresholds tie, so the steps of the sweep are the
    resolution: with scores on the thresholds it is exact, else off by about one step of the curve.

    Args:
        confusions: one matrix per background score, as by `sweep_confusions`, summed over a set.
        thresholds: the background scores, as given to `sweep_confusions`.

    Returns:
        float64 in [0, 1], one for each class, without the background (which has no score of its
        own); NaN for a class without a true pixel.
    """
    _check(confusions, thresholds)
    counts = confusions.long()
    hit = counts.diagonal(dim1=-2, dim2=-1)[:, 1:]
    claimed = counts.sum(-2)[:, 1:]
    true = counts[0].sum(-1)[1:]
    everything = counts[0].sum().expand(1, len(true))
    # from the highest background score to the lowest, then all that was never claimed
    hit = torch.cat([hit.flip(0), true[None]]).double()
    claimed = torch.cat([claimed.flip(0), everything]).double()
    precision = (hit / claimed).nan_to_num(0.0)  # no pixel claimed: recall has not moved yet
    gained = torch.cat([hit[:1], hit.diff(dim=0)]) / true
    return (precision * gained).sum(0)


def _check(confusions: Tensor, thresholds: Tensor) -> None:
    if len(thresholds) != len(confusions) or not len(thresholds):
        raise ValueError(
            f"`thresholds` must hold one score for each of the {len(confusions)} matrices, and at "
            f"least one, got {len(thresholds)}; pass those of sweep_confusions"
        )
