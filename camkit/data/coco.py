"""MS COCO: its classes, its folder layouts, and masks in several forms."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from camkit.data.labels import VECTOR_FILES, LabelFile, check_split, read_label_vectors, read_text
from camkit.data.sample import MaskForm, Sample, all_usable, mask_classes, mask_values, present
from camkit.errors import DataError

CocoIds: TypeAlias = Literal["contiguous", "original", "stuff"]
"""What a mask holds: 1 to 80, the category ids 1 to 90, or those of COCO-Stuff, one lower."""

COCO_IDS: dict[str, int] = {
    "person": 1,
    "bicycle": 2,
    "car": 3,
    "motorcycle": 4,
    "airplane": 5,
    "bus": 6,
    "train": 7,
    "truck": 8,
    "boat": 9,
    "traffic light": 10,
    "fire hydrant": 11,
    "stop sign": 13,
    "parking meter": 14,
    "bench": 15,
    "bird": 16,
    "cat": 17,
    "dog": 18,
    "horse": 19,
    "sheep": 20,
    "cow": 21,
    "elephant": 22,
    "bear": 23,
    "zebra": 24,
    "giraffe": 25,
    "backpack": 27,
    "umbrella": 28,
    "handbag": 31,
    "tie": 32,
    "suitcase": 33,
    "frisbee": 34,
    "skis": 35,
    "snowboard": 36,
    "sports ball": 37,
    "kite": 38,
    "baseball bat": 39,
    "baseball glove": 40,
    "skateboard": 41,
    "surfboard": 42,
    "tennis racket": 43,
    "bottle": 44,
    "wine glass": 46,
    "cup": 47,
    "fork": 48,
    "knife": 49,
    "spoon": 50,
    "bowl": 51,
    "banana": 52,
    "apple": 53,
    "sandwich": 54,
    "orange": 55,
    "broccoli": 56,
    "carrot": 57,
    "hot dog": 58,
    "pizza": 59,
    "donut": 60,
    "cake": 61,
    "chair": 62,
    "couch": 63,
    "potted plant": 64,
    "bed": 65,
    "dining table": 67,
    "toilet": 70,
    "tv": 72,
    "laptop": 73,
    "mouse": 74,
    "remote": 75,
    "keyboard": 76,
    "cell phone": 77,
    "microwave": 78,
    "oven": 79,
    "toaster": 80,
    "sink": 81,
    "refrigerator": 82,
    "book": 84,
    "clock": 85,
    "vase": 86,
    "scissors": 87,
    "teddy bear": 88,
    "hair drier": 89,
    "toothbrush": 90,
}
"""The category ids, which leave out 10 of the numbers to 90."""

COCO_CLASSES = tuple(COCO_IDS)
"""The 80 classes in the order of their ids; the contiguous ids 1 to 80 are their places."""

VOC_IN_COCO: dict[str, str] = {
    "aeroplane": "airplane",
    "bicycle": "bicycle",
    "bird": "bird",
    "boat": "boat",
    "bottle": "bottle",
    "bus": "bus",
    "car": "car",
    "cat": "cat",
    "chair": "chair",
    "cow": "cow",
    "diningtable": "dining table",
    "dog": "dog",
    "horse": "horse",
    "motorbike": "motorcycle",
    "person": "person",
    "pottedplant": "potted plant",
    "sheep": "sheep",
    "sofa": "couch",
    "train": "train",
    "tvmonitor": "tv",
}
"""What COCO calls the classes of VOC, in the order of VOC."""


def coco_form(ids: CocoIds, *, voc: bool = False) -> MaskForm:
    """How the masks of COCO are read.

    Args:
        ids: what they hold.
        voc: read them as the 20 classes of VOC.
    """
    places = coco_places(voc=voc)
    if ids == "contiguous":
        return MaskForm(ids={0: 0} | {index + 1: place for index, place in enumerate(places)})
    category = dict(zip(COCO_IDS.values(), places, strict=True))
    if ids == "original":
        return MaskForm(ids={0: 0} | category)
    # COCO-Stuff counts from 0: 90 categories of things, then 92 of stuff, which is background
    return MaskForm(ids={number - 1: category.get(number, 0) for number in range(1, 183)})


def coco_places(*, voc: bool) -> list[int]:
    """The id of each COCO class, in the order of COCO; 0 for those that are background."""
    if not voc:
        return list(range(1, len(COCO_CLASSES) + 1))
    order = list(VOC_IN_COCO.values())
    return [order.index(name) + 1 if name in order else 0 for name in COCO_CLASSES]


_SPLIT = re.compile(r"(train|val|test)(20\d\d)?")
_PHOTO_FOLDERS = ("", "images", "JPEGImages")
_MASK_FOLDERS = ("SegmentationClass", "masks", "annotations", "stuffthingmaps")
_EVIDENCE = 100  # masks that are read to tell their ids; a few are nearly always enough


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
        ids: what masks hold. With None the labels decide: of "contiguous" and "original", the one
            by which the first 100 masks show the classes that the labels name. Without labels, or
            where both fit, masks are contiguous. Those in ``stuffthingmaps`` are "stuff".
        voc: speak of the 20 classes of VOC by VOC's names; all others are background then.
    """

    root: Path
    splits: tuple[str, ...]
    ids: CocoIds | None = None
    voc: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(VOC_IN_COCO) if self.voc else COCO_CLASSES

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of one split, in the order of ``instances_<split>.json`` or by name.

        Raises:
            ValueError: there is no such split.
            DataError: a photo is absent, or its labels or mask cannot be used.
        """
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Go through one split; an entry that cannot be used is given as what is wrong with it."""
        check_split(name, self.splits)
        photos, labels = _photos(self.root, name), _labels(self.root, name)
        masks, forms = self._masks(name, labels)
        listed = photos if labels is None or labels.path.suffix == ".npy" else labels.vectors or {}
        for stem in map(str, listed):
            form = forms if isinstance(forms, MaskForm) else forms.get(stem, MaskForm())
            try:
                yield self._sample(stem, photos.get(stem), masks.get(stem), form, labels)
            except DataError as error:
                yield error

    def _sample(
        self,
        stem: str,
        photo: Path | None,
        mask: Path | None,
        form: MaskForm,
        labels: LabelFile | None,
    ) -> Sample:
        if photo is None:
            source = self.root if labels is None else labels.path
            raise DataError(f"{source} lists {stem}.jpg, which is not there; add it or remove it")
        if labels is not None:
            places = coco_places(voc=self.voc)
            known = labels.classes_of(stem, str(photo))
            classes = sorted(places[index] - 1 for index in known if places[index])
            return Sample(stem, photo, mask, tuple(classes), form)
        if mask is None:
            raise DataError(
                f"{photo} has neither labels nor a mask; add the mask, "
                f"annotations/instances_*.json or {VECTOR_FILES[0]}"
            )
        found = mask_classes(mask, num_classes=len(self.classes), form=form)
        return Sample(stem, photo, mask, found, form)

    def _masks(
        self, name: str, labels: LabelFile | None
    ) -> tuple[dict[str, Path], MaskForm | dict[str, MaskForm]]:
        """Masks by image, and the form of all or of each."""
        for folder in _MASK_FOLDERS:
            masks = {path.stem: path for path in sorted((self.root / folder / name).glob("*.png"))}
            if masks:
                stuff: CocoIds | None = "stuff" if folder == "stuffthingmaps" else None
                ids = self.ids or stuff or _tell_ids(masks, labels)
                return masks, coco_form(ids, voc=self.voc)
        listing = self.root / "annotations" / f"panoptic_{name}.json"
        if listing.is_file():
            folder_of = self.root / "annotations" / f"panoptic_{name}"
            masks = {path.stem: path for path in sorted(folder_of.glob("*.png"))}
            return masks, _panoptic_forms(listing, voc=self.voc)
        return {}, MaskForm()


