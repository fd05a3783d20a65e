"""MS COCO: its classes, folder layouts and forms of masks."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from camkit.data.labels import VECTOR_FILES, ImageLabels, find_labels
from camkit.data.names import check_split
from camkit.data.sample import (
    VOC_FORM,
    MaskForm,
    Sample,
    all_usable,
    mask_classes,
    mask_values,
    unique_values,
)
from camkit.data.voc import VOC_CLASSES
from camkit.errors import DataError
from camkit.tensors import IGNORE
from camkit.untrusted import bounded, read_json

CocoIds: TypeAlias = Literal["contiguous", "original", "stuff"]
"""The ids in a mask: 1 to 80, the category ids 1 to 90, or COCO-Stuff's, which are 1 less."""

_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

COCO_CLASSES = tuple(name.strip() for name in _NAMES.split(","))
"""The 80 classes in the order of their ids; the contiguous ids 1 to 80 are their positions."""

COCO_IDS: dict[str, int] = dict(
    zip(COCO_CLASSES, (id_ for id_ in range(1, 91) if id_ not in _UNUSED_IDS), strict=True)
)
"""The category id of each class."""

_RENAMED = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
VOC_IN_COCO: dict[str, str] = {name: _RENAMED.get(name, name) for name in VOC_CLASSES}
"""COCO's names of the classes of VOC, in the order of VOC."""

_SPLIT = re.compile(r"(train|val|test)(20\d\d)?")
_PHOTO_FOLDERS = ("", "images", "JPEGImages")
_MASK_FOLDERS = ("SegmentationClass", "masks", "annotations", "stuffthingmaps")


def coco_form(ids: CocoIds, *, voc: bool = False) -> MaskForm:
    """Return the form of COCO's masks; with ``voc`` they are read as the 20 classes of VOC."""
    mask_ids = _mask_ids(voc=voc)
    if ids == "contiguous":
        return MaskForm(ids={0: 0} | dict(enumerate(mask_ids, start=1)))
    category = dict(zip(COCO_IDS.values(), mask_ids, strict=True))
    if ids == "original":
        return MaskForm(ids={0: 0} | category)
    # COCO-Stuff counts from 0: 90 categories of things, then 92 of stuff, which is background
    return MaskForm(ids={number - 1: category.get(number, 0) for number in range(1, 183)})


def _mask_ids(*, voc: bool) -> list[int]:
    """Return the mask id of each COCO class in COCO's order; 0 is background."""
    if not voc:
        return list(range(1, len(COCO_CLASSES) + 1))
    order = list(VOC_IN_COCO.values())
    return [order.index(name) + 1 if name in order else 0 for name in COCO_CLASSES]


@dataclass(frozen=True)
class CocoFolder:
    """A data set laid out like MS COCO; `open_coco` finds its splits.

    Photos are ``<split>/*.jpg``, at the top, in ``images`` or in ``JPEGImages``. Masks have the
    same names in the folder ``<split>`` of ``SegmentationClass``, ``masks``, ``annotations`` or
    ``stuffthingmaps``; or they are the panoptic ones, ``annotations/panoptic_<split>/`` beside
    ``annotations/panoptic_<split>.json``. Stuff is background. Labels come from
    ``annotations/instances_<split>.json``, whose images then make the split, else from
    ``cls_labels.npy`` or ``cls_labels_onehot.npy``, else from the masks.

    Attributes:
        root: the folder of the data set.
        splits: such as train2017.
        ids: the ids in the masks. None takes "stuff" in ``stuffthingmaps``, else "original" if more
            of the first 100 masks agree with the labels that way, else "contiguous".
        voc: use the 20 classes of VOC, by VOC's names; all others become background.
    """

    root: Path
    splits: tuple[str, ...]
    ids: CocoIds | None = None
    voc: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(VOC_IN_COCO) if self.voc else COCO_CLASSES

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, in the order of ``instances_<split>.json`` or by name."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        check_split(name, self.splits)
        folders = (_files(self.root / folder / name, "jpg") for folder in _PHOTO_FOLDERS)
        photos = next(filter(None, folders), None)
        if photos is None:
            raise DataError(f"{self.root} no longer holds photos of {name}; open it again")
        instances = self.root / "annotations" / f"instances_{name}.json"
        if instances.is_file():
            labels: ImageLabels | None = ImageLabels(instances, _instances(instances), COCO_CLASSES)
        else:
            labels = find_labels(self.root, COCO_CLASSES)
        masks = self._masks(name, labels)
        listed = labels.labels if labels and labels.path == instances else photos
        for stem in map(str, listed):
            try:
                yield self._sample(stem, photos.get(stem), masks.get(stem), labels)
            except DataError as error:
                yield error

    def _sample(
        self,
        stem: str,
        photo: Path | None,
        mask_and_form: tuple[Path, MaskForm] | None,
        labels: ImageLabels | None,
    ) -> Sample:
        if photo is None:
            source = self.root if labels is None else labels.path
            raise DataError(f"{source} lists {stem}.jpg, which is not there; add it or remove it")
        mask, form = mask_and_form or (None, VOC_FORM)
        if labels is not None:
            mask_ids = _mask_ids(voc=self.voc)
            known = labels.of(stem, str(photo))
            classes = sorted(mask_ids[index] - 1 for index in known if mask_ids[index])
            return Sample(stem, photo, mask, tuple(classes), form)
        if mask is None:
            raise DataError(
                f"{photo} has neither labels nor a mask; add the mask, "
                f"annotations/instances_*.json or {VECTOR_FILES[0]}"
            )
        shown = mask_classes(mask, num_classes=len(self.classes), form=form)
        return Sample(stem, photo, mask, shown, form)

    def _masks(self, name: str, labels: ImageLabels | None) -> dict[str, tuple[Path, MaskForm]]:
        """Map each image to its mask and the form of the mask."""
        for folder in _MASK_FOLDERS:
            if masks := _files(self.root / folder / name, "png"):
                stuff: CocoIds | None = "stuff" if folder == "stuffthingmaps" else None
                ids = self.ids or stuff or _recognise_ids(masks, labels)
                form = coco_form(ids, voc=self.voc)
                return {stem: (path, form) for stem, path in masks.items()}
        listing = self.root / "annotations" / f"panoptic_{name}.json"
        if not listing.is_file():
            return {}
        forms = _panoptic_forms(listing, voc=self.voc)
        masks = _files(listing.with_suffix(""), "png")
        return {stem: (path, forms.get(stem, VOC_FORM)) for stem, path in masks.items()}


