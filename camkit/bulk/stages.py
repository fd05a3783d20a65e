"""The stages of a bulk run, from an image to its files.

chunks(source, size)              -> Iterator[tuple[Item | Failure, ...]]
    read(item, loading)               -> ReadImage                     any core
    batches(images, recipe)           -> list[tuple[ReadImage, ...]]   of one size each
    forward(pipeline, recipe, batch)  -> list[Maps | Failure]          where the model is
    learn(fitter, recipe, batch, todo) -> list[Lesson | Failure]       the same in the pass of a fit
    finish(maps, writing, folder)     -> ImageResult                   any core; writes the files
    write_part(results, folder, name) -> list[ImageResult]             Parquet only, once per chunk

All arguments and results can be pickled. The same chunk gives the same bytes in every engine,
however often it is interrupted, because batches depend on the chunk alone: a chunk is planned
whole even if some of its images are done (ledger.py). A ``CamkitError`` or ``ValueError`` of a
stage concerns one image; an `OutputError` concerns the results folder and ends the run.
"""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from camkit.bulk.items import Failure, Item, result_path
from camkit.bulk.recipe import Job, Loading, Recipe, Writing
from camkit.capture.record import Capture
from camkit.data.camfiles import write_cam
from camkit.errors import CamkitError, DataError, one_line
from camkit.fitting import GUESSES, Fitter
from camkit.mask import mask_at
from camkit.ops.images import resize_cam
from camkit.paint import save_mask
from camkit.photo import read_levels
from camkit.pipeline import Pipeline
from camkit.printing import several, short_repr
from camkit.readout import Readout
from camkit.result import mask_bits
from camkit.seeds import PredictedClasses
from camkit.tensors import Cam
from camkit.vocabulary import Vocabulary

Entry = TypeVar("Entry")
Outcome = TypeVar("Outcome")

MAX_VALUES = 1 << 27
"""Pixels times classes of the maps that a worker writes for one photo; it takes up to 3 GB."""

_FOLDER_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
)


class OutputError(CamkitError):
    """The results folder cannot be written to, whatever the image."""

    @staticmethod
    def explain(root: Path, error: OSError) -> "OutputError":
        """Say what to do about an error of the file system."""
        return OutputError(
            f"{root} cannot be written to ({error.strerror}); free disk space or check write "
            "permission there, then run the command again: finished images are kept"
        )


@dataclass(frozen=True)
class OutFolder:
    """The results folder.

    Attributes:
        root: of all results.
        rank: of this process among those that write into the folder.
        folds: see `camkit.bulk.items.result_path`.
    """

    root: Path
    rank: int = 0
    folds: bool = False

    @property
    def drafts(self) -> Path:
        """Folder of unfinished files of this rank, which its next run clears."""
        return self.root / ".drafts" / f"rank-{self.rank}"

    @property
    def sums(self) -> Path:
        """Folder of the sums of a fit that is not over; the journal lists its files."""
        return self.root / ".sums"


@dataclass(frozen=True, eq=False)
class ReadImage:
    """A picture at the size the model sees.

    Attributes:
        key: of the item.
        source: where its bytes are, as text.
        levels: colours in 0..255, and opacity for a model of 4 channels.
        size: rows and columns of the photo itself.
        classes: of the image, from 0; None if the source has no labels.
        notes: how it was read, if that is worth a note.
    """

    key: str
    source: str
    levels: UInt8[np.ndarray, "H W c"]
    size: tuple[int, int]
    classes: tuple[int, ...] | None
    notes: tuple[str, ...] = ()

    __repr__ = short_repr

    @property
    def rgb(self) -> UInt8[np.ndarray, "H W 3"]:
        """The colours alone."""
        return np.ascontiguousarray(self.levels[:, :, :3])

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True, eq=False)
class Maps:
    """Class maps after the model and the refiners that need its attention.

    Attributes:
        image: the picture.
        classes: of each map, from 0.
        cam: in [0, 1], of any size.
        values: of each class in masks.
        bits: of the masks of this run.
        row: its line of the manifest so far, JSON-ready.
    """

    image: ReadImage
    classes: tuple[int, ...]
    cam: Float[np.ndarray, "k h w"]
    values: tuple[int, ...]
    bits: Literal[8, 16]
    row: dict[str, Any]

    __repr__ = short_repr

    def __str__(self) -> str:
        return self.image.key


