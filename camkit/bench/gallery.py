"""Examples of a benchmark as rows of small pictures inside a page."""

import base64
import io
from collections.abc import Iterable

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from camkit.bench.examples import FALSE, HIT, MISSED, WRONG, Example
from camkit.bench.markup import points, select, text
from camkit.bench.results import Report
from camkit.mask import IGNORE
from camkit.paint import Picture, overlay_cam, overlay_mask
from camkit.palette import voc_palette

SIDE = 240
"""Pixels of the long side of a picture: 36 examples of eight stay below 5 MB."""

ERRORS = {
    HIT: ("hit", (0, 158, 115)),
    MISSED: ("missed", (0, 114, 178)),
    FALSE: ("false", (213, 94, 0)),
    WRONG: ("wrong class", (240, 228, 66)),
    IGNORE: ("ignored", (200, 200, 200)),
}
"""Names and colours of an error map; the colours of Okabe and Ito, told apart by everybody."""

_ORDERS = {
    "random": "random draw",
    "best": "best gains",
    "worst": "worst gains",
    "all": "all, best first",
}
_QUALITY = 74  # of WebP: no blocks to be seen at this size, about 8 kB a picture
_STRENGTH = 0.75  # of error colours over the grey photo


def show_examples(report: Report, examples: Iterable[Example]) -> str:
    """All examples with what chooses among them; empty without any."""
    articles: list[str] = []
    compared: dict[str, None] = {}
    present = dict.fromkeys(range(1, len(report.classes)), 0)
    for example in examples:
        articles.append(_article(report, example))
        compared[_compared(example)] = None
        for value in example.classes:
            present[value] += 1
    if not articles:
        return ""
    classes = {"": "any class"} | {
        str(value): f"{report.classes[value]} ({number})"
        for value, number in present.items()
        if number
    }
    return (
        f"<p>{text('; '.join(compared))}. Best and worst by the mIoU of each image alone, "
        "which sorts pictures and makes no figure. Class maps show the strongest class of each "
        "pixel, from the lowest value in the map to the highest.</p>"
        f'<p>Errors: {_error_key()}</p><form class="controls">'
        f"<label>Show {select('order', _ORDERS)}</label> "
        f"<label>with {select('class', classes)}</label> "
        '<label><input type="checkbox" id="large"> large</label> '
        f'<span role="status" id="count">{len(articles)} images</span></form>'
        f'<div id="examples">{"".join(articles)}</div>'
    )


def error_picture(rgb: Picture, errors: UInt8[np.ndarray, "H W"]) -> Picture:
    """Paint an error map over the photo in grey."""
    grey = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    painted = grey.copy()
    for value, (_, colour) in ERRORS.items():
        chosen = errors == value
        mixed = grey[chosen] + _STRENGTH * (np.array(colour, dtype=np.float64) - grey[chosen])
        painted[chosen] = mixed.round().astype(np.uint8)
    return painted


def _article(report: Report, example: Example) -> str:
    names = ", ".join(report.classes[value] for value in example.classes) or "no class"
    keys = "".join(_swatch(_colour(v), report.classes[v]) for v in example.classes)
    told = f"{example.line} {example.iou * 100:.1f}"
    if example.base is not None and example.base_iou is not None:
        told += f", {example.base} {example.base_iou * 100:.1f}: {points(example.gain)}"
    values = " ".join(map(str, example.classes))
    figures = "".join(
        f'<figure><img src="{_uri(picture)}" width="{picture.shape[1]}" '
        f'height="{picture.shape[0]}" alt="{text(alt)}" loading="lazy" decoding="async">'
        f"<figcaption>{text(title)}</figcaption></figure>"
        for title, alt, picture in _pictures(example, names)
    )
    return (
        f'<article data-gain="{example.gain!r}" data-groups="{" ".join(example.groups)}" '
        f'data-classes="{values}"><h3>{text(example.name)}</h3>'
        f"<p>{text(told)} <small>({text(', '.join(example.groups))})</small> {keys}</p>"
        f'<div class="strip">{figures}</div></article>\n'
    )


def _pictures(example: Example, names: str) -> Iterable[tuple[str, str, Picture]]:
    """Titles, descriptions and pictures, from the photo to the errors."""
    rgb = _reduced(example.photo)
    size = (rgb.shape[1], rgb.shape[0])
    yield "photo", f"photo of {names}: {example.name}", rgb
    for stage in example.stages:
        cam = cv2.resize(_array(stage.cam.amax(0)), size, interpolation=cv2.INTER_AREA)
        yield stage.name, f"class map after {stage.name}", overlay_cam(rgb, _stretched(cam))
    masks = {"mask": example.mask, "ground truth": example.truth}
    if example.base_mask is not None:
        masks = {"mask of base": example.base_mask} | masks
    for title, mask in masks.items():
        yield title, f"{title}, {_covered(mask)}", overlay_mask(rgb, _nearest(mask, size))
    alt = "errors: " + ", ".join(
        f"{name} {_share(example.errors == value)}" for value, (name, _) in ERRORS.items()
    )
    yield "errors", alt, error_picture(rgb, _nearest(example.errors, size))


def _reduced(rgb: Picture) -> UInt8[np.ndarray, "h w 3"]:
    rows, cols = rgb.shape[:2]
    scale = min(1.0, SIDE / max(rows, cols))
    size = (max(1, round(cols * scale)), max(1, round(rows * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def _stretched(cam: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """From 0 to 1: maps between two refiners may be anything within that; a flat one is 0."""
    low, high = cam.min(), cam.max()
    return ((cam - low) / max(high - low, 1e-6)).clip(0, 1)


def _nearest(mask: Tensor, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    return cv2.resize(_array(mask).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _covered(mask: Tensor) -> str:
    return f"{_share((mask != 0) & (mask != IGNORE))} of the photo"


def _share(chosen: Tensor) -> str:
    return f"{float(chosen.float().mean()) * 100:.0f} %"


def _compared(example: Example) -> str:
    return example.line if example.base is None else f"{example.line} over {example.base}"


def _error_key() -> str:
    return "".join(_swatch(colour, name) for name, colour in ERRORS.values())


def _colour(value: int) -> tuple[int, int, int]:
    red, green, blue = voc_palette()[3 * value : 3 * value + 3]
    return red, green, blue


def _swatch(colour: tuple[int, int, int], name: str) -> str:
    return f'<span class="chip"><i style="background:rgb{colour}"></i>{text(name)}</span>'


def _uri(picture: Picture) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
