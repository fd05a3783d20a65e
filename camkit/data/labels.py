"""Image-level labels and lists of names in files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camkit.data.arrays import read_arrays
from camkit.errors import DataError, closest, nearby

VECTOR_FILES = ("cls_labels.npy", "cls_labels_onehot.npy")
"""File names that other codebases give to their label vectors."""


def read_text(path: Path) -> str:
    """Read a small UTF-8 file, with or without a byte order mark, or raise DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        hint = nearby(path) if isinstance(error, FileNotFoundError) else ""
        hint = hint or "; expected a UTF-8 text file"
        raise DataError(f"{path} cannot be read ({error.strerror}){hint}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read ({error}); expected a UTF-8 text file") from error


def read_names(path: Path) -> dict[str, int]:
    """Map each name in a file to its line number; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, is empty, or repeats a name.
    """
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name = line.strip()
        if name in lines:
            raise DataError(
                f"{path}, line {number}: {name!r} is already on line {lines[name]}; remove one"
            )
        if name:
            lines[name] = number
    if not lines:
        raise DataError(f"{path} is empty; expected one name per line")
    return lines


def check_split(name: str, splits: tuple[str, ...]) -> None:
    """Raise ValueError if the data set has no split of this name."""
    if name not in splits:
        raise ValueError(
            f"`name` must be a split of the data set, got {name!r}; {closest(name, splits)}"
        )


@dataclass(frozen=True)
class LabelFile:
    """Labels by image.

    Attributes:
        path: the file of the labels.
        classes: the classes that the labels refer to.
        labels: class names or class indices by image name or image number (see `label_keys`).
    """

    path: Path
    classes: tuple[str, ...]
    labels: Mapping[Any, Sequence[str | int]]

    def classes_of(self, name: str, source: str) -> tuple[int, ...]:
        """Return the class indices of an image, ascending.

        ``source``, in errors, is the line that lists the image.

        Raises:
            DataError: the file has no labels for the image, or one that is not a class.
        """
        key = next((key for key in label_keys(name) if key in self.labels), None)
        if key is None:
            raise DataError(
                f"{self.path} has no labels for {name} ({source}); add them, [] for none"
            )
        indices = set()
        for label in self.labels[key]:
            if isinstance(label, str) and label not in self.classes:
                raise DataError(
                    f"{self.path}: {name} is labelled {label!r}, which is not a class; "
                    f"{closest(label, self.classes)}"
                )
            indices.add(self.classes.index(label) if isinstance(label, str) else label)
        return tuple(sorted(indices))


def find_labels(root: Path, classes: tuple[str, ...]) -> LabelFile | None:
    """Read ``labels.json`` if the folder has it, else the first of `VECTOR_FILES`.

    ``labels.json`` holds ``{"classes": [names], "labels": {image: [names]}}``. The argument
    ``classes`` names those of the vectors.

    Raises:
        DataError: the file has another form.
    """
    path = root / "labels.json"
    if not path.is_file():
        return find_label_vectors(root, classes)
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); correct it or remove it") from error
    form: Any = content if isinstance(content, dict) else {}
    names, labels = form.get("classes"), form.get("labels")
    named = isinstance(labels, dict) and all(map(_are_names, (names, *labels.values())))
    if not names or not named:
        raise DataError(
            f'{path} must hold {{"classes": [names], "labels": {{image: [names]}}}}; '
            "correct it, or remove it to take the labels from the masks"
        )
    return LabelFile(path, tuple(names), labels)


def find_label_vectors(root: Path, classes: tuple[str, ...]) -> LabelFile | None:
    """Read the first of `VECTOR_FILES` that the folder has; errors are those of `label_vectors`."""
    path = next((root / name for name in VECTOR_FILES if (root / name).is_file()), None)
    if path is None:
        return None
    return LabelFile(path, classes, label_vectors(path, length=len(classes)))


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


def label_keys(name: str) -> list[str | int]:
    """List the keys an image may have in a label file: its name, or the number IRN makes of it.

    >>> label_keys("2007_000032")
    ['2007_000032', 2007000032, '2007000032']
    """
    number = name.rpartition("_")[2] if name.startswith("COCO_") else name.replace("_", "")
    return [name, int(number), number] if number.isascii() and number.isdigit() else [name]


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )
