"""Data sets: the protocol, samples with image-level labels, and masks with class ids."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Integer
from PIL import Image
from torch import Tensor

from camkit.data.drawn import CocoMask
from camkit.errors import DataError
from camkit.formats import has_more_pages
from camkit.photo import decode, opened
from camkit.tensors import IGNORE, IGNORE_16
from camkit.untrusted import bounded

_TIFF_BITS = 258  # the tag "BitsPerSample"
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JPEG2000", "JXL")


@runtime_checkable
class MaskReader(Protocol):
    """How the mask of a sample is read.

    A reader is picklable and small, as every sample has one: it holds at most what belongs to its
    own image.
    """

    def read(self, path: Path, *, num_classes: int) -> Int[np.ndarray, "H W"]:
        """Return 0 for background, class index + 1, -1 for pixels that are ignored.

        Raises:
            DataError: the mask cannot be read, or holds something that is no class.
        """

    def digest(self, path: Path) -> str:
        """Identify what `read` returns: equal digests are equal masks.

        Raises:
            OSError: the file cannot be read.
        """


@dataclass(frozen=True)
class MaskForm:
    """How the pixel values of a mask file encode classes.

    Attributes:
        colours: a value is red + 256 * green + 65536 * blue of an RGB image; else it is an index
            into a palette, a grey level, or a whole number of a TIFF or ``.npy`` file.
        ids: the id (0 for background, else class index + 1) of each value; None where values are
            ids already.
        ignored: values of pixels that are not scored. Values of more than 8 bits that are ids
            already have other defaults: 65535, and 255 unless it is a class. In files of signed
            numbers, -1 is not scored either, unless ``ids`` says otherwise.
    """

    colours: bool = False
    ids: Mapping[int, int] | None = None
    ignored: tuple[int, ...] = (IGNORE,)

    def read(self, path: Path, *, num_classes: int) -> Int[np.ndarray, "H W"]:
        """Read a mask; see `MaskReader`."""
        values = mask_values(path, form=self)
        known = dict(self.ids or {value: value for value in range(num_classes + 1)})
        ignored = self.ignored
        if values.itemsize > 1 and self.ids is None and ignored == (IGNORE,):
            ignored = (IGNORE_16,) if num_classes >= IGNORE else (IGNORE, IGNORE_16)
        if values.dtype.kind == "i" and -1 not in known:
            ignored = (*dict.fromkeys((*ignored, -1)),)
        id_of = known | dict.fromkeys(ignored, -1)
        held = unique_values(values)
        unknown = [value for value in held.tolist() if value not in id_of]
        if unknown:
            count = "" if self.ids is None else f"{len(known)} from "
            raise DataError(
                f"{path} holds the ids {_in_short(unknown)}; allowed are "
                f"{count}{min(known)} to {max(known)} for {num_classes} classes and "
                f"{', '.join(map(str, ignored))} for ignore"
            )
        ids = np.array([id_of[value] for value in held.tolist()], np.int64)
        return ids[np.searchsorted(held, values)]

    def digest(self, path: Path) -> str:
        """Identify the mask by its file and this form."""
        return hashlib.sha256(path.read_bytes() + repr(self).encode()).hexdigest()


VOC_FORM = MaskForm()
"""Ids as they are, 255 for ignore: the form of most data sets."""


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        name: the file name without its ending.
        photo: the image file.
        mask: the file of the ground truth, if there is one. A file of annotations may hold the
            ground truth of many images.
        classes: indices of the classes present, from 0, ascending; the background is not a class.
        form: how the mask is read from this file.
    """

    name: str
    photo: Path
    mask: Path | None
    classes: tuple[int, ...]
    form: MaskReader = field(default=VOC_FORM, hash=False)


@runtime_checkable
class DataSet(Protocol):
    """Images with image-level labels, in named splits.

    A mask holds 0 for background, the index in ``classes`` plus one, and 255 for ignore, unless its
    sample names another `MaskReader`. ``root`` and all paths of samples are absolute, so that they
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


@runtime_checkable
class Described(Protocol):
    """A data set that can say what it took each of its files for."""

    def describe(self) -> tuple[str, ...]:
        """Return short sentences, such as "labels.txt: 3 classes (cat, dog, horse)"."""


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
    size: tuple[int, int] | None,
    num_classes: int,
    form: MaskReader = VOC_FORM,
    classes: Sequence[int] | None = None,
) -> Int[Tensor, "H W"]:
    """Read a ground-truth mask.

    Args:
        path: a mask, or a file of annotations.
        size: rows and columns of the image it belongs to; None accepts any.
        num_classes: number of classes of the data set, background not counted.
        form: how the mask is read from the file, as the sample says.
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
    path: Path,
    *,
    num_classes: int,
    form: MaskReader = VOC_FORM,
    size: tuple[int, int] | None = None,
) -> tuple[int, ...]:
    """List the classes in a mask, from 0, ascending; arguments and errors are those of `read_mask`.

    ``size=None`` accepts any size.
    """
    ids = mask_ids(path, size=size, num_classes=num_classes, form=form)
    return tuple(value - 2 for value in unique_values(ids + 1).tolist() if value > 1)


