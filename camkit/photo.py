"""Photos: image files become normalised pixels, colours in [0, 1] and their original size."""

import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
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
        original: colours of the original in 0..255, if it came from no file.
    """

    pixels: Pixels
    rgb: RGB
    size: tuple[int, int]
    path: Path | None = None
    original: UInt8[np.ndarray, "R S 3"] | None = field(default=None, repr=False)

    __repr__ = short_repr


def keys_of(photos: Sequence[Photo]) -> tuple[str, ...]:
    """Return the file names of photos without ending; empty text for photos from no file."""
    return tuple("" if photo.path is None else photo.path.stem for photo in photos)


@dataclass(frozen=True)
class PhotoSettings:
    """Settings of `load_photo`, to prepare photos for a model.

    `camkit.inputs.photo_settings` reads them from a model.
    """

    size: int | tuple[int, int] = 384
    mean: float | tuple[float, ...] = (0.5, 0.5, 0.5)
    std: float | tuple[float, ...] = (0.5, 0.5, 0.5)
    multiple: int = 16
    channels: int = 3

    def load(self, path: str | Path) -> Photo:
        """Read one photo from a file, as `load_photo` does."""
        return load_photo(path, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Return the settings as arguments of `load_photo` and `photo_from_array`."""
        return {each.name: getattr(self, each.name) for each in fields(PhotoSettings)}


