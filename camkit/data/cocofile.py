"""Files of annotations in COCO's form: images, categories, and the annotations of each image."""

import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from camkit.data.drawn import CocoMask, check_picture, packed
from camkit.data.files import picture_size
from camkit.data.names import composed, named
from camkit.data.sample import MaskForm
from camkit.errors import DataError
from camkit.printing import short_repr
from camkit.untrusted import read_json

Crowds: TypeAlias = Literal["ignored", "objects"]
"""What annotations with ``iscrowd`` are: not scored, or objects like others."""

_KEYS = (b'"images"', b'"annotations"', b'"categories"')
_OURS = "exported by camkit"


@dataclass(eq=False)
class CocoImage:
    """An image of a file, and what is annotated in it.

    Attributes:
        number: its id.
        file_name: as the file gives it.
        size: rows and columns, which some files leave out.
        present: ids of the categories annotated.
        annotations: id, category, crowd and segmentation of each.
        boxes: how many annotations have no segmentation.
        painted: how many crowds are taken for objects.
        fault: why it cannot be used.
    """

    number: Any
    file_name: str
    size: tuple[Any, Any] | None
    present: set[int] = field(default_factory=set)
    annotations: list[tuple[Any, int, bool, Any]] = field(default_factory=list)
    boxes: int = 0
    painted: int = 0
    fault: str | None = None

    def form(self, path: Path, photo: Path, index: Mapping[int, int]) -> CocoMask:
        """Return the form that draws the mask.

        Args:
            path: the file of annotations.
            photo: whose size counts if the file gives none.
            index: the class index of each category that is a class.

        Raises:
            DataError: neither the file nor the photo has a size.
        """
        source = f"{path}, image {self.number} ({self.file_name})"
        size = picture_size(photo) if self.size is None else check_picture(self.size, source)
        drawn = [
            (number, index[category] + 1, crowd, segmentation)
            for number, category, crowd, segmentation in self.annotations
            if category in index
        ]
        return CocoMask(self.file_name, size, packed(drawn))


@dataclass(frozen=True, eq=False)
class CocoFile:
    """The content of a file.

    Attributes:
        path: of the file.
        categories: name by id, in ascending order.
        images: in the order of the file.
        stray: errors of annotations that belong to no image.
    """

    path: Path
    categories: Mapping[int, str]
    images: tuple[CocoImage, ...]
    stray: tuple[str, ...]

    __repr__ = short_repr

    @cached_property
    def drawn(self) -> bool:
        """Whether any annotation has a segmentation."""
        return any(image.annotations for image in self.images)


