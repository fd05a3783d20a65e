"""The class maps of one CAM file, set against its background and brought to its photo's size."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.bulk.camfolder import CamItem
from camkit.data.camfiles import read_cam
from camkit.data.camforms import CamFile
from camkit.errors import DataError
from camkit.ops.resampling import resize_cam
from camkit.photo import read_picture

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
