"""Plots of a report as pictures inside a page, for light and dark screens."""

import base64
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from camkit.bench.markup import printable, text
from camkit.bench.results import Report, Row
from camkit.errors import CamkitError
from camkit.score import THRESHOLDS

COLOURS = (
    *("#1f77b4", "#e0701a", "#2ca02c", "#d94f4f", "#9467bd"),
    *("#a0705f", "#d467b0", "#808080", "#a3a51d", "#17a5b8"),
)
"""Of lines, in turn: dark enough for white paper, light enough for a dark screen."""

STROKES = ("solid", "dashed", "dotted")
"""Of lines, in turn: neighbours differ by more than colour."""

_INK = "#010203"  # stands in a drawing for the colour of its text, which the screen decides
_ON_LIGHT, _ON_DARK = "#3a3a3a", "#d0d0d0"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: in the browser's fonts, which know every script
    "svg.hashsalt": "camkit",
    "text.parse_math": False,  # a name with $ in it is no formula
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#80808050",
}


def curves_plot(report: Report) -> str:
    """Mean IoU of every row over background scores on the tuning split, with the picked ones."""
    told = []
    with _drawing(7.0, 4.2) as (figure, axes):
        for index, row in enumerate(report.rows):
            colour, stroke = look(index)
            heights = [value * 100 for value in row.curve]
            axes.plot(THRESHOLDS.tolist(), heights, color=colour, linestyle=stroke, linewidth=1.6)
            best = max(row.curve)  # of repeats both the curve and the score are the first one's
            axes.plot(row.background_score, best * 100, "o", color=colour)
            told.append(f"{row.name}: {best * 100:.1f} at {row.background_score:.2f}")
        axes.set_xlabel("background score")
        axes.set_ylabel(f"mIoU on {printable(report.tune_split)} (%)")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True)
        alt = f"mIoU over background scores on {report.tune_split}. Picked: {'; '.join(told)}"
        return _picture(figure, alt)


def classes_plot(report: Report, row: Row, base: Row | None) -> str:
    """IoU of each class by a row, beside its base."""
    shown = [row] if base is None else [row, base]
    thickness = 0.8 / len(shown)
    places = range(len(report.classes))
    with _drawing(5.6, 0.9 + 0.42 * len(report.classes)) as (figure, axes):
        for index, one in enumerate(shown):
            values = [0.0 if math.isnan(iou) else iou * 100 for iou in one.class_iou]
            middles = [place - 0.4 + thickness * (index + 0.5) for place in places]
            colour, _ = look(_place(report, one))
            bars = axes.barh(middles, values, thickness * 0.92, color=colour)
            labels = ["-" if math.isnan(iou) else f"{iou * 100:.1f}" for iou in one.class_iou]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set_yticks(list(places), [printable(name) for name in report.classes])
        axes.set_xlim(0, 105)
        axes.set_xlabel(f"IoU on {printable(report.split)} (%)")
        axes.invert_yaxis()
        against = "" if base is None else f", beside its base {base.name}"
        return _picture(figure, f"IoU by class of {row.name}{against}; the table has the figures")


def legend(report: Report, rows: Sequence[Row]) -> str:
    """Which line or bar is which row's: in the page, where names of any length have room."""
    items = []
    for row in rows:
        colour, stroke = look(_place(report, row))
        line = f'<span class="line" style="border-top:3px {stroke} {colour}"></span>'
        items.append(f"<li>{line}{text(row.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def look(index: int) -> tuple[str, str]:
    """Colour and stroke of a row."""
    return COLOURS[index % len(COLOURS)], STROKES[index % len(STROKES)]


def _place(report: Report, row: Row) -> int:
    return [one.name for one in report.rows].index(row.name)


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure with axes, and our settings for as long as it is drawn."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CamkitError(
            "a page with plots needs matplotlib, which is not installed; run "
            '`pip install "camkit[report]"`, or write Markdown or JSON'
        ) from error
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser will have it
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _picture(figure: Any, alt: str) -> str:
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    light, dark = (_uri(file.getvalue().replace(_INK, ink)) for ink in (_ON_LIGHT, _ON_DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="plot" src="{light}" alt="{text(alt)}"></picture>'
    )


def _uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