@dataclass(frozen=True, eq=False)
class ImageResult:
    """A finished image.

    Attributes:
        key: of the item.
        row: its line of the manifest, JSON-ready, with paths relative to the results folder.
        cam: its maps, kept for the Parquet file of the chunk.
        stamps: of its files, see `stamp_of`; mask before cam.
    """

    key: str
    row: dict[str, Any]
    cam: Float[np.ndarray, "k h w"] | None = None
    stamps: tuple[str, ...] = ()

    __repr__ = short_repr


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the images of a batch taught a read-out.

    Attributes:
        keys: of the images that were still to be counted, also of those that show no class.
        sums: of those images; None if none of them shows a class.
    """

    keys: tuple[str, ...]
    sums: Readout | None

    __repr__ = short_repr


def chunks(entries: Iterable[Entry], size: int) -> Iterator[tuple[Entry, ...]]:
    """Cut the entries of a source into chunks, in order.

    >>> list(chunks("abcde", 2))
    [('a', 'b'), ('c', 'd'), ('e',)]
    """
    left = iter(entries)
    while chunk := tuple(islice(left, size)):
        yield chunk


def read(item: Item, loading: Loading) -> ReadImage:
    """Read an image and bring it to the size of the model."""
    source = str(item.place)
    with item.place.open() as file:
        picture = read_levels(
            file, source, opacity=loading.channels == 4, max_pixels=loading.max_pixels
        )
    photo = replace(loading, mean=0.0, std=1.0).photo(picture.levels)
    planes = photo.pixels if loading.channels == 4 else photo.rgb
    levels = (planes[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return ReadImage(item.key, source, levels, photo.size, item.classes, picture.notes)


def batches(images: Sequence[ReadImage], recipe: Recipe) -> list[tuple[ReadImage, ...]]:
    """Batch the pictures of a chunk by size, in order.

    Pictures without any class need no model and form batches of their own, as do those whose
    classes only the model knows.
    """
    groups: dict[tuple[Any, ...], list[ReadImage]] = {}
    for image in images:
        classes = _known_classes(image, recipe)
        groups.setdefault((image.levels.shape, classes == (), classes is None), []).append(image)
    return [batch for group in groups.values() for batch in chunks(group, recipe.batch)]


def model_stage(
    pipeline: Pipeline, recipe: Recipe, job: Job
) -> Callable[[Sequence[ReadImage], frozenset[str]], list[Maps | Lesson | Failure]]:
    """Return what a pass does with a batch, of which some images are still to be done."""
    if job == "maps":
        return lambda batch, _: [*forward(pipeline, recipe, batch)]
    fitter = Fitter(pipeline, guesses=recipe.guesses or GUESSES)
    return lambda batch, todo: [*learn(fitter, recipe, batch, todo)]


def forward(pipeline: Pipeline, recipe: Recipe, batch: Sequence[ReadImage]) -> list[Maps | Failure]:
    """Run the model on a batch.

    If a batch fails, each of its pictures is run alone, so that only those at fault fail.

    Raises:
        CamkitError: the batch does not fit the memory of the device.
    """
    return _alone_if_failed(lambda part: [*_forward(pipeline, recipe, part)], batch)


def learn(
    fitter: Fitter, recipe: Recipe, batch: Sequence[ReadImage], todo: frozenset[str]
) -> list[Lesson | Failure]:
    """Run the model on a batch and sum up what those images in ``todo`` teach.

    Images that fail, and the error, are those of `forward`.
    """

    def work(part: Sequence[ReadImage]) -> list[Lesson]:
        labels = _class_request(recipe, part)
        sums = None
        if labels is not None:
            rows = [_known_classes(image, recipe) or () for image in part]
            photos = [recipe.loading.photo(image.levels, image.levels.shape[:2]) for image in part]
            pixels = torch.cat([photo.pixels for photo in photos])
            rgb = torch.cat([photo.rgb for photo in photos])
            counted = [image.key in todo for image in part]
            guessed = isinstance(labels, PredictedClasses)
            sums = fitter.of(pixels, rgb, None if guessed else rows, counted=counted)
        return [Lesson(tuple(image.key for image in part if image.key in todo), sums)]

    return _alone_if_failed(work, batch)


def _alone_if_failed(
    work: Callable[[Sequence[ReadImage]], list[Outcome]], batch: Sequence[ReadImage]
) -> list[Outcome | Failure]:
    """Work on a batch, or on each of its pictures alone if the batch fails."""
    try:
        return [*work(batch)]
    except torch.OutOfMemoryError as error:
        rows, cols = batch[0].levels.shape[:2]
        raise CamkitError(
            f"a batch of {several(len(batch), 'image')} of {rows}x{cols} does not fit the memory "
            "of the model's device; use smaller batches (--batch)"
        ) from error
    except (CamkitError, ValueError) as error:
        if len(batch) == 1:
            return [Failure(batch[0].key, "model", one_line(error))]
    return [outcome for image in batch for outcome in _alone_if_failed(work, (image,))]


def _forward(pipeline: Pipeline, recipe: Recipe, batch: Sequence[ReadImage]) -> Iterator[Maps]:
    cams = np.zeros((len(batch), 0, 1, 1), np.float32)
    slots: list[list[int]] = [[]] * len(batch)
    unfitted: tuple[tuple[str, ...], ...] = ((),) * len(batch)
    names: tuple[tuple[str, ...], ...] = ((),) * len(batch)
    values: tuple[tuple[int, ...], ...] = ((),) * len(batch)
    outputs = None
    labels = _class_request(recipe, batch)
    if labels is not None:
        photos = [recipe.loading.photo(image.levels, image.levels.shape[:2]) for image in batch]
        stages = pipeline.stages(
            torch.cat([photo.pixels for photo in photos]),
            rgb=torch.cat([photo.rgb for photo in photos]),
            classes=labels,
            keys=[image.key for image in batch],
            sizes=[image.size for image in batch],
        )
        cams, slots = stages.cam.float().cpu().numpy(), stages.classes.tolist()
        names, values, outputs = stages.names, stages.values, stages.capture.outputs
        unfitted = stages.unfitted
    bits = _mask_bits(recipe, pipeline.vocabulary)
    for number, image in enumerate(batch):
        classes = tuple(index for index in slots[number] if index >= 0)
        legend = dict(zip(values[number], names[number], strict=True))
        row = {
            "key": image.key,
            "source": image.source,
            "size": list(image.size),
            "model_size": list(image.levels.shape[:2]),
            "classes": [
                {"index": index, "name": name}
                for index, name in zip(classes, names[number], strict=True)
            ],
            "legend": {str(value): name for value, name in legend.items()},
            "most_probable_output": None if outputs is None else int(outputs[number].argmax()),
        }
        if unfitted[number]:
            row["unfitted"] = list(unfitted[number])
        if image.notes:
            row["notes"] = list(image.notes)
        cam = np.ascontiguousarray(cams[number, : len(classes)])
        yield Maps(image, classes, cam, values[number], bits or mask_bits(values[number]), row)


def _mask_bits(recipe: Recipe, vocabulary: Vocabulary | None) -> Literal[8, 16] | None:
    """Return the bits of all masks of a run; None if nothing tells which classes there are."""
    if vocabulary is None:
        return None
    indices: Iterable[int] = range(len(vocabulary))
    if isinstance(recipe.labels, PredictedClasses):
        indices = vocabulary.candidates or indices
    elif recipe.labels is not None:
        indices = recipe.labels
    return mask_bits(vocabulary.value(index) for index in indices)


def _class_request(recipe: Recipe, batch: Sequence[ReadImage]) -> Any:
    """Return the classes to request from the pipeline; None if no picture has any."""
    rows = [_known_classes(image, recipe) for image in batch]
    if all(row == () for row in rows):
        return None
    if isinstance(recipe.labels, PredictedClasses):
        return recipe.labels
    if any(row is None for row in rows):
        if recipe.guesses is None:
            raise DataError("the image has no labels; give labels, or let the classifier predict")
        return recipe.guesses  # `batches` keeps images with and without labels apart
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=-1)


def _known_classes(image: ReadImage, recipe: Recipe) -> tuple[int, ...] | None:
    """Return the classes of an image before the model runs; None if only the model knows."""
    if isinstance(recipe.labels, PredictedClasses):
        return None
    return image.classes if recipe.labels is None else recipe.labels


def finish(maps: Maps, writing: Writing, folder: OutFolder) -> ImageResult:
    """Refine by colour, draw the mask, and write the files of an image."""
    image, classes = maps.image, maps.classes
    cam = torch.from_numpy(maps.cam)[None]
    if classes and writing.finish:
        colours = torch.from_numpy(image.rgb).permute(2, 0, 1)[None] / 255
        capture = Capture.of_picture(colours, keys=[image.key], sizes=[image.size])
        with torch.no_grad():
            for refiner in writing.finish:
                cam = refiner(cam, capture)
        cam = cam.float()
    full = _full_size(cam, image, writing) if classes else torch.zeros(1, 0, *image.size)
    files: dict[str, Path] = {}
    with _draft_folder(folder) as draft:
        if writing.masks:
            mask = torch.zeros(image.size, dtype=torch.uint8)
            if classes:
                mask = mask_at(
                    cam,
                    image.size,
                    torch.tensor([maps.values]) - 1,
                    background_score=writing.background_score,
                    background=writing.background,
                    ignore_below=writing.ignore_below,
                    bits=maps.bits,
                )[0]
            files["mask"] = draft / "mask.png"
            save_mask(mask, files["mask"], bits=maps.bits)
        if writing.cams == "npz":
            half = full[0].numpy().astype(np.float16)
            files["cam"] = draft / "cam.npz"
            np.savez_compressed(files["cam"], keys=np.array(classes, np.int64), attn_highres=half)
        elif writing.cams in ("both", "psa", "irn", "clip-es"):
            files["cam"] = draft / "cam.npy"
            write_cam(files["cam"], classes, full[0], form=writing.cams)
        paths, stamps = dict[str, str](), list[str]()
        for kind, path in files.items():
            place = f"{kind}s" / result_path(image.key, path.suffix, folds=folder.folds)
            paths[kind], stamp = _move(path, place, folder)
            stamps.append(stamp)
    kept = cam[0].clamp(0, 1).numpy() if writing.cams == "parquet" else None
    return ImageResult(image.key, {**maps.row, **paths}, kept, tuple(stamps))


def _full_size(cam: Cam, image: ReadImage, writing: Writing) -> Float[Tensor, "b k H W"]:
    """Return the maps at the size of the photo, if they are written at this size.

    Raises:
        DataError: they would take gigabytes.
    """
    if writing.cams in ("none", "parquet"):
        return cam
    count = cam.shape[1]
    if count * image.size[0] * image.size[1] > MAX_VALUES:
        raise DataError(
            f"{image.source} has {image.size[0]}x{image.size[1]} pixels (rows x columns) and "
            f"{count} classes, and class maps of this size are too large to write; keep them at "
            "the size of the model (--cams parquet), or write masks only (--cams none)"
        )
    return resize_cam(cam, image.size).clamp(0, 1)


def write_part(results: Sequence[ImageResult], folder: OutFolder, name: str) -> list[ImageResult]:
    """Write the maps of a chunk as one Parquet file, float16.

    Columns: ``key``; ``rows`` and ``cols`` of the photo; ``height`` and ``width`` of the maps;
    ``classes``; ``names``; ``cam``, map after map, row by row. Rows are sorted by key. ``name`` is
    that of the file without its suffix, see `camkit.bulk.ledger.ChunkPlan.part`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not results:
        return []
    results = sorted(results, key=lambda result: result.key)  # they finish in any order
    rows = [result.row for result in results]
    cams, int32 = [result.cam for result in results if result.cam is not None], pa.int32()
    columns = {
        "key": [result.key for result in results],
        "rows": pa.array([row["size"][0] for row in rows], int32),
        "cols": pa.array([row["size"][1] for row in rows], int32),
        "height": pa.array([cam.shape[1] for cam in cams], int32),
        "width": pa.array([cam.shape[2] for cam in cams], int32),
    }
    for column, entry, kind in (("classes", "index", int32), ("names", "name", pa.string())):
        values = [[label[entry] for label in row["classes"]] for row in rows]
        columns[column] = pa.array(values, pa.list_(kind))
    flat = [cam.astype(np.float16).ravel() for cam in cams]
    columns["cam"] = pa.array(flat, pa.list_(pa.float16()))
    with _draft_folder(folder) as draft:
        parquet.write_table(pa.table(columns), draft / "part.parquet", compression="zstd")
        place = PurePosixPath("cams", f"{name}.parquet")
        path, stamp = _move(draft / "part.parquet", place, folder)
    return [
        replace(result, row={**result.row, "cam": path}, cam=None, stamps=(*result.stamps, stamp))
        for result in results
    ]


@contextmanager
def _draft_folder(folder: OutFolder) -> Iterator[Path]:
    """Yield a new folder for drafts, which the block may fill, and remove it afterwards."""
    draft = folder.drafts / uuid.uuid4().hex
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise OutputError.explain(folder.root, error) from error
    try:
        yield draft
    except OSError as error:
        if error.errno in _FOLDER_ERRORS:
            raise OutputError.explain(folder.root, error) from error
        raise  # concerns this image alone, such as a path that is too long
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move(draft: Path, place: PurePosixPath, folder: OutFolder) -> tuple[str, str]:
    """Flush a draft to the disk and move it to its place in one step; return place and stamp."""
    with draft.open("rb+") as file:
        stamp = _stamp(file)
        os.fsync(file.fileno())  # the file must survive whatever the journal entry survives
    target = folder.root / place
    target.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(target)
    return str(place), stamp


def stamp_of(path: Path) -> str:
    """Return the size and a hash of a file, by which a later run knows whether it is whole."""
    with path.open("rb") as file:
        return _stamp(file)


def _stamp(file: BinaryIO) -> str:
    digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=8))  # type: ignore[arg-type]
    return f"{file.tell()}-{digest.hexdigest()}"
