"""Errors that a caller may catch; wrong arguments are plain ValueError and TypeError."""

import difflib
from collections.abc import Iterable


class CamkitError(Exception):
    """Anything camkit refuses to guess about."""


class UnsupportedModelError(CamkitError):
    """The model has no attention that can be watched, or no rule that fits what was asked."""


class CaptureError(CamkitError):
    """Something was asked of a capture that it did not see."""


class DataError(CamkitError):
    """A file cannot be used; the message names it."""


def closest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that was probably meant, or list them all."""
    known = list(known)
    folded = {candidate.casefold(): candidate for candidate in known}
    match = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean {folded[match[0]]!r}?" if match else f"known are {', '.join(known)}"
