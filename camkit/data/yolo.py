"""The layout of YOLO's segmentation labels: data.yaml, images, and a text file of outlines each."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from camkit.data.drawn import by_area, check_inside, check_picture, check_ring, filled, painted
from camkit.data.files import holds, in_short, photos_in, picture_size, relative_to
from camkit.data.names import check_split, named
from camkit.data.sample import VOC_FORM, Sample, all_usable
from camkit.data.text import read_text
from camkit.errors import DataError
from camkit.formats import IMAGE_SUFFIXES
from camkit.printing import several

_FILES = ("data.yaml", "data.yml", "dataset.yaml")
_SPLITS = ("train", "val", "test", "valid")
_NO_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt")
_BOX = 4  # numbers of a line that is a box


@dataclass(frozen=True)
class YoloForm:
    """Masks drawn from the outlines of a label file.

    A pixel is covered if its centre is inside of an odd number of outlines of a line. Where objects
    overlap, the smaller one is on top, of equal ones the later one.

    Attributes:
        photo: whose size the shares refer to.
    """

    photo: Path

    def read(self, path: Path, *, num_classes: int) -> Int[np.ndarray, "H W"]:
        """Draw the mask of a file; see `MaskReader`."""
        size = check_picture(picture_size(self.photo), str(self.photo))
        layers = []
        for line, (index, numbers) in _lines(path, num_classes).items():
            ring = numbers.reshape(-1, 2) * (size[1], size[0])
            check_ring(ring, size, f"{path}, line {line}")
            check_inside([ring], size, f"{path}, line {line}")
            layers.append((index + 1, filled([ring], size)))
        return painted(by_area(layers), size)

    def digest(self, path: Path) -> str:
        """Identify the mask by its file and the size of the photo."""
        content = path.read_bytes() if path.is_file() else b""
        return hashlib.sha256(content + repr(picture_size(self.photo)).encode()).hexdigest()


@dataclass(frozen=True)
class YoloFolder:
    """A data set with labels of YOLO's segmentation; `open_yolo` finds its classes and splits.

    ``data.yaml`` names the classes and the folders of photos; labels are ``labels/.../<name>.txt``
    where photos are ``images/.../<name>.jpg``. A photo without a label file shows no class. If a
    line of a file is a box, the image has labels but no mask.
    """

    root: Path
    classes: tuple[str, ...]
    parts: tuple[tuple[str, Path], ...]
    file: str = "data.yaml"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, by name."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        for stem, photo, path in self._pairs(name):
            try:
                yield self._sample(stem, photo, path)
            except DataError as error:
                yield error

    def _sample(self, stem: str, photo: Path, path: Path) -> Sample:
        if not path.is_file():
            return Sample(stem, photo, None, ())
        lines = _lines(path, len(self.classes)).values()
        classes = tuple(sorted({index for index, _ in lines}))
        if any(numbers.size == _BOX for _, numbers in lines):
            return Sample(stem, photo, None, classes, VOC_FORM)
        return Sample(stem, photo, path, classes, YoloForm(photo))

    def _pairs(self, name: str) -> Iterator[tuple[str, Path, Path]]:
        """Yield name, photo and label file of each image."""
        top = dict(self.parts)[name]
        labels = _labels_of(top)
        for stem, photo in photos_in(top, deep=True).items():
            yield stem, photo, labels / photo.relative_to(top).with_suffix(".txt")

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        sentences = [
            f"{self.file}: YOLO, {several(len(self.classes), 'class')} ({in_short(self.classes)})"
        ]
        for name, top in self.parts:
            pairs = list(self._pairs(name))
            labels = relative_to(_labels_of(top), self.root)
            sentences.append(
                f"{relative_to(top, self.root)}: {several(len(pairs), 'photo')}; {labels}: "
                f"{_label_files(_labels_of(top), [path for _, _, path in pairs])}"
            )
        return tuple(sentences)


def _label_files(folder: Path, expected: Sequence[Path]) -> str:
    """Say what the label files of a folder hold, and how many belong to no photo."""
    held = [path for path in expected if path.is_file()]
    boxes = sum(map(_holds_boxes, held))
    sentences = []
    if len(held) > boxes or not held:
        count = several(len(held) - boxes, "file")
        sentences.append(f"{count} of outlines; of objects that overlap, the smaller is on top")
    if boxes:
        sentences.append(f"{several(boxes, 'file')} with boxes: labels only, no masks")
    stray = {path for path in folder.rglob("*.txt") if path.name not in _NO_LABELS} - {*held}
    if stray:
        count = several(len(stray), "file")
        sentences.append(f"{count} without a photo left out, such as {min(stray).name}")
    return "; ".join(sentences)


def _holds_boxes(path: Path) -> bool:
    return any(len(line.split()) == 1 + _BOX for line in read_text(path).splitlines())


def is_yolo(root: Path) -> bool:
    """Return whether a folder, or a file of it, is a data set of YOLO."""
    if root.is_file():
        return root.suffix in (".yaml", ".yml")
    return any((root / name).is_file() for name in _FILES)


def open_yolo(root: str | Path) -> YoloFolder:
    """Find the classes and splits of a data set of YOLO.

    Args:
        root: the folder with ``data.yaml``, or this file under any name.

    Raises:
        DataError: the file is no such file, or names no folder of photos that exists.
    """
    path = Path(root).absolute()
    if path.is_dir():
        path = next(path / name for name in (*_FILES, "") if not name or (path / name).is_file())
    root = path.parent
    content = _yaml(path)
    classes = _classes(path, content.get("names"))
    _check(path, content, len(classes))
    parts: dict[str, Path] = {}
    for name in _SPLITS:
        top = _folder(root, content, content.get(name), name)
        if top is None:
            continue
        if top in parts.values():  # a folder for train and val is what its own name says
            if name != top.name:
                continue
            parts = {other: place for other, place in parts.items() if place != top}
        parts[name] = top
    parts = parts or _usual_folders(root)
    if not parts:
        raise DataError(
            f"{path} names no folder of photos that is there; expected lines such as "
            "train: images/train"
        )
    return YoloFolder(root, classes, tuple(parts.items()), path.name)


def _folder(root: Path, content: Mapping[str, Any], named: Any, split: str) -> Path | None:
    """Return the folder of photos of a split: as the file names it, else by its usual names."""
    below = content.get("path")
    tops = [root] if not isinstance(below, str) else [root, root / below]
    places = [top / named for top in tops if isinstance(named, str)]
    if isinstance(named, str):  # Roboflow writes ../train/images for train/images
        places.append(root / named.removeprefix("../"))
        places += [root / "images" / split, root / split / "images"]
    for place in places:
        if place.is_dir() and holds(place, IMAGE_SUFFIXES):
            return Path(place).resolve() if ".." in place.parts else place
    return None


def _usual_folders(root: Path) -> dict[str, Path]:
    """Find folders of photos that have a folder of labels, for a file that names none."""
    tops = [*sorted(root.glob("images/*/")), *sorted(root.glob("*/images/"))]
    parts = {
        path.parent.name if path.name == "images" else path.name: path
        for path in tops
        if _labels_of(path).is_dir() and holds(path, IMAGE_SUFFIXES)
    }
    flat = root / "images"
    return parts or ({"all": flat} if (root / "labels").is_dir() and flat.is_dir() else {})


def _labels_of(top: Path) -> Path:
    """Return the folder of labels of a folder of photos: the last ``images`` becomes ``labels``."""
    parts = list(top.parts)
    for place in reversed(range(len(parts))):
        if parts[place] == "images":
            parts[place] = "labels"
            return Path(*parts)
    return top


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no YAML ({reason}); correct it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold names and the folders of photos; correct it")
    return content


def _classes(path: Path, names: Any) -> tuple[str, ...]:
    """Return the names of the classes, from a list or from names by number."""
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[number] for number in range(len(names))]
    scalars = isinstance(names, list) and all(isinstance(n, str | int | float) for n in names)
    if not names or not scalars:
        raise DataError(f"{path} names no classes from 0; expected names: [cat, dog]")
    listed = [named(str(name)) for name in names]
    return tuple(
        name if listed.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(listed)
    )


def _check(path: Path, content: Mapping[str, Any], count: int) -> None:
    """Raise DataError for labels of poses, and for another number of classes than names."""
    if "kpt_shape" in content:
        raise DataError(
            f"{path} has kpt_shape, so its labels are boxes and key points of poses, which are no "
            "outlines; name a data set of segmentation labels"
        )
    number = content.get("nc", count)
    if number != count:
        raise DataError(
            f"{path} says nc: {number}, but names {several(count, 'class')}; correct nc or names"
        )


def _lines(path: Path, count: int) -> dict[int, tuple[int, np.ndarray]]:
    """Return class index and numbers of each line, by its number."""
    lines = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            index, numbers = _whole(words[0]), np.array(words[1:], np.float64)
        except ValueError as error:
            raise DataError(f"{path}, line {number} holds other words than numbers") from error
        outline = numbers.size >= 6 and numbers.size % 2 == 0
        if not 0 <= index < count or not (outline or numbers.size == _BOX):
            raise DataError(
                f"{path}, line {number}: class {index} and {numbers.size} numbers; expected a "
                f"class from 0 to {count - 1}, then x y x y ... of at least three points"
            )
        lines[number] = (index, numbers)
    return lines


def _whole(word: str) -> int:
    """Read a class, which some tools write as 1.0; another word is a ValueError."""
    number = float(word)
    if not number.is_integer():
        raise ValueError(word)
    return int(number)
