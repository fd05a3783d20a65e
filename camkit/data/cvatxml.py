"""CVAT's "CVAT for images 1.1": an XML file of polygons and painted masks for many images."""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from xml.etree.ElementTree import Element

import numpy as np
from jaxtyping import Bool, Int

from camkit.data.colours import is_ignored
from camkit.data.drawn import IGNORED_ID, CocoMask, check_picture, coco_pixels, packed, painted
from camkit.data.files import PhotoFinder, in_short, relative_to
from camkit.data.names import check_split, named
from camkit.data.reading import is_background
from camkit.data.sample import VOC_FORM, MaskReader, Sample, all_usable
from camkit.errors import DataError, closest
from camkit.printing import several
from camkit.untrusted import read_xml

XML_NAME = "annotations.xml"
_ALL = "all"
_DRAWN = ("polygon", "mask")
_NOT_DRAWN = ("box", "ellipse", "polyline", "points", "cuboid", "skeleton")
_Shape: TypeAlias = tuple[int, str, str, dict[str, str]]  # number, kind, label, attributes


@dataclass(frozen=True, repr=False)
class CvatMask(CocoMask):
    """The mask of an image, drawn from the shapes of an XML file of CVAT.

    pycocotools draws polygons, as in CVAT's own exports; masks are exact. A higher ``z_order`` is
    on top, of equal ones the later shape. ``packed`` holds the shapes in this order.
    """

    def read(self, path: Path, *, num_classes: int) -> Int[np.ndarray, "H W"]:
        """Draw the mask; ``path`` and ``num_classes`` are named in errors."""
        layers = []
        for number, value, _, (kind, attributes) in json.loads(zlib.decompress(self.packed)):
            source = f"{path}, {kind} {number} of {self.image}"
            if value > num_classes:
                raise DataError(f"{source}: its class is none of the {num_classes} classes")
            draw = _polygon if kind == "polygon" else _runs
            layers.append((value, draw(attributes, self.size, source)))
        return painted(layers, self.size)


