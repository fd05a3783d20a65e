"""The stages of a bulk run up to the maps: read, batch, forward.

chunks(source, size)             -> Iterator[tuple[Item | Failure, ...]]
    read(item, loading)              -> ReadImage                     any core
    batches(images, recipe)          -> list[tuple[ReadImage, ...]]   of one size each
    forward(pipeline, recipe, batch) -> list[Maps | Failure]          where the model is
    finish(maps, writing, folder)    -> ImageResult                   any core; writes the files
    write_part(results, folder, name)-> list[ImageResult]             Parquet only, once per chunk

The last two are in finishing.py; ledger.py plans the chunks and records the results.

All arguments and results can be pickled. The same chunk gives the same bytes in every engine,
however often it is interrupted, because batches depend on the chunk alone: a chunk is planned
whole even if some of its images are done. A ``CamkitError`` or ``ValueError`` of a stage concerns
one image; an `OutputError` concerns the results folder and ends the run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from camkit.bulk.items import Failure, Item
from camkit.bulk.recipe import Loading, Recipe
from camkit.errors import CamkitError, DataError
from camkit.photo import picture_from_file
from camkit.pipeline import Pipeline, fits_a_byte, mask_legend
from camkit.seeds import PredictedClasses

Entry = TypeVar("Entry")


@dataclass(frozen=True, eq=False)
class ReadImage:
    """A picture at the size the model sees.

    Attributes:
        key: of the item.
        source: where its bytes are, as text.
        rgb: colours in 0..255.
        size: rows and columns of the photo itself.
        classes: of the image, from 0; None if the source has no labels.
    """

    key: str
    source: str
    rgb: UInt8[np.ndarray, "H W 3"]
    size: tuple[int, int]
    classes: tuple[int, ...] | None

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True, eq=False)
class Maps:
    """Class maps after the model and the refiners that need its attention.

    Attributes:
        image: the picture.
        classes: of each map, from 0.
        cam: in [0, 1], of any size.
        by_class: masks hold class + 1; if there are too many classes for a byte, the slot + 1.
        row: its line of the manifest so far, JSON-ready.
    """

    image: ReadImage
    classes: tuple[int, ...]
    cam: Float[np.ndarray, "k h w"]
    by_class: bool
    row: dict[str, Any]

    def __str__(self) -> str:
        return self.image.key


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
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = loading.max_pixels
    try:
        with item.place.open() as file:
            picture = picture_from_file(file, source)
    except DataError as error:
        if not isinstance(error.__cause__, (Image.DecompressionBombError, Warning)):
            raise
        raise DataError(
            f"{source} has more than the {loading.max_pixels} pixels allowed; raise the limit "
            "(--max-pixels) if you trust its origin"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    photo = loading.photo(picture)
    rgb = (photo.rgb[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return ReadImage(item.key, source, rgb, photo.size, item.classes)


def batches(images: Sequence[ReadImage], recipe: Recipe) -> list[tuple[ReadImage, ...]]:
    """Batch the pictures of a chunk by size, in order.

    Pictures without any class need no model and form batches of their own.
    """
    groups: dict[tuple[Any, ...], list[ReadImage]] = {}
    for image in images:
        empty = _known_classes(image, recipe) == ()
        groups.setdefault((image.rgb.shape, empty), []).append(image)
    return [batch for group in groups.values() for batch in chunks(group, recipe.batch)]


def forward(pipeline: Pipeline, recipe: Recipe, batch: Sequence[ReadImage]) -> list[Maps | Failure]:
    """Run the model on a batch.

    If a batch fails, each of its pictures is run alone, so that only those at fault fail.

    Raises:
        CamkitError: the batch does not fit the memory of the device.
    """
    try:
        return list(_forward(pipeline, recipe, batch))
    except torch.OutOfMemoryError as error:
        rows, cols = batch[0].rgb.shape[:2]
        raise CamkitError(
            f"{len(batch)} images of {rows}x{cols} do not fit the memory of the model's device; "
            "use smaller batches (--batch)"
        ) from error
    except (CamkitError, ValueError) as error:
        if len(batch) == 1:
            return [Failure(batch[0].key, "model", " ".join(str(error).split()))]
    return [outcome for image in batch for outcome in forward(pipeline, recipe, (image,))]


def _forward(pipeline: Pipeline, recipe: Recipe, batch: Sequence[ReadImage]) -> Iterator[Maps]:
    cams = np.zeros((len(batch), 0, 1, 1), np.float32)
    slots: list[list[int]] = [[]] * len(batch)
    names: tuple[tuple[str, ...], ...] = ((),) * len(batch)
    outputs, known = None, 0
    labels = _class_request(recipe, batch)
    if labels is not None:
        photos = [recipe.loading.photo(image.rgb, image.rgb.shape[:2]) for image in batch]
        stages = pipeline.stages(
            torch.cat([photo.pixels for photo in photos]),
            rgb=torch.cat([photo.rgb for photo in photos]),
            classes=labels,
        )
        cams, slots = stages.cam.float().cpu().numpy(), stages.classes.tolist()
        names, known, outputs = stages.names, stages.known, stages.capture.outputs
    for number, image in enumerate(batch):
        classes = tuple(index for index in slots[number] if index >= 0)
        legend = mask_legend(classes, names[number], known)
        row = {
            "key": image.key,
            "source": image.source,
            "size": list(image.size),
            "model_size": list(image.rgb.shape[:2]),
            "classes": [
                {"index": index, "name": name}
                for index, name in zip(classes, names[number], strict=True)
            ],
            "legend": {str(value): name for value, name in legend.items()},
            "most_probable_output": None if outputs is None else int(outputs[number].argmax()),
        }
        cam = np.ascontiguousarray(cams[number, : len(classes)])
        yield Maps(image, classes, cam, fits_a_byte(known), row)


def _class_request(recipe: Recipe, batch: Sequence[ReadImage]) -> Any:
    """Return the classes to request from the pipeline; None if no picture has any."""
    rows = [_known_classes(image, recipe) for image in batch]
    if all(row == () for row in rows):
        return None
    if isinstance(recipe.labels, PredictedClasses):
        return recipe.labels
    if any(row is None for row in rows):
        raise DataError("the image has no labels; give labels, or let the classifier predict")
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=-1)


def _known_classes(image: ReadImage, recipe: Recipe) -> tuple[int, ...] | None:
    """Return the classes of an image before the model runs; None if only the model knows."""
    if isinstance(recipe.labels, PredictedClasses):
        return None
    return image.classes if recipe.labels is None else recipe.labels
