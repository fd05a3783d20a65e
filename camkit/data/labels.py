"""Image-level labels and lists of names in files."""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from camkit.data.camfiles import read_arrays
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


VECTOR_FILES = ("cls_labels.npy", "cls_labels_onehot.npy")
"""What the codebases of the field call a file of label vectors."""


@dataclass(frozen=True)
class LabelFile:
    """Labels by image.

    Attributes:
        path: where they come from.
        classes: the classes they speak of.
        names: class names by image, or None where there are vectors.
        vectors: class indices by image or image number, or None where there are names.
    """

    path: Path
    classes: tuple[str, ...]
    names: Mapping[str, list[str]] | None = None
    vectors: Mapping[str | int, tuple[int, ...]] | None = None

    def classes_of(self, name: str, source: str) -> tuple[int, ...]:
        """Give the class indices of an image, ascending.

        Args:
            name: of the image.
            source: the line that lists the image, for messages.

        Raises:
            DataError: the file has no labels for the image, or one that is no class.
        """
        labels = self.names if self.vectors is None else self.vectors
        key = next((key for key in label_keys(name) if labels is not None and key in labels), None)
        if key is None:
            raise DataError(
                f"{self.path} has no labels for {name} ({source}); add them, [] for none"
            )
        if self.vectors is not None:
            return self.vectors[key]
        found = [] if self.names is None else self.names[str(key)]
        for label in found:
            if label not in self.classes:
                raise DataError(
                    f"{self.path}: {name} is labelled {label!r}, which is not a class; "
                    f"{closest(label, self.classes)}"
                )
        return tuple(sorted({self.classes.index(label) for label in found}))


def find_labels(root: Path, classes: tuple[str, ...]) -> LabelFile | None:
    """Look for ``labels.json``, then for the first of `VECTOR_FILES`.

    Args:
        root: the folder of the data set.
        classes: what the vectors speak of; ``labels.json`` names its own.

    Raises:
        DataError: the file is of another form.
    """
    if (root / "labels.json").is_file():
        return read_label_names(root / "labels.json")
    found = [root / name for name in VECTOR_FILES if (root / name).is_file()]
    return read_label_vectors(found[0], classes) if found else None


def read_label_names(path: Path) -> LabelFile:
    """Read ``{"classes": [names], "labels": {image: [names]}}``.

    Raises:
        DataError: the file is of another form.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); correct it or remove it") from error
    classes = content.get("classes") if isinstance(content, dict) else None
    labels = content.get("labels") if isinstance(content, dict) else None
    if (
        not _are_names(classes)
        or not isinstance(labels, dict)
        or not all(map(_are_names, labels.values()))
        or not classes
    ):
        raise DataError(
            f'{path} must hold {{"classes": [names], "labels": {{image: [names]}}}}; '
            "correct it, or remove it to take the labels from the masks"
        )
    return LabelFile(path, tuple(classes), names=labels)


def read_label_vectors(path: Path, classes: tuple[str, ...]) -> LabelFile:
    """Read a file of label vectors whose classes are known (`label_vectors`).

    Raises:
        DataError: the file holds something else, or vectors of another length.
    """
    return LabelFile(path, classes, vectors=label_vectors(path, length=len(classes)))


def label_vectors(path: Path, *, length: int | None = None) -> dict[str | int, tuple[int, ...]]:
    """Read a dict of 0/1 vectors by image, as PSA, IRN, MCTformer and ToCo keep them.

    No code that the file asks for is run.

    Args:
        path: a ``.npy`` file with one dict.
        length: how many classes there are, where that is known.

    Returns:
        The classes of each image, from 0; `label_keys` tells what an image may be called.

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
            wanted = "class" if length is None else f"of the {length} classes"
            raise DataError(
                f"{path}: the labels of {key!r} have shape {vector.shape}; expected one 0 or 1 for "
                f"each {wanted}, without the background"
            )
        if not np.isin(vector, (0, 1)).all():
            raise DataError(f"{path}: the labels of {key!r} are not all 0 or 1; write it again")
        vectors[key] = tuple(np.flatnonzero(vector).tolist())
    return vectors


def label_keys(name: str) -> list[str | int]:
    """What an image may be called in a label file: its name, or IRN's number in it.

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
