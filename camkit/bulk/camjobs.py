"""Folders of CAM files refined, or drawn as masks, by many processes."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit import __version__
from camkit.bulk.camfiles import EVEN, CamFolder, ClassMaps, FileItem, read_maps, to_photo_size
from camkit.bulk.items import Failure
from camkit.bulk.journal import Journal
from camkit.bulk.stages import OutFolder
from camkit.bulk.workers import run_jobs
from camkit.capture.record import Capture
from camkit.data.camfiles import write_cam
from camkit.errors import DataError
from camkit.manifest import remove_unfinished
from camkit.mask import to_mask
from camkit.paint import save_mask
from camkit.photo import read_picture
from camkit.refiners import Chain, Normalize, Refiner
from camkit.refiners.prompted import segmenters_in

BACKGROUND_SCORE = 0.45  # of `camkit.to_mask`, for files without a background map
_TOLERANCE = 1e-4  # what resizing and half precision may add to a normalised map


@runtime_checkable
class CamJob(Protocol):
    """Makes one file from a CAM file. Its repr is its settings."""

    suffix: ClassVar[str]
    stage: ClassVar[str]  # of a failure; the progress bar shows it too

    def __call__(self, item: FileItem, folder: CamFolder, path: Path) -> None: ...


@dataclass(frozen=True)
class RefineCam:
    """Refine a CAM file by its photo, and write it at the photo's size.

    Refiners get the maps at the size of the photo, and a capture that holds only the photo;
    refiners that need attention raise an error.

    Attributes:
        refine: the refiner; `camkit.chain` joins several.
        form: which codebases can read the files, see `camkit.data.write_cam`.
    """

    refine: Refiner
    form: Literal["both", "psa", "irn", "clip-es"] = "both"
    suffix: ClassVar[str] = ".npy"
    stage: ClassVar[str] = "refine"

    def __call__(self, item: FileItem, folder: CamFolder, path: Path) -> None:
        if item.photo is None:
            raise DataError(f"{item.path} has no photo; give the folder of the photos")
        colours = torch.from_numpy(read_picture(item.photo)).permute(2, 0, 1)[None] / 255
        size = (colours.shape[2], colours.shape[3])
        maps = read_maps(item)
        cam = to_photo_size(maps, size, item, any_aspect=folder.any_aspect)
        if maps.classes:
            first = self.refine
            while isinstance(first, Chain) and first.refiners:
                first = first.refiners[0]
            if not isinstance(first, Normalize):
                _check_range(cam, f"{item.path} holds maps", "start with the step normalize")
            with torch.no_grad():
                cam = self.refine(cam, Capture.of_picture(colours, keys=[item.name], sizes=[size]))
            _check_range(cam, "the refiners returned maps", "end with the step normalize")
            cam = to_photo_size(ClassMaps(maps.classes, cam, opposed=False), size, item)
        write_cam(path, maps.classes, cam[0].clamp(0, 1), form=self.form)


def _check_range(cam: Tensor, subject: str, way_out: str) -> None:
    low, high = (float(value) for value in cam.aminmax())
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # NaN fails both
        raise ValueError(f"{subject} from {low:.4g} to {high:.4g}, expected [0, 1]; {way_out}")


@dataclass(frozen=True)
class DrawMask:
    """Draw the mask of a CAM file (`camkit.to_mask`) as a palette PNG, class + 1 at each pixel.

    The mask has the size of the photo if photos are given, else that of the maps.

    Attributes:
        background_score: score that a class must exceed, or the exponent of a power background.
            None is 0.45, and 0.5 for files with a background map, where it draws the highest map.
        background: see `camkit.to_mask`.
        ignore_below: background pixels with a class score above this become 255.
    """

    background_score: float | None = None
    background: Literal["constant", "power"] = "constant"
    ignore_below: float | None = None
    suffix: ClassVar[str] = ".png"
    stage: ClassVar[str] = "draw"

    def __post_init__(self) -> None:
        if self.background == "power" and self.background_score is None:
            raise ValueError("a power background needs an exponent: 1 of CLIP-ES, 4 to 24 of PSA")
        self._draw(torch.zeros(1, 1, 1, 1), (0,), EVEN)  # refuses invalid settings

    def __call__(self, item: FileItem, folder: CamFolder, path: Path) -> None:
        maps = read_maps(item)
        cam = maps.cam
        if item.photo is not None:
            rows, cols = read_picture(item.photo).shape[:2]
            cam = to_photo_size(maps, (rows, cols), item, any_aspect=folder.any_aspect)
        if 0 in cam.shape[2:]:
            raise DataError(
                f"{item.path} is of an image without classes and does not contain its size; give "
                "the folder of the photos (--images)"
            )
        mask = torch.zeros(cam.shape[2:], dtype=torch.uint8)
        if maps.classes:
            mask = self._draw(cam, maps.classes, EVEN if maps.opposed else BACKGROUND_SCORE)[0]
        save_mask(mask, path)

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
class FilesSummary:
    """What became of a folder of CAM files: files written now, files that existed, failures."""

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
) -> FilesSummary:
    """Make a file from each CAM file of a folder, by many processes.

    Files that exist are kept, so that an interrupted run continues where it stopped; files are
    written atomically. ``settings.json`` beside the files holds all settings, ``errors.tsv`` the
    failures of the last run.

    Args:
        job: `RefineCam`, `DrawMask`, or an object like them.
        folder: the CAM files, with photos and labels.
        out: folder of the files, created if needed.
        workers: processes; None uses one per core, 0 works in this process.
        overwrite: write files again that exist.

    Raises:
        DataError: a folder is missing or empty, or ``out`` holds results of other settings.
    """
    out = Path(out)
    if out.exists() and out.samefile(folder.cams):
        raise DataError(f"{out} is the folder of the CAM files; choose another one for the results")
    items, failures = folder.items()
    settings = {
        "camkit": __version__,
        "job": repr(job),
        "cams": str(folder.cams.resolve()),
        "images": str(folder.images and folder.images.resolve()),
        "labels": str(folder.labels and folder.labels.path.resolve()),
        "any_aspect": str(folder.any_aspect),
    }
    segmenters = segmenters_in([getattr(job, "refine", None)])
    if segmenters:
        settings["segmenters"] = "; ".join(segmenters)
    pattern = f"*{job.suffix}"
    with Journal(OutFolder(out), results=(pattern,), exclusive=False) as journal:
        present = {path.stem for path in out.glob(pattern) if not path.name.startswith(".")}
        kept = present & {item.name for item in items}
        others = present - kept if overwrite else present
        if overwrite and others:
            way_out = f"{len(others)} files of other images would keep them, so remove those files"
            journal.claim(settings, way_out=f"{way_out} or choose another folder")
        else:
            journal.claim(settings, overwrite=not (others or journal.counts()[0]))
        if overwrite:
            for name in kept:
                (out / f"{name}{job.suffix}").unlink(missing_ok=True)
            kept = set()
        journal.forget_failures()
        remove_unfinished(out)
        # workers need neither the names nor the labels of all images
        lean = replace(folder, labels=None, names=None)
        work = partial(_write_file, job=job, folder=lean, out=out)
        left = [item for item in items if item.name not in kept]
        jobs = run_jobs(work, left, stage=job.stage, workers=workers, skipped=len(kept))
        written = 0
        try:
            for _, result in jobs:
                if isinstance(result, Failure):
                    failures.append(result)
                else:
                    written += 1
        finally:
            journal.record(failures)
            journal.export(manifest=False)
    failures.sort(key=lambda failure: failure.key)
    return FilesSummary(written, len(kept), tuple(failures))


def _write_file(item: FileItem, job: CamJob, folder: CamFolder, out: Path) -> None:
    job(item, folder, out / f"{item.name}{job.suffix}")
