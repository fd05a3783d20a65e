"""What a confusion matrix says of each class, as values and as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from camkit.score.confusion import Overlap

_HEADS = ("IoU", "precision", "recall", "FP", "FN")


@dataclass(frozen=True)
class ClassScore:
    """How well one class was found, in [0, 1]; NaN where there is nothing to divide by.

    Attributes:
        name: of the class.
        iou: intersection over union.
        precision: share of what was predicted that is true.
        recall: share of what is true that was predicted.
        false_positives: share of the union that was predicted and is not true.
        false_negatives: share of the union that is true and was not predicted; with ``iou`` and
            ``false_positives`` it adds up to 1, as the evaluators of PSA and SEAM tell it.
        pixels: how many are true.
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
        names: of the classes, the background's first.

    Raises:
        ValueError: there is not one name for each class.
    """
    if len(names) != len(confusion):
        raise ValueError(
            f"`names` must name {len(confusion)} classes, the background too, got {len(names)}"
        )
    overlap = Overlap.of(confusion)
    counts = zip(
        names, overlap.hit.tolist(), overlap.true.tolist(), overlap.predicted.tolist(), strict=True
    )
    return tuple(_score(name, hit, true, predicted) for name, hit, true, predicted in counts)


def pixel_accuracy(confusion: Int[Tensor, "c c"]) -> float:
    """Share of the pixels whose class was found; NaN without pixels."""
    return _share(int(confusion.diagonal().sum()), int(confusion.sum()))


def class_table(scores: Sequence[ClassScore]) -> str:
    """A table in %, one class a line; - where there is nothing to divide by."""
    width = max(len("class"), *(len(score.name) for score in scores))
    lines = [f"{'class':<{width}}  " + "  ".join(f"{head:>9}" for head in (*_HEADS, "pixels"))]
    for score in scores:
        shares = (
            score.iou,
            score.precision,
            score.recall,
            score.false_positives,
            score.false_negatives,
        )
        cells = [*(percent(share) for share in shares), str(score.pixels)]
        lines.append(f"{score.name:<{width}}  " + "  ".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share in %, two digits behind the point.

    >>> percent(0.12345), percent(float("nan"))
    ('12.35', '-')
    """
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def _score(name: str, hit: int, true: int, predicted: int) -> ClassScore:
    union = true + predicted - hit
    return ClassScore(
        name=name,
        iou=_share(hit, union),
        precision=_share(hit, predicted),
        recall=_share(hit, true),
        false_positives=_share(predicted - hit, union),
        false_negatives=_share(true - hit, union),
        pixels=true,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
