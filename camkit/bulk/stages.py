"""What happens to an image of a bulk run, stage by stage: read, forward, finish.

chunks(source, size)            -> Iterator[tuple[Item | Refused, ...]]
    read(item, reading)             -> Prepared                   any core
    batches(prepared, recipe)       -> list[tuple[Prepared, ...]] of one size each
    forward(pipeline, recipe, batch)-> list[Maps | Failure]       where the model is
    finish(maps, writing, folder)   -> Made                       any core; writes mask and maps
    write_part(made, folder, name)  -> list[Made]                 only for maps in Parquet, by chunk

The last two are in finishing.py. Around them, `camkit.bulk.plan.plan(chunk, journal)` says what
of a chunk is left to do, and `camkit.bulk.journal.Journal` keeps what is done.

All that goes in and comes out can be pickled. The same chunk gives the same bytes, whoever runs it
and however often: batches depend on the chunk alone, so a chunk is planned whole even where part
of it is done. `read`, `forward` and `finish` tell what is wrong with an image by `CamkitError`,
``ValueError`` or a `Failure`; an `OutputError` is of the folder of the results and ends the run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from camkit.bulk.items import Item
from camkit.bulk.recipe import Reading, Recipe
from camkit.bulk.workers import Failure
from camkit.capture.record import Capture
from camkit.errors import CamkitError, DataError
from camkit.photo import Photo, photo_from_array, picture_from_file
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
        classes: asked of it, from 0; None lets the classifier guess.
    """

    key: str
    source: str
    rgb: UInt8[np.ndarray, "H W 3"]
    size: tuple[int, int]
    classes: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Maps:
    """Class maps as the model and the refiners beside it left them.

    Attributes:
        key: of the item.
        source: where its bytes are, as text.
        rgb: the picture, for refiners that follow its colours.
        size: rows and columns of the photo itself.
        classes: one for each map, from 0.
        cam: in [0, 1], of any size.
        by_class: masks hold class + 1; else, with too many classes for a byte, the slot + 1.
        row: what the manifest says of it so far, JSON-ready.
    """

    key: str
    source: str
    rgb: UInt8[np.ndarray, "H W 3"]
    size: tuple[int, int]
    classes: tuple[int, ...]
    cam: Float[np.ndarray, "k h w"]
    by_class: bool
    row: dict[str, Any] = field(default_factory=dict)


def chunks(entries: Iterable[Entry], size: int) -> Iterator[tuple[Entry, ...]]:
    """Cut the entries of a source into chunks, in their order.

    >>> list(chunks("abcde", 2))
    [('a', 'b'), ('c', 'd'), ('e',)]
    """
    found = iter(entries)
    while chunk := tuple(islice(found, size)):
        yield chunk