def is_coco(path: Path) -> bool:
    """Return whether a JSON file has images, annotations and categories."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and all(
                text.find(key) >= 0 for key in _KEYS
            )
    except (OSError, ValueError):  # unreadable, or empty
        return False


def is_panoptic(path: Path) -> bool:
    """Return whether a JSON file lists the segments of panoptic masks."""
    return is_coco(path) and _mentions(path, b'"segments_info"')


def _mentions(path: Path, key: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(key) >= 0


def panoptic_form(
    segments: Any, values: Mapping[int, int], source: str, crowds: Crowds | None = None
) -> MaskForm:
    """Return the form of a panoptic mask, a PNG of ids, red + 256 * green + 65536 * blue.

    The id 0 and crowds are not scored.

    Args:
        segments: ``segments_info`` of the image.
        values: class index + 1 of each category, 0 for those that are background.
        source: names the image in errors.
        crowds: "objects" scores crowds like others.

    Raises:
        DataError: two segments have one id, or a segment is of an unknown category.
    """
    ids = {0: 0}
    ignored = [0]
    for segment in segments:
        number, category = segment["id"], segment["category_id"]
        if type(number) is not int:
            raise DataError(f"{source}: a segment has the id {number!r}; expected a whole number")
        if number in ids:
            raise DataError(f"{source}: two segments have the id {number!r}; give each its own")
        if category not in values:
            raise DataError(
                f"{source}, segment {number}: there is no category {category!r}; add it to the "
                "categories"
            )
        ids[number] = values[category]
        if segment.get("iscrowd") and crowds != "objects":
            ignored.append(number)
    return MaskForm(colours=True, ids=ids, ignored=tuple(ignored))


def read_categories(path: Path) -> dict[int, str]:
    """Read the categories of a file, without the rest of it where they stand in one place only.

    Raises:
        DataError: there are none, or they have other ids than whole numbers.
    """
    with _reading(path), path.open("rb") as file:
        if path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                place = text.find(_KEYS[2])
                alone = place >= 0 and text.find(_KEYS[2], place + 1) < 0
                piece = text[place : place + _MOST] if alone else b""
            _, colon, rest = piece.partition(b":")
            if colon:
                try:
                    listed, _ = json.JSONDecoder().raw_decode(
                        rest.decode("utf-8", "ignore").lstrip()
                    )
                    return categories_of(path, listed)
                except json.JSONDecodeError:
                    pass  # read the whole file, which says where it is damaged
        return categories_of(path, json_object(path).get("categories"))


_MOST = 2**20  # bytes of the categories


def read_coco(path: Path, *, crowds: Crowds | None = None) -> CocoFile:
    """Read a file of annotations.

    Args:
        path: of the file.
        crowds: whether annotations with ``iscrowd`` are objects. None takes them for objects where
            they have ``attributes`` or all of ``info`` is blank: CVAT and Datumaro write so, and
            they mark everything that was painted as a crowd. Elsewhere crowds are not scored.

    Raises:
        DataError: it is no such file. Faults of single images are kept with them.
    """
    with _reading(path):
        content = json_object(path)
        categories = categories_of(path, content.get("categories"))
        info = content.get("info")
        info = info if isinstance(info, dict) else {}
        ours = info.get("description") == _OURS
        if crowds is None and info and not any(info.values()):
            crowds = "objects"  # Datumaro, which writes CVAT's files too, leaves all of it blank
        images = images_of(path, content["images"])
        stray = []
        for annotation in content["annotations"]:
            number = annotation.get("id", "without id")
            image = images.get(annotation["image_id"])
            if image is None:
                stray.append(
                    f"{path}, annotation {number}: there is no image {annotation['image_id']!r}; "
                    "remove the annotation"
                )
            elif annotation["category_id"] not in categories:
                image.fault = (
                    f"{path}, annotation {number} of {image.file_name}: there is no category "
                    f"{annotation['category_id']!r}; known are {_listed(categories)}"
                )
            else:
                _add(image, annotation, crowds, crowd_is_void=ours)
    return CocoFile(path, categories, tuple(images.values()), tuple(stray))


def images_of(path: Path, listed: Any) -> dict[Any, CocoImage]:
    """Return the images by id; an id or a file that comes twice is a DataError."""
    images: dict[Any, CocoImage] = {}
    held: dict[str, Any] = {}
    for entry in listed:
        number, name = entry["id"], str(entry["file_name"])
        if number in images:
            raise DataError(
                f"{path}: two images have the id {number!r} ({images[number].file_name} and "
                f"{name}); give each its own"
            )
        place = composed(name).replace("\\", "/")
        if place in held:
            raise DataError(
                f"{path}: {name} is listed under the ids {held[place]!r} and {number!r}; keep one "
                "of them, with all annotations"
            )
        held[place] = number
        size = (entry.get("height"), entry.get("width"))
        images[number] = CocoImage(number, name, None if None in size else size)
    return images


def _add(
    image: CocoImage, annotation: Mapping[str, Any], crowds: Crowds | None, *, crowd_is_void: bool
) -> None:
    category, crowd = annotation["category_id"], bool(annotation.get("iscrowd", 0))
    painted = crowd and ("attributes" in annotation if crowds is None else crowds == "objects")
    if not (crowd and crowd_is_void):
        image.present.add(category)
    image.painted += painted
    segmentation = annotation.get("segmentation")
    if segmentation:
        number = annotation.get("id", "without id")
        image.annotations.append((number, category, crowd and not painted, segmentation))
    else:
        image.boxes += 1


def categories_of(path: Path, listed: Any) -> dict[int, str]:
    """Return names by id; two categories of one name are told apart by their ids."""
    if not isinstance(listed, list) or not listed:
        raise DataError(
            f"{path} has no categories, so its ids have no names; add "
            '"categories": [{"id": 1, "name": "cat"}, ...]'
        )
    names: dict[int, str] = {}
    for category in listed:
        number, name = category["id"], category["name"]
        if type(number) is not int or number < 0:
            raise DataError(
                f"{path}: the category {name!r} has the id {number!r}; expected a whole number"
            )
        if number in names:
            raise DataError(f"{path}: two categories have the id {number}; give each its own")
        names[number] = named(str(name))
    held = list(names.values())
    unique = {n: f"{name} ({n})" if held.count(name) > 1 else name for n, name in names.items()}
    return dict(sorted(unique.items()))


def _listed(categories: Mapping[int, str]) -> str:
    shown = [f"{number} ({name})" for number, name in list(categories.items())[:6]]
    return ", ".join(shown) + (", ..." if len(categories) > 6 else "")


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; others are a TypeError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")
    return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of the content of a file into a DataError."""
    with reading_json(path, "instances", "images, annotations and categories"):
        yield


@contextmanager
def reading_json(path: Path, kind: str, expected: str) -> Iterator[None]:
    """Turn errors of a file's JSON, met inside the `with` block, into a DataError.

    Args:
        path: of the file.
        kind: of the COCO file, such as "instances".
        expected: in the file.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no list of COCO {kind} ({type(error).__name__}: {error}); expected "
            f"{expected}"
        ) from error
