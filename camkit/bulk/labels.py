"""Image-level labels of a data set, in the files that codebases keep them in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from camkit.data.labels import label_keys, label_vectors
from camkit.data.names import read_text
from camkit.errors import DataError


@dataclass(frozen=True)
class ImageLabels:
    """The classes of each image, from 0; `read_labels` reads them.

    Attributes:
        path: the file they come from.
        classes: by image name, as the file spells it.
    """

    path: Path
    classes: Mapping[str | int, tuple[int, ...]]

    def of(self, name: str) -> tuple[int, ...]:
        """The classes of one image.

        Raises:
            DataError: the file has no labels for it.
        """
        for key in label_keys(name):
            if key in self.classes:
                return self.classes[key]
        raise DataError(f"{self.path} has no labels for {name}; add them")


def read_labels(path: str | Path) -> ImageLabels:
    """Read image-level labels.

    Args:
        path: ``cls_labels.npy`` of PSA, IRN, MCTformer or ToCo, {name: a 0 or 1 for each class}, of
            which nothing is run; or JSON, {"classes": [names], "labels": {image: [names]}} as in
            `camkit.data.open_voc`, or {image: [class indices]}.

    Returns:
        The labels.

    Raises:
        DataError: the file cannot be read, or is of another form.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return ImageLabels(path, label_vectors(path))
    if path.suffix == ".json":
        return ImageLabels(path, _from_json(path))
    raise DataError(f"{path} must end in .npy (cls_labels.npy) or .json to be read as labels")


def _from_json(path: Path) -> dict[str | int, tuple[int, ...]]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); correct it") from error
    named = isinstance(content, dict) and set(content) == {"classes", "labels"}
    known = list(content["classes"]) if named else None
    table = content["labels"] if named else content
    if not isinstance(table, dict) or not all(isinstance(row, list) for row in table.values()):
        raise DataError(
            f'{path} must hold {{"classes": [names], "labels": {{image: [names]}}}} or '
            "{image: [class indices]}"
        )
    return {name: _indices(row, name, known, path) for name, row in table.items()}


def _indices(row: list[object], name: str, known: list[str] | None, path: Path) -> tuple[int, ...]:
    found = []
    for label in row:
        index = known.index(label) if known is not None and label in known else label
        if type(index) is not int or index < 0:
            wanted = "an index from 0" if known is None else f"one of {', '.join(known)}"
            raise DataError(f"{path}: {name} is labelled {label!r}, expected {wanted}")
        found.append(index)
    return tuple(sorted(set(found)))
