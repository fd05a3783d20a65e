"""Folders of LabelMe: a JSON file of shapes for each photo."""

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image, ImageDraw

from camkit.data.drawn import IGNORED_ID, check_inside, check_picture, check_ring, painted
from camkit.data.files import PhotoFinder, files_in, folders_in, in_short, photos_in, relative_to
from camkit.data.names import check_split, composed, named, read_names
from camkit.data.reading import Reading
from camkit.data.sample import Sample, all_usable
from camkit.errors import DataError, closest
from camkit.formats import IMAGE_SUFFIXES
from camkit.photo import opened_bytes
from camkit.printing import several
from camkit.untrusted import read_json

_ALL = "all"
_IGNORED, _BACKGROUND = "__ignore__", "_background_"
_LOOKED_AT, _LARGEST = 5, 2**26  # files, and their bytes, to recognise the layout


@dataclass(frozen=True)
class LabelMeForm:
    """Masks drawn from the shapes of a LabelMe file, as LabelMe's own export draws them.

    Shapes are drawn in their order, so later ones are on top. Polygons, rectangles and circles
    cover their outline too, which is half a pixel more than their area on each side.

    Attributes:
        classes: names of the classes.
    """

    classes: tuple[str, ...]

    def read(self, path: Path, *, num_classes: int) -> Int[np.ndarray, "H W"]:  # noqa: ARG002
        """Draw the mask of a file; see `MaskReader`."""
        content = read_labelme(path)
        sides = (content.get("imageHeight"), content.get("imageWidth"))
        size = check_picture(sides, str(path))
        layers = []
        for number, shape in enumerate(content["shapes"], start=1):
            source = f"{path}, shape {number}"
            value = self.value_of(shape["label"], source)
            layers.append((value, shape_pixels(shape, size, source)))
        return painted(layers, size)

    def value_of(self, label: str, source: str) -> int:
        """Return the id of a label; ``source`` is named if it is no class."""
        label = named(label)
        if label in (_IGNORED, _BACKGROUND):
            return IGNORED_ID if label == _IGNORED else 0
        if label not in self.classes:
            raise DataError(f"{source}: {label!r} is not a class; {closest(label, self.classes)}")
        return self.classes.index(label) + 1

    def digest(self, path: Path) -> str:
        """Identify the mask by its file and the classes."""
        return hashlib.sha256(path.read_bytes() + repr(self).encode()).hexdigest()


@dataclass(frozen=True)
class LabelMeFolder:
    """A data set of LabelMe files; `open_labelme` finds its classes and splits.

    Files ``<name>.json`` are beside their photos or name them by ``imagePath``; folders with such
    files are splits. Classes are those of ``labels.txt`` without ``__ignore__`` (not scored) and
    ``_background_``, else the labels in the files, sorted. A photo without a file is left out.
    """

    root: Path
    classes: tuple[str, ...]
    splits: tuple[str, ...]

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, by name."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        folder = _place(self.root, name)
        near = (folder, self.root / "images", self.root / "JPEGImages", self.root)
        finder, form = (
            PhotoFinder(place for place in near if place.is_dir()),
            LabelMeForm(self.classes),
        )
        for path in _labelled(folder):
            try:
                content = read_labelme(path)
                classes = {
                    form.value_of(shape["label"], f"{path}, shape {number}") - 1
                    for number, shape in enumerate(content["shapes"], start=1)
                }
                photo = _photo(path, content, finder)
                shown = tuple(sorted(index for index in classes if index >= 0))
                yield Sample(path.stem, photo, path, shown, form)
            except DataError as error:
                yield error

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        source = "labels.txt" if (self.root / "labels.txt").is_file() else "the labels in the files"
        sentences = [f"{source}: {several(len(self.classes), 'class')} ({in_short(self.classes)})"]
        for name in self.splits:
            folder = _place(self.root, name)
            files = _labelled(folder)
            alone = photos_in(folder).keys() - {composed(path.stem) for path in files}
            more = f"; {several(len(alone), 'photo')} without a file left out" if alone else ""
            place = relative_to(folder, self.root)
            sentences.append(
                f"{place}: {several(len(files), 'file')} of LabelMe, drawn as LabelMe draws them; "
                f"later shapes are on top{more}"
            )
        return tuple(sentences)


def labelme_splits(root: Path) -> tuple[str, ...]:
    """List the splits of a folder of LabelMe files; none if it has another layout."""
    if _is_labelme(root):
        return (_ALL,)
    return tuple(path.name for path in folders_in(root) if _is_labelme(path))


def _place(root: Path, split: str) -> Path:
    """Return the folder of a split, which may be called "all" itself."""
    return root if split == _ALL and _is_labelme(root) else root / split


