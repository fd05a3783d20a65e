"""Masks in which a class is a colour: labelmap.txt of CVAT, and the palette of PASCAL VOC."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from camkit.data.reading import is_background
from camkit.data.text import read_text
from camkit.errors import DataError
from camkit.mask import voc_colour
from camkit.photo import decode
from camkit.tensors import IGNORE

_UNKNOWN = -2
_IGNORED = ("ignored", "__ignore__", "void")


@dataclass(frozen=True)
class ColourForm:
    """Masks in which a class is a colour of an RGB PNG, or of the palette of a PNG.

    Attributes:
        colours: the id of each colour, red + 256 * green + 65536 * blue: 0 for background, else
            class index + 1, -1 for ignore.
        source: where the colours are listed, for errors.
    """

    colours: Mapping[int, int]
    source: str

    def read(self, path: Path, *, num_classes: int) -> Int[np.ndarray, "H W"]:  # noqa: ARG002
        """Read a mask; see `MaskReader`."""
        image = decode(path)
        if image.format != "PNG" or image.mode not in ("RGB", "RGBA", "P"):
            raise DataError(
                f"{path} is a {image.format} of mode {image.mode}; expected the colours of "
                f"{self.source} in a PNG, as other formats change colours"
            )
        levels = np.array(image.convert("RGB")).astype(np.int32)
        values = levels @ np.array([1, 256, 65536], np.int32)
        ids = np.full(values.shape, _UNKNOWN, np.int64)
        for colour, id_ in self.colours.items():  # a comparison is far faster than sorting
            ids[values == colour] = id_
        unknown = np.unique(values[ids == _UNKNOWN]).tolist()
        if unknown:
            shown = ", ".join(str((v % 256, v // 256 % 256, v // 65536)) for v in unknown[:4])
            more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
            raise DataError(
                f"{path} holds the colours {shown}{more}, which {self.source} does not list; add "
                "them, or save the mask without smoothing"
            )
        return ids

    def digest(self, path: Path) -> str:
        """Identify the mask by its file and this form."""
        return hashlib.sha256(path.read_bytes() + repr(self).encode()).hexdigest()


def voc_colours(count: int) -> ColourForm:
    """Return the form of masks in the colours of PASCAL VOC; that of 255 is ignored."""
    ids = {number: number for number in range(count + 1)} | {IGNORE: -1}
    return ColourForm({_packed(voc_colour(n)): id_ for n, id_ in ids.items()}, "VOC's palette")


def is_ignored(name: str) -> bool:
    """Return whether a label of CVAT stands for pixels that are not scored."""
    return name.strip().casefold() in _IGNORED


def read_labelmap(path: Path) -> tuple[tuple[str, ...], ColourForm]:
    """Read CVAT's ``labelmap.txt``, lines of ``name:red,green,blue:parts:actions``.

    The label ``background`` is background, ``ignored`` is not scored.

    Returns:
        The names of the classes in the order of the file, and the form of masks.

    Raises:
        DataError: a line has another form, or two labels share a colour.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        levels = rest.partition(":")[0].split(",")
        if len(levels) != 3 or not all(map(_is_level, levels)):
            raise DataError(
                f"{path}, line {number}: expected name:red,green,blue:: with levels of 0 to 255, "
                f"got {line.strip()!r}"
            )
        rows.append((number, name, _packed(tuple(int(level) for level in levels))))
    return _coloured(path, rows, "cat:128,0,0::")


def read_class_dict(path: Path) -> tuple[tuple[str, ...], ColourForm]:
    """Read ``class_dict.csv`` as CamVid and others have it: rows of name, r, g, b under a header.

    A class called void or ignored is not scored, one called background is background.

    Returns:
        The names of the classes in the order of the file, and the form of masks.

    Raises:
        DataError: a row has another form, or two classes share a colour.
    """
    lines = [
        (number, [cell.strip() for cell in line.split(",")])
        for number, line in enumerate(read_text(path).splitlines(), start=1)
        if line.strip()
    ]
    if not lines or [cell.casefold() for cell in lines[0][1]] != ["name", "r", "g", "b"]:
        raise DataError(f"{path}: expected the header name,r,g,b; correct it or remove the file")
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != 4 or not cells[0] or not all(map(_is_level, cells[1:])):
            raise DataError(
                f"{path}, line {number}: expected a name and levels of 0 to 255, got "
                f"{','.join(cells)!r}"
            )
        rows.append((number, cells[0], _packed(tuple(map(int, cells[1:])))))
    return _coloured(path, rows, "cat,128,0,0")


def _coloured(
    path: Path, rows: Iterable[tuple[int, str, int]], example: str
) -> tuple[tuple[str, ...], ColourForm]:
    """Return classes and form of labels, given by their line, name and colour."""
    names: list[str] = []
    ids: dict[int, int] = {}
    for number, name, colour in rows:
        if colour in ids:
            raise DataError(f"{path}, line {number}: {name} has the colour of a label above it")
        if is_background(name) or is_ignored(name):
            ids[colour] = 0 if is_background(name) else -1
        else:
            names.append(name.strip())
            ids[colour] = len(names)
    if not names:
        raise DataError(f"{path} names no class; expected lines such as {example}")
    return tuple(names), ColourForm(ids, path.name)


def _packed(colour: tuple[int, ...]) -> int:
    return colour[0] + 256 * colour[1] + 65536 * colour[2]


def _is_level(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdecimal() and int(text) < 256