def open_coco(root: str | Path, *, ids: CocoIds | None = None, voc: bool = False) -> CocoFolder:
    """Find the splits of a folder laid out like MS COCO.

    Args:
        root: the folder that holds the folders of photos, such as train2017 and val2017.
        ids: the ids in the masks; None recognises them, see `CocoFolder`.
        voc: use the 20 classes of VOC instead of COCO's 80.

    Raises:
        DataError: the folder holds no photos.
        ValueError: there are no such ids.
    """
    root = Path(root).absolute()
    if ids not in (None, "contiguous", "original", "stuff"):
        raise ValueError(f'`ids` must be "contiguous", "original" or "stuff", got "{ids}"')
    splits = coco_splits(root)
    if not splits:
        raise DataError(
            f"{root} holds no photos of COCO; expected folders such as train2017/ and val2017/ "
            "with .jpg files, at the top or in images/ or JPEGImages/"
        )
    return CocoFolder(root, splits, ids, voc)


def coco_splits(root: Path) -> tuple[str, ...]:
    """List the names of the folders of photos."""
    names = {
        path.name
        for folder in _PHOTO_FOLDERS
        for path in (root / folder).glob("*/")
        if _SPLIT.fullmatch(path.name) and next(path.glob("*.jpg"), None)
    }
    return tuple(sorted(names))


def _files(folder: Path, ending: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob(f"*.{ending}"))}


@contextmanager
def _listing(path: Path, kind: str, expected: str) -> Iterator[Any]:
    """Read JSON, and turn errors of its content inside the `with` block into a DataError."""
    try:
        with bounded(path):
            yield read_json(path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is no list of COCO {kind} ({type(error).__name__}: {error}); expected "
            f"{expected}"
        ) from error


def _instances(path: Path) -> dict[str | int, tuple[int, ...]]:
    """Read the indices of COCO classes by image."""
    index = {category: position for position, category in enumerate(COCO_IDS.values())}
    expected = "images, and annotations with their image_id and category_id"
    with _listing(path, "instances", expected) as content:
        stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        present: dict[str, set[int]] = {stem: set() for stem in stems.values()}
        for annotation in content["annotations"]:
            present[stems[annotation["image_id"]]].add(index[annotation["category_id"]])
    return {stem: tuple(sorted(classes)) for stem, classes in present.items()}


def _panoptic_forms(path: Path, *, voc: bool) -> dict[str, MaskForm]:
    category = dict(zip(COCO_IDS.values(), _mask_ids(voc=voc), strict=True))
    forms = {}
    expected = "annotations with file_name and segments_info"
    with _listing(path, "panoptic masks", expected) as content:
        for image in content["annotations"]:
            ids = {s["id"]: category.get(s["category_id"], 0) for s in image["segments_info"]}
            form = MaskForm(colours=True, ids=ids, ignored=(0,))
            forms[Path(image["file_name"]).stem] = form
    return forms


def _recognise_ids(masks: Mapping[str, Path], labels: ImageLabels | None) -> CocoIds:
    """Return the kind of ids with which more of the first masks agree with their labels."""
    kinds = {
        "contiguous": coco_form("contiguous").ids or {},
        "original": coco_form("original").ids or {},
    }
    fits = dict.fromkeys(kinds, 0)
    for stem, path in list(masks.items())[:100]:
        try:
            known = () if labels is None else labels.of(stem, str(path))
            values = unique_values(mask_values(path)).tolist()
        except DataError:
            continue  # the error is reported where the mask or label is used
        allowed = {index + 1 for index in known} | {0}
        for kind, ids in kinds.items():
            fits[kind] += {ids.get(value, -1) for value in values if value != IGNORE} <= allowed
    return "original" if fits["original"] > fits["contiguous"] else "contiguous"
