"""What is done to CAM files: refined into CAM files, drawn as masks."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.bulk.camfolder import CamFolder, CamItem
from camkit.bulk.classmaps import EVEN, ClassMaps, read_maps, read_photo, to_photo_size
from camkit.bulk.jobs import Done, Failure, run_jobs
from camkit.bulk.outputs import claim_folder, write_errors
from camkit.capture.record import Capture
from camkit.data.camfiles import write_cam
from camkit.errors import DataError
from camkit.mask import to_mask
from camkit.paint import save_mask
from camkit.refine import Chain, Normalize, Refiner

BACKGROUND_SCORE = 0.45  # of `camkit.to_mask`, for maps without one of the background

_TOLERANCE = 1e-4  # what resizing and half precision may add to a normalised map


@runtime_checkable
class CamJob(Protocol):
    """Makes one file of one CAM file; its repr is its settings."""

    @property
    def suffix(self) -> str:
        """Ending of the files made."""

    @property
    def label(self) -> str:
        """What the progress bar says."""

    def __call__(self, item: CamItem, folder: CamFolder, path: Path) -> None: ...


@dataclass(frozen=True)
class RefineCam:
    """Refine a CAM file by its photo, and write it at the photo's size.

    Refiners see the maps at the size of the photo, and a capture of the photo alone: those that
    need attention refuse it.

    Attributes:
        refine: the refiner; `camkit.chain` makes one of several.
        form: which codebases can read the files, see `camkit.data.write_cam`.
    """

    refine: Refiner
    form: Literal["both", "psa", "irn", "clip-es"] = "both"
    suffix: ClassVar[str] = ".npy"
    label: ClassVar[str] = "refining"

    def __call__(self, item: CamItem, folder: CamFolder, path: Path) -> None:
        colours = torch.from_numpy(read_photo(item)).permute(2, 0, 1)[None] / 255
        size = (colours.shape[2], colours.shape[3])
        maps = read_maps(item)
        cam = to_photo_size(maps, size, item, any_aspect=folder.any_aspect)
        if maps.classes:
            if not _begins_by_normalizing(self.refine):
                _check_range(cam, f"{item.cam} holds maps", "refine by normalize first")
            with torch.no_grad():
                cam = self.refine(cam, Capture.of_picture(colours))
            _check_range(cam, "the refiners gave maps", "let normalize be the last of them")
            cam = to_photo_size(ClassMaps(maps.classes, cam, opposed=False), size, item)
        write_cam(path, maps.classes, cam[0].clamp(0, 1), form=self.form)


@dataclass(frozen=True)
class DrawMask:
    """Draw the mask of a CAM file (`camkit.to_mask`) as a palette PNG, class + 1 at each pixel.

    The mask has the size of the photo where photos are given, else that of the maps.

    Attributes:
        background_score: what a class must beat, or the exponent of a power background. None is
            0.45, and 0.5 for files that hold a map of the background: there it is the highest map.
        background: see `camkit.to_mask`.
        ignore_below: pixels that lose to the background, yet score more than this, become 255.
    """

    background_score: float | None = None
    background: Literal["constant", "power"] = "constant"
    ignore_below: float | None = None
    suffix: ClassVar[str] = ".png"
    label: ClassVar[str] = "drawing"

    def __post_init__(self) -> None:
        if self.background == "power" and self.background_score is None:
            raise ValueError("a power background needs an exponent: 1 of CLIP-ES, 4 to 24 of PSA")
        self._draw(torch.zeros(1, 1, 1, 1), (0,), EVEN)  # refuses settings that cannot be used

    def __call__(self, item: CamItem, folder: CamFolder, path: Path) -> None:
        maps = read_maps(item)
        cam = maps.cam
        if item.photo is not None:
            rows, cols = read_photo(item).shape[:2]
            cam = to_photo_size(maps, (rows, cols), item, any_aspect=folder.any_aspect)
        if 0 in cam.shape[2:]:
            raise DataError(
                f"{item.cam} is of an image without classes and does not say its size; give the "
                "folder of the photos (--images)"
            )
        if not maps.classes:
            save_mask(torch.zeros(cam.shape[2:], dtype=torch.uint8), path)
            return
        default = EVEN if maps.opposed else BACKGROUND_SCORE
        save_mask(self._draw(cam, maps.classes, default)[0], path)

    def _draw(
        self, cam: Float[Tensor, "1 k H W"], classes: tuple[int, ...], default: float
    ) -> UInt8[Tensor, "1 H W"]:
        return to_mask(
            cam,
            torch.tensor([classes]),
            background_score=default if self.background_score is None else self.background_score,
            background=self.background,
            ignore_below=self.ignore_below,
        )


@dataclass(frozen=True)
class Written:
    """What became of a folder of CAM files.

    Attributes:
        written: files made now.
        kept: files that an earlier run had made.
        failures: CAM files that no file could be made of.
    """

    written: int
    kept: int
    failures: tuple[Failure, ...]


def write_all(
    job: CamJob,
    folder: CamFolder,
    out: str | Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> Written:
    """Make a file of each CAM file of a folder, by many processes.

    What is there already is kept, so that an interrupted run goes on where it stopped; a file
    appears complete or not at all. ``settings.json`` beside the files says how they were made, and
    ``errors.tsv`` which could not be made and why.

    Args:
        job: `RefineCam`, `DrawMask`, or anything like them.
        folder: the CAM files and what belongs to them.
        out: folder of the files, made if it is not there.
        workers: processes; None takes one a core, 0 works in this process.
        overwrite: make the files again, whatever is there.

    Returns:
        How many were made, and what failed.

    Raises:
        DataError: a folder is missing or empty, or ``out`` holds results of other settings.
    """
    out = Path(out)
    if out.exists() and out.samefile(folder.cams):
        raise DataError(f"{out} is the folder of the CAM files; name another for the results")
    items, failures = folder.items()
    settings = {
        "camkit": version("camkit"),
        "job": repr(job),
        "cams": str(folder.cams.resolve()),
        "images": str(folder.images and folder.images.resolve()),
        "labels": str(folder.labels and folder.labels.path.resolve()),
        "any_aspect": str(folder.any_aspect),
    }
    names = [item.name for item in items]
    kept = claim_folder(out, settings, names, suffix=job.suffix, overwrite=overwrite)
    left = [item for item in items if item.name not in kept]
    # the workers need neither all names nor all labels
    alone = CamFolder(folder.cams, folder.images, any_aspect=folder.any_aspect)
    work = _IntoFolder(job, alone, out)
    outcomes = run_jobs(work, left, workers=workers, label=job.label, skipped=len(kept))
    written = 0
    try:
        for outcome in outcomes:
            written += isinstance(outcome, Done)
            if isinstance(outcome, Failure):
                failures.append(outcome)
    finally:
        write_errors(out, failures)
    return Written(written, len(kept), tuple(sorted(failures, key=lambda one: one.name)))


@dataclass(frozen=True)
class _IntoFolder:
    job: CamJob
    folder: CamFolder
    out: Path

    def __call__(self, item: CamItem) -> None:
        self.job(item, self.folder, self.out / f"{item.name}{self.job.suffix}")


def _begins_by_normalizing(refine: Callable[..., object]) -> bool:
    if isinstance(refine, Chain):
        return bool(refine.refiners) and _begins_by_normalizing(refine.refiners[0])
    return isinstance(refine, Normalize)


def _check_range(cam: Tensor, found: str, way_out: str) -> None:
    low, high = (float(value) for value in cam.aminmax())
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # NaN fails both
        raise ValueError(f"{found} from {low:.4g} to {high:.4g}, expected [0, 1]; {way_out}")
