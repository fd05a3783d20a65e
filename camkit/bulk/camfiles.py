"""CAM files with their photos and labels: found, read, refined, drawn as masks."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.bulk.ledger import claim_folder, write_errors
from camkit.bulk.workers import Done, Failure, run_jobs
from camkit.capture.record import Capture
from camkit.data.camfiles import CamFile, read_cam, write_cam
from camkit.data.labels import label_keys, label_vectors, read_text
from camkit.errors import DataError
from camkit.mask import to_mask
from camkit.ops.images import resize_cam
from camkit.paint import save_mask
from camkit.photo import read_picture
from camkit.refiners import Chain, Normalize, Refiner


@dataclass(frozen=True)
class ImageLabels:
    """The classes of each image, from 0; `read_labels` reads them.

    Attributes:
        path: the file they come from.
        classes: by image name, as the file spells it.
    """

    path: Path
    classes: Mapping[str | int, tuple[int, ...]]

    def of(self, name: str) -> tuple[int, ...]:
        """The classes of one image.

        Raises:
            DataError: the file has no labels for it.
        """
        for key in label_keys(name):
            if key in self.classes:
                return self.classes[key]
        raise DataError(f"{self.path} has no labels for {name}; add them")


def read_labels(path: str | Path) -> ImageLabels:
    """Read image-level labels.

    Args:
        path: ``cls_labels.npy`` of PSA, IRN, MCTformer or ToCo, {name: a 0 or 1 for each class}, of
            which nothing is run; or JSON, {"classes": [names], "labels": {image: [names]}} as in
            `camkit.data.open_voc`, or {image: [class indices]}.

    Returns:
        The labels.

    Raises:
        DataError: the file cannot be read, or is of another form.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return ImageLabels(path, label_vectors(path))
    if path.suffix == ".json":
        return ImageLabels(path, _from_json(path))
    raise DataError(f"{path} must end in .npy (cls_labels.npy) or .json to be read as labels")


def _from_json(path: Path) -> dict[str | int, tuple[int, ...]]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); correct it") from error
    named = isinstance(content, dict) and set(content) == {"classes", "labels"}
    known = list(content["classes"]) if named else None
    table = content["labels"] if named else content
    if not isinstance(table, dict) or not all(isinstance(row, list) for row in table.values()):
        raise DataError(
            f'{path} must hold {{"classes": [names], "labels": {{image: [names]}}}} or '
            "{image: [class indices]}"
        )
    return {name: _indices(row, name, known, path) for name, row in table.items()}


def _indices(row: list[object], name: str, known: list[str] | None, path: Path) -> tuple[int, ...]:
    found = []
    for label in row:
        index = known.index(label) if known is not None and label in known else label
        if type(index) is not int or index < 0:
            wanted = "an index from 0" if known is None else f"one of {', '.join(known)}"
            raise DataError(f"{path}: {name} is labelled {label!r}, expected {wanted}")
        found.append(index)
    return tuple(sorted(set(found)))


CAM_ENDINGS = (".npy", ".npz", ".safetensors")
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MASK_ENDINGS = (".png",)


@dataclass(frozen=True)
class CamItem:
    """One CAM file, and what belongs to it.

    Attributes:
        name: the file name without its ending.
        cam: the CAM file.
        photo: the image file, where photos are needed.
        classes: of the image, where labels are given.
    """

    name: str
    cam: Path
    photo: Path | None = None
    classes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class CamFolder:
    """CAM files, with the photos and labels that belong to them by name.

    Attributes:
        cams: folder of the CAM files; other files in it are left alone.
        images: folder of the photos; None where none are needed.
        labels: the classes of each image, for files that do not say them, and of files that hold
            all classes (logits) those to keep.
        names: the images wanted; None takes all CAM files.
        any_aspect: stretch maps onto photos of another aspect ratio, for models that squash photos
            into squares.
    """

    cams: Path
    images: Path | None = None
    labels: ImageLabels | None = None
    names: Collection[str] | None = None
    any_aspect: bool = False

    def items(self) -> tuple[list[CamItem], list[Failure]]:
        """Pair the files; what cannot be paired is told.

        Raises:
            DataError: a folder is not there, or holds no file of its kind.
        """
        cams = files_by_name(self.cams, CAM_ENDINGS, "CAM files")
        photos = None
        if self.images is not None:
            photos = files_by_name(self.images, PHOTO_ENDINGS, "photos")
        items, failures = [], []
        for name in cams if self.names is None else self.names:
            try:
                items.append(self._item(name, cams, photos))
            except DataError as error:
                failures.append(Failure(name, str(error)))
        return items, failures

    def _item(
        self, name: str, cams: Mapping[str, list[Path]], photos: Mapping[str, list[Path]] | None
    ) -> CamItem:
        return CamItem(
            name,
            only_file(name, cams, self.cams, CAM_ENDINGS),
            None
            if photos is None or self.images is None
            else only_file(name, photos, self.images, PHOTO_ENDINGS),
            None if self.labels is None else self.labels.of(name),
        )