def load_photo(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = 384,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    multiple: int = 16,
    channels: int = 3,
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
        channels: 1 for a model that takes grey images; ``rgb`` holds the colours all the same. 4
            for a model that takes transparency as well. For other channels use `photo_from_array`.

    Returns:
        The photo, float32, on the CPU.

    Raises:
        DataError: the file is missing or cannot be decoded.
        ValueError: a setting is out of range.
    """
    path = Path(path)
    image = decode(path)
    with _decoding_errors(path):
        picture = upright_rgba(image) if channels == 4 else upright_rgb(image)
    photo = photo_from_array(
        picture, size=size, mean=mean, std=std, multiple=multiple, channels=channels
    )
    return replace(photo, path=path, original=None)


def read_picture(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Read an image file as colours in 0..255 at its own size; errors are those of `decode`.

    The picture is upright, and on white where it is transparent.
    """
    path = Path(path)
    image = decode(path)
    with _decoding_errors(path):
        return upright_rgb(image)


def picture_from_file(
    file: BufferedReader | BytesIO, name: str | Path
) -> UInt8[np.ndarray, "H W 3"]:
    """Read an open image file as `read_picture` does; errors call it ``name``."""
    with _decoding_errors(name), Image.open(file) as image:
        image.load()
        return upright_rgb(image)


def photo_from_array(
    picture: Shaped[np.ndarray, "R S ..."],
    *,
    size: int | tuple[int, int] | None = 384,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    multiple: int = 16,
    channels: int = 3,
) -> Photo:
    """Make a photo, without a path, from an array.

    The settings are those of `load_photo`.

    Args:
        picture: grey ``(rows, cols)`` or ``(rows, cols, 1)``, colours ``(rows, cols, 3)`` with red
            first (OpenCV reads blue first), or colours and transparency ``(rows, cols, 4)``, which
            are put on white unless the model takes 4 channels; or the channels of the model, of
            which the first three serve as colours. uint8, 16-bit integers in 0..65535, floats in
            [0, 1], or bool.
        size: as in `load_photo`, like the next four.
        mean: one number, or one per channel.
        std: the same.
        multiple: the patch size.
        channels: that the model takes.

    Raises:
        ValueError: the array is no picture, its channels do not suit the model, or a setting is out
            of range.
    """
    if channels < 1:
        raise ValueError(f"`channels` must be at least 1, got {channels}")
    shift, scale = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if not bool((scale > 0).all()):
        raise ValueError(f"`std` must be positive, got {std}; 0.5 or the ImageNet values are usual")
    levels = to_bytes(picture)
    if levels.shape[2] == 4 and channels != 4:
        levels = _on_white(Image.fromarray(levels, "RGBA"))
    if channels not in (1, 3, levels.shape[2]):
        raise ValueError(
            f"the model takes {channels} channels, but the picture has {levels.shape[2]}; give an "
            f"array of shape (rows, cols, {channels})"
        )
    original = (levels.shape[0], levels.shape[1])
    rows, cols = _model_size(original, size, multiple)
    shown = _colours(levels)
    resized = levels if (rows, cols) == original else _resized(levels, rows, cols)
    colours = _unit_interval(_colours(resized))
    if channels == 1 and levels.shape[2] > 1:
        resized = np.array(Image.fromarray(_colours(resized)).convert("L"))[:, :, None]
    pixels = colours if channels == 3 else _unit_interval(resized)
    return Photo(pixels=(pixels - shift) / scale, rgb=colours, size=original, original=shown)


def _unit_interval(levels: UInt8[np.ndarray, "R S c"]) -> Float[torch.Tensor, "1 c R S"]:
    return torch.from_numpy(levels).permute(2, 0, 1)[None].contiguous() / 255


def to_bytes(picture: Shaped[np.ndarray, "R S ..."]) -> UInt8[np.ndarray, "R S _"]:
    """Return a picture in 0..255 with its channels on the last axis.

    Args:
        picture: see `photo_from_array`.

    Raises:
        ValueError: the array is no picture.
    """
    shape = tuple(picture.shape)
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if picture.ndim != 3 or picture.size == 0:
        raise ValueError(
            f"a picture must have shape (rows, cols) or (rows, cols, channels), got {shape}"
        )
    if shape[0] in (1, 3, 4) and picture.shape[2] > 4:
        raise ValueError(
            f"a picture must have its channels on the last axis, got shape {shape}; transpose it "
            "by `array.transpose(1, 2, 0)`, or pass a torch tensor, which has them first"
        )
    if picture.dtype == np.uint8:
        return np.array(picture, order="C")  # contiguous, and not shared with the caller
    if picture.dtype == np.bool_:
        return picture.astype(np.uint8) * 255
    return _levels_to_bytes(picture, float(picture.min()), float(picture.max()))


def _levels_to_bytes(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale numbers from ``low`` to ``high`` to 0..255."""
    integers = picture.dtype.kind in "iu" and low >= 0
    if integers and high <= 255 and picture.dtype.itemsize > 2:
        return picture.astype(np.uint8)
    if integers and high <= 65535:
        if 0 < high < 4096:
            warnings.warn(
                f"the picture has 16-bit levels up to {high:.0f} of 65535 and is almost black; "
                "scale it to 0..65535 or to uint8 if its sensor has fewer bits",
                stacklevel=4,
            )
        return ((picture.astype(np.int64) + 128) // 257).astype(np.uint8)
    if picture.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(picture * 255).astype(np.uint8)
    raise ValueError(
        f"a picture must be uint8, 16-bit integers, or floats in [0, 1], got {picture.dtype} from "
        f"{low:.4g} to {high:.4g}; scale it first"
    )


def _colours(levels: UInt8[np.ndarray, "R S _"]) -> UInt8[np.ndarray, "R S 3"]:
    """Return the first three channels, or the only one as grey."""
    if levels.shape[2] < 3:
        levels = levels[:, :, :1].repeat(3, axis=2)
    return np.ascontiguousarray(levels[:, :, :3])


def _resized(levels: UInt8[np.ndarray, "R S _"], rows: int, cols: int) -> np.ndarray:
    if levels.shape[2] == 3:
        image = Image.fromarray(levels).resize((cols, rows), Image.Resampling.BICUBIC)
        return np.array(image)
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(levels, 2, 0)]
    filtered = [plane.resize((cols, rows), Image.Resampling.BICUBIC) for plane in planes]
    return np.stack([np.array(plane) for plane in filtered], axis=2)


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


def upright_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Return the colours of an image in 0..255, upright, on white where it is transparent."""
    image = _eight_bits(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def upright_rgba(image: Image.Image) -> UInt8[np.ndarray, "H W 4"]:
    """Return colours and opacity of an image in 0..255, upright."""
    return np.array(_eight_bits(ImageOps.exif_transpose(image)).convert("RGBA"))


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        levels = np.asarray(image).astype(np.int64)  # PIL's own conversion clips at 255
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"values {levels.min()} to {levels.max()}, expected 0 to 65535")
        return Image.fromarray(to_bytes(levels.astype(np.uint16))[:, :, 0])
    if image.mode == "F":
        raise ValueError("mode F, floats of unknown range")
    return image


def _on_white(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> torch.Tensor:
    numbers = list(value) if isinstance(value, Sequence) else [value]
    if len(numbers) not in (1, channels) or not all(math.isfinite(number) for number in numbers):
        several = f" or {channels}, one per channel" if channels > 1 else " for grey images"
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
