"""HTML pieces with all text escaped, and the tables of a report made of them."""

import html
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import get_args

import torch

from camkit.bench.results import Report, Row
from camkit.score import Definition, Gain, class_scores


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        shown: its text.
        value: its sort key, if not the text; NaN and None come last.
        note: smaller text below.
    """

    shown: str
    value: float | int | None = None
    note: str = ""


NO_CELL = Cell("-", math.nan)


def text(value: object) -> str:
    """Escape a text for HTML, inside and outside of attributes."""
    return html.escape(printable(value), quote=True)


def printable(value: object) -> str:
    """Replace control characters and lone surrogates, as in undecodable file names."""
    whole = str(value).encode("utf-8", "replace").decode()
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" else char for char in whole)


def percent(share: float | None) -> Cell:
    """Return a cell with a share in %, or a dash for None and NaN."""
    if share is None or math.isnan(share):
        return NO_CELL
    return Cell(f"{share * 100:.1f}", share)


def points(difference: float) -> str:
    """Return a difference of shares in %, with its sign."""
    return f"{difference * 100:+.1f}"


def table(caption: str, heads: Sequence[str], lines: Iterable[Sequence[Cell]]) -> str:
    """Return a table that can be sorted by any column; the first column holds names."""
    columns = "".join(
        f'<th scope="col"><button type="button">{text(head)}</button></th>' for head in heads
    )
    body = "\n".join(
        f"<tr>{_cell(line[0], first=True)}{''.join(map(_cell, line[1:]))}</tr>" for line in lines
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">'
        f"<table><caption>{text(caption)}</caption><thead><tr>{columns}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values."""
    items = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)
    return f"<dl>{items}</dl>"


def bullets(items: Iterable[object]) -> str:
    """Return a bulleted list."""
    return f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>"


def select(key: str, options: Mapping[str, str], chosen: str = "") -> str:
    """Return a drop-down list from values and their labels."""
    items = ""
    for value, name in options.items():
        marked = " selected" if value == chosen else ""
        items += f'<option value="{text(value)}"{marked}>{text(name)}</option>'
    return f'<select id="{key}">{items}</select>'


def section(key: str, title: str, content: str) -> str:
    """Return a section of the page with its heading."""
    heading = f'<h2 id="{key}-title">{text(title)}</h2>'
    return f'<section id="{key}" aria-labelledby="{key}-title">{heading}\n{content}</section>'


def _cell(cell: Cell, *, first: bool = False) -> str:
    content = text(cell.shown) + (f"<small>{text(cell.note)}</small>" if cell.note else "")
    if first:
        return f'<th scope="row">{content}</th>'
    if cell.value is None:
        return f"<td>{content}</td>"
    value = "" if math.isnan(cell.value) else repr(cell.value)
    return f'<td data-value="{value}">{content}</td>'


def gain_cells(gain: Gain | None) -> tuple[Cell, Cell]:
    """Return cells with a gain and its interval, or dashes."""
    if gain is None:
        return NO_CELL, NO_CELL
    interval = f"{points(gain.low)} to {points(gain.high)}"
    return Cell(points(gain.gain), gain.gain), Cell(interval, gain.low)


def controls(report: Report) -> str:
    """Return the table of gains over controls, if there are any."""
    lines = [
        (Cell(row.name), Cell(other.name), *gain_cells(other.gain))
        for row in report.rows
        for other in row.over_controls
    ]
    if not lines:
        return ""
    heads = ["variant", "control", "gain", "95% interval"]
    return section("controls", "Against controls", table("Gains over controls", heads, lines))


def definitions(report: Report) -> str:
    """Return mean IoU by each definition, for rows where the definitions differ."""
    names = get_args(Definition)
    lines = [
        [Cell(row.name), *(percent(row.definitions[name]) for name in names)]
        for row in report.rows
        if len({round(value, 6) for value in row.definitions.values()}) > 1
    ]
    if not lines:
        return ""
    shown = table("mIoU by definition", ["variant", *names], lines)
    return section("definitions", "Definitions of mIoU", shown)


def quality(report: Report) -> str:
    """Return insertion, deletion and the score left behind, if they were requested."""
    pairs = [(row, row.quality) for row in report.rows if row.quality is not None]
    if not pairs:
        return ""
    lines = []
    for row, quality in pairs:
        figures = zip(astuple(quality.means), astuple(quality.errors), strict=True)
        cells = [Cell(f"{mean:.3f} ± {error:.3f}", mean) for mean, error in figures]
        lines.append([Cell(row.name), *cells])
    heads = ["variant", "insertion", "deletion", "left behind"]
    note = (
        f"<p>By the classifier's scores, over {pairs[0][1].maps} maps, with standard errors. "
        "Higher insertion is better; lower deletion and a lower score left behind are better.</p>"
    )
    return section("quality", "By the classifier", note + table("Without masks", heads, lines))


def outlines(report: Report) -> str:
    """Return the table of boundary IoU, if it was requested."""
    lines = [
        [Cell(row.name), percent(row.outlines.mean_iou), *gain_cells(row.outlines.gain)]
        for row in report.rows
        if row.outlines is not None
    ]
    if not lines:
        return ""
    heads = ["variant", "boundary IoU", "gain", "95% interval"]
    return section("outlines", "Outlines", table("Boundary IoU and gains", heads, lines))


def by_class(report: Report, row: Row) -> str:
    """Return the table of all classes of one row."""
    pixel_ap = (float("nan"), *row.class_precision)  # the background has no map to rank
    lines = [
        [
            Cell(score.name),
            percent(score.iou),
            percent(score.precision),
            percent(score.recall),
            percent(score.false_positives),
            percent(score.false_negatives),
            percent(ap),
            Cell(f"{score.pixels:,}", score.pixels),
        ]
        for score, ap in zip(
            class_scores(torch.tensor(row.confusion), report.classes), pixel_ap, strict=True
        )
    ]
    heads = ["class", "IoU", "precision", "recall", "FP", "FN", "pixel AP", "true pixels"]
    return table(f"By class: {row.name}", heads, lines)
