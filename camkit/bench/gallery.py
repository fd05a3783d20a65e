"""The example images of a report as HTML: each photo once, its stages as layers over it."""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from camkit.bench.examples import FALSE, HIT, MISSED, WRONG, Example
from camkit.bench.markup import data_uri, points, select, text
from camkit.bench.results import Report
from camkit.paint import Picture, mask_colour, overlay_cam, overlay_mask
from camkit.printing import several
from camkit.tensors import IGNORE

Layer: TypeAlias = UInt8[np.ndarray, "h w 4"]
"""Colours and opacity in 0..255."""

SIDE = 480
"""Long side of photos and masks in pixels: enough for a whole screen."""

MAP_SIDE = 320
"""Long side of class maps, which are smooth."""

ERRORS = {
    HIT: ("hit", (0, 158, 115)),
    MISSED: ("missed", (0, 114, 178)),
    FALSE: ("false", (213, 94, 0)),
    WRONG: ("wrong class", (240, 228, 66)),
    IGNORE: ("ignored", (200, 200, 200)),
}
"""Names and colours of an error map; colours of Okabe and Ito, safe for the colour-blind."""

_ORDERS = {
    "random": "random draw",
    "best": "best gains",
    "worst": "worst gains",
    "all": "all, best first",
}
_PHOTO_QUALITY = 78  # of WebP: no visible blocks
_MAP_QUALITY = 70  # the colours of a map are smooth
_OPACITY_QUALITY = 50  # no visible steps; lossless opacity would double the size of a map
_ERROR_OPACITY = 0.75  # over the grey photo


class _Stage(NamedTuple):
    """A layer as WebP, and whether the photo below it is grey."""

    title: str
    alt: str
    layer: bytes
    grey: bool = False


def show_examples(report: Report, examples: Iterable[Example]) -> str:
    """Return all examples as HTML with controls to filter them; empty without examples."""
    articles: list[str] = []
    compared: dict[str, None] = {}
    present = dict.fromkeys(range(1, len(report.classes)), 0)
    for example in examples:
        articles.append(_article(report, example))
        base = "" if example.base is None else f" over {example.base}"
        compared[f"{example.row}{base}"] = None
        for value in example.classes:
            present[value] += 1
    if not articles:
        return ""
    classes = {"": "any class"} | {
        str(value): f"{report.classes[value]} ({number})"
        for value, number in present.items()
        if number
    }
    errors = "".join(_swatch(colour, name) for name, colour in ERRORS.values())
    return (
        f"<p>{text('; '.join(compared))}. Best and worst by the mIoU of each image alone, "
        "which only ranks the pictures. Class maps show the strongest class of each "
        "pixel, from the lowest value in the map to the highest. "
        '<span class="hint">Click a picture to enlarge it and to drag from stage to stage.</span>'
        f'</p><p id="errors-key">Errors: {errors}</p><form class="controls">'
        f"<label>Show {select('order', _ORDERS)}</label> "
        f"<label>with {select('class', classes)}</label> "
        '<label><input type="checkbox" id="large"> large</label> '
        f'<span role="status" id="count">{several(len(articles), "image")}</span></form>'
        f'<div id="examples">{"".join(articles)}</div>'
    )


def layer_of(paint: Callable[[Picture], Picture], rows: int, cols: int) -> Layer:
    """Return what a function paints over a photo as a layer of its own.

    Args:
        paint: mixes its colours into a picture, each pixel with an opacity that does not depend on
            the picture.
        rows: height of the layer.
        cols: width of the layer.
    """
    # what an opacity lets through is the difference between a white and a black picture
    on_black = paint(np.zeros((rows, cols, 3), np.uint8)).astype(np.float64)
    on_white = paint(np.full((rows, cols, 3), 255, np.uint8)).astype(np.float64)
    opacity = 255 - (on_white - on_black).mean(-1, keepdims=True)
    colours = on_black * 255 / opacity.clip(1)
    return np.concatenate((colours, opacity), -1).round().clip(0, 255).astype(np.uint8)


def error_layer(errors: UInt8[np.ndarray, "h w"]) -> Layer:
    """Return the colours of an error map; correct background is clear."""
    layer = np.zeros((*errors.shape, 4), np.uint8)
    for value, (_, colour) in ERRORS.items():
        layer[errors == value] = (*colour, round(_ERROR_OPACITY * 255))
    return layer


