"""Errors that a caller may catch; wrong arguments are plain ValueError and TypeError."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

_LONGEST = 1000  # characters of an error, which may name a long path and list what is allowed


class CamkitError(Exception):
    """Base of camkit's own errors: something it would have to guess."""


class UnsupportedModelError(CamkitError):
    """The model has no attention camkit can watch, or does not support the requested method."""


class CaptureError(CamkitError):
    """A capture does not hold what was requested."""


class DataError(CamkitError):
    """A file cannot be used; the message says which and why, in one line of some length."""

    def __str__(self) -> str:
        text = super().__str__()
        return (
            text if len(text) <= _LONGEST and text.isprintable() else one_line(text, most=_LONGEST)
        )


def require(package: str, purpose: str, extra: str) -> None:
    """Refuse work that needs an optional package which is not installed.

    Args:
        package: name of its module.
        purpose: what needs it, with a verb: the start of the sentence.
        extra: of camkit, that brings it.

    Raises:
        CamkitError: it cannot be imported.
    """
    try:
        import_module(package)
    except ImportError as error:
        raise CamkitError(
            f"{purpose} {package}; install it with `pip install 'camkit[{extra}]'`"
        ) from error


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


def one_line(error: object, *, most: int = 500) -> str:
    r"""Return an error as one printable line.

    A longer text loses its middle, since its start names the file and its end says what to do.

    >>> one_line("a.jpg\n is broken \x1b[2J")
    'a.jpg is broken \\x1b[2J'
    >>> one_line("x" * 1000, most=20)
    'xxxxxxxxxx ... xxxxx'
    >>> one_line("the quick brown fox jumps over the lazy dog", most=40)
    'the quick brown fox ... lazy dog'
    """
    text = str(error)
    if len(text) > 8 * most:  # an error may repeat megabytes of a file
        text = text[: 6 * most] + text[-2 * most :]
    words = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(line) <= most:
        return line
    start = (most - 5) * 2 // 3
    head, tail = line[:start], line[len(line) - (most - 5 - start) :]
    # cut between words, but not far from the middle where there is none
    word, rest = head.rpartition(" ")[0], tail.partition(" ")[2]
    head, tail = word if 2 * len(word) > start else head, rest if 2 * len(rest) > start else tail
    return f"{head} ... {tail}"