def mask_ids(
    path: Path, *, size: tuple[int, int] | None, num_classes: int, form: MaskReader
) -> Int[np.ndarray, "H W"]:
    """Read a mask of any number of classes: 0 for background, class index + 1, -1 for ignore."""
    ids = form.read(path, num_classes=num_classes)
    if size is not None and ids.shape != size and isinstance(form, CocoMask):
        raise DataError(
            f"{path}, image {form.image}: listed with {ids.shape[0]}x{ids.shape[1]} pixels (rows x "
            f"columns) but the photo has {size[0]}x{size[1]}; use the photo that was annotated, or "
            "rotate it as EXIF says"
        )
    if size is not None and ids.shape != size:
        raise DataError(
            f"{path} has {ids.shape[0]}x{ids.shape[1]} pixels (rows x columns) but its image "
            f"has {size[0]}x{size[1]}; save the mask at image size, or rotate it as EXIF rotates "
            "the photo"
        )
    return ids


def mask_values(path: Path, *, form: MaskForm = VOC_FORM) -> Integer[np.ndarray, "H W"]:
    """Read the values of a mask file, before they are mapped to classes.

    Read are PNG with a palette or grey levels of 1 to 16 bits, TIFF and BMP with whole numbers, and
    ``.npy`` files of whole numbers.
    """
    if path.suffix.lower() == ".npy" and path.is_file():
        return _array_values(path)
    image = decode(path)
    if form.colours:
        if image.format != "PNG" or image.mode != "RGB":
            raise DataError(
                f"{path} is a {image.format} of mode {image.mode}; expected ids written as colours "
                "in an RGB PNG"
            )
        red, green, blue = np.moveaxis(np.array(image).astype(np.int32), -1, 0)
        return red + 256 * green + 65536 * blue
    if image.format in _LOSSY or "jpeg" in str(image.info.get("compression", "")):
        raise DataError(
            f"{path} is a {image.format}, whose compression changes class ids near every edge; "
            "expected class ids in a PNG: save the masks as PNG from where they were drawn"
        )
    if image.format not in ("PNG", "TIFF", "BMP") or image.mode not in _ID_MODES:
        raise DataError(
            f"{path} is a {image.format} of mode {image.mode}; expected class ids in a PNG with a "
            "palette (mode P) or grey levels of 1 to 16 bits (modes 1, L and I;16), not colours"
        )
    stretch = {2: 85, 4: 17}.get(_bits(path, image), 1)  # PIL stretches grey levels to 0..255
    values = np.array(image)
    if image.mode == "1":
        return values.astype(np.uint8)
    return values // stretch if image.mode == "L" else values


_ID_MODES = ("1", "P", "L", "I", "I;16", "I;16B", "I;16L", "I;16N")


def _bits(path: Path, image: Image.Image) -> int:
    """Return the bits of a grey level in a file of one picture; several are a DataError."""
    if image.format == "TIFF":
        with opened(path) as file:
            if has_more_pages(file):
                raise DataError(f"{path} holds several pictures; expected one mask")
            return getattr(file, "tag_v2", {}).get(_TIFF_BITS, (8,))[0]
    if image.format != "PNG":
        return 8
    with path.open("rb") as file:
        header = file.read(25)
    # the bits follow signature (8 bytes), chunk length and name (8), width and height (8)
    return header[24]


def _array_values(path: Path) -> Integer[np.ndarray, "H W"]:
    """Read a ``.npy`` file of whole numbers or of True and False."""
    try:
        with bounded(path):
            values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as an array ({error}); write it again") from error
    if values.dtype.kind not in "iub" or values.ndim != 2:
        raise DataError(
            f"{path} holds {values.dtype} of shape {values.shape}; expected whole numbers, rows x "
            "columns"
        )
    if values.size > (Image.MAX_IMAGE_PIXELS or values.size):
        raise DataError(f"{path} holds {values.size} numbers, more than a picture may have pixels")
    return np.array(values, np.uint8 if values.dtype.kind == "b" else None)


def unique_values(values: Integer[np.ndarray, "H W"]) -> Integer[np.ndarray, "n"]:
    """List the distinct values in ascending order."""
    # counting is far faster than sorting
    if values.size and values.max() < 2**16 and values.min() >= 0:
        return np.flatnonzero(np.bincount(values.ravel()))
    return np.unique(values)


def _in_short(values: Sequence[int]) -> str:
    """List at most twelve values."""
    return ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
