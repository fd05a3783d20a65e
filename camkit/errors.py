"""Errors that a caller may catch; wrong arguments are plain ValueError and TypeError."""

import difflib
from collections.abc import Iterable


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