def read(item: Item, reading: Reading) -> ReadImage:
    """Read an image and bring it to the size of the model.

    Raises:
        DataError: it cannot be read, or is larger than allowed.
    """
    source = str(item.place)
    allowed = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = reading.max_pixels
    try:
        with item.place.open() as file:
            picture = picture_from_file(file, source)
    except DataError as error:
        if not isinstance(error.__cause__, (Image.DecompressionBombError, Warning)):
            raise
        raise DataError(
            f"{source} holds more than the {reading.max_pixels} pixels allowed; raise the limit "
            "(--max-pixels) if you know where it comes from"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = allowed
    photo = _photo(picture, reading, reading.size)
    small = (photo.rgb[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return ReadImage(item.key, source, small, photo.size, item.classes)


def batches(prepared: Sequence[ReadImage], recipe: Recipe) -> list[tuple[ReadImage, ...]]:
    """Put the pictures of a chunk that go through the model together into batches, in order.

    Those of which no class is asked need no model and stay among themselves.
    """
    groups: dict[tuple[Any, ...], list[ReadImage]] = {}
    for one in prepared:
        unasked = _asked(one, recipe) == ()
        groups.setdefault((one.rgb.shape, unasked), []).append(one)
    return [batch for group in groups.values() for batch in chunks(group, recipe.batch)]


def forward(pipeline: Pipeline, recipe: Recipe, batch: Sequence[ReadImage]) -> list[Maps | Failure]:
    """Run the model on pictures of one size.

    Where a batch cannot be run, each picture of it is tried alone, so that only the one at fault
    fails.

    Args:
        pipeline: of the same recipe, see `Recipe.pipeline`.
        recipe: the settings.
        batch: from `batches`.
    """
    try:
        return list(_forward(pipeline, recipe, batch))
    except (CamkitError, ValueError) as error:
        if len(batch) == 1:
            return [Failure(batch[0].key, " ".join(str(error).split()))]
    return [found for one in batch for found in forward(pipeline, recipe, (one,))]


def _forward(pipeline: Pipeline, recipe: Recipe, batch: Sequence[ReadImage]) -> list[Maps]:
    asked = [_asked(one, recipe) for one in batch]
    if any(classes is None for classes in asked) and not isinstance(
        recipe.labels, PredictedClasses
    ):
        raise DataError("no classes are known of it; give labels, or let the classifier guess")
    if all(classes == () for classes in asked):
        return [_maps(one, (), np.zeros((0, 1, 1), np.float32), recipe) for one in batch]
    photos = [_photo(one.rgb, recipe.reading, one.rgb.shape[:2]) for one in batch]

    def slots(capture: Capture) -> Tensor:
        return (
            recipe.labels(capture)
            if isinstance(recipe.labels, PredictedClasses)
            else _padded(asked)
        )

    stages = pipeline.stages(
        torch.cat([photo.pixels for photo in photos]),
        rgb=torch.cat([photo.rgb for photo in photos]),
        classes=slots,
    )
    cams = stages.cam.float().cpu()
    found = []
    for slot, one in enumerate(batch):
        classes = tuple(index for index in stages.classes[slot].tolist() if index >= 0)
        outputs = stages.capture.outputs
        best = None if outputs is None else int(outputs[slot].argmax())
        known = int(stages.capture.scores.shape[-1])
        cam = cams[slot, : len(classes)].contiguous().numpy()
        found.append(_maps(one, classes, cam, recipe, known=known, best=best))
    return found


def _asked(one: ReadImage, recipe: Recipe) -> tuple[int, ...] | None:
    if isinstance(recipe.labels, PredictedClasses):
        return None
    return one.classes if recipe.labels is None else recipe.labels


def _padded(classes: Sequence[tuple[int, ...] | None]) -> Tensor:
    rows = [row or () for row in classes]
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([[*row, *([-1] * (width - len(row)))] for row in rows])


def _maps(
    one: ReadImage,
    classes: tuple[int, ...],
    cam: Float[np.ndarray, "k h w"],
    recipe: Recipe,
    *,
    known: int = 0,
    best: int | None = None,
) -> Maps:
    vocabulary = recipe.vocabulary
    names = tuple(str(one) if vocabulary is None else vocabulary.names[one] for one in classes)
    row = {
        "key": one.key,
        "source": one.source,
        "size": list(one.size),
        "model_size": list(one.rgb.shape[:2]),
        "classes": [
            {"index": index, "name": name} for index, name in zip(classes, names, strict=True)
        ],
        "legend": {str(value): name for value, name in mask_legend(classes, names, known).items()},
        "most_probable_output": best,
    }
    by_class = fits_a_byte(known)
    return Maps(one.key, one.source, one.rgb, one.size, classes, cam, by_class, row)


def _photo(
    picture: UInt8[np.ndarray, "H W 3"], reading: Reading, size: int | tuple[int, ...]
) -> Photo:
    return photo_from_array(
        picture,
        size=size if isinstance(size, int) else (size[0], size[1]),
        mean=reading.mean,
        std=reading.std,
        multiple=reading.multiple,
    )