def open_coco(root: str | Path, *, ids: CocoIds | None = None, voc: bool = False) -> CocoFolder:
    """Find the splits of a folder laid out like MS COCO.

    Args:
        root: the folder that holds the folders of photos, such as train2017 and val2017.
        ids: what the masks hold; None tells it from the labels, see `CocoFolder`.
        voc: speak of the 20 classes of VOC.

    Returns:
        The data set, with 80 or 20 classes.

    Raises:
        DataError: the folder holds no photos.
    """
    root = Path(root)
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
    """Name the folders of photos."""
    found = {
        path.name
        for folder in _PHOTO_FOLDERS
        for path in (root / folder).glob("*/")
        if _SPLIT.fullmatch(path.name) and next(path.glob("*.jpg"), None)
    }
    return tuple(sorted(found))


def _photos(root: Path, name: str) -> dict[str, Path]:
    for folder in _PHOTO_FOLDERS:
        found = {path.stem: path for path in sorted((root / folder / name).glob("*.jpg"))}
        if found:
            return found
    raise DataError(f"{root} holds no photos of {name} any more; open it again")


def _labels(root: Path, name: str) -> LabelFile | None:
    """Indices of COCO classes by image."""
    path = root / "annotations" / f"instances_{name}.json"
    if path.is_file():
        return LabelFile(path, COCO_CLASSES, vectors=_instances(path))
    vectors = [root / file for file in VECTOR_FILES if (root / file).is_file()]
    return read_label_vectors(vectors[0], COCO_CLASSES) if vectors else None


def _instances(path: Path) -> dict[str | int, tuple[int, ...]]:
    index = {number: place for place, number in enumerate(COCO_IDS.values())}
    content = _read_json(path)
    try:
        stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        found: dict[str, set[int]] = {stem: set() for stem in stems.values()}
        for annotation in content["annotations"]:
            found[stems[annotation["image_id"]]].add(index[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no list of COCO instances ({type(error).__name__}: {error}); expected "
            "images, and annotations with their image_id and category_id"
        ) from error
    return {stem: tuple(sorted(classes)) for stem, classes in found.items()}


def _panoptic_forms(path: Path, *, voc: bool) -> dict[str, MaskForm]:
    category = dict(zip(COCO_IDS.values(), coco_places(voc=voc), strict=True))
    content = _read_json(path)
    try:
        return {
            Path(image["file_name"]).stem: MaskForm(
                colours=True,
                ids={
                    one["id"]: category.get(one["category_id"], 0) for one in image["segments_info"]
                },
                ignored=(0,),
            )
            for image in content["annotations"]
        }
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no list of COCO panoptic masks ({type(error).__name__}: {error}); expected "
            "annotations with file_name and segments_info"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again") from error


def _tell_ids(masks: Mapping[str, Path], labels: LabelFile | None) -> CocoIds:
    """Count the masks that show no class but those of their labels, under either reading."""
    readings = {
        "contiguous": coco_form("contiguous").ids or {},
        "original": coco_form("original").ids or {},
    }
    fits = dict.fromkeys(readings, 0)
    for stem, path in list(masks.items())[:_EVIDENCE]:
        try:
            known = () if labels is None else labels.classes_of(stem, str(path))
            values = present(mask_values(path)).tolist()
        except DataError:
            continue  # it is told of where it is used
        named = {index + 1 for index in known} | {0}
        for reading, ids in readings.items():
            fits[reading] += {ids.get(value, -1) for value in values if value != 255} <= named
    return "original" if fits["original"] > fits["contiguous"] else "contiguous"
