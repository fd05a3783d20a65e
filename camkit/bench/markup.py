"""The tables of a report, as Markdown and as HTML in which all text is escaped."""

import base64
import html
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import get_args

from camkit.bench.oracles import BAND, SIZES
from camkit.bench.results import Report, Row
from camkit.printing import several
from camkit.score import Definition, Gain


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        shown: its text.
        value: its sort key, if that is not the text; NaN and None come last.
        note: smaller text below.
        more: further numbers behind the text, one for each further part of the `Head`.
    """

    shown: str
    value: float | int | None = None
    note: str = ""
    more: tuple[float, ...] = ()


@dataclass(frozen=True)
class Head:
    """A column whose cells hold several numbers; a CSV file has a column for each.

    Attributes:
        name: as displayed.
        parts: name of each number; the first is the sort key.
    """

    name: str
    parts: tuple[str, ...]


INTERVAL = Head("95% interval", ("low", "high"))


NO_CELL = Cell("-", math.nan)


def percent(share: float | None) -> Cell:
    """Return a cell with a share in %, or a dash for None and NaN."""
    if share is None or math.isnan(share):
        return NO_CELL
    return Cell(f"{share * 100:.1f}", share)


def points(difference: float) -> str:
    """Return a difference of shares in %, with its sign."""
    return f"{difference * 100:+.1f}"


def gain_cells(gain: Gain | None) -> tuple[Cell, Cell]:
    """Return cells with a gain and its interval, or dashes."""
    if gain is None:
        return NO_CELL, NO_CELL
    interval = f"{points(gain.low)} to {points(gain.high)}"
    return Cell(points(gain.gain), gain.gain), Cell(interval, gain.low, more=(gain.high,))


@dataclass(frozen=True)
class Table:
    """A table of the report, in a section of its own.

    Attributes:
        key: HTML id of the section.
        title: heading of the section.
        caption: a line above the table.
        heads: names of the columns.
        rows: cells by row; the first column holds names.
        note: explains the table.
    """

    key: str
    title: str
    caption: str
    heads: Sequence[str | Head]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def extra_tables(report: Report) -> list[Table]:
    """Return the tables besides the main one, each only if the report has figures for it."""
    rows, names, gain = report.rows, get_args(Definition), ("gain", INTERVAL)
    tables: list[Table] = []
    lines: list[tuple[Cell, ...]]
    heads: tuple[str | Head, ...]
    if lines := [
        (Cell(row.name), Cell(other.name), *gain_cells(other.gain))
        for row in rows
        for other in row.over_controls
    ]:
        heads = ("variant", "control", *gain)
        tables.append(Table("controls", "Against controls", "Gains over controls", heads, lines))
    if lines := [
        (Cell(row.name), *(percent(row.definitions[name]) for name in names))
        for row in rows
        if len({round(value, 6) for value in row.definitions.values()}) > 1
    ]:
        heads = ("variant", *names)
        title = "Definitions of mIoU"
        tables.append(Table("definitions", title, "mIoU by definition", heads, lines))
    if lines := [
        (Cell(row.name), percent(row.outlines.mean_iou), *gain_cells(row.outlines.gain))
        for row in rows
        if row.outlines is not None
    ]:
        heads = ("variant", "boundary IoU", *gain)
        tables.append(Table("outlines", "Outlines", "Boundary IoU and gains", heads, lines))
    if measured := [(row.name, row.quality) for row in rows if row.quality is not None]:
        lines = []
        for name, quality in measured:
            pairs = zip(astuple(quality.means), astuple(quality.errors), strict=True)
            shown = (Cell(f"{m:.3f} ± {error:.3f}", m, more=(error,)) for m, error in pairs)
            lines.append((Cell(name), *shown))
        parts = ("mean", "standard error")
        heads = ("variant", *(Head(n, parts) for n in ("insertion", "deletion", "left behind")))
        note = (
            f"By the classifier's scores, over {measured[0][1].maps} maps, with standard errors. "
            "Higher insertion is better; lower deletion and a lower score left behind are better."
        )
        tables.append(Table("quality", "By the classifier", "Without masks", heads, lines, note))
    return tables + _analysis_tables(report)


def _analysis_tables(report: Report) -> list[Table]:
    """Return oracles, a column for each row, and shares of wrong pixels."""
    analysed = [(row, row.analysis) for row in report.rows if row.analysis is not None]
    if not analysed:
        return []
    by_row = [{o.name: o.mean_iou for o in analysis.oracles} for _, analysis in analysed]
    names = dict.fromkeys(name for oracles in by_row for name in oracles)
    lines: list[tuple[Cell, ...]]
    lines = [(Cell("as measured"), *(percent(row.mean_iou) for row, _ in analysed))]
    lines += [
        (Cell(f"oracle: {name}"), *(percent(oracles.get(name)) for oracles in by_row))
        for name in names
    ]
    note = (
        "Every line but the first reads the true masks: it shows what the method reaches with one "
        "part replaced, and is no result. Best background scores and lines without a kind of error "
        "are never below the measured line; the others may be, and another rule that reads the "
        "masks may reach more. Oracles have the background score that is best on the reported "
        "images; lines without a kind of error have the method's own."
    )
    heads = ("mIoU in %", *(row.name for row, _ in analysed))
    tables = [Table("oracles", "Oracles", "Oracles, which read the masks", heads, lines, note)]
    lines = [
        (
            Cell(row.name),
            Cell(group.group if group.kind == "all" else f"{group.kind}: {group.group}"),
            Cell(f"{group.wrong:,}", group.wrong),
            *(percent(share) for share in astuple(group)[3:]),
        )
        for row, analysis in analysed
        for group in analysis.errors
    ]
    note = (
        "In %. A wrong pixel belongs to its true class, or to the painted class if it is "
        f"background. A class that covers less than {SIZES['small']:.0%} of a picture is small "
        f"there, from {SIZES['medium']:.0%} large. The last column counts pixels within {BAND} "
        "pixels of an outline of the true mask."
    )
    heads = ("variant", "pixels of", "wrong pixels", "share of all errors")
    heads += ("background as class", "class as background", "class as another", "near an outline")
    return [*tables, Table("errors", "Errors", "Wrong pixels by kind", heads, lines, note)]


def to_markdown(report: Report) -> str:
    """Return the report as Markdown tables with an explanation."""
    split = f"{report.split} ({several(report.images, 'image')})"
    tuned = f"{report.tune_split} ({several(report.tune_images, 'image')})"
    lines = [
        f"mIoU in % over {', '.join(report.classes)}",
        f"on {split} of {report.dataset}. Definition: mean over the classes present in the ground",
        "truth, one confusion matrix over all images; other objects count as background.",
        f"Image-level labels: {report.labels}, for every image.",
        f"Background scores and choices picked on {tuned}. Gains: 95% intervals of a paired",
        "bootstrap over images; p is two-sided, corrected for all gains of the table (Holm).",
    ]
    if report.oracle:
        lines += ["", "ORACLE: background scores were picked on images that are reported."]
    lines += [line for warning in report.warnings for line in ("", f"WARNING: {warning}.")]
    lines += [
        "",
        "| variant | background score | on tuning split | mIoU | gain (95% interval) | p "
        "| by class |",
        "|---|---|---|---|---|---|---|",
        *(_main_line(row) for row in report.rows),
    ]
    for table in extra_tables(report):
        lines += ["", f"{table.caption}. {table.note}".strip(), ""]
        lines += [f"| {' | '.join(map(head_name, table.heads))} |", "|---" * len(table.heads) + "|"]
        lines += [f"| {' | '.join(cell.shown for cell in row)} |" for row in table.rows]
    if report.skipped:
        lines += ["", f"{several(len(report.skipped), 'image')} could not be used:"]
        lines += [f"- {reason}" for reason in report.skipped]
    return "\n".join(lines) + "\n"


def _main_line(row: Row) -> str:
    name, mean, gain = row.name, f"{row.mean_iou * 100:.1f}", ""
    if row.spread is not None:
        low, high = row.spread
        mean += f" ({low * 100:.1f} to {high * 100:.1f})"
    elif row.name != row.variant.name:
        name += f": {row.variant.name}"
    if row.gain is not None:
        difference, interval = gain_cells(row.gain)
        gain = f"{difference.shown} ({interval.shown})"
    p_value = "" if row.p_value is None else f"{row.p_value:.2g}"
    by_class = " ".join("-" if iou != iou else f"{iou * 100:.0f}" for iou in row.class_iou)
    return (
        f"| {name} | {row.background_score:.2f} | {row.tuned_mean_iou * 100:.1f} | {mean} | {gain} "
        f"| {p_value} | {by_class} |"
    )


def text(value: object) -> str:
    """Escape a text for HTML, inside and outside of attributes."""
    return html.escape(printable(value), quote=True)


def printable(value: object) -> str:
    """Replace control characters and lone surrogates, as in undecodable file names."""
    whole = str(value).encode("utf-8", "replace").decode()
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" else char for char in whole)


def head_name(head: str | Head) -> str:
    """Return the name of a column."""
    return head.name if isinstance(head, Head) else head


def html_table(caption: str, heads: Sequence[str | Head], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table that can be sorted by any column; the first column holds names."""
    columns = "".join(map(_head_html, heads))
    lines = []
    for first, *others in rows:
        cells = "".join(map(_cell_html, others))
        lines.append(f'<tr><th scope="row">{_name_html(first)}</th>{cells}</tr>\n')
    table = f"<thead><tr>{columns}</tr></thead>\n<tbody>{''.join(lines)}</tbody>"
    return scrolled(caption, f"<table><caption>{text(caption)}</caption>{table}</table>")