def files_by_name(folder: Path, endings: Collection[str], kind: str) -> dict[str, list[Path]]:
    """List the files of a folder by their names without endings, sorted.

    Args:
        folder: where to look; its sub-folders are left out.
        endings: that count, in lower case.
        kind: what to call the files in an error.

    Raises:
        DataError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the one that holds the {kind}")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in endings and not path.name.startswith("."):
            found.setdefault(path.stem, []).append(path)
    if not found:
        raise DataError(f"{folder} holds no {kind} ({', '.join(endings)}) directly within it")
    return found


def only_file(
    name: str, files: Mapping[str, list[Path]], folder: Path, endings: Collection[str]
) -> Path:
    """The one file of a name.

    Raises:
        DataError: there is none, or more than one.
    """
    found = files.get(name, [])
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(f"{folder} has no file {name} ending in {', '.join(endings)}")
    raise DataError(
        f"{folder} has {' and '.join(path.name for path in found)}; leave one, to say which counts"
    )


def read_list(path: Path) -> tuple[str, ...]:
    """Read image names, one a line, in any way the lists of the field spell them.

    A name alone; a name with class indices behind it; or paths of a photo and of its mask.

    Raises:
        DataError: the file cannot be read, is empty, or names an image twice.
    """
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name = _listed_name(line.strip())
        if name in names:
            raise DataError(f"{path}: {name!r} stands on lines {names[name]} and {number}")
        names[name] = number
    if not names:
        raise DataError(f"{path} is empty; expected one image name a line")
    return tuple(names)


def _listed_name(line: str) -> str:
    first, *others = line.split()
    if not all(other.isdigit() for other in others) and Path(first).suffix not in PHOTO_ENDINGS:
        first = line  # a name with spaces in it
    path = Path(first)
    return path.stem if path.suffix.lower() in (*PHOTO_ENDINGS, *CAM_ENDINGS) else path.name


EVEN = 0.5
"""Score at which class and background are even, in maps that were set against a background map."""


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """The maps of an image's classes, from 0; ``opposed`` if they were set against a background."""

    classes: tuple[int, ...]
    cam: Float[Tensor, "1 k H W"]
    opposed: bool


def read_maps(item: CamItem) -> ClassMaps:
    """Read a CAM file; maps that come with one of the background are set against it.

    What a class has of the sum of both is 0.5 where they are even. So background score 0.5 draws
    the same mask as the highest map, and a refiner sees the classes as contested as the file does.

    Raises:
        DataError: the file cannot be read, or does not fit the labels.
    """
    found = _read(item)
    if found.background is None:
        return ClassMaps(found.classes, found.cam[None], opposed=False)
    if found.cam.numel() and min(found.cam.min(), found.background.min()) < 0:
        raise DataError(f"{item.cam} holds negative maps beside one of the background")
    share = found.cam / (found.cam + found.background).clamp_min(1e-12)  # 0 where both are 0
    return ClassMaps(found.classes, share[None], opposed=True)


def _read(item: CamItem) -> CamFile:
    if item.classes is None:
        return read_cam(item.cam)
    try:
        return read_cam(item.cam, classes=item.classes)
    except DataError as error:
        try:
            found = read_cam(item.cam)
        except DataError:
            raise error from None
        if found.form != "logits" or not set(item.classes) <= set(found.classes):
            raise
    kept = [found.classes.index(index) for index in item.classes]
    return CamFile(item.classes, found.cam[kept], found.background, found.form)


def read_photo(item: CamItem) -> UInt8[np.ndarray, "H W 3"]:
    """Read the photo of an item, upright, colours in 0..255.

    Raises:
        DataError: there is none, or it cannot be decoded.
    """
    if item.photo is None:
        raise DataError(f"{item.cam} was given no photo; name the folder of the photos")
    return read_picture(item.photo)


def to_photo_size(
    maps: ClassMaps, size: tuple[int, int], item: CamItem, *, any_aspect: bool = False
) -> Float[Tensor, "1 k H W"]:
    """Bring maps to the size of their photo; those of an image without classes are given it.

    Raises:
        DataError: maps and photo have another aspect ratio.
    """
    if not maps.classes:
        return torch.zeros(1, 0, *size)
    rows, cols = maps.cam.shape[-2:]
    if (rows, cols) == size:
        return maps.cam
    if not any_aspect and not same_aspect((rows, cols), size):
        turned = (
            "; it fits the photo turned, so the maps may be of the photo as stored, without the "
            "turn that its EXIF asks for: save the photo upright and make the maps again"
            if same_aspect((cols, rows), size)
            else "; if photos were squashed for the model, say so by any_aspect (--any-aspect)"
        )
        raise DataError(
            f"{item.cam} holds maps of {rows}x{cols} (rows x columns), which do not fit "
            f"{size[0]}x{size[1]} of {item.photo or 'its photo'}{turned}"
        )
    return resize_cam(maps.cam, size)


def same_aspect(small: tuple[int, int], large: tuple[int, int]) -> bool:
    """Whether one size is the other one scaled, each side off by less than one row or column.

    That is what rounding to whole patches, up or down, leaves.

    >>> same_aspect((24, 32), (375, 500)), same_aspect((32, 24), (375, 500))
    (True, False)
    """
    (rows, cols), (high, wide) = small, large
    return (rows - 1) * wide < (cols + 1) * high and (cols - 1) * high < (rows + 1) * wide


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
class FileResult:
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
) -> FileResult:
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
    return FileResult(written, len(kept), tuple(sorted(failures, key=lambda one: one.name)))


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
