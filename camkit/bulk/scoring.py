"""Folders of masks or CAM files scored, at a background score whose choice is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Int
from torch import Tensor

from camkit.bulk.counting import CountCam, Counted, CountMask, TruthItem, count
from camkit.bulk.jobs import Failure
from camkit.errors import DataError
from camkit.score import THRESHOLDS, Definition, best_threshold

Choice: TypeAlias = Literal["given", "tuned", "oracle"]
"""Where a background score comes from; "oracle" is the best on the very images it is reported on,
which flatters the maps."""


@dataclass(frozen=True, eq=False)
class Scored:
    """The confusion matrix of a folder.

    Attributes:
        confusion: summed over the images.
        each: the same of every image by its name, where they were asked for.
        images: how many were counted.
        failures: those that were not, here or while choosing the background score.
        background_score: at which masks were drawn; None of masks.
        choice: where it comes from.
    """

    confusion: Int[Tensor, "c c"]
    each: dict[str, Int[Tensor, "c c"]]
    images: int
    failures: tuple[Failure, ...]
    background_score: float | None = None
    choice: Choice = "given"


def score_masks(
    items: Sequence[TruthItem],
    *,
    num_classes: int,
    keep_each: bool = False,
    workers: int | None = None,
) -> Scored:
    """Score masks.

    Args:
        items: from `camkit.bulk.pair_truth`.
        num_classes: the background included.
        keep_each: keep the matrix of every image, for `camkit.score.paired_gain`.
        workers: see `camkit.bulk.run_jobs`.

    Raises:
        DataError: not one image could be counted.
    """
    found = count(CountMask(num_classes), items, keep_each=keep_each, workers=workers)
    _check_counted(found)
    return _scored(found)


def score_cams(  # noqa: PLR0913  (each setting is a choice of its own)
    items: Sequence[TruthItem],
    *,
    num_classes: int,
    background_score: float | None = None,
    tune: Sequence[TruthItem] = (),
    definition: Definition = "present",
    resize: bool = False,
    keep_each: bool = False,
    workers: int | None = None,
) -> Scored:
    """Score CAM files.

    Args:
        items: from `camkit.bulk.pair_truth`.
        num_classes: the background included.
        background_score: what a class must beat; None takes the best of
            `camkit.score.THRESHOLDS`.
        tune: images to find the best one on, others than are scored; without any it is found on
            those that are scored, and called an oracle.
        definition: of the mean IoU that is best.
        resize: bring maps to the size of the truth; else those of another size fail.
        keep_each: keep the matrix of every image, for `camkit.score.paired_gain`.
        workers: see `camkit.bulk.run_jobs`.

    Raises:
        ValueError: images are both tuned on and scored, or a score is given and tuned too.
        DataError: not one image could be counted.
    """
    shared = {item.name for item in tune} & {item.name for item in items}
    if shared:
        raise ValueError(
            f"{len(shared)} images are scored and tuned on too, such as {min(shared)}; take others"
        )
    if background_score is not None and tune:
        raise ValueError("a background score is given, so there is none to tune; leave one out")
    sweep = CountCam(num_classes, tuple(THRESHOLDS.tolist()), resize)
    choice: Choice = "given"
    lost: tuple[Failure, ...] = ()
    if background_score is None:
        choice = "tuned" if tune else "oracle"
        swept = count(sweep, tune or items, workers=workers, label="choosing")
        _check_counted(swept)
        background_score = best_threshold(swept.total, definition=definition).threshold
        if not tune and not keep_each:  # the best of the sweep is the result
            at = sweep.thresholds.index(background_score)
            return _scored(swept, at=at, background_score=background_score, choice=choice)
        lost = swept.failures if tune else ()
    one = CountCam(num_classes, (background_score,), resize)
    found = count(one, items, keep_each=keep_each, workers=workers)
    _check_counted(found)
    return _scored(found, background_score=background_score, choice=choice, lost=lost)


def _scored(
    found: Counted,
    *,
    at: int = 0,
    background_score: float | None = None,
    choice: Choice = "given",
    lost: tuple[Failure, ...] = (),
) -> Scored:
    each = {name: confusions[at] for name, confusions in found.each.items()}
    failures = (*lost, *found.failures)
    return Scored(found.total[at], each, found.images, failures, background_score, choice)


def _check_counted(found: Counted) -> None:
    if not found.images:
        first = found.failures[0] if found.failures else None
        raise DataError(
            "not one image could be counted" + (f"; {first.name}: {first.reason}" if first else "")
        )
