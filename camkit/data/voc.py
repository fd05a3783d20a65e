"""The folder layout of PASCAL VOC: photos, palette masks and lists of names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from camkit.data.names import check_split, closest, read_names, read_text
from camkit.data.sample import Sample, mask_classes
from camkit.errors import DataError

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 20 classes of PASCAL VOC in the order of their mask ids, which start at 1."""


@dataclass(frozen=True)
class VOCFolder:
    """A data set laid out like PASCAL VOC; `open_voc` finds its classes and splits.

    Photos are ``JPEGImages/*.jpg``, masks ``SegmentationClass/*.png``, and each file
    ``ImageSets/Segmentation/<split>.txt`` lists names, one a line. Labels come from
    ``labels.json``, ``{"classes": [...], "labels": {name: [class names]}}``, or where there is
    none from the masks.
    """

    root: Path
    classes: tuple[str, ...] = VOC_CLASSES
    splits: tuple[str, ...] = ("train", "val")

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of one split, in the order of its list.

        Without ``labels.json`` every mask of the split is read once.

        Raises:
            ValueError: there is no such split.
            DataError: a listed photo is absent, or its labels are unknown.
        """
        check_split(name, self.splits)
        labels = _read_labels(self.root)[1]
        listing = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
        return tuple(
            self._sample(stem, labels, f"{listing}, line {line}")
            for stem, line in read_names(listing).items()
        )

    def _sample(self, stem: str, labels: Mapping[str, list[str]] | None, source: str) -> Sample:
        photo = self.root / "JPEGImages" / f"{stem}.jpg"
        if not photo.is_file():
            raise DataError(f"{source}: {photo} does not exist; add the photo or remove the line")
        mask = self.root / "SegmentationClass" / f"{stem}.png"
        found = mask if mask.is_file() else None
        return Sample(stem, photo, found, self._classes_of(stem, found, labels, source))

    def _classes_of(
        self, stem: str, mask: Path | None, labels: Mapping[str, list[str]] | None, source: str
    ) -> tuple[int, ...]:
        if labels is None:
            if mask is None:
                raise DataError(
                    f"{source}: {stem} has neither a mask in SegmentationClass nor labels; "
                    "add the mask or a labels.json"
                )
            return mask_classes(mask, num_classes=len(self.classes))
        path = self.root / "labels.json"
        if stem not in labels:
            raise DataError(f"{path} has no labels for {stem} ({source}); add them, [] for none")
        for label in labels[stem]:
            if label not in self.classes:
                raise DataError(
                    f"{path}: {stem} is labelled {label!r}, which is not a class; "
                    f"{closest(label, self.classes)}"
                )
        return tuple(sorted({self.classes.index(label) for label in labels[stem]}))


def open_voc(root: str | Path) -> VOCFolder:
    """Find the classes and splits of a folder laid out like PASCAL VOC.

    Args:
        root: the folder that holds ``JPEGImages`` and ``ImageSets``.

    Returns:
        The data set, with the classes of ``labels.json`` or the 20 of VOC.

    Raises:
        DataError: the folder lists no split, or its ``labels.json`` is of another form.
    """
    root = Path(root)
    lists = root / "ImageSets" / "Segmentation"
    splits = tuple(sorted(path.stem for path in lists.glob("*.txt")))
    if not splits:
        raise DataError(f"{lists} holds no list of names; add one, such as train.txt")
    return VOCFolder(root, _read_labels(root)[0], splits)


def _read_labels(root: Path) -> tuple[tuple[str, ...], Mapping[str, list[str]] | None]:
    path = root / "labels.json"
    if not path.is_file():
        return VOC_CLASSES, None
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
    return tuple(classes), labels


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )
