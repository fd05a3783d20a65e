"""Tables in text files: the separator, the quotes and the header are found by looking."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from camkit.data.names import composed, has_image_suffix
from camkit.data.text import decoded
from camkit.errors import DataError

_SEPARATORS = "\t,;|"
_NAMED = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars", " ": "spaces"}
_IMAGES = """filename imagefilename imagefile file filepath imagepath imgpath path image images
imagename imgname imageid imgid img photo picture key name id uri"""
_IMAGE_WORDS = _IMAGES.split()
TRUE = frozenset(("1", "1.0", "true", "yes", "x"))
FALSE = frozenset(("0", "0.0", "false", "no", "", "nan"))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        line: its number in the file, from 1.
        cells: stripped texts, in NFC.
    """

    line: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The rows of a text file.

    Attributes:
        path: the file.
        encoding: of the text.
        separator: of the cells; " " is any white space.
        header: the names of the columns, if the first row holds names.
        rows: all rows but the header.
    """

    path: Path
    encoding: str
    separator: str
    header: tuple[str, ...] | None
    rows: tuple[Row, ...]

    @property
    def form(self) -> str:
        """A description of the file."""
        header = "no header" if self.header is None else f"header {', '.join(self.header[:4])}"
        more = ", ..." if self.header is not None and len(self.header) > 4 else ""
        return (
            f"{self.encoding.upper()} table, {_NAMED[self.separator]} between cells, {header}{more}"
        )


def read_table(path: Path) -> Table:
    """Read a table of any usual dialect.

    The separator is the first tab, comma, semicolon or bar on most lines, so that other separators
    may stand between the labels of a cell; without any of these, it is white space. Cells may be
    in quotes. Lines before the header that start with ``#`` and Excel's ``sep=;`` are skipped. The
    first row is the header if one of its cells is a usual name of a column of images, or if it
    holds names above columns of 0 and 1.

    Raises:
        DataError: the file is no text, is empty, or a quote in it is not closed.
    """
    text, encoding = decoded(path)
    lines = text.splitlines()
    skipped, separator = _preamble(lines)
    body = lines[skipped:]
    separator = separator or _separator(body)
    rows = tuple(_rows(path, body, separator, skipped))
    if not rows:
        raise DataError(f"{path} is empty; expected a table of images and labels")
    header = rows[0].cells if _is_header(rows) else None
    return Table(path, encoding, separator, header, rows[1:] if header else rows)


def plain_word(cell: str) -> str:
    """Return a column's name in small letters, without spaces and marks.

    >>> plain_word("Image ID"), plain_word("file_name")
    ('imageid', 'filename')
    """
    return re.sub(r"[^a-z0-9]", "", cell.casefold())


def image_column(names: Sequence[str]) -> int | None:
    """Return the position of the column that names the images, or None."""
    words = [plain_word(name) for name in names]
    return next((words.index(word) for word in _IMAGE_WORDS if word in words), None)


def _preamble(lines: Sequence[str]) -> tuple[int, str | None]:
    """Count the lines to skip, and return the separator that they name."""
    skipped, separator = 0, None
    for line in lines:
        named = re.fullmatch(r'"?sep=(.)"?\s*', line)
        if named:
            separator = named[1]
        elif line.strip() and not line.startswith("#"):
            break
        skipped += 1
    return skipped, separator


def _separator(lines: Sequence[str]) -> str:
    """Return the separator that stands first on most lines; a tie is decided by the first line."""
    firsts: Counter[str] = Counter()
    for line in lines[:1000]:
        if line.strip():
            outside = re.sub(r'"[^"]*"', "", line)
            firsts[next((mark for mark in outside if mark in _SEPARATORS), " ")] += 1
    return firsts.most_common(1)[0][0] if firsts else ","


def _rows(path: Path, lines: Sequence[str], separator: str, skipped: int) -> Iterator[Row]:
    if separator == " ":
        for number, line in enumerate(lines, start=skipped + 1):
            if line.strip():
                yield Row(number, _space_separated(composed(line)))
        return
    single = all(line.startswith("'") for line in lines if line.strip())
    # a line keeps its ending, so that a cell in quotes may hold one
    reader = csv.reader(
        (f"{line}\n" for line in lines),
        delimiter=separator,
        quotechar="'" if single else '"',
        skipinitialspace=True,
        strict=True,
    )
    try:
        for cells in reader:
            stripped = tuple(composed(cell.strip()) for cell in cells)
            if any(stripped):
                yield Row(skipped + reader.line_num, stripped)
    except csv.Error as error:
        line_number = skipped + reader.line_num
        raise DataError(f"{path}, line {line_number}: {error}; check the quotes") from error


def _space_separated(line: str) -> tuple[str, ...]:
    """Split a line at white space, but not within a name such as ``my cat.jpg`` at its start."""
    cells = line.split()
    for end in range(1, len(cells)):
        name = " ".join(cells[: end + 1])
        if has_image_suffix(cells[end]) and not any(map(has_image_suffix, cells[:end])):
            return (name, *cells[end + 1 :])
    return tuple(cells)


def _is_header(rows: Sequence[Row]) -> bool:
    first = rows[0].cells
    if has_image_suffix(first[0]):
        return False
    if image_column(first) is not None:
        return True
    others = rows[1:101]
    return (
        len(others) > 0
        and len(first) > 2
        and not _folded(first) & (TRUE | FALSE)
        and all(_folded(row.cells) <= TRUE | FALSE for row in others)
    )


def _folded(cells: Sequence[str]) -> set[str]:
    return {cell.casefold() for cell in cells[1:]}
