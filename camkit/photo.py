"""Photos: image files become normalised pixels, colours in [0, 1] and their original size."""

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageFile

from camkit.errors import DataError
from camkit.formats import decoding, has_more_pages, open_image
from camkit.levels import levels_of, on_white, orientation, scaled, to_bytes
from camkit.printing import short_repr
from camkit.tensors import RGB, Pixels

FIRST_PAGE = "only the first of its pages is read"
"""What is said of a file with several pictures."""

_PHOTOMETRIC = 262  # tag of TIFF: 0 if 0 is white, as in scans and X-rays
_DEEP = re.compile(r"RGB.*;16")  # PIL's name of such data in a file


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
        path: an image in one of `camkit.formats.FORMATS`, of 8 or 16 bits per channel or floats in
            [0, 1]. Of several pages the first is read, and levels below 4096 in 16 bits are scaled
            as those of a sensor with fewer bits; both with a warning.
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
    with _file(path) as file:
        read = read_levels(file, path, opacity=channels == 4)
    for note in read.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    photo = photo_from_array(
        read.levels, size=size, mean=mean, std=std, multiple=multiple, channels=channels
    )
    return replace(photo, path=path, original=None)


def read_picture(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Read an image file as colours in 0..255 at its own size; errors are those of `decode`.

    The picture is upright, and on white where it is transparent.
    """
    path = Path(path)
    with _file(path) as file:
        return read_levels(file, path).levels


@dataclass(frozen=True, eq=False)
class Levels:
    """A picture as it was read from a file.

    Attributes:
        levels: colours in 0..255, and opacity if it was asked for, upright.
        notes: what a reader may not expect, such as `FIRST_PAGE`; mostly none.
    """

    levels: UInt8[np.ndarray, "R S c"]
    notes: tuple[str, ...] = ()

    __repr__ = short_repr


def read_levels(
    file: BufferedReader | BytesIO,
    source: str | Path,
    *,
    opacity: bool = False,
    max_pixels: int | None = None,
) -> Levels:
    """Read an open image file; errors call it ``source``.

    Args:
        file: at its start.
        source: its name.
        opacity: return it as a fourth channel; otherwise transparent parts are put on white.
        max_pixels: as in `camkit.formats.open_image`.

    Raises:
        DataError: the file cannot be decoded, or is too large.
    """
    image = open_image(file, source, max_pixels=max_pixels)
    with decoding(source):
        notes = [FIRST_PAGE] if has_more_pages(image) else []
        colours_of_16_bits = any(_DEEP.search(str(tile[3])) for tile in image.tile)
        image.load()
        if colours_of_16_bits and _is_dark(image):
            array, note = scaled(_read_16_bits(file, image.size))  # PIL keeps the upper byte only
            turn = 1 if image.format == "TIFF" else orientation(image)  # both turn TIFF themselves
            levels, _ = levels_of(Image.fromarray(array), opacity=opacity, turn=turn)
        else:
            levels, note = levels_of(_min_is_black(image), opacity=opacity)
    return Levels(levels, (*notes, *([] if note is None else [note])))


def _min_is_black(image: Image.Image) -> Image.Image:
    """Return grey levels of 16 bits with 0 as black; PIL turns those of 8 bits itself."""
    deep = image.format == "TIFF" and image.mode.startswith("I;16")
    if not deep or getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) != 0:
        return image
    turned = Image.fromarray(65535 - np.asarray(image).astype(np.uint16))
    turned.info = image.info
    return turned


def _is_dark(image: Image.Image) -> bool:
    """Return whether no colour reaches 4096 of 65535; PIL has divided it by 256."""
    return image.mode in ("RGB", "RGBA") and bool(np.asarray(image)[:, :, :3].max() < 16)


def _read_16_bits(file: BufferedReader | BytesIO, size: tuple[int, int]) -> np.ndarray:
    """Read a colour picture of 16 bits per channel with OpenCV, as PIL has no mode for it."""
    file.seek(0)
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    picture = cv2.imdecode(np.frombuffer(file.read(), np.uint8), flags)
    shape = None if picture is None or picture.dtype != np.uint16 else picture.shape
    if picture is None or shape is None or len(shape) != 3 or shape[:2] != size[::-1]:
        raise ValueError("OpenCV does not read its 16-bit colours")
    order = [2, 1, 0, 3][: picture.shape[2]]  # OpenCV has blue first
    return np.ascontiguousarray(picture[:, :, order])


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
        levels = on_white(Image.fromarray(levels))
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


def decode(path: Path, *, max_pixels: int | None = None) -> Image.Image:
    """Read an image file as it is stored, without change of mode.

    Raises:
        DataError: the file is missing, a folder, broken, of an unknown format, or too large.
    """
    with opened(path, max_pixels=max_pixels) as image:
        image.load()
    return image


@contextmanager
def opened(path: Path, *, max_pixels: int | None = None) -> Iterator[ImageFile.ImageFile]:
    """Read the header of an image file; the pixels are decoded where they are used.

    Raises:
        DataError: as `decode`, also for errors of PIL in the block.
    """
    with _file(path) as file:
        image = open_image(file, path, max_pixels=max_pixels)
        with decoding(path):
            yield image


@contextmanager
def opened_bytes(content: bytes, source: str) -> Iterator[ImageFile.ImageFile]:
    """Read the header of an image that another file holds; errors, called ``source``, as above."""
    image = open_image(BytesIO(content), source)
    with decoding(source):
        yield image


@contextmanager
def _file(path: Path) -> Iterator[BufferedReader]:
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected an image file; name a file in it")
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file; name an image file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check it") from error
    with file:
        yield file


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
