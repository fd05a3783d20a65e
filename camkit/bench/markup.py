"""Small pieces of HTML, with every text from outside escaped."""

import html
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        shown: its text.
        value: what it is sorted by, if not its text; NaN and None come last.
        note: smaller text below.
    """

    shown: str
    value: float | int | None = None
    note: str = ""


NO_CELL = Cell("-", math.nan)


def text(value: object) -> str:
    """Escape a text for HTML, inside and outside of attributes; what no file can hold becomes ?."""
    return html.escape(printable(value), quote=True)


def printable(value: object) -> str:
    """Replace control characters and halves of characters, as undecodable file names have them."""
    whole = str(value).encode("utf-8", "replace").decode()
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" else char for char in whole)


def percent(share: float | None) -> Cell:
    """A share in %, one digit behind the point; - where there is none."""
    if share is None or math.isnan(share):
        return NO_CELL
    return Cell(f"{share * 100:.1f}", share)


def points(difference: float) -> str:
    """A difference of shares in %, with its sign."""
    return f"{difference * 100:+.1f}"


def table(caption: str, heads: Sequence[str], lines: Iterable[Sequence[Cell]]) -> str:
    """A table that sorts by any of its columns; the first one holds names."""
    columns = "".join(
        f'<th scope="col"><button type="button">{text(head)}</button></th>' for head in heads
    )
    body = "\n".join(
        f"<tr>{_first(line[0])}{''.join(map(_other, line[1:]))}</tr>" for line in lines
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">'
        f"<table><caption>{text(caption)}</caption><thead><tr>{columns}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they are."""
    items = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)
    return f"<dl>{items}</dl>"


def bullets(items: Iterable[object]) -> str:
    """A plain list."""
    return f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>"


def select(key: str, options: Mapping[str, str], chosen: str = "") -> str:
    """A list to choose from: what each value is called."""
    items = ""
    for value, name in options.items():
        marked = " selected" if value == chosen else ""
        items += f'<option value="{text(value)}"{marked}>{text(name)}</option>'
    return f'<select id="{key}">{items}</select>'


def section(key: str, title: str, content: str) -> str:
    """A part of the page under its heading."""
    heading = f'<h2 id="{key}-title">{text(title)}</h2>'
    return f'<section id="{key}" aria-labelledby="{key}-title">{heading}\n{content}</section>'


def _first(cell: Cell) -> str:
    return f'<th scope="row">{_inside(cell)}</th>'


def _other(cell: Cell) -> str:
    if cell.value is None:
        return f"<td>{_inside(cell)}</td>"
    value = "" if math.isnan(cell.value) else repr(cell.value)
    return f'<td data-value="{value}">{_inside(cell)}</td>'


def _inside(cell: Cell) -> str:
    return text(cell.shown) + (f"<small>{text(cell.note)}</small>" if cell.note else "")
