"""Names of images and classes in files, however a tool spells them."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from camkit.data.text import read_text
from camkit.errors import DataError, closest
from camkit.formats import IMAGE_SUFFIXES
from camkit.untrusted import read_json

_SUFFIXES = [suffix[1:] for suffix in IMAGE_SUFFIXES]
_WITH_SUFFIX = re.compile(
    rf"(?P<name>.*?\.(?:{'|'.join(_SUFFIXES)}))(?:[\s,;]+(?P<rest>.*))?$", re.IGNORECASE
)
_PRESENCE = re.compile(r"\s+-?1$")
_BARE_WITH_NUMBERS = re.compile(r"(?P<name>\S+?)[\s,;]+(?P<rest>-?\d+(?:[\s,]+-?\d+)*)$", re.ASCII)


def composed(text: str) -> str:
    """Return a text in Unicode's composed form (NFC), in which equal texts have equal letters.

    macOS writes the name of a file decomposed: "e" and an accent in place of "é".
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def named(text: str) -> str:
    """Return the name of a class without spaces around it, in Unicode's composed form."""
    return composed(text.strip())


def on_disk(path: Path) -> Path:
    """Return the path of a file whose name may be stored in another Unicode form."""
    text = str(path)
    if text.isascii() or path.exists():
        return path
    others = (Path(unicodedata.normalize(form, text)) for form in ("NFC", "NFD"))
    return next((other for other in others if other.exists()), path)


def image_name(text: str) -> str:
    r"""Return the path of an image without the suffix of its format, with slashes, in NFC.

    >>> image_name(r".\photos\v1.5.JPG"), image_name("2007_000032")
    ('photos/v1.5', '2007_000032')
    """
    name = composed(text.strip()).replace("\\", "/").removeprefix("file://")
    while name.startswith("./"):
        name = name[2:]
    stem, dot, suffix = name.rpartition(".")
    if dot and stem and not stem.endswith("/") and suffix.lower() in _SUFFIXES:
        return stem
    return name


def has_image_suffix(text: str) -> bool:
    """Return whether a text ends as the name of an image file does."""
    return text.strip().rpartition(".")[2].lower() in _SUFFIXES and "." in text.strip()[1:]


def label_keys(name: str) -> list[str | int]:
    """List the keys an image may have in a label file: its name, or the number IRN makes of it.

    >>> label_keys("2007_000032")
    ['2007_000032', 2007000032, '2007000032']
    """
    number = name.rpartition("_")[2] if name.startswith("COCO_") else name.replace("_", "")
    return [name, int(number), number] if number.isascii() and number.isdigit() else [name]


class NameIndex:
    """Finds the entries of a file that mean an image.

    An entry and a name mean the same image if their paths, without the suffix of an image, end
    alike: one of them may have more folders in front. Names that consist of digits may be numbers,
    as in IRN's label files (see `label_keys`).

    Args:
        entries: as the file spells them.
    """

    def __init__(self, entries: Iterable[str | int]) -> None:
        self._by_last: dict[str | int, list[str | int]] = {}
        for entry in entries:
            last = entry if isinstance(entry, int) else image_name(entry).rpartition("/")[2]
            self._by_last.setdefault(last, []).append(entry)

    def find(self, name: str) -> list[str | int]:
        """Return the entries that agree with a name in the most folders; several if they tie."""
        wanted = image_name(name)
        folders, _, last = wanted.rpartition("/")
        for key in label_keys(last):
            agreeing = [
                (shared, entry)
                for entry in self._by_last.get(key, ())
                if (shared := _shared_folders(entry, folders)) is not None
            ]
            if agreeing:
                most = max(shared for shared, _ in agreeing)
                return [entry for shared, entry in agreeing if shared == most]
        return []


def _shared_folders(entry: str | int, folders: str) -> int | None:
    """Count the folders that an entry shares with a name; None if they contradict it."""
    if isinstance(entry, int):
        return 0
    own = image_name(entry).rpartition("/")[0].strip("/").split("/")
    other = folders.strip("/").split("/")
    pairs = list(zip(reversed(_parts(own)), reversed(_parts(other)), strict=False))
    return len(pairs) if all(one == two for one, two in pairs) else None


def _parts(folders: Sequence[str]) -> list[str]:
    return [folder for folder in folders if folder]


