"""Data sets: the protocol, samples with image-level labels, and masks with class ids."""

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
from camkit.tensors import IGNORE, IGNORE_16


@dataclass(frozen=True)
class MaskForm:
    """How the pixel values of a mask file encode classes.

    Attributes:
        colours: a value is red + 256 * green + 65536 * blue of an RGB image; else it is an index
            into a palette or a grey level of 8 or 16 bits.
        ids: the id (0 for background, else class index + 1) of each value; None where values are
            ids already.
        ignored: values of pixels that are not scored; in grey levels of 16 bits that are ids
            already, 65535 takes the place of 255.
    """

    colours: bool = False
    ids: Mapping[int, int] | None = None
    ignored: tuple[int, ...] = (IGNORE,)


VOC_FORM = MaskForm()
"""Ids in a palette or in grey levels, 255 for ignore: the form of most data sets."""


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        name: the file name without its ending.
        photo: the image file.
        mask: the file of the ground truth, if there is one.
        classes: indices of the classes present, from 0, ascending; the background is not a class.
        form: how the mask encodes classes.
    """

    name: str
    photo: Path
    mask: Path | None
    classes: tuple[int, ...]
    form: MaskForm = field(default=VOC_FORM, hash=False)


@runtime_checkable
class DataSet(Protocol):
    """Images with image-level labels, in named splits.

    A mask holds 0 for background, the index in ``classes`` plus one, and 255 for ignore, unless its
    sample names another `MaskForm`. ``root`` and all paths of samples are absolute, so that they
    stay valid when the working directory changes.
    """

    @property
    def root(self) -> Path: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, or raise the first error of `entries`.

        Raises:
            ValueError: there is no such split.
            DataError: a photo, label or mask of the split cannot be used.
        """

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""


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
        num_classes: number of classes of the data set, background not counted.
        form: how its values encode classes, as the sample says.
        classes: the classes to keep, at most 254; all others become background. None keeps all.

    Returns:
        0 for background, class index + 1 (place in ``classes`` + 1), 255 for ignore; int64.

    Raises:
        DataError: the file holds no ids, ids of no class, or another size than the image.
        ValueError: there are more classes than a mask can hold.
    """
    kept = range(num_classes) if classes is None else classes
    if len(kept) >= IGNORE:
        raise ValueError(
            f"a mask has room for {IGNORE - 1} classes, got {len(kept)}; pass the classes of "
            "interest as `classes`"
        )
    ids = mask_ids(path, size=size, num_classes=num_classes, form=form)
    values = np.zeros(num_classes + 2, np.int64)
    values[[index + 1 for index in kept]] = range(1, len(kept) + 1)
    values[-1] = IGNORE  # ignored pixels have the id -1
    return torch.from_numpy(values[ids])


def mask_classes(
    path: Path, *, num_classes: int, form: MaskForm = VOC_FORM, size: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """List the classes in a mask, from 0, ascending; arguments and errors are those of `read_mask`.

    ``size=None`` accepts any size.
    """
    ids = mask_ids(path, size=size, num_classes=num_classes, form=form)
    return tuple(value - 2 for value in unique_values(ids + 1).tolist() if value > 1)


def mask_ids(
    path: Path, *, size: tuple[int, int] | None, num_classes: int, form: MaskForm
) -> Int[np.ndarray, "H W"]:
    """Read a mask of any number of classes: 0 for background, class index + 1, -1 for ignore."""
    values = mask_values(path, form=form)
    if size is not None and values.shape != size:
        raise DataError(
            f"{path} has {values.shape[0]}x{values.shape[1]} pixels (rows x columns) but its image "
            f"has {size[0]}x{size[1]}; save the mask at image size, or rotate it as EXIF rotates "
            "the photo"
        )
    known = dict(form.ids or {value: value for value in range(num_classes + 1)})
    wide = values.dtype == np.uint16 and form.ids is None
    ignored = (IGNORE_16,) if wide else form.ignored
    id_of = known | dict.fromkeys(ignored, -1)
    held = unique_values(values)
    unknown = [value for value in held.tolist() if value not in id_of]
    if unknown:
        count = "" if form.ids is None else f"{len(known)} from "
        raise DataError(
            f"{path} holds the ids {', '.join(map(str, unknown))}; allowed are "
            f"{count}{min(known)} to {max(known)} for {num_classes} classes and "
            f"{', '.join(map(str, ignored))} for ignore"
        )
    ids = np.array([id_of[value] for value in held.tolist()], np.int64)
    return ids[np.searchsorted(held, values)]


def mask_values(path: Path, *, form: MaskForm = VOC_FORM) -> Integer[np.ndarray, "H W"]:
    """Read the pixel values of a mask file, before they are mapped to classes."""
    image = decode(path)
    if form.colours:
        if image.format != "PNG" or image.mode != "RGB":
            raise DataError(
                f"{path} is a {image.format} of mode {image.mode}; expected ids written as colours "
                "in an RGB PNG"
            )
        red, green, blue = np.moveaxis(np.array(image).astype(np.int32), -1, 0)
        return red + 256 * green + 65536 * blue
    # PIL stretches 2- and 4-bit grey levels to 0..255, so only 8-bit levels are still ids. The bits
    # follow signature (8 bytes), chunk length and name (8), width and height (8).
    stretched = image.mode == "L" and path.read_bytes()[24] != 8
    if image.format == "PNG" and image.mode == "I;16":
        return np.array(image, np.uint16)
    if image.format != "PNG" or image.mode not in ("P", "L") or stretched:
        raise DataError(
            f"{path} is a {image.format} of mode {image.mode}; expected class ids in a PNG with a "
            "palette (mode P) or grey levels of 8 or 16 bits (modes L and I;16), not colours"
        )
    return np.array(image)


def unique_values(values: Integer[np.ndarray, "H W"]) -> Integer[np.ndarray, "n"]:
    """List the distinct values, all at least 0, in ascending order."""
    if values.size and values.max() < 2**16:  # then counting is far faster than sorting
        return np.flatnonzero(np.bincount(values.ravel()))
    return np.unique(values)
