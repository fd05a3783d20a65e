"""Plots and example pictures of a report, for light and dark screens."""

import base64
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from camkit.bench.examples import FALSE, HIT, MISSED, WRONG, Example
from camkit.bench.markup import points, printable, select, text
from camkit.bench.results import Report, Row
from camkit.errors import CamkitError
from camkit.paint import Picture, mask_colour, overlay_cam, overlay_mask
from camkit.score import THRESHOLDS
from camkit.tensors import IGNORE

COLOURS = (
    *("#1f77b4", "#e0701a", "#2ca02c", "#d94f4f", "#9467bd"),
    *("#a0705f", "#d467b0", "#808080", "#a3a51d", "#17a5b8"),
)
"""Line colours, in turn: dark enough for white paper, light enough for a dark screen."""

STROKES = ("solid", "dashed", "dotted")
"""Line styles, in turn, so that neighbours do not differ by colour alone."""

SIDE = 240
"""Long side of a picture in pixels: 36 examples of eight pictures stay below 5 MB."""

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
_QUALITY = 74  # of WebP: no visible blocks at this size, about 8 kB per picture
_STRENGTH = 0.75  # of error colours over the grey photo

_INK = "#010203"  # placeholder for the text colour, which differs between light and dark screens
_ON_LIGHT, _ON_DARK = "#3a3a3a", "#d0d0d0"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the fonts of the browser, which has every script
    "svg.hashsalt": "camkit",
    "text.parse_math": False,  # a name that contains $ is no formula
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#80808050",
}


def curves_plot(report: Report) -> str:
    """Plot mean IoU over background scores on the tuning split, with the picked scores."""
    picked = []
    with _drawing(7.0, 4.2) as (figure, axes):
        for row in report.rows:
            colour, stroke = line_style(report, row)
            heights = [value * 100 for value in row.curve]
            axes.plot(THRESHOLDS.tolist(), heights, color=colour, linestyle=stroke, linewidth=1.6)
            best = max(row.curve)  # of repeats both the curve and the score are the first one's
            axes.plot(row.background_score, best * 100, "o", color=colour)
            picked.append(f"{row.name}: {best * 100:.1f} at {row.background_score:.2f}")
        axes.set_xlabel("background score")
        axes.set_ylabel(f"mIoU on {printable(report.tune_split)} (%)")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True)
        alt = f"mIoU over background scores on {report.tune_split}. Picked: {'; '.join(picked)}"
        return _plot_html(figure, alt)


def classes_plot(report: Report, row: Row, base: Row | None) -> str:
    """Plot the IoU of each class by a row, beside its base."""
    shown = [row] if base is None else [row, base]
    thickness = 0.8 / len(shown)
    places = range(len(report.classes))
    with _drawing(5.6, 0.9 + 0.42 * len(report.classes)) as (figure, axes):
        for index, each in enumerate(shown):
            values = [0.0 if math.isnan(iou) else iou * 100 for iou in each.class_iou]
            middles = [place - 0.4 + thickness * (index + 0.5) for place in places]
            colour, _ = line_style(report, each)
            bars = axes.barh(middles, values, thickness * 0.92, color=colour)
            labels = ["-" if math.isnan(iou) else f"{iou * 100:.1f}" for iou in each.class_iou]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set_yticks(list(places), [printable(name) for name in report.classes])
        axes.set_xlim(0, 105)
        axes.set_xlabel(f"IoU on {printable(report.split)} (%)")
        axes.invert_yaxis()
        against = "" if base is None else f", beside its base {base.name}"
        return _plot_html(figure, f"IoU by class of {row.name}{against}; the table has the figures")


def legend(report: Report, rows: Sequence[Row]) -> str:
    """Return the legend as HTML; it stands outside the plot, so that long names have room."""
    items = []
    for row in rows:
        colour, stroke = line_style(report, row)
        line = f'<span class="line" style="border-top:3px {stroke} {colour}"></span>'
        items.append(f"<li>{line}{text(row.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def line_style(report: Report, row: Row) -> tuple[str, str]:
    """Return colour and stroke of a row."""
    index = [each.name for each in report.rows].index(row.name)
    return COLOURS[index % len(COLOURS)], STROKES[index % len(STROKES)]


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Yield a figure with axes, under our settings of matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CamkitError(
            "a page with plots needs matplotlib, which is not installed; run "
            '`pip install "camkit[report]"`, or write Markdown or JSON'
        ) from error
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has it
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _plot_html(figure: Any, alt: str) -> str:
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    light, dark = (
        _uri("image/svg+xml", file.getvalue().replace(_INK, ink).encode())
        for ink in (_ON_LIGHT, _ON_DARK)
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="plot" src="{light}" alt="{text(alt)}"></picture>'
    )


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
        "pixel, from the lowest value in the map to the highest.</p>"
        f'<p>Errors: {errors}</p><form class="controls">'
        f"<label>Show {select('order', _ORDERS)}</label> "
        f"<label>with {select('class', classes)}</label> "
        '<label><input type="checkbox" id="large"> large</label> '
        f'<span role="status" id="count">{len(articles)} images</span></form>'
        f'<div id="examples">{"".join(articles)}</div>'
    )


