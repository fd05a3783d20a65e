"""What a data set is made of: samples with image-level labels, and masks with class ids."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from camkit.errors import DataError
from camkit.photo import decode

_IGNORE = 255
_MOST_CLASSES = 254  # 255 is ignore
_FEW = 2**16


@dataclass(frozen=True)
class MaskForm:
    """How the pixel values of a mask file stand for classes.

    Attributes:
        colours: a value is red + 256 * green + 65536 * blue of an RGB image; else it is an index
            into a palette or an 8-bit grey level.
        ids: the id (0 for background, else class index + 1) of each value; None where values are
            ids already.
        ignored: values of pixels that count nowhere.
    """

    colours: bool = False
    ids: Mapping[int, int] | None = None
    ignored: tuple[int, ...] = (_IGNORE,)


VOC_FORM = MaskForm()
"""Ids in a palette or grey levels, 255 for ignore: most of the field."""


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        name: the file name without its ending.
        photo: the image file.
        mask: the ground truth, where there is one.
        classes: indices of the classes present, from 0, ascending; the background is no class.
        form: how the mask is to be read.
    """

    name: str
    photo: Path
    mask: Path | None
    classes: tuple[int, ...]
    form: MaskForm = field(default=VOC_FORM, hash=False)


@runtime_checkable
class DataSet(Protocol):
    """Images with image-level labels, in named splits.

    A mask holds 0 for background, the index in ``classes`` plus one, and 255 for ignore, or it is
    of the `MaskForm` that its sample names.
    """

    @property
    def root(self) -> Path: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of one split, in the order of its list."""

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Go through one split; an entry that cannot be used is given as what is wrong with it."""


def all_usable(entries: Iterable[Sample | DataError]) -> tuple[Sample, ...]:
    """List samples, or raise the first error among them."""
    samples = []
    for entry in entries:
        if isinstance(entry, DataError):
            raise entry
        samples.append(entry)
    return tuple(samples)


def read_mask(
    path: Path,
    *,
    size: tuple[int, int],
    num_classes: int,
    form: MaskForm = VOC_FORM,
    classes: Sequence[int] | None = None,
) -> Int[Tensor, "H W"]:
    """Read a ground-truth mask.

    Args:
        path: a PNG.
        size: rows and columns of the image it belongs to.
        num_classes: how many classes the data set has, background not counted.
        form: how its values stand for classes, as the sample says.
        classes: the classes of interest; all others become background. None takes all, of which
            there may be 254.

    Returns:
        0 for background, class index + 1 (with ``classes``: place in it + 1), 255 for ignore;
        int64.

    Raises:
        DataError: the file holds no ids, ids of no class, or another size than the image.
    """
    asked = range(num_classes) if classes is None else classes
    if len(asked) > _MOST_CLASSES:
        raise ValueError(
            f"a mask has room for {_MOST_CLASSES} classes, got {len(asked)}; name those of "
            "interest as `classes`"
        )
    ids = mask_ids(path, size=size, num_classes=num_classes, form=form)
    values = np.zeros(num_classes + 2, np.int64)
    values[[index + 1 for index in asked]] = range(1, len(asked) + 1)
    values[-1] = _IGNORE  # ignored pixels have the id -1
    return torch.from_numpy(values[ids])


def mask_classes(path: Path, *, num_classes: int, form: MaskForm = VOC_FORM) -> tuple[int, ...]:
    """List the classes a mask shows, from 0, ascending; background and ignore are none.

    Raises:
        DataError: the file holds no ids, or ids of no class.
    """
    ids = mask_ids(path, size=None, num_classes=num_classes, form=form)
    return tuple(value - 2 for value in present(ids + 1).tolist() if value > 1)


def mask_ids(
    path: Path, *, size: tuple[int, int] | None, num_classes: int, form: MaskForm
) -> Int[np.ndarray, "H W"]:
    """Read a mask of any number of classes: 0 for background, class index + 1, -1 for ignore.

    Raises:
        DataError: the file holds no ids, ids of no class, or another size than the image.
    """
    values = mask_values(path, form=form)
    if size is not None and values.shape != size:
        raise DataError(
            f"{path} has {values.shape[0]}x{values.shape[1]} pixels (rows x columns) but its image "
            f"has {size[0]}x{size[1]}; save the mask at image size, or turn it as EXIF turns the "
            "photo"
        )
    known = form.ids or {value: value for value in range(num_classes + 1)}
    known = dict(known) | dict.fromkeys(form.ignored, -1)
    held = present(values)
    unknown = [value for value in held.tolist() if value not in known]
    if unknown:
        named = range(num_classes + 1) if form.ids is None else form.ids
        some = "" if form.ids is None else f"{len(named)} from "
        raise DataError(
            f"{path} holds the ids {', '.join(map(str, unknown))}; allowed are "
            f"{some}{min(named, default=0)} to {max(named, default=0)} for {num_classes} classes "
            f"and {', '.join(map(str, form.ignored))} for ignore"
        )
    ids = np.array([known[value] for value in held.tolist()], np.int64)
    return ids[np.searchsorted(held, values)]


def mask_values(path: Path, *, form: MaskForm = VOC_FORM) -> Integer[np.ndarray, "H W"]:
    """Read the pixel values of a mask file, whatever they stand for.

    Raises:
        DataError: the file holds no values of this form.
    """
    image = decode(path)
    if form.colours:
        if image.format != "PNG" or image.mode != "RGB":
            raise DataError(
                f"{path} is a {image.format} of mode {image.mode}; expected ids written as colours "
                "in an RGB PNG"
            )
        red, green, blue = np.moveaxis(np.array(image).astype(np.int32), -1, 0)
        return red + 256 * green + 65536 * blue
    # PIL stretches 2- and 4-bit grey levels to 0..255, so only 8-bit ones are still ids.
    stretched = image.mode == "L" and _png_bits(path) != 8
    if image.format != "PNG" or image.mode not in ("P", "L") or stretched:
        raise DataError(
            f"{path} is a {image.format} of mode {image.mode}; expected class ids in a PNG with a "
            "palette (mode P) or 8-bit grey levels (mode L), not colours"
        )
    return np.array(image)


def present(values: Integer[np.ndarray, "H W"]) -> Integer[np.ndarray, "n"]:
    """Values from 0 that occur, ascending."""
    if values.size and values.max() < _FEW:
        return np.flatnonzero(np.bincount(values.ravel()))  # far faster than sorting
    return np.unique(values)


def _png_bits(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[-1]  # signature 8, chunk length and name 8, width 4, height 4, bits