def open_labelme(root: str | Path, *, reading: Reading | None = None) -> LabelMeFolder:
    """Find the classes and splits of a folder of LabelMe files; every file is read once.

    Raises:
        DataError: there are no such files, or one of them is damaged.
    """
    root, reading = Path(root).absolute(), reading or Reading()
    splits = labelme_splits(root)
    if not splits:
        raise DataError(f"{root} holds no files of LabelMe, with shapes and imagePath")
    classes = reading.classes
    if classes is None and (root / "labels.txt").is_file():
        names = read_names(root / "labels.txt")
        classes = tuple(name for name in names if name not in (_IGNORED, _BACKGROUND))
    if classes is None:
        labels: set[str] = set()
        for name in splits:
            for path in _labelled(_place(root, name)):
                try:
                    labels |= {named(shape["label"]) for shape in read_labelme(path)["shapes"]}
                except DataError:
                    continue  # the error is reported with its image
        classes = tuple(sorted(labels - {_IGNORED, _BACKGROUND}))
    if not classes:
        raise DataError(f"{root}: no file of LabelMe holds a shape of a class; draw some first")
    return LabelMeFolder(root, classes, splits)


def read_labelme(path: Path) -> dict[str, Any]:
    """Read a file of LabelMe; one with other content is a DataError."""
    content = read_json(path)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    fits = isinstance(shapes, list) and all(
        isinstance(shape, dict) and isinstance(shape.get("label"), str) for shape in shapes
    )
    if not fits:
        raise DataError(
            f"{path} is no file of LabelMe; expected shapes with a label, and imagePath"
        )
    return content


def _is_labelme(folder: Path) -> bool:
    for path in _labelled(folder)[:_LOOKED_AT]:
        if path.stat().st_size > _LARGEST:
            continue
        try:
            if "imagePath" in read_labelme(path):
                return True
        except DataError:
            continue
    return False


def _labelled(folder: Path) -> list[Path]:
    return files_in(folder, ".json")


def _photo(path: Path, content: Mapping[str, Any], finder: PhotoFinder) -> Path:
    """Return the photo that a file names, or the one beside it with its name."""
    named = content.get("imagePath")
    if isinstance(named, str) and named:
        beside = path.parent / named.replace("\\", "/")
        found = beside if beside.is_file() else finder.find(named)
        if found is not None:
            return found
    for suffix in IMAGE_SUFFIXES:
        for each in (suffix, suffix.upper()):
            if path.with_suffix(each).is_file():
                return path.with_suffix(each)
    inside = ", which holds its data in the file only" if content.get("imageData") else ""
    raise DataError(f"{path} names the photo {named}{inside}; put the photo beside the file")


def shape_pixels(
    shape: Mapping[str, Any], size: tuple[int, int], source: str
) -> Bool[np.ndarray, "H W"]:
    """Draw a shape of LabelMe.

    Args:
        shape: with ``points``, ``shape_type`` and perhaps ``mask``.
        size: rows and columns of the photo.
        source: names the shape in errors.

    Raises:
        DataError: it has another type, or other points than its type.
    """
    kind = shape.get("shape_type") or "polygon"
    if kind not in (*_DRAWING, "mask"):
        raise DataError(
            f"{source}: a {kind} has no area; read are {', '.join(_DRAWING)} and mask, so remove "
            "it or draw it as one of these"
        )
    try:
        points = np.array(shape["points"], np.float64).reshape(-1, 2)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{source}: its points are no pairs of numbers ({error})") from error
    if len(points) not in _POINTS.get(kind, (2,)):
        raise DataError(f"{source}: a {kind} cannot have {len(points)} points; draw it again")
    check_ring(points, size, source)
    if kind == "mask":
        return _mask_pixels(shape.get("mask"), points, size, source)
    if kind != "circle":
        check_inside([points], size, source)
    picture = Image.new("L", (size[1], size[0]))
    _DRAWING[kind](ImageDraw.Draw(picture), points)
    return np.array(picture).astype(np.bool_)


def _polygon(draw: ImageDraw.ImageDraw, points: np.ndarray) -> None:
    draw.polygon([tuple(point) for point in points.tolist()], outline=1, fill=1)


def _rectangle(draw: ImageDraw.ImageDraw, points: np.ndarray) -> None:
    corners = [tuple(corner) for corner in np.sort(points, axis=0).tolist()]
    draw.rectangle(corners, outline=1, fill=1)


def _circle(draw: ImageDraw.ImageDraw, points: np.ndarray) -> None:
    (x, y), edge = points.tolist()
    radius = math.dist((x, y), edge)
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)


_DRAWING: dict[str, Callable[[ImageDraw.ImageDraw, np.ndarray], None]] = {
    "polygon": _polygon,
    "oriented_rectangle": _polygon,
    "rectangle": _rectangle,
    "circle": _circle,
}


_POINTS: dict[str, Sequence[int]] = {"polygon": range(3, 10**6), "oriented_rectangle": (4,)}


def _mask_pixels(
    encoded: Any, points: np.ndarray, size: tuple[int, int], source: str
) -> Bool[np.ndarray, "H W"]:
    """Paste a mask, a PNG as base64 text, at its box."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: its mask is no PNG in base64 ({error}); save again") from error
    with opened_bytes(data, f"{source}: its mask") as picture:
        inside = np.array(picture).astype(np.bool_)
    left, top = points.min(axis=0).astype(int).tolist()
    pixels = np.zeros(size, np.bool_)
    fits = inside.ndim == 2 and left >= 0 and top >= 0
    if not fits or top + inside.shape[0] > size[0] or left + inside.shape[1] > size[1]:
        raise DataError(f"{source}: its mask lies outside of the photo; draw it again")
    pixels[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return pixels