def error_picture(rgb: Picture, errors: UInt8[np.ndarray, "H W"]) -> Picture:
    """Paint an error map over the grey photo."""
    grey = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    painted = grey.copy()
    for value, (_, colour) in ERRORS.items():
        chosen = errors == value
        mixed = grey[chosen] + _STRENGTH * (np.array(colour, dtype=np.float64) - grey[chosen])
        painted[chosen] = mixed.round().astype(np.uint8)
    return painted


def _article(report: Report, example: Example) -> str:
    names = ", ".join(report.classes[value] for value in example.classes) or "no class"
    keys = "".join(_swatch(mask_colour(v), report.classes[v]) for v in example.classes)
    summary = f"{example.row} {example.iou * 100:.1f}"
    if example.base is not None and example.base_iou is not None:
        summary += f", {example.base} {example.base_iou * 100:.1f}: {points(example.gain)}"
    figures = ""
    for title, alt, picture in _example_pictures(example, names):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="WEBP", quality=_QUALITY, method=4)
        figures += (
            f'<figure><img src="{_uri("image/webp", file.getvalue())}" width="{picture.shape[1]}" '
            f'height="{picture.shape[0]}" alt="{text(alt)}" loading="lazy" decoding="async">'
            f"<figcaption>{text(title)}</figcaption></figure>"
        )
    return (
        f'<article data-gain="{example.gain!r}" data-groups="{" ".join(example.groups)}" '
        f'data-classes="{" ".join(map(str, example.classes))}"><h3>{text(example.name)}</h3>'
        f"<p>{text(summary)} <small>({text(', '.join(example.groups))})</small> {keys}</p>"
        f'<div class="strip">{figures}</div></article>\n'
    )


def _example_pictures(example: Example, names: str) -> Iterable[tuple[str, str, Picture]]:
    """Yield title, description and picture, from the photo to the errors."""
    rows, cols = example.photo.shape[:2]
    scale = min(1.0, SIDE / max(rows, cols))
    size = (max(1, round(cols * scale)), max(1, round(rows * scale)))

    def nearest(mask: Tensor) -> UInt8[np.ndarray, "h w"]:
        return cv2.resize(
            mask.cpu().numpy().astype(np.uint8), size, interpolation=cv2.INTER_NEAREST
        )

    rgb = cv2.resize(example.photo, size, interpolation=cv2.INTER_AREA)
    yield "photo", f"photo of {names}: {example.name}", rgb
    for stage in example.stages:
        strongest = stage.cam.amax(0).detach().cpu().numpy()
        cam = cv2.resize(strongest, size, interpolation=cv2.INTER_AREA)
        low, high = cam.min(), cam.max()  # between refiners, a map may cover any part of [0, 1]
        stretched = ((cam - low) / max(high - low, 1e-6)).clip(0, 1)
        yield stage.name, f"class map after {stage.name}", overlay_cam(rgb, stretched)
    masks = {"mask": example.mask, "ground truth": example.truth}
    if example.base_mask is not None:
        masks = {"mask of base": example.base_mask} | masks
    for title, mask in masks.items():
        covered = _share((mask != 0) & (mask != IGNORE))
        yield title, f"{title}, {covered} of the photo", overlay_mask(rgb, nearest(mask))
    alt = "errors: " + ", ".join(
        f"{name} {_share(example.errors == value)}" for value, (name, _) in ERRORS.items()
    )
    yield "errors", alt, error_picture(rgb, nearest(example.errors))


def _share(chosen: Tensor) -> str:
    return f"{float(chosen.float().mean()) * 100:.0f} %"


def _swatch(colour: tuple[int, int, int], name: str) -> str:
    return f'<span class="chip"><i style="background:rgb{colour}"></i>{text(name)}</span>'


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