def _article(report: Report, example: Example) -> str:
    names = ", ".join(report.classes[value] for value in example.classes) or "no class"
    keys = "".join(_swatch(mask_colour(v), report.classes[v]) for v in _painted(example))
    summary = f"{example.row} {example.iou * 100:.1f}"
    if example.base is not None and example.base_iou is not None:
        summary += f", {example.base} {example.base_iou * 100:.1f}: {points(example.gain)}"
    cols, rows = _fitted(example.photo, SIDE)
    photo = cv2.resize(example.photo, (cols, rows), interpolation=cv2.INTER_AREA)
    figures = "".join(
        f'<figure><img class="layer{" grey" if stage.grey else ""}" '
        f'src="{data_uri("image/webp", stage.layer)}" width="{cols}" height="{rows}" '
        f'alt="{text(stage.alt)}"><figcaption>{text(stage.title)}</figcaption></figure>'
        for stage in _stages(example, names)
    )
    name = text(example.name)
    address = data_uri("image/webp", _webp(photo, quality=_PHOTO_QUALITY))
    return (
        f'<article aria-label="{name}" data-gain="{example.gain!r}" '
        f'data-groups="{" ".join(example.groups)}" '
        f'data-classes="{" ".join(map(str, example.classes))}" '
        f'style="--ratio:{cols}/{rows};--photo:url({address})">'
        f'<div class="bar"><h3>{name}</h3></div>'
        f"<p>{text(summary)} <small>({text(', '.join(example.groups))})</small> "
        f'<span class="key">{keys}</span></p>'
        f'<div class="strip">{figures}</div></article>\n'
    )


def _painted(example: Example) -> list[int]:
    """Return the classes of the truth and of the masks, which may hold others."""
    masks = [example.mask] + ([] if example.base_mask is None else [example.base_mask])
    values = {value for mask in masks for value in mask.unique().tolist()}
    return sorted(values.union(example.classes) - {0, IGNORE})


def _stages(example: Example, names: str) -> Iterator[_Stage]:
    """Yield the stages of an example, from the photo to the errors."""
    yield _Stage("photo", f"photo of {names}: {example.name}", _webp(np.zeros((1, 1, 4), np.uint8)))
    size = _fitted(example.photo, MAP_SIDE)
    for stage in example.stages:
        strongest = stage.cam.amax(0).detach().cpu().numpy()
        cam = cv2.resize(strongest, size, interpolation=cv2.INTER_AREA)
        low, high = cam.min(), cam.max()  # between refiners, a map may cover any part of [0, 1]
        stretched = ((cam - low) / max(high - low, 1e-6)).clip(0, 1)
        layer = layer_of(partial(overlay_cam, cam=stretched), size[1], size[0])
        content = _webp(layer, quality=_MAP_QUALITY, alpha_quality=_OPACITY_QUALITY)
        yield _Stage(stage.name, f"class map after {stage.name}", content)
    size = _fitted(example.photo, SIDE)

    def nearest(mask: Tensor) -> UInt8[np.ndarray, "h w"]:
        return cv2.resize(
            mask.cpu().numpy().astype(np.uint8), size, interpolation=cv2.INTER_NEAREST
        )

    masks = {"mask": example.mask, "ground truth": example.truth}
    if example.base_mask is not None:
        masks = {"mask of base": example.base_mask} | masks
    for title, mask in masks.items():
        covered = _share((mask != 0) & (mask != IGNORE))
        layer = layer_of(partial(overlay_mask, mask=nearest(mask)), size[1], size[0])
        yield _Stage(title, f"{title}, {covered} of the photo", _webp(layer))
    alt = "errors: " + ", ".join(
        f"{name} {_share(example.errors == value)}" for value, (name, _) in ERRORS.items()
    )
    yield _Stage("errors", alt, _webp(error_layer(nearest(example.errors))), grey=True)


def _fitted(photo: np.ndarray, side: int) -> tuple[int, int]:
    """Return width and height of a photo whose long side is at most ``side`` pixels."""
    rows, cols = photo.shape[:2]
    scale = min(1.0, side / max(rows, cols))
    return max(1, round(cols * scale)), max(1, round(rows * scale))


def _webp(
    pixels: UInt8[np.ndarray, "h w c"], *, quality: int | None = None, alpha_quality: int = 100
) -> bytes:
    """Encode a picture; without a quality its pixels stay exact."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file,
        format="WEBP",
        lossless=quality is None,
        quality=80 if quality is None else quality,
        alpha_quality=alpha_quality,
        method=4,
    )
    return file.getvalue()


def _share(chosen: Tensor) -> str:
    return f"{float(chosen.float().mean()) * 100:.0f} %"


def _swatch(colour: tuple[int, int, int], name: str) -> str:
    return f'<span class="chip"><i style="background:rgb{colour}"></i>{text(name)}</span>'
