"""Image-level labels in files of any usual form."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from camkit.data.arrays import read_arrays
from camkit.data.names import NameIndex, composed, numbered_lines
from camkit.data.records import Label, Records, json_records, table_records
from camkit.data.tables import read_table
from camkit.data.text import read_text
from camkit.errors import DataError, closest
from camkit.printing import short_repr
from camkit.untrusted import read_json

VECTOR_FILES = ("cls_labels.npy", "cls_labels_onehot.npy")
"""File names that other codebases give to their label vectors."""

LABEL_FILES = (
    "labels.json",
    "labels.csv",
    "labels.tsv",
    "labels.jsonl",
    "metadata.csv",
    "metadata.jsonl",
    *VECTOR_FILES,
)
"""Names of label files that are looked for in the folder of a data set, in this order."""

_LINES = (".jsonl", ".ndjson")
_KINDS = {
    b"PK\x03\x04": "an Excel or zip file; save it as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel file; save it as CSV",
    b"\x80": "a pickle, which would run code; save it as JSON or CSV",
    b"PAR1": "a Parquet file; save it as CSV",
}


@dataclass(frozen=True, eq=False)
class ImageLabels:
    """The classes of each image; see `read_labels`.

    Attributes:
        path: of the label file.
        labels: class indices from 0, by image as the file spells it.
        classes: names of the classes that the indices count, if they are known.
        form: what the file was taken for.
        lines: where images stand in a text file, for errors.
        splits: the split of each image, if the file says it.
        listed: whether the file lists the classes in their order.
    """

    path: Path
    labels: Mapping[str | int, tuple[int, ...]]
    classes: tuple[str, ...] | None = None
    form: str = ""
    lines: Mapping[str | int, int] = field(default_factory=dict)
    splits: Mapping[str | int, str] = field(default_factory=dict)
    listed: bool = False

    __repr__ = short_repr

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(self.labels)

    def entry(self, name: str) -> str | int | None:
        """Return the entry of an image, as the file spells it, or None; see `NameIndex`.

        Raises:
            DataError: several entries fit the name, and their labels differ.
        """
        if name in self.labels:
            return name
        entries = self._index.find(name)
        if len({self.labels[entry] for entry in entries}) > 1:
            raise DataError(
                f"{self.path} has {len(entries)} entries that fit {name} ({entries[0]}, "
                f"{entries[1]}), with other labels; write paths that tell them apart"
            )
        return entries[0] if entries else None

    def place(self, entry: str | int) -> str:
        """Return the file, and the line of an entry if there is one, for errors."""
        line = self.lines.get(entry)
        return str(self.path) if line is None else f"{self.path}, line {line}"

    def of(self, name: str, source: str | None = None) -> tuple[int, ...]:
        """Return the class indices of an image, ascending.

        Args:
            name: of the image, with or without folders and suffix.
            source: where the image is listed, for errors.

        Raises:
            DataError: the file has no labels of the image, or several that differ.
        """
        entry = self.entry(name)
        if entry is None:
            where = "" if source is None else f" ({source})"
            raise DataError(f"{self.path} has no labels for {name}{where}; add them, [] for none")
        return self.labels[entry]

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the index out: another process makes it again."""
        values = (self.path, self.labels, self.classes, self.form, self.lines, self.splits)
        return ImageLabels, (*values, self.listed)


def read_labels(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    default: Sequence[str] | None = None,
) -> ImageLabels:
    """Read image-level labels; what a file is, is found by looking into it.

    Args:
        path: one of

            - a table (CSV, TSV, text): any separator, with or without a header, with a column of
              labels or a 0 or 1 for each class (see `read_table` and `table_records`),
            - JSON or JSON lines in one of the forms of `json_records`, also COCO's instances,
            - ``cls_labels.npy`` of PSA, IRN, MCTformer or ToCo, {name: 0 or 1 for each class}, read
              without running code.
        classes: the classes that the indices of the result count; names in the file that are not
            among them are errors. None takes the list in the file, else its names, sorted.
        default: classes to take if the file lists none, and every name in it is among them.

    Returns:
        Indices from 0 into ``classes``, by image.

    Raises:
        DataError: the file cannot be read, or has another form; the message names the line.
    """
    path = Path(path)
    known = None if classes is None else tuple(composed(name) for name in classes)
    preset = None if default is None else tuple(composed(name) for name in default)
    records = _records(path, known if known is not None else preset)
    names, strict = records.classes, known is not None
    if known is not None:
        names = known
    elif names is None:
        names = _implied(records, preset)
    labels = {
        image: _indices(records, image, row, names, strict=strict)
        for image, row in records.labels.items()
    }
    found = (records.form, records.lines, records.splits, records.classes is not None)
    return ImageLabels(path, labels, names, *found)


