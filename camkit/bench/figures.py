"""Plots of a report, for light and dark screens."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from camkit.bench.markup import data_uri, printable, text
from camkit.bench.results import Report, Row
from camkit.errors import require
from camkit.score import THRESHOLDS

COLOURS = (
    *("#1f77b4", "#e0701a", "#2ca02c", "#d94f4f", "#9467bd"),
    *("#a0705f", "#d467b0", "#808080", "#a3a51d", "#17a5b8"),
)
"""Line colours, in turn: dark enough for white paper, light enough for a dark screen."""

STROKES = ("solid", "dashed", "dotted")
"""Line styles, in turn, so that neighbours do not differ by colour alone."""

_INK = "#010203"  # placeholder for the text colour, which differs between light and dark screens
_INKS = {"light": "#3a3a3a", "dark": "#d0d0d0"}
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
    require("matplotlib", "a page with plots (Markdown and JSON have none) needs", "report")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has it
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _plot_html(figure: Any, alt: str) -> str:
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    # both are in the page: paper is white even where the screen is dark
    return "".join(
        f'<img class="plot on-{paper}" alt="{text(alt)}" '
        f'src="{data_uri("image/svg+xml", file.getvalue().replace(_INK, ink).encode())}">'
        for paper, ink in _INKS.items()
    )
