"""Folders of masks or CAM files scored against ground truth."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from camkit.bulk.camfiles import (
    CAM_SUFFIXES,
    MASK_SUFFIXES,
    FileItem,
    FilesByName,
    read_maps,
)
from camkit.bulk.items import Failure
from camkit.bulk.workers import run_jobs
from camkit.data.files import MASK_SUFFIXES as TRUTH_SUFFIXES, mask_name
from camkit.data.labels import ImageLabels
from camkit.data.sample import VOC_FORM, MaskForm, read_mask
from camkit.errors import DataError
from camkit.ops.images import resize_cam
from camkit.printing import short_repr
from camkit.score import THRESHOLDS, Definition, best_threshold, confusion_matrix, sweep_confusions
from camkit.score.confusion import NO_FOREGROUND, has_foreground

Choice: TypeAlias = Literal["given", "tuned", "oracle"]
"""Where a background score comes from; "oracle" is the best on the images that are scored, which
overestimates the maps."""


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """The confusion matrix of a folder.

    Attributes:
        confusion: summed over the images.
        each: the matrix of every image by its name, if they were kept.
        images: number of images counted.
        failures: images not counted, here or while the background score was chosen.
        background_score: at which masks were drawn; None for a folder of masks.
        choice: where the background score comes from.
        unseen: images counted whose labels name a class that the truth shows nowhere, if labels
            were given.
    """

    confusion: Int[Tensor, "c c"]
    each: dict[str, Int[Tensor, "c c"]]
    images: int
    failures: tuple[Failure, ...]
    background_score: float | None = None
    choice: Choice = "given"
    unseen: int = 0

    __repr__ = short_repr


def pair_truth(
    predictions: Path,
    truths: Path,
    *,
    cams: bool = False,
    names: Collection[str] | None = None,
    labels: ImageLabels | None = None,
    partial: bool = False,
) -> list[FileItem]:
    """Find the mask or CAM file of each ground truth.

    Args:
        predictions: folder of masks (PNG) or CAM files.
        truths: folder of ground-truth masks (PNG, TIFF, BMP or ``.npy``), with the names of the
            predictions, or those names with an ending such as ``_mask``.
        cams: whether the predictions are CAM files.
        names: the images to use; None uses all with a ground truth.
        labels: classes of each image, for CAM files that do not contain them.
        partial: skip images without a prediction.

    Raises:
        DataError: a file is missing, or two files have the same name.
    """
    kind = "CAM files" if cams else "masks"
    predicted = FilesByName(predictions, CAM_SUFFIXES if cams else MASK_SUFFIXES, kind)
    plain = truths.is_dir() and any(truths.glob("*.png"))  # other files beside PNGs are no masks
    suffixes = MASK_SUFFIXES if plain else TRUTH_SUFFIXES
    true = FilesByName(truths, suffixes, "ground-truth masks")
    known = set(predicted.paths) if names is None else set(names)
    true.paths = _without_endings(true.paths, known)
    names = list(true.paths) if names is None else list(names)
    if lost := [name for name in names if name not in true.paths]:
        raise DataError(f"{truths} has no ground truth of {_examples(lost)}; correct the list")
    missing = [name for name in names if name not in predicted.paths]
    if len(missing) == len(names):
        raise DataError(
            f"{predictions} has no {kind} of {_examples(missing)}: no name fits {truths}"
        )
    if missing and not partial:
        raise DataError(
            f"{predictions} lacks {len(missing)} of {len(names)} {kind}: {_examples(missing)}; "
            "list the images of your split (--list), or score those that exist (--partial)"
        )
    return [
        FileItem(
            name,
            predicted.only(name),
            truth=true.only(name),
            classes=None if labels is None else labels.of(name),
        )
        for name in names
        if name in predicted.paths
    ]


def _without_endings(paths: dict[str, list[Path]], known: set[str]) -> dict[str, list[Path]]:
    """Name masks such as a_mask.png by their images, if a is an image and has no other mask."""
    short = {name: mask_name(name) for name in paths if name not in known}
    taken = {name for name in paths if name in known}
    found: dict[str, list[Path]] = {}
    for name, files in paths.items():
        other = short.get(name, name)
        kept = other if other in known and other not in taken else name
        found.setdefault(kept, []).extend(files)
    return found


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def score_masks(
    items: Sequence[FileItem],
    *,
    num_classes: int,
    form: MaskForm = VOC_FORM,
    keep_each: bool = False,
    workers: int | None = None,
) -> ScoreResult:
    """Score masks.

    Args:
        items: from `pair_truth`.
        num_classes: background included.
        form: how the true masks are read; the others hold ids.
        keep_each: keep the matrix of every image, for `camkit.score.paired_gain`.
        workers: see `run_jobs`.

    Raises:
        DataError: not a single image could be counted, or no true mask shows a class.
    """
    return _count(_CountMask(num_classes, form), items, keep_each=keep_each, workers=workers)[0]


def score_cams(  # noqa: PLR0913 - each setting is a choice of its own
    items: Sequence[FileItem],
    *,
    num_classes: int,
    form: MaskForm = VOC_FORM,
    background_score: float | None = None,
    tune: Sequence[FileItem] = (),
    definition: Definition = "present",
    resize: bool = False,
    keep_each: bool = False,
    workers: int | None = None,
) -> ScoreResult:
    """Score CAM files.

    Args:
        items: from `pair_truth`.
        num_classes: background included.
        form: how the true masks are read.
        background_score: score that a class must exceed; None chooses the best of
            `camkit.score.THRESHOLDS`.
        tune: images to choose it on, other than ``items``. Without them it is chosen on ``items``
            and called an oracle.
        definition: of the mean IoU that is maximised.
        resize: resize maps to the size of the truth; otherwise other sizes fail.
        keep_each: keep the matrix of every image, for `camkit.score.paired_gain`.
        workers: see `run_jobs`.

    Raises:
        ValueError: images are both tuned on and scored, or ``tune`` comes with a score.
        DataError: not a single image could be counted, or no true mask shows a class.
    """
    shared = {item.name for item in tune} & {item.name for item in items}
    if shared:
        raise ValueError(
            f"{len(shared)} images are both tuned on and scored, such as {min(shared)}; tune on "
            "other images"
        )
    if background_score is not None and tune:
        raise ValueError("`background_score` is given, so `tune` has no effect; omit one of them")
    choice: Choice = "given"
    lost: tuple[Failure, ...] = ()
    if background_score is None:
        choice = "tuned" if tune else "oracle"
        sweep = _CountCam(num_classes, tuple(THRESHOLDS.tolist()), resize, form)
        results = _count(sweep, tune or items, workers=workers)
        confusions = torch.stack([result.confusion for result in results])
        background_score = best_threshold(confusions, definition=definition).threshold
        if not tune and not keep_each:  # the sweep contains the result
            result = results[sweep.thresholds.index(background_score)]
            return replace(result, background_score=background_score, choice=choice)
        lost = results[0].failures if tune else ()
    work = _CountCam(num_classes, (background_score,), resize, form)
    result = _count(work, items, keep_each=keep_each, workers=workers)[0]
    failures = (*lost, *result.failures)
    return replace(result, failures=failures, background_score=background_score, choice=choice)


@dataclass(frozen=True)
class _CountMask:
    """Counts a mask against its ground truth."""

    num_classes: int
    form: MaskForm
    thresholds: tuple[float, ...] = (0.0,)  # masks need none

    def __call__(self, item: FileItem) -> Int64[np.ndarray, "1 c c"]:
        truth = _read_ids(item.truth, self.num_classes, self.form)
        predicted = _read_ids(item.path, self.num_classes)
        if predicted.shape != truth.shape:
            sizes = ["x".join(map(str, mask.shape)) for mask in (predicted, truth)]
            raise DataError(
                f"{item.path} has {sizes[0]} pixels (rows x columns) but {item.truth} has "
                f"{sizes[1]}; draw the mask at the size of its photo"
            )
        return confusion_matrix(truth, predicted, num_classes=self.num_classes)[None].numpy()


@dataclass(frozen=True)
class _CountCam:
    """Counts the masks of a CAM file at each background score."""

    num_classes: int
    thresholds: tuple[float, ...]
    resize: bool
    form: MaskForm

    def __call__(self, item: FileItem) -> Int64[np.ndarray, "s c c"]:
        truth, maps = _read_ids(item.truth, self.num_classes, self.form), read_maps(item)
        size = (truth.shape[0], truth.shape[1])
        cam = maps.cam if maps.classes else torch.zeros(1, 1, *size)
        rows, cols = cam.shape[-2:]
        if (rows, cols) != size and not self.resize:
            raise DataError(
                f"{item.path} holds maps of {rows}x{cols} (rows x columns) but {item.truth} has "
                f"{size[0]}x{size[1]} pixels; `camkit refine` writes maps at the size of the "
                "photo, or resize them here (--resize)"
            )
        return sweep_confusions(
            cam[0] if (rows, cols) == size else resize_cam(cam, size)[0],
            torch.tensor(maps.classes or (-1,)),
            truth,
            thresholds=torch.tensor(self.thresholds, dtype=torch.float64),
            num_classes=self.num_classes,
        ).numpy()


def _read_ids(path: Path | None, num_classes: int, form: MaskForm = VOC_FORM) -> Int[Tensor, "H W"]:
    if path is None:
        raise DataError("the image has no ground truth; match the files by pair_truth")
    return read_mask(path, size=None, num_classes=num_classes - 1, form=form)


def _count(
    work: _CountMask | _CountCam,
    items: Sequence[FileItem],
    *,
    keep_each: bool = False,
    workers: int | None = None,
) -> list[ScoreResult]:
    """Count every image, by many processes; return a result for each background score.

    Raises:
        DataError: not a single image could be counted, or no true mask shows a class.
    """
    total = torch.zeros(len(work.thresholds), work.num_classes, work.num_classes).long()
    each: dict[str, Tensor] = {}
    failures: list[Failure] = []
    unseen = 0
    for item, result in run_jobs(work, items, stage="score", workers=workers):
        if isinstance(result, Failure):
            failures.append(result)
            continue
        confusion = torch.from_numpy(result)
        total += confusion
        shown = confusion[0].sum(1) > 0
        unseen += not all(shown[index + 1] for index in item.classes or ())
        if keep_each:
            each[item.name] = confusion.int()  # the pixels of one image fit 32 bits
    failures.sort(key=lambda failure: failure.key)
    if len(failures) == len(items):
        reason = f"; {failures[0].key}: {failures[0].reason}" if failures else ""
        raise DataError(f"not a single image could be counted{reason}")
    if not has_foreground(total[0]):
        raise DataError(
            f"nothing can be measured on {len(items) - len(failures)} true masks, such as "
            f"{items[0].truth}: {NO_FOREGROUND}"
        )
    return [
        ScoreResult(
            confusion,
            {name: confusions[number] for name, confusions in each.items()},
            len(items) - len(failures),
            tuple(failures),
            unseen=unseen,
        )
        for number, confusion in enumerate(total)
    ]