def find_labels(root: Path, default: Sequence[str]) -> ImageLabels | None:
    """Read the first of `LABEL_FILES` that a folder has, as `read_labels` does."""
    path = label_file(root)
    return None if path is None else read_labels(path, default=default)


def label_file(root: Path) -> Path | None:
    """Return the path of the first of `LABEL_FILES` that a folder has."""
    return next((root / name for name in LABEL_FILES if (root / name).is_file()), None)


def shortened(names: Sequence[str]) -> str:
    """List names, the first five of many."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _records(path: Path, known: Sequence[str] | None) -> Records:
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        head = b""  # read_text reports it
    if head.startswith(b"\x93NUMPY"):
        form = "label vectors (npy)"
        vectors = label_vectors(path, length=None if known is None else len(known))
        return Records(path, form, dict(vectors))
    kind = next((text for mark, text in _KINDS.items() if head.startswith(mark)), None)
    if kind is not None:
        raise DataError(f"{path} is {kind}")
    text = read_text(path)
    if text.lstrip().startswith(("{", "[")):
        return _json_file(path, text, known)
    return table_records(read_table(path), known=known)


def _json_file(path: Path, text: str, known: Sequence[str] | None) -> Records:
    lines = [line for line in text.splitlines() if line.strip()]
    objects = lines[0].rstrip().endswith("}") and all(line.lstrip()[0] == "{" for line in lines[:2])
    if not (objects and (len(lines) > 1 or path.suffix.lower() in _LINES)):
        return json_records(read_json(text, path, unique=True), path, known=known)
    values = [read_json(line, f"{path}, line {number}") for line, number in numbered_lines(path)]
    return json_records(values, path, form="JSON lines", known=known)


def _implied(records: Records, preset: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the classes of a file that lists none: the preset, if it holds all names, else these.

    Indices without names count the preset, if there is one.
    """
    names = {label for row in records.labels.values() for label in row if isinstance(label, str)}
    if preset is not None and names <= {*preset}:
        return preset
    return tuple(sorted(names, key=_natural)) if names else None


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort "class 10" behind "class 9"."""
    parts = re.findall(r"\d+|\D+", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _indices(
    records: Records,
    image: str | int,
    row: Sequence[Label],
    names: tuple[str, ...] | None,
    *,
    strict: bool,
) -> tuple[int, ...]:
    """Turn the labels of an image into indices; ``strict`` counts given classes, not the file's."""
    indices = set()
    own = records.classes if strict and records.classes is not None else None
    for label in row if own is None else [_named(records, image, label, own) for label in row]:
        if isinstance(label, int):
            if names is not None and label >= len(names):
                raise DataError(
                    f"{records.place(image)}: {image} is labelled {label}, expected an index from "
                    f"0 to {len(names) - 1}; indices count from 0, without the background"
                )
            indices.add(label)
        elif names is not None and label in names:
            indices.add(names.index(label))
        else:
            raise DataError(
                f"{records.place(image)}: {image} is labelled {label!r}, which is not a class; "
                f"{closest(label, names or ())}"
            )
    return tuple(sorted(indices))


def _named(records: Records, image: str | int, label: Label, classes: Sequence[str]) -> str:
    """Return the name of a label in the file's own list of classes."""
    if isinstance(label, str):
        return label
    if label >= len(classes):
        raise DataError(
            f"{records.place(image)}: {image} is labelled {label}, expected an index from 0 to "
            f"{len(classes) - 1}"
        )
    return classes[label]


def label_vectors(path: Path, *, length: int | None = None) -> dict[str | int, tuple[int, ...]]:
    """Read a dict of 0/1 vectors by image from a ``.npy`` file, as PSA, IRN and ToCo keep them.

    Args:
        path: the file; nothing in it is run.
        length: the number of classes, if it is known.

    Returns:
        The classes of each image, from 0, by one of the keys that `label_keys` lists.

    Raises:
        DataError: the file holds something else, or vectors of another length.
    """
    content = read_arrays(path)
    if not isinstance(content, dict) or not content:
        raise DataError(
            f"{path} holds no dict of label vectors, {{image name: a 0 or 1 for each class}}; "
            "write it again or remove it"
        )
    vectors: dict[str | int, tuple[int, ...]] = {}
    for key, value in content.items():
        vector = np.asarray(value)
        fits = vector.ndim == 1 and length in (None, len(vector))
        if not isinstance(key, str | int) or not fits:
            expected = "class" if length is None else f"of the {length} classes"
            raise DataError(
                f"{path}: the labels of {key!r} have shape {vector.shape}; expected one 0 or 1 for "
                f"each {expected}, without the background"
            )
        if not np.isin(vector, (0, 1)).all():
            raise DataError(f"{path}: the labels of {key!r} are not all 0 or 1; write it again")
        vectors[key] = tuple(np.flatnonzero(vector).tolist())
    return vectors
