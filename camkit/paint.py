"""Pictures of results: palette PNGs, overlays and contact sheets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import cv2
import numpy as np
from jaxtyping import Float, Integer, UInt8, UInt16
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from camkit.errors import DataError
from camkit.manifest import unfinished
from camkit.mask import voc_colour, voc_palette
from camkit.tensors import IGNORE, IGNORE_16

Picture: TypeAlias = UInt8[np.ndarray, "H W 3"]
"""Colours in 0..255, red first."""

Colour: TypeAlias = tuple[int, int, int]
"""Red, green and blue in 0..255."""

_Cell: TypeAlias = UInt8[np.ndarray, "_ _ 3"]  # in a table, each picture may have its own size
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

_FULLY_PAINTED = 0.6  # from this evidence on, the paint has its full opacity
_LIGHT_GREY = (224, 224, 224)
_PAPER, _INK, _FAINT_INK = (248, 248, 246), (34, 34, 34), (96, 96, 96)
_GAP, _MARGIN = 10, 20  # pixels


def save_mask(
    mask: Integer[Tensor, "H W"] | Integer[np.ndarray, "H W"],
    path: str | Path,
    *,
    bits: Literal[8, 16] = 8,
) -> None:
    """Write a mask as a PNG whose pixel values are the ids; the write is atomic.

    Args:
        mask: ids.
        path: must end in ``.png``.
        bits: 8 writes a palette PNG in the colours of PASCAL VOC, 16 a grey PNG of 16 bits, which
            most viewers show almost black.

    Raises:
        ValueError: the mask has ids outside of the range of ``bits``, or ``path`` does not end in
            ``.png``.
        DataError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"`path` must end in .png, which keeps ids exact, got {path.name}")
    if not path.parent.is_dir():
        raise DataError(f"{path} cannot be written: {path.parent} is not a folder; create it first")
    ids = _ids(mask, highest=IGNORE if bits == 8 else IGNORE_16)
    if bits == 8:
        image = Image.fromarray(ids.astype(np.uint8))
        image.putpalette(voc_palette())
    else:
        image = Image.fromarray(ids)
    with unfinished(path) as draft:
        image.save(draft, format="PNG")


def save_picture(rgb: Picture, path: str | Path) -> None:
    """Write a picture as a PNG; the write is atomic."""
    with unfinished(Path(path)) as draft:
        Image.fromarray(rgb).save(draft, format="PNG")


def mask_colour(value: int) -> Colour:
    """Return the colour that `overlay_mask` gives a mask value: that of PASCAL VOC, brightened.

    VOC's cat, (64, 0, 0), is hardly seen on a dark photo or page. So the strongest channel becomes
    the square root of VOC's, with both in [0, 1], and the others keep their ratio to it.

    >>> mask_colour(8)
    (128, 0, 0)
    """
    colour = voc_colour(value)
    strength = (255 / max(*colour, 1)) ** 0.5
    red, green, blue = (round(level * strength) for level in colour)
    return red, green, blue


def overlay_mask(
    rgb: Picture,
    mask: Integer[Tensor, "H W"] | Integer[np.ndarray, "H W"],
    *,
    opacity: float = 0.55,
) -> Picture:
    """Paint a mask over a photo in bright colours (`mask_colour`), with a line along each border.

    Args:
        rgb: the photo.
        mask: ids at photo size, of 8 or 16 bits; 0 stays clear, 255 (65535 in masks that are not
            uint8) becomes light grey.
        opacity: of the colours, in [0, 1]; 0.55 keeps texture visible under the darkest of them.

    Raises:
        ValueError: the sizes differ, or a value is out of range.
    """
    ids = _ids(mask, highest=IGNORE_16)
    _check(rgb, ids, opacity)
    ignore = IGNORE if ids.max() <= IGNORE else IGNORE_16
    palette = np.zeros((int(ids.max()) + 1, 3), np.uint8)
    for value in np.flatnonzero(np.bincount(ids.ravel())).tolist():
        palette[value] = _LIGHT_GREY if value == ignore else mask_colour(value)
    colours = palette[ids]
    painted = np.where(ids[:, :, None] > 0, _mix(rgb, colours, opacity), rgb)
    reach = 1 + 2 * max(1, round(max(ids.shape) / 500))  # the line is thicker on larger photos
    square = np.ones((reach, reach), np.uint8)
    edge = (cv2.erode(ids, square) != ids) | (cv2.dilate(ids, square) != ids)
    edge &= (ids > 0) & (ids != ignore)
    painted = np.where(edge[:, :, None], _mix(colours, 255, 0.45), painted)
    return painted.round().astype(np.uint8)


def overlay_cam(
    rgb: Picture,
    cam: Float[Tensor, "H W"] | Float[np.ndarray, "H W"],
    *,
    opacity: float = 0.5,
) -> Picture:
    """Paint a class map over a photo, in a perceptually uniform colour map (inferno).

    Args:
        rgb: the photo.
        cam: evidence in [0, 1] at photo size.
        opacity: of evidence above 0.6, in [0, 1]; weaker evidence is more transparent, and zero
            evidence leaves the photo as it is.

    Raises:
        ValueError: the sizes differ, or a value is out of range.
    """
    evidence = _to_array(cam).astype(np.float64)
    _check(rgb, evidence, opacity)
    if not bool(((evidence >= 0) & (evidence <= 1)).all()):
        raise ValueError(
            f"`cam` must lie in [0, 1], got {evidence.min():.3g} to {evidence.max():.3g}; "
            "normalise it first"
        )
    levels = (evidence * 255).round().astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[:, :, ::-1]
    ramp = np.minimum(evidence / _FULLY_PAINTED, 1)
    ramp = ramp * ramp * (3 - 2 * ramp)  # smooth at both ends: no rim where the paint begins
    return _mix(rgb, colours, opacity * ramp[:, :, None]).round().astype(np.uint8)


