"""Panoptic annotations in COCO's form without instances: PNGs of segment ids and a JSON file."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camkit.data.coco import CocoSplit, coco_splits, merged_categories, sample_names, split_of
from camkit.data.cocofile import (
    CocoImage,
    categories_of,
    images_of,
    is_panoptic,
    json_object,
    panoptic_form,
    reading_json,
)
from camkit.data.files import PhotoFinder, files_in, in_short, relative_to
from camkit.data.names import check_split
from camkit.data.sample import Sample, all_usable
from camkit.errors import DataError
from camkit.printing import several

_FEW = 12  # JSON files at the top; where there are more, each is about one image


@dataclass(frozen=True)
class PanopticFolder:
    """A data set of panoptic masks; `open_panoptic` finds its splits.

    ``annotations/panoptic_<split>.json`` lists the segments of each image, and the PNG files in
    ``annotations/panoptic_<split>/`` hold their ids, red + 256 * green + 65536 * blue. Classes are
    all categories, things and stuff, in the order of their ids. The id 0 and crowds are not scored.

    Attributes:
        root: the folder of the data set.
        parts: the splits.
        categories: id and name of each class.
    """

    root: Path
    parts: tuple[CocoSplit, ...]
    categories: tuple[tuple[int, str], ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.categories)

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, in the order of its file."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        part = self.parts[self.splits.index(name)]
        path = _listing(part)
        images, annotations = _read(path)
        names = sample_names(tuple(images.values()))
        photos, masks = PhotoFinder(part.folders), PhotoFinder(_mask_folders(path))
        for number, image in images.items():
            try:
                mask, segments = _annotation(path, image, annotations, masks)
                yield self._sample(path, names[number], _photo(path, image, photos), mask, segments)
            except DataError as error:
                yield error
        for number in annotations.keys() - images.keys():
            yield DataError(
                f"{path} annotates the image {number!r}, which it does not list; remove the "
                "annotation"
            )

    def _sample(self, path: Path, name: str, photo: Path, mask: Path, segments: Any) -> Sample:
        values = {number: place for place, (number, _) in enumerate(self.categories, start=1)}
        with _reading(path):
            form = panoptic_form(segments, values, f"{path}, {mask.name}")
            held = {values[s["category_id"]] - 1 for s in segments if not s.get("iscrowd")}
        return Sample(name, photo, mask, tuple(sorted(held)), form)

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for; this reads the annotations."""
        sentences = []
        for part in self.parts:
            path = _listing(part)
            annotations = _read(path)[1]
            with _reading(path):
                count = Counter(
                    "crowd" if segment.get("iscrowd") else "segment"
                    for entries in annotations.values()
                    for entry in entries
                    for segment in entry["segments_info"]
                )
            crowds = (
                f"; {several(count['crowd'], 'crowd region')} ignored" if count["crowd"] else ""
            )
            sentences.append(
                f"{relative_to(path, self.root)}: panoptic annotations, "
                f"{several(len(self.classes), 'category')} ({in_short(self.classes)}), things and "
                f"stuff; {several(count['segment'], 'segment')}{crowds}; 0 is not scored"
            )
        return tuple(sentences)


def panoptic_splits(root: Path) -> tuple[CocoSplit, ...]:
    """Find the splits of a folder with panoptic annotations and without instances, or of a file."""
    if root.is_file():
        place = root.parents[root.parent.name == "annotations"]
        return (split_of(root, place, several=False),) if is_panoptic(root) else ()
    top = files_in(root, ".json")
    paths = [*files_in(root / "annotations", ".json"), *(top if len(top) <= _FEW else ())]
    lists = [path for path in paths if is_panoptic(path)]
    if not lists or any(part.annotations for part in coco_splits(root)):
        return ()
    return tuple(split_of(path, root, several=len(lists) > 1) for path in lists)


def open_panoptic(root: str | Path) -> PanopticFolder:
    """Find the splits and classes of panoptic annotations; ``root`` is a folder or a JSON file.

    Raises:
        DataError: there are no such annotations, or categories that disagree.
    """
    root = Path(root).absolute()
    parts = panoptic_splits(root)
    if not parts:
        raise DataError(
            f"{root} holds no panoptic annotations alone; expected annotations/panoptic_*.json "
            "with segments_info, and no annotations/instances_*.json"
        )
    categories = merged_categories([_listing(part) for part in parts])
    if root.is_file():
        root = root.parents[root.parent.name == "annotations"]
    return PanopticFolder(root, parts, categories)


def _listing(part: CocoSplit) -> Path:
    if part.annotations is None:
        raise DataError(f"{part.name} has no panoptic annotations; open the data set again")
    return part.annotations


def _mask_folders(path: Path) -> tuple[Path, ...]:
    """Return the folders that may hold the PNG files, the likeliest first."""
    top = path.parents[path.parent.name == "annotations"]
    short = path.stem.removeprefix("panoptic_")
    places = [
        path.with_suffix(""),
        *(top / stem for stem in (path.stem, f"panoptic/{short}", f"masks/{short}")),
        *(folder / name for folder in (path.parent, top) for name in ("panoptic", "masks")),
    ]
    return tuple(place for place in dict.fromkeys(places) if place.is_dir())


def _reading(path: Path) -> Any:
    return reading_json(path, "panoptic masks", "annotations with file_name and segments_info")


def _read(path: Path) -> tuple[dict[Any, CocoImage], dict[Any, list[Any]]]:
    """Return the images, and the annotations of each, by the id of the image."""
    with _reading(path):
        content = json_object(path)
        categories_of(path, content.get("categories"))
        annotations: dict[Any, list[Any]] = {}
        for entry in content["annotations"]:
            entry["file_name"], entry["segments_info"] = (
                str(entry["file_name"]),
                list(entry["segments_info"]),
            )
            annotations.setdefault(entry["image_id"], []).append(entry)
        return images_of(path, content["images"]), annotations


def _annotation(
    path: Path, image: CocoImage, annotations: Mapping[Any, list[Any]], masks: PhotoFinder
) -> tuple[Path, list[Any]]:
    """Return the PNG of an image and its segments."""
    held = annotations.get(image.number, [])
    if len(held) != 1:
        raise DataError(
            f"{path} has {len(held)} annotations of {image.file_name}; expected one, with all "
            "segments"
        )
    mask = masks.find(held[0]["file_name"])
    if mask is None:
        raise DataError(
            f"{path} lists the mask {held[0]['file_name']}, which is not there; put the PNG files "
            f"into {path.with_suffix('')}"
        )
    return mask, held[0]["segments_info"]


def _photo(path: Path, image: CocoImage, photos: PhotoFinder) -> Path:
    photo = photos.find(image.file_name)
    if photo is None:
        raise DataError(f"{path} lists {image.file_name}, which is not there; add it or remove it")
    return photo
