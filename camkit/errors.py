"""Errors that a caller may catch; wrong arguments are plain ValueError and TypeError."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class CamkitError(Exception):
    """Base of camkit's own errors: something it would have to guess."""


class UnsupportedModelError(CamkitError):
    """The model has no attention camkit can watch, or does not support the requested method."""


class CaptureError(CamkitError):
    """A capture does not hold what was requested."""


class DataError(CamkitError):
    """A file cannot be used; the message says which and why."""


def closest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that was probably meant, or list them all."""
    known = list(known)
    folded = {candidate.casefold(): candidate for candidate in known}
    match = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean {folded[match[0]]!r}?" if match else f"known are {', '.join(known)}"


def nearby(path: Path) -> str:
    """Suggest the file or folder that was probably meant, as the end of an error; or nothing."""
    if path.exists():
        return ""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        parent = path.parent
        return "" if parent.exists() or parent == path else f"; {parent} does not exist either"
    match = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(match[0])}?" if match else ""
