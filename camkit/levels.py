"""Pictures as levels in 0..255, upright, from every mode of PIL and every type of array."""

import struct
import warnings
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import ExifTags, Image, ImageCms

_DEPTHS = (8, 10, 12)  # bits that cameras and screens have, stored in 16
_OPAQUE = 65535
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BAD_METADATA = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError, struct.error, Warning),
)


def upright_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Return the colours of an image, upright, on white where it is transparent.

    Raises:
        ValueError: its numbers are in no known range.
    """
    return _said(*levels_of(image))


def upright_rgba(image: Image.Image) -> UInt8[np.ndarray, "H W 4"]:
    """Return colours and opacity of an image, upright; errors are those of `upright_rgb`."""
    return _said(*levels_of(image, opacity=True))


def levels_of(
    image: Image.Image, *, opacity: bool = False, turn: int | None = None
) -> tuple[UInt8[np.ndarray, "H W c"], str | None]:
    """Return the levels of an image, and what must be said of them.

    Args:
        image: in any mode.
        opacity: return it as a fourth channel, instead of colours on white.
        turn: EXIF orientation; None reads it.
    """
    method = _TURNS.get(orientation(image) if turn is None else turn)
    image = image if method is None else image.transpose(method)
    note = None
    if image.mode == "F" or image.mode.startswith("I"):
        levels, note = scaled(_numbers(image)[:, :, None])
        image = Image.fromarray(levels[:, :, 0])
    image = _simpler(image)
    if opacity:
        return np.array(image.convert("RGBA")), note
    if image.has_transparency_data:
        return on_white(image.convert("RGBA")), note
    return np.array(image.convert("RGB")), note


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the metadata have none or are damaged."""
    try:
        value: Any = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BAD_METADATA:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return rows and columns of an image that is open but not loaded, once it is upright."""
    cols, rows = image.size
    swapped = image.format != "TIFF" and orientation(image) > 4  # PIL has swapped those of a TIFF
    return (cols, rows) if swapped else (rows, cols)


def _numbers(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        return np.asarray(image)
    levels = np.asarray(image).astype(np.int64)  # PIL's own conversion clips at 255
    if levels.min() < 0 or levels.max() > _OPAQUE:
        raise ValueError(f"values {levels.min()} to {levels.max()}, expected 0 to {_OPAQUE}")
    return levels.astype(np.uint16)


def _simpler(image: Image.Image) -> Image.Image:
    """Bring modes that PIL converts to few others to one that it converts to RGB and RGBA."""
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        return image if converted is None else converted
    return image.convert("LA") if image.mode == "La" else image


def on_white(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Put an image of mode RGBA on white."""
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def to_bytes(picture: Shaped[np.ndarray, "R S ..."]) -> UInt8[np.ndarray, "R S _"]:
    """Return a picture in 0..255 with its channels on the last axis.

    Args:
        picture: see `camkit.photo_from_array`.

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
    return _said(*scaled(picture))


def scaled(
    picture: Shaped[np.ndarray, "R S c"],
) -> tuple[UInt8[np.ndarray, "R S c"], str | None]:
    """Scale a picture to 0..255; return it and what must be said of it.

    16-bit levels below 4096 are those of a sensor with fewer bits: 8, 10 or 12, whichever is the
    fewest. Levels from 4096 on are taken for 16 bits, since the picture may just be dark.
    """
    if picture.dtype == np.uint8:
        return np.array(picture, order="C"), None  # contiguous, and not shared with the caller
    if picture.dtype == np.bool_:
        return picture.astype(np.uint8) * 255, None
    low, high = float(picture.min()), float(picture.max())
    if picture.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(picture * 255).astype(np.uint8), None
    if picture.dtype.kind not in "iu" or low < 0 or high > _OPAQUE:
        raise ValueError(
            "a picture must be uint8, 16-bit integers, or floats in [0, 1], got "
            f"{picture.dtype} from {low:.4g} to {high:.4g}; scale it first"
        )
    if high <= 255 and picture.dtype.itemsize > 2:
        return picture.astype(np.uint8), None
    return _from_16_bits(picture)


def _from_16_bits(picture: np.ndarray) -> tuple[np.ndarray, str | None]:
    colours = picture[:, :, :3]
    opaque = picture.shape[2] == 4 and picture[:, :, 3].max() == _OPAQUE
    highest = int((colours if opaque else picture).max())
    bits = next((bits for bits in _DEPTHS if 0 < highest < 2**bits), None)
    if bits is None:
        return ((picture.astype(np.int64) + 128) // 257).astype(np.uint8), None
    most = 2**bits - 1
    levels = ((picture.astype(np.int64) * 510 + most) // (2 * most)).clip(0, 255).astype(np.uint8)
    if opaque:
        levels[:, :, 3] = (picture[:, :, 3].astype(np.int64) + 128) // 257
    return levels, f"its 16-bit levels are scaled as {bits} bits, since none is above {most}"


def _said(levels: np.ndarray, note: str | None) -> np.ndarray:
    if note is not None:
        warnings.warn(f"the picture: {note}", stacklevel=4)
    return levels
