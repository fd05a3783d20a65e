"""Lists of names, one a line: the splits and classes of a data set."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from camkit.errors import DataError


def read_text(path: Path) -> str:
    """Read a small UTF-8 file, with or without a byte order mark.

    Raises:
        DataError: the file is missing or is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected a UTF-8 text file") from error


def read_names(path: Path) -> dict[str, int]:
    """Read the names in a file, each with the line it stands on; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, is empty, or names something twice.
    """
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name = line.strip()
        if name in lines:
            raise DataError(
                f"{path}, line {number}: {name!r} stands on line {lines[name]} already; remove one"
            )
        if name:
            lines[name] = number
    if not lines:
        raise DataError(f"{path} is empty; expected one name a line")
    return lines


def closest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, or list them all."""
    known = list(known)
    folded = {one.casefold(): one for one in known}
    match = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean {folded[match[0]]!r}?" if match else f"known are {', '.join(known)}"


def check_split(name: str, splits: tuple[str, ...]) -> None:
    """Refuse a split that the data set does not have.

    Raises:
        ValueError: the name is not among the splits.
    """
    if name not in splits:
        raise ValueError(
            f"`name` must be a split of the data set, got {name!r}; {closest(name, splits)}"
        )
