"""Photos: image files become normalised pixels, colours in [0, 1] and their original size."""

import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps

from camkit.errors import DataError
from camkit.printing import short_repr
from camkit.tensors import RGB, Pixels

# PIL's exceptions for a broken file, depending on where it breaks
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


@dataclass(frozen=True)
class Photo:
    """One picture, ready for a model.

    Attributes:
        pixels: the model's input, normalised, one image with as many channels as the model takes.
        rgb: the same picture with colours in [0, 1].
        size: rows and columns of the original, after EXIF rotation.
        path: the file it came from, if any.
    """

    pixels: Pixels
    rgb: RGB
    size: tuple[int, int]
    path: Path | None = None

    __repr__ = short_repr


@dataclass(frozen=True)
class PhotoSettings:
    """Settings of `load_photo`, to prepare photos for a model."""

    size: int | tuple[int, int] = 384
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    multiple: int = 16
    channels: Literal[1, 3] = 3

    def load(self, path: str | Path) -> Photo:
        """Read one photo from a file, as `load_photo` does."""
        return load_photo(path, **vars(self))


def load_photo(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = 384,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    multiple: int = 16,
    channels: Literal[1, 3] = 3,
) -> Photo:
    """Read an image file for a model.

    The picture is rotated upright, put on white where it is transparent, and resized by PIL's
    antialiased bicubic filter, as timm does for evaluation.

    Args:
        path: an image in any format that PIL reads, 8 or 16 bits per channel.
        size: the long side, aspect kept and both sides rounded to ``multiple``; or exact rows and
            columns; or None for the original size rounded to ``multiple``. 384 keeps small objects
            a few patches wide and is what most ViTs were fine-tuned at.
        mean: subtracted from the colours, one number or three; 0.5 is the value of the augreg and
            other "inception"-normalised checkpoints.
        std: divides the difference, one number or three.
        multiple: the patch size of the model, or any multiple of it.
        channels: 1 for a model that takes grey images; ``rgb`` holds the colours all the same. For
            other channels make a `Photo` of your own ``pixels``, ``rgb`` and ``size``.

    Returns:
        The photo, float32, on the CPU.

    Raises:
        DataError: the file is missing or cannot be decoded.
        ValueError: a setting is out of range.
    """
    path, rgb = Path(path), read_picture(path)
    photo = photo_from_array(
        rgb, size=size, mean=mean, std=std, multiple=multiple, channels=channels
    )
    return replace(photo, path=path)


def read_picture(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Read an image file as colours in 0..255 at its own size; errors are those of `decode`.

    The picture is upright, and on white where it is transparent.
    """
    path = Path(path)
    image = decode(path)
    with _decoding_errors(path):
        return _upright_rgb(image)


def picture_from_file(
    file: BufferedReader | BytesIO, name: str | Path
) -> UInt8[np.ndarray, "H W 3"]:
    """Read an open image file as `read_picture` does; errors call it ``name``."""
    with _decoding_errors(name), Image.open(file) as image:
        image.load()
        return _upright_rgb(image)


def photo_from_array(
    rgb: UInt8[np.ndarray, "H W 3"],
    *,
    size: int | tuple[int, int] | None = 384,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    multiple: int = 16,
    channels: Literal[1, 3] = 3,
) -> Photo:
    """Make a photo, without a path, from an array of colours in 0..255.

    Red comes first (OpenCV reads blue first). The settings are those of `load_photo`.

    Raises:
        ValueError: the array is not a colour picture, or a setting is out of range.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise ValueError(
            f"`rgb` must be uint8 of shape (rows, cols, 3), got {rgb.dtype} of shape {rgb.shape}; "
            "scale colours to 0..255 and put them on the last axis"
        )
    if channels not in (1, 3):
        raise ValueError(
            f"`channels` must be 1 or 3, got {channels}; for others make a camkit.Photo of your "
            "own `pixels`, `rgb` and `size`"
        )
    shift, scale = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if not bool((scale > 0).all()):
        raise ValueError(f"`std` must be positive, got {std}; 0.5 or the ImageNet values are usual")
    original = (rgb.shape[0], rgb.shape[1])
    rows, cols = _model_size(original, size, multiple)
    picture = np.array(rgb, order="C")  # contiguous, and not shared with the caller
    if (rows, cols) != original:
        resized = Image.fromarray(picture).resize((cols, rows), Image.Resampling.BICUBIC)
        picture = np.array(resized)
    colours = torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous() / 255
    pixels = colours
    if channels == 1:
        grey = np.array(Image.fromarray(picture).convert("L"))
        pixels = torch.from_numpy(grey)[None, None] / 255
    return Photo(pixels=(pixels - shift) / scale, rgb=colours, size=original)


def decode(path: Path) -> Image.Image:
    """Read an image file as it is stored, without rotation or change of mode.

    Raises:
        DataError: the file is missing, a folder, broken, of an unknown format, or too large.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected an image file; name a file in it")
    with _decoding_errors(path):
        image = Image.open(path)
        with image:
            image.load()
    return image


@contextmanager
def _decoding_errors(path: str | Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not matter to the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path} holds more than the {Image.MAX_IMAGE_PIXELS} pixels PIL trusts; reduce it, "
            "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust its source"
        ) from error
    except _BROKEN as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); "
            "copy it again, or convert it to 8-bit RGB PNG or JPEG"
        ) from error


def _upright_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        levels = np.asarray(image).astype(np.int64)  # PIL's own conversion clips at 255
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"values {levels.min()} to {levels.max()}, expected 0 to 65535")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("mode F, floats of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> torch.Tensor:
    numbers = list(value) if isinstance(value, Sequence) else [value]
    if len(numbers) not in (1, channels) or not all(math.isfinite(number) for number in numbers):
        several = " or three (red, green, blue)" if channels == 3 else " for grey images"
        raise ValueError(
            f"`{name}` must be one finite number{several}, got {value}; take it from the model's "
            "own preprocessing"
        )
    return torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1, 1)


def _model_size(
    original: tuple[int, int], size: int | tuple[int, int] | None, multiple: int
) -> tuple[int, int]:
    if multiple < 1:
        raise ValueError(f"`multiple` must be at least 1, got {multiple}; use the patch size")
    if isinstance(size, tuple):
        if any(side < 1 or side % multiple for side in size):
            raise ValueError(
                f"`size` must be rows and columns divisible by {multiple}, got {size}; "
                f"use {tuple(_nearest(side, 1, multiple) for side in size)} or set `multiple`"
            )
        return size
    long_side = max(original)
    target = long_side if size is None else size
    if target < 1:
        raise ValueError(f"`size` must be at least 1, got {size}; 384 is the default")
    rows, cols = (_nearest(side * target, long_side, multiple) for side in original)
    return rows, cols


def _nearest(numerator: int, denominator: int, multiple: int) -> int:
    """Round a fraction to the nearest positive multiple, halves up, without floats."""
    step = denominator * multiple
    return max(1, (2 * numerator + step) // (2 * step)) * multiple