def read_names(path: Path) -> dict[str, int]:
    """Map each name in a file to its line number; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, is empty, or repeats a name.
    """
    return unrepeated(path, numbered_lines(path))


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes in the order of their indices.

    The file holds one name per line, or JSON: a list of names, ``{"0": "cat", ...}`` as in
    ``id2label.json`` of transformers, ``{"cat": 0, ...}``, or one of these under ``classes``,
    ``names`` or ``id2label``.

    Raises:
        DataError: the file cannot be read, is empty, or repeats a name.
    """
    text = read_text(path)
    if not text.lstrip().startswith(("{", "[")):
        return tuple(read_names(path))
    content = read_json(text, path)
    for key in ("classes", "names", "id2label"):
        if isinstance(content, dict) and isinstance(content.get(key), list | dict):
            content = content[key]
    try:
        return class_list(content)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} lists no classes ({error}); write one name per line") from error


def class_list(names: Any) -> tuple[str, ...]:
    """Read classes in order, from a list, or from a dict of indices or of names.

    Raises:
        ValueError: the indices have gaps, or a name comes twice.
    """
    if isinstance(names, dict):
        by_index = all(isinstance(name, str) for name in names.values())
        pairs = (
            [(int(index), name) for index, name in names.items()]
            if by_index
            else [(int(index), name) for name, index in names.items()]
        )
        if sorted(index for index, _ in pairs) != list(range(len(pairs))):
            raise ValueError("the indices of the classes must be 0, 1, ... without gaps")
        names = [name for _, name in sorted(pairs)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("the classes must be a list of names")
    classes = tuple(composed(name.strip()) for name in names)
    if not classes or len({*classes}) < len(classes):
        raise ValueError("the classes must be names, at least one and none twice")
    return classes


def read_image_names(path: Path, *, folders: bool = False) -> dict[str, int]:
    """Map each image on a list to its line number.

    A line is read as `split_line` does, and may hold the 1 or -1 of a class (VOC's
    ``ImageSets/Main``). Of a path, the name of the file without its suffix is kept, and with
    ``folders`` the folders before it.

    Raises:
        DataError: the file cannot be read, is empty, or names an image twice.
    """
    lines = (
        (image_name(split_line(_PRESENCE.sub("", line))[0]), number)
        for line, number in numbered_lines(path)
    )
    names = ((name if folders else name.rpartition("/")[2], number) for name, number in lines)
    return unrepeated(path, names)


def numbered_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the lines of a file that are not blank, stripped and in NFC, with their numbers."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            yield composed(line.strip()), number


def unrepeated(path: Path, names: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Map names to line numbers; a repeated name, or none at all, is a DataError."""
    lines: dict[str, int] = {}
    for name, number in names:
        if name in lines:
            raise DataError(
                f"{path}, line {number}: {name!r} is already on line {lines[name]}; remove one"
            )
        lines[name] = number
    if not lines:
        raise DataError(f"{path} is empty; expected one name per line")
    return lines


def split_line(line: str) -> tuple[str, tuple[int, ...] | None]:
    r"""Split a line of an image list into the image and its class indices, or None.

    A name or path may be followed by class indices, or by the path of its mask. Names may contain
    spaces.

    Raises:
        DataError: a negative number follows, as in VOC's ``ImageSets/Main``.

    >>> split_line("a.jpg a.png"), split_line("my cat"), split_line("coco_9 14 3")
    (('a.jpg', None), ('my cat', None), ('coco_9', (3, 14)))
    >>> split_line("my cat.jpg, 7")
    ('my cat.jpg', (7,))
    """
    match = _WITH_SUFFIX.match(line) or _BARE_WITH_NUMBERS.match(line)
    if match is None:
        return line, None
    name, rest = match["name"], (match["rest"] or "").replace(",", " ").split()
    if any(number.startswith("-") and number[1:].isdecimal() for number in rest):
        raise DataError(
            f"{name!r} is followed by {' '.join(rest)}, as in the lists of ImageSets/Main; "
            "expected class indices from 0, or a list of ImageSets/Segmentation"
        )
    if all(number.isascii() and number.isdecimal() for number in rest):
        return name, tuple(sorted({int(number) for number in rest})) if rest else None
    return (name if has_image_suffix(" ".join(rest)) else line), None


def check_split(name: str, splits: tuple[str, ...]) -> None:
    """Raise ValueError if the data set has no split of this name."""
    if name not in splits:
        raise ValueError(
            f"`name` must be a split of the data set, got {name!r}; {closest(name, splits)}"
        )