@dataclass(frozen=True)
class _Image:
    """An image of the file."""

    name: str
    subset: str
    size: tuple[int, int]
    shapes: tuple[_Shape, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class CvatXml:
    """A data set in an XML file of CVAT; `open_cvat` opens it.

    Splits are the subsets of a project, else "all". Classes are the labels of the file in its
    order; ``background`` is background, ``ignored`` is not scored. An image with a shape that has
    no outline, such as a box, is an error; one with tags alone has labels but no mask.

    Attributes:
        root: the folder that ``folders`` are named by.
        path: the file.
        classes: names of the classes.
        images: in the order of the file.
        folders: where the photos may be, the likeliest first.
    """

    root: Path
    path: Path
    classes: tuple[str, ...]
    images: tuple[_Image, ...] = field(repr=False)
    folders: tuple[Path, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(image.subset for image in self.images))

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, in the order of the file."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        inner = (folder / name for folder in self.folders)
        finder = PhotoFinder(folder for folder in (*inner, *self.folders) if folder.is_dir())
        for image in self.images:
            if image.subset == name:
                try:
                    yield self._sample(image, finder)
                except DataError as error:
                    yield error

    def _sample(self, image: _Image, finder: PhotoFinder) -> Sample:
        source = f"{self.path}, {image.name}"
        photo = finder.find(image.name)
        if photo is None:
            raise DataError(
                f"{self.path} lists {image.name}, which is not there; put the photos into images/ "
                'beside it, or export with "save images"'
            )
        shapes = []
        for number, kind, label, attributes in image.shapes:
            if kind in _NOT_DRAWN:
                raise DataError(
                    f"{source}, shape {number}: a {kind} does not say which pixels are "
                    f"{label}; draw it as a polygon or a mask, or remove it"
                )
            value = self._value_of(label, f"{source}, shape {number}")
            shapes.append((number, value, False, (kind, attributes)))
        values = {value for _, value, _, _ in shapes}
        values |= {self._value_of(label, f"{source}, its tag") for label in image.tags}
        form: MaskReader = CvatMask(image.name, check_picture(image.size, source), packed(shapes))
        alone = bool(image.tags) and not shapes
        shown = tuple(sorted(value - 1 for value in values if value > 0))
        name = Path(image.name.replace("\\", "/")).with_suffix("").as_posix()
        if alone:
            return Sample(name, photo, None, shown, VOC_FORM)
        return Sample(name, photo, self.path, shown, form)

    def _value_of(self, label: str, source: str) -> int:
        if is_background(label) or is_ignored(label):
            return 0 if is_background(label) else IGNORED_ID
        if label not in self.classes:
            raise DataError(f"{source}: {label!r} is not a label; {closest(label, self.classes)}")
        return self.classes.index(label) + 1

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        kinds = [kind for image in self.images for _, kind, _, _ in image.shapes]
        drawn = " and ".join(several(kinds.count(kind), kind) for kind in _DRAWN)
        refused = sum(kind in _NOT_DRAWN for kind in kinds)
        more = f"; {several(refused, 'shape')} without an outline: errors" if refused else ""
        return (
            f"{relative_to(self.path, self.root)}: CVAT for images, "
            f"{several(len(self.classes), 'label')} ({in_short(self.classes)}), masks drawn from "
            f"{drawn}; a higher z_order is on top{more}",
        )


def is_cvat_xml(path: Path) -> bool:
    """Return whether a file is an XML file of CVAT; only its beginning is read."""
    return _top(path) == b"annotations"


def is_other_xml(path: Path) -> bool:
    """Return whether a file is one of the XML files of PASCAL VOC and LabelMe's old tool."""
    return _top(path) == b"annotation"


def _top(path: Path) -> bytes:
    """Return the name of the first element of an XML file."""
    try:
        with path.open("rb") as file:
            head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError:
        return b""
    if head.startswith(b"<?xml"):
        head = head.partition(b"?>")[2].lstrip()
    name = head.removeprefix(b"<").partition(b">")[0].split()
    return name[0] if head.startswith(b"<") and name else b""


def refuse_other_xml(path: Path) -> None:
    """Raise DataError for an XML file of PASCAL VOC or of LabelMe's old tool."""
    if is_other_xml(path):
        raise DataError(
            f"{path} is an XML file of PASCAL VOC (boxes) or of LabelMe's old web tool, which are "
            "not read; convert its polygons to LabelMe's JSON or to COCO"
        )


def open_cvat_xml(path: Path, folders: tuple[Path, ...]) -> CvatXml:
    """Open an XML file of CVAT, whose photos are in one of the folders.

    Raises:
        DataError: it is no such file, or no image is listed.
    """
    refuse_other_xml(path)
    top = read_xml(path)
    if top.tag != "annotations":
        raise DataError(
            f"{path} is no XML file of CVAT; expected annotations, got {top.tag!r}: export as "
            '"CVAT for images 1.1"'
        )
    images = tuple(_image(path, each) for each in top.iter("image"))
    if not images:
        raise DataError(
            f'{path} lists no image; export as "CVAT for images 1.1" ("for video" is not read)'
        )
    listed = [label for label in top.iterfind("meta//labels/label") if not label.findtext("parent")]
    names = [named(label.findtext("name") or "") for label in listed]
    if not names:
        names = sorted({label for image in images for _, _, label, _ in image.shapes})
    classes = dict.fromkeys(n for n in names if n and not is_background(n) and not is_ignored(n))
    if not classes:
        raise DataError(f"{path} names no label; add one in CVAT and export again")
    return CvatXml(path.parent, path, tuple(classes), images, folders)


def _image(path: Path, found: Element) -> _Image:
    name = found.get("name", "")
    try:
        size = (int(found.get("height", "")), int(found.get("width", "")))
        shapes = [
            (int(shape.get("z_order", "0")), number, shape)
            for number, shape in enumerate(found, start=1)
            if shape.tag in (*_DRAWN, *_NOT_DRAWN)
        ]
    except ValueError as error:
        raise DataError(f"{path}, image {name}: {error}; export it again") from error
    ordered = sorted(shapes, key=lambda shape: shape[:2])
    return _Image(
        name,
        found.get("subset") or _ALL,
        size,
        tuple(
            (number, shape.tag, named(shape.get("label", "")), _kept(shape))
            for _, number, shape in ordered
        ),
        tuple(named(tag.get("label", "")) for tag in found.iterfind("tag")),
    )


_KEPT = ("points", "rle", "left", "top", "width", "height")


def _kept(shape: Element) -> dict[str, str]:
    return {key: value for key, value in shape.items() if key in _KEPT}


def _polygon(
    attributes: Mapping[str, str], size: tuple[int, int], source: str
) -> Bool[np.ndarray, "H W"]:
    try:
        points = [
            float(number)
            for pair in attributes.get("points", "").split(";")
            for number in pair.split(",", 1)
        ]
    except ValueError as error:
        raise DataError(f"{source}: its points are no pairs of numbers ({error})") from error
    return coco_pixels([points], size, source)


def _runs(
    attributes: Mapping[str, str], size: tuple[int, int], source: str
) -> Bool[np.ndarray, "H W"]:
    """Draw a mask: runs outside and inside in turn, row by row within its box."""
    try:
        left, top, width, height = (int(attributes[key]) for key in _KEPT[2:])
        counts = np.array([int(count) for count in attributes["rle"].split(",")], np.int64)
    except (KeyError, ValueError, OverflowError) as error:
        raise DataError(f"{source}: its rle, left, top, width or height is {error}") from error
    inside = min(left, top) >= 0 and min(width, height) > 0
    if not inside or top + height > size[0] or left + width > size[1]:
        raise DataError(f"{source}: its box lies outside of the image; export it again")
    if counts.min() < 0 or counts.max() > width * height or counts.sum() != width * height:
        raise DataError(
            f"{source}: its run lengths do not add up to {width}x{height} pixels; export it again"
        )
    pixels = np.zeros(size, np.bool_)
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    pixels[top : top + height, left : left + width] = runs.reshape(height, width)
    return pixels