def contact_sheet(
    rows: Sequence[Sequence[_Cell]],
    *,
    titles: Sequence[str],
    captions: Sequence[str] = (),
    legends: Sequence[Sequence[tuple[Colour, str]]] = (),
    cell: int = 260,
) -> Picture:
    """Arrange pictures in a table.

    Columns have equal widths, a row is as high as its highest picture; pictures keep their aspect.

    Args:
        rows: the pictures, one per title in each row.
        titles: one for each column.
        captions: one for each row, written above it; or none.
        legends: colours and names for each row, written behind its caption; or none.
        cell: width of a cell in pixels and its greatest height; 260 puts five columns on a screen.

    Raises:
        ValueError: rows, titles, captions and legends do not match, or cells are below 32 pixels.
    """
    _check_table(rows, titles, captions, cell)
    if legends and len(legends) != len(rows):
        raise ValueError(f"got {len(legends)} legends for {len(rows)} rows; give one for each")
    fitted = [[_fit(picture, cell) for picture in row] for row in rows]
    heights = [max(picture.height for picture in row) for row in fitted]
    title_font = ImageFont.load_default(size=max(11, cell // 16))
    caption_font = ImageFont.load_default(size=max(10, cell // 19))
    boxes = [font.getbbox("\u00c1gj") for font in (title_font, caption_font)]
    head, foot = (round(bottom - top) + _GAP for _, top, _, bottom in boxes)
    foot = foot if captions or legends else 0
    inner = len(titles) * (cell + _GAP) - _GAP
    between = foot + _GAP + (_GAP // 2 if foot else 0)
    size = (inner + 2 * _MARGIN, head + sum(heights) + len(rows) * between + 2 * _MARGIN - _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [_MARGIN + column * (cell + _GAP) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        short = _shorten(title, title_font, cell)
        draw.text((left + cell // 2, _MARGIN), short, _INK, title_font, anchor="ma")
    captions, legends = captions or [""] * len(rows), legends or [()] * len(rows)
    for index, (row, caption, legend) in enumerate(zip(fitted, captions, legends, strict=True)):
        top = _MARGIN + head + sum(heights[:index]) + index * between
        short = _shorten(caption, caption_font, inner // 2 if legend else inner)
        draw.text((_MARGIN, top), short, _FAINT_INK, caption_font)
        left = _MARGIN + round(caption_font.getlength(short)) + (2 * _GAP if short else 0)
        _draw_legend(draw, legend, caption_font, (left, top), _MARGIN + inner)
        for left, picture in zip(lefts, row, strict=True):
            sheet.paste(picture, (left + (cell - picture.width) // 2, top + foot))
    return np.array(sheet)


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    legend: Sequence[tuple[Colour, str]],
    font: _Font,
    start: tuple[int, int],
    end: int,
) -> None:
    """Write names behind squares of their colours, as many as fit into the line."""
    left, top = start
    _, high, _, low = font.getbbox("X")
    side = round(low - high) + 1
    for colour, name in legend:
        width = side + _GAP // 2 + round(font.getlength(name))
        if left + width > end:
            draw.text((left, top), "...", _FAINT_INK, font)
            return
        box = (left, top + round(high), left + side, top + round(high) + side)
        draw.rectangle(box, colour, _FAINT_INK)
        draw.text((left + side + _GAP // 2, top), name, _INK, font)
        left += width + 2 * _GAP


def _to_array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _ids(mask: Tensor | np.ndarray, *, highest: int) -> UInt16[np.ndarray, "H W"]:
    ids = _to_array(mask)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"`mask` must hold integer ids in rows and columns, got {ids.dtype} of shape "
            f"{ids.shape}; pass one image of a batch"
        )
    if ids.min() < 0 or ids.max() > highest:
        raise ValueError(
            f"`mask` must hold ids in 0..{highest}, got {ids.min()} to {ids.max()}"
            + ("; use bits=16" if highest == IGNORE else "")
        )
    return np.ascontiguousarray(ids.astype(np.uint16))


def _check(rgb: np.ndarray, layer: np.ndarray, opacity: float) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(
            f"`rgb` must be uint8 of shape (rows, cols, 3), got {rgb.dtype} of shape {rgb.shape}"
        )
    if layer.shape != rgb.shape[:2]:
        raise ValueError(
            f"the photo has {rgb.shape[0]}x{rgb.shape[1]} pixels (rows x columns) but the layer "
            f"over it has shape {layer.shape}; resize it to the photo first"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"`opacity` must lie in [0, 1], got {opacity}")


def _mix(
    below: np.ndarray, above: np.ndarray | int, opacity: float | np.ndarray
) -> Float[np.ndarray, "H W 3"]:
    return below + opacity * (np.asarray(above, dtype=np.float64) - below)


def _check_table(
    rows: Sequence[Sequence[_Cell]], titles: Sequence[str], captions: Sequence[str], cell: int
) -> None:
    if cell < 32:
        raise ValueError(f"`cell` must be at least 32 pixels, got {cell}")
    if not rows or not titles:
        raise ValueError("a contact sheet needs at least one row and one column, got none")
    for index, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(
                f"row {index} has {len(row)} pictures for {len(titles)} titles; "
                "give one picture for each title"
            )
    if captions and len(captions) != len(rows):
        raise ValueError(f"got {len(captions)} captions for {len(rows)} rows; give one for each")


def _fit(picture: _Cell, cell: int) -> Image.Image:
    scale = cell / max(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)


def _shorten(text: str, font: _Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
