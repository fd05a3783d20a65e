"""Files that other programs wrote are read here: sizes, nesting and numbers are checked first."""

import json
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser, fromstring

from camkit.errors import DataError, nearby

MAX_JSON_BYTES = 4 << 30
"""No larger JSON file is read; the labels of the largest public data sets have 3 GB."""

MAX_XML_BYTES = 1 << 29
"""No larger XML file is read; its elements take about ten times as much memory."""

_DEEPEST = 64  # containers inside each other; label files need 6
_LONG_NUMBER = re.compile(r"(?<![\d.])\d{19}")


def read_json(
    content: Path | bytes | str, source: str | Path | None = None, *, unique: bool = False
) -> Any:
    """Read JSON that another program wrote.

    UTF-8, UTF-16 and UTF-32 are read, with or without a byte order mark.

    Args:
        content: a file, or the text itself.
        source: name of the text in errors; a file needs none.
        unique: refuse an object that has a key twice; Python's reader keeps the last.

    Returns:
        The document. Its integers fit 64 bits, and at most 64 lists and objects are nested.

    Raises:
        DataError: the file cannot be read or holds no JSON; or it holds NaN, Infinity, larger
            integers or deeper lists, which Python's reader accepts and no label file needs.

    >>> read_json('{"cat.jpg": [1, 2]}', "labels.json")
    {'cat.jpg': [1, 2]}
    """
    if isinstance(content, Path):
        source = content if source is None else source
        content = read_bytes(content, most=MAX_JSON_BYTES)
    with bounded(source or "the text"):
        try:
            if isinstance(content, bytes):
                content = content.decode(json.detect_encoding(content))
            integer: Callable[[str], int] | None = None
            if _LONG_NUMBER.search(content):
                integer = _integer
            document = json.loads(
                content,
                parse_constant=_refuse,
                parse_int=integer,
                object_pairs_hook=_without_repeats if unique else None,
            )
            _check_nesting(document, _DEEPEST)
        except ValueError as error:
            raise DataError(f"{source} is not JSON ({error}); correct it or remove it") from error
    return document


def read_xml(path: Path) -> Element:
    """Read an XML file that another program wrote.

    Raises:
        DataError: the file cannot be read, is no XML, has a DOCTYPE (which may define entities and
            name other files), or nests more than 64 elements.
    """
    content = read_bytes(path, most=MAX_XML_BYTES)
    with bounded(path):
        try:
            return fromstring(content, XMLParser(target=_Builder()))
        except (ParseError, ValueError, LookupError) as error:
            raise DataError(f"{path} is not XML ({error}); correct it or remove it") from error


class _Builder(TreeBuilder):
    """Builds elements, and refuses what an attack needs."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def doctype(self, name: str, *_: str | None) -> NoReturn:
        raise ValueError(f"it has the DOCTYPE {name}, which may define entities")

    def start(self, tag: str, attrs: dict[str, str], /) -> Element:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"it nests more than {_DEEPEST} elements")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> Element:
        self._depth -= 1
        return super().end(tag)


def read_bytes(path: Path, *, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    Raises:
        DataError: the file is missing, cannot be read, is larger, or is a pipe or a device.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= most:
            return path.read_bytes()
    except OSError as error:
        hint = nearby(path) if isinstance(error, FileNotFoundError) else ""
        raise DataError(
            f"{path} cannot be read ({error.strerror}){hint or '; check it'}"
        ) from error
    if stat.S_ISREG(status.st_mode):
        raise DataError(
            f"{path} has {status.st_size} bytes, expected at most {most}; check that it is the "
            "right file"
        )
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
    raise DataError(f"{path} is {kind}; name a file")


@contextmanager
def bounded(source: str | Path) -> Iterator[None]:
    """Turn what hostile content does to a reader into a DataError.

    That is a claim of more memory than there is, a number out of every range, and nesting without
    end. Other errors pass, as each reader knows what they mean.
    """
    problem = f"{source} cannot be read"
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{problem}: it claims more memory than there is; check it") from error
    except OverflowError as error:
        raise DataError(f"{problem}: a number is out of range ({error}); check it") from error
    except RecursionError as error:
        raise DataError(f"{problem}: its content is nested too deeply; check it") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which JSON does not have; write null or a number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} comes twice")
    return document


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"it holds an integer of {len(digits)} digits")
    return int(digits)


def _check_nesting(document: object, most: int) -> None:
    layer = [document]
    for _ in range(most):
        layer = [child for parent in layer for child in _containers(parent)]
        if not layer:
            return
    raise ValueError(f"it nests more than {most} lists and objects")


def _containers(parent: object) -> list[object]:
    if isinstance(parent, dict):
        return [child for child in parent.values() if isinstance(child, list | dict)]
    return [c for c in parent if isinstance(c, list | dict)] if isinstance(parent, list) else []