def scrolled(name: str, content: str) -> str:
    """Return content in a region of this name that scrolls if it is too wide for the screen."""
    label = f'role="region" tabindex="0" aria-label="{text(name)}"'
    return f'<div class="scroll" {label}>{content}</div>'


def _head_html(head: str | Head) -> str:
    parts = f' data-parts="{text("|".join(head.parts))}"' if isinstance(head, Head) else ""
    name = text(head_name(head))
    return f'<th scope="col"{parts}><button type="button">{name}</button></th>'


def _cell_html(cell: Cell) -> str:
    key = "" if cell.value is None or math.isnan(cell.value) else repr(cell.value)
    data = "" if cell.value is None else f' data-value="{key}"'
    if cell.more:
        data += f' data-more="{" ".join(map(repr, cell.more))}"'
    return f"<td{data}>{_content(cell)}</td>"


def _name_html(cell: Cell) -> str:
    """Return a name that may be long; a line may end after each part of a chain."""
    name = re.sub(r"([+|,/])", r"\1<wbr>", text(cell.shown))
    return f"<span>{name}</span>{_note_html(cell)}"


def _content(cell: Cell) -> str:
    return text(cell.shown) + _note_html(cell)


def _note_html(cell: Cell) -> str:
    return f"<small>{text(cell.note)}</small>" if cell.note else ""


def facts(values: Mapping[str, object]) -> str:
    """Return a list of names and values."""
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(value)}</dd>" for k, value in values.items())
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


def data_uri(kind: str, content: bytes) -> str:
    """Return an address that holds the content itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
