"""Folders of masks or CAM files counted against ground truth, image by image."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from camkit.bulk.camfolder import (
    CAM_ENDINGS,
    MASK_ENDINGS,
    CamItem,
    files_by_name,
    only_file,
)
from camkit.bulk.classmaps import read_maps
from camkit.bulk.jobs import Done, Failure, run_jobs
from camkit.bulk.labels import ImageLabels
from camkit.data.sample import read_mask
from camkit.errors import DataError
from camkit.ops.resampling import resize_cam
from camkit.photo import decode
from camkit.score import confusion_matrix, sweep_confusions


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
class Counted:
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
) -> Counted:
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
    return Counted(total, each, images, tuple(sorted(failures, key=lambda one: one.name)))


def _ids(path: Path, num_classes: int) -> Int[Tensor, "H W"]:
    cols, rows = decode(path).size
    return read_mask(path, size=(rows, cols), num_classes=num_classes - 1)


def _by(mask: Tensor) -> str:
    return "x".join(map(str, mask.shape))


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
