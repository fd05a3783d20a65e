"""Folders of masks or CAM files counted against ground truth and scored."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from camkit.bulk.camfiles import (
    CAM_ENDINGS,
    MASK_ENDINGS,
    CamItem,
    ImageLabels,
    files_by_name,
    only_file,
    read_maps,
)
from camkit.bulk.workers import Done, Failure, run_jobs
from camkit.data.sample import read_mask
from camkit.errors import DataError
from camkit.ops.images import resize_cam
from camkit.photo import decode
from camkit.score import THRESHOLDS, Definition, best_threshold, confusion_matrix, sweep_confusions


@dataclass(frozen=True)
class TruthItem:
    """One image to be counted.

    Attributes:
        name: the file name without its ending.
        predicted: its mask or CAM file.
        truth: its ground truth.
        classes: of the image, where labels are given.
    """

    name: str
    predicted: Path
    truth: Path
    classes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CountMask:
    """Count a mask against its ground truth (`camkit.score.confusion_matrix`).

    Attributes:
        num_classes: the background included.
    """

    num_classes: int

    def __call__(self, item: TruthItem) -> Int64[np.ndarray, "1 c c"]:
        truth = _ids(item.truth, self.num_classes)
        predicted = _ids(item.predicted, self.num_classes)
        if predicted.shape != truth.shape:
            raise DataError(
                f"{item.predicted} has {_by(predicted)} pixels (rows x columns) but {item.truth} "
                f"has {_by(truth)}; draw the mask at the size of its photo"
            )
        return confusion_matrix(truth, predicted, num_classes=self.num_classes)[None].numpy()


@dataclass(frozen=True)
class CountCam:
    """Count the masks of a CAM file at each background score (`camkit.score.sweep_confusions`).

    Attributes:
        num_classes: the background included.
        thresholds: background scores, ascending.
        resize: bring maps to the size of the truth; else those of another size are refused.
    """

    num_classes: int
    thresholds: tuple[float, ...]
    resize: bool = False

    def __call__(self, item: TruthItem) -> Int64[np.ndarray, "s c c"]:
        truth = _ids(item.truth, self.num_classes)
        maps = read_maps(CamItem(item.name, item.predicted, classes=item.classes))
        size = (truth.shape[0], truth.shape[1])
        cam = self._fitted(maps.cam, size, item) if maps.classes else torch.zeros(1, 1, *size)
        return sweep_confusions(
            cam[0],
            torch.tensor(maps.classes or (-1,)),
            truth,
            thresholds=torch.tensor(self.thresholds, dtype=torch.float64),
            num_classes=self.num_classes,
        ).numpy()

    def _fitted(self, cam: Tensor, size: tuple[int, int], item: TruthItem) -> Tensor:
        rows, cols = cam.shape[-2:]
        if (rows, cols) == size:
            return cam
        if not self.resize:
            raise DataError(
                f"{item.predicted} holds maps of {rows}x{cols} (rows x columns) but {item.truth} "
                f"has {size[0]}x{size[1]} pixels; refine writes maps of the size of the "
                "photo, or let them be resized here (--resize)"
            )
        return resize_cam(cam, size)


@dataclass(frozen=True, eq=False)
class CountResult:
    """Confusion matrices of a folder.

    Attributes:
        total: one for each background score, summed over the images; one in all of masks.
        each: the same of every image by its name, where they were asked for.
        images: how many were counted.
        failures: those that were not.
    """

    total: Int[Tensor, "s c c"]
    each: dict[str, Int[Tensor, "s c c"]]
    images: int
    failures: tuple[Failure, ...]


def pair_truth(
    predictions: Path,
    truths: Path,
    *,
    cams: bool = False,
    names: Collection[str] | None = None,
    labels: ImageLabels | None = None,
    partial: bool = False,
) -> list[TruthItem]:
    """Find the mask or CAM file of each ground truth.

    Args:
        predictions: folder of masks (PNG) or CAM files.
        truths: folder of ground-truth masks (PNG).
        cams: whether the predictions are CAM files.
        names: the images wanted; None takes all that have a ground truth.
        labels: the classes of each image, for CAM files that do not say them.
        partial: leave out images without a prediction.

    Raises:
        DataError: a file is missing, or there are two of a name.
    """
    endings, kind = (CAM_ENDINGS, "CAM files") if cams else (MASK_ENDINGS, "masks")
    found = files_by_name(predictions, endings, kind)
    truth_files = files_by_name(truths, MASK_ENDINGS, "ground-truth masks")
    wanted = list(truth_files) if names is None else list(names)
    lost = [name for name in wanted if name not in truth_files]
    if lost:
        raise DataError(f"{truths} has no ground truth of {_some(lost)}; correct the list")
    missing = [name for name in wanted if name not in found]
    if len(missing) == len(wanted):
        raise DataError(f"{predictions} has no {kind} of {_some(missing)}: no name fits {truths}")
    if missing and not partial:
        raise DataError(
            f"{predictions} lacks {len(missing)} of {len(wanted)} {kind}: {_some(missing)}; name "
            "the images of your split (--list), or count those that are there (--partial)"
        )
    return [
        TruthItem(
            name,
            only_file(name, found, predictions, endings),
            only_file(name, truth_files, truths, MASK_ENDINGS),
            None if labels is None else labels.of(name),
        )
        for name in wanted
        if name in found
    ]


def count(
    work: CountMask | CountCam,
    items: Sequence[TruthItem],
    *,
    keep_each: bool = False,
    workers: int | None = None,
    label: str = "counting",
) -> CountResult:
    """Count every image, by many processes.

    Args:
        work: how one image is counted.
        items: what is counted, from `pair_truth`.
        keep_each: keep the matrices of every image, for `camkit.score.paired_gain`.
        workers: processes; None takes one a core, 0 works in this process.
        label: stands before the progress bar.
    """
    steps = len(work.thresholds) if isinstance(work, CountCam) else 1
    total = torch.zeros(steps, work.num_classes, work.num_classes, dtype=torch.int64)
    each: dict[str, Tensor] = {}
    failures = []
    images = 0
    for outcome in run_jobs(work, items, workers=workers, label=label):
        if isinstance(outcome, Done):
            confusion = torch.from_numpy(outcome.result)
            total += confusion
            images += 1
            if keep_each:
                each[outcome.item.name] = confusion.int()  # pixels of one image fit
        else:
            failures.append(outcome)
    return CountResult(total, each, images, tuple(sorted(failures, key=lambda one: one.name)))


def _ids(path: Path, num_classes: int) -> Int[Tensor, "H W"]:
    cols, rows = decode(path).size
    return read_mask(path, size=(rows, cols), num_classes=num_classes - 1)


def _by(mask: Tensor) -> str:
    return "x".join(map(str, mask.shape))


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


Choice: TypeAlias = Literal["given", "tuned", "oracle"]
"""Where a background score comes from; "oracle" is the best on the very images it is reported on,
which flatters the maps."""


@dataclass(frozen=True, eq=False)
class ScoreResult:
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
) -> ScoreResult:
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
) -> ScoreResult:
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
    found: CountResult,
    *,
    at: int = 0,
    background_score: float | None = None,
    choice: Choice = "given",
    lost: tuple[Failure, ...] = (),
) -> ScoreResult:
    each = {name: confusions[at] for name, confusions in found.each.items()}
    failures = (*lost, *found.failures)
    return ScoreResult(found.total[at], each, found.images, failures, background_score, choice)


def _check_counted(found: CountResult) -> None:
    if not found.images:
        first = found.failures[0] if found.failures else None
        raise DataError(
            "not one image could be counted" + (f"; {first.name}: {first.reason}" if first else "")
        )
