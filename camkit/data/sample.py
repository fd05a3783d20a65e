"""What a data set is made of: samples with image-level labels, and masks with class ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from camkit.errors import DataError
from camkit.photo import decode

_IGNORE = 255


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        name: the file name without its ending.
        photo: the image file.
        mask: the ground truth, where there is one.
        classes: indices of the classes present, from 0, ascending; the background is no class.
    """

    name: str
    photo: Path
    mask: Path | None
    classes: tuple[int, ...]


@runtime_checkable
class DataSet(Protocol):
    """Images with image-level labels, in named splits.

    A mask holds 0 for background, the index in ``classes`` plus one, and 255 for ignore.
    """

    @property
    def root(self) -> Path: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of one split, in the order of its list."""


def read_mask(path: Path, *, size: tuple[int, int], num_classes: int) -> Int[Tensor, "H W"]:
    """Read a ground-truth mask.

    Args:
        path: a PNG with a palette or plain 8-bit grey levels, whose values are the ids.
        size: rows and columns of the image it belongs to.
        num_classes: how many classes the data set has, background not counted.

    Returns:
        0 for background, class index + 1, 255 for ignore; int64.

    Raises:
        DataError: the file holds no ids, ids of no class, or another size than the image.
    """
    ids = _read_ids(path, num_classes)
    if ids.shape != size:
        raise DataError(
            f"{path} has {ids.shape[0]}x{ids.shape[1]} pixels (rows x columns) but its image has "
            f"{size[0]}x{size[1]}; save the mask at image size, or turn it as EXIF turns the photo"
        )
    return torch.from_numpy(ids.astype(np.int64))


def mask_classes(path: Path, *, num_classes: int) -> tuple[int, ...]:
    """List the classes a mask shows, from 0, ascending; background and ignore are none.

    Raises:
        DataError: the file holds no ids, or ids of no class.
    """
    present = np.unique(_read_ids(path, num_classes)).tolist()
    return tuple(value - 1 for value in present if value not in (0, _IGNORE))


def _read_ids(path: Path, num_classes: int) -> UInt8[np.ndarray, "H W"]:
    image = decode(path)
    # PIL stretches 2- and 4-bit grey levels to 0..255, so only 8-bit ones are still ids.
    stretched = image.mode == "L" and _png_bits(path) != 8
    if image.format != "PNG" or image.mode not in ("P", "L") or stretched:
        raise DataError(
            f"{path} is a {image.format} of mode {image.mode}; expected class ids in a PNG with a "
            "palette (mode P) or 8-bit grey levels (mode L), not colours"
        )
    ids = np.array(image)
    unknown = sorted(set(np.unique(ids).tolist()) - set(range(num_classes + 1)) - {_IGNORE})
    if unknown:
        raise DataError(
            f"{path} holds the ids {', '.join(map(str, unknown))}; allowed are 0 to {num_classes} "
            f"for {num_classes} classes and {_IGNORE} for ignore"
        )
    return ids


def _png_bits(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[-1]  # signature 8, chunk length and name 8, width 4, height 4, bits
