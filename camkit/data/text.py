"""Text files of any usual encoding."""

import codecs
from pathlib import Path

from camkit.errors import DataError, nearby

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Read a small text file; see `decoded`."""
    return decoded(path)[0]


def decoded(path: Path) -> tuple[str, str]:
    """Read a small text file, and return its text and its encoding.

    UTF-8, UTF-16 and UTF-32 are recognised, with or without a byte order mark (UTF-32 needs it).
    Other encodings are refused, not guessed: a guess from a short file is often wrong, and a wrong
    letter makes another name.

    Raises:
        DataError: the file cannot be read, or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = nearby(path) if isinstance(error, FileNotFoundError) else ""
        hint = hint or "; expected a UTF-8 text file"
        raise DataError(f"{path} cannot be read ({error.strerror}){hint}") from error
    encoding = _encoding(data)
    try:
        return data.decode(encoding), encoding.removesuffix("-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line} cannot be read ({encoding.upper()} has no byte "
            f"0x{data[error.start]:02x} there); expected a UTF-8 text file: save it as UTF-8 "
            "(in Excel: CSV UTF-8)"
        ) from error


def _encoding(data: bytes) -> str:
    """Return the encoding that the first bytes show, or UTF-8."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    head = data[:4096]
    if len(data) % 2 == 0 and len(head) > 1:
        # letters, digits and commas have a zero byte in UTF-16
        even, odd = (head[start::2].count(0) / (len(head) / 2) for start in (0, 1))
        if max(even, odd) > 0.4 and min(even, odd) < 0.1:
            return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"
