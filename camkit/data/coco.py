"""MS COCO: its classes, folder layouts and forms of masks."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from camkit.data.cocofile import (
    CocoFile,
    CocoImage,
    Crowds,
    is_coco,
    is_panoptic,
    panoptic_form,
    read_categories,
    read_coco,
    reading_json,
)
from camkit.data.files import (
    PhotoFinder,
    files_in,
    folders_in,
    holds,
    in_short,
    photos_in,
    relative_to,
)
from camkit.data.labels import VECTOR_FILES, ImageLabels, find_labels
from camkit.data.names import check_split
from camkit.data.sample import (
    VOC_FORM,
    MaskForm,
    MaskReader,
    Sample,
    all_usable,
    mask_classes,
    mask_values,
    unique_values,
)
from camkit.data.voc import VOC_CLASSES
from camkit.errors import DataError
from camkit.formats import IMAGE_SUFFIXES
from camkit.printing import several
from camkit.tensors import IGNORE
from camkit.untrusted import read_json

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

_SPLIT = re.compile(r"(train|val|test)20\d\d")
_PHOTO_FOLDERS = ("", "images", "JPEGImages")
_MASK_FOLDERS = ("SegmentationClass", "masks", "annotations", "stuffthingmaps")
_OTHER_LISTS = ("panoptic_", "captions_", "person_keypoints_", "stuff_", "image_info_")
_ROBOFLOW = "_annotations.coco.json"
_KIND = re.compile("^(instances|panoptic)_")
_WHOLE = (
    "panoptic",
    "result",
    "labels",
    "annotations",
    "instances",
    "_annotations.coco",
    "coco",
    "default",
)
_FEW = 12  # JSON files at the top; where there are more, each is about one image


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
class CocoSplit:
    """A split of a `CocoFolder`.

    Attributes:
        name: of the split.
        annotations: the file of its annotations, if there is one.
        folders: where its photos may be, the likeliest first.
    """

    name: str
    annotations: Path | None
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class CocoFolder:
    """A data set with annotations in COCO's form; `open_coco` finds its splits.

    Annotations are ``annotations/instances_<split>.json`` (COCO, CVAT, camkit's export), other
    files in ``annotations``, ``<split>/_annotations.coco.json`` (Roboflow), or one file at the top
    (``result.json`` of Label Studio, ``labels.json`` of FiftyOne). Their photos are found by
    ``file_name``, or by its last part if its folders are those of another machine. Classes are
    the categories, in the order of their ids, whatever the ids are.

    Masks are drawn from polygons and run lengths, see `camkit.data.drawn.CocoMask`; an image with
    an annotation that is only a box has labels but no mask. PNG masks go before: files with the
    names of the photos in the folder ``<split>`` of ``SegmentationClass``, ``masks``,
    ``annotations`` or ``stuffthingmaps``, or the panoptic ones, ``annotations/panoptic_<split>/``
    beside ``annotations/panoptic_<split>.json`` of COCO itself. Stuff is background.

    Crowd regions (``iscrowd``) are not scored. CVAT and Datumaro mark all that was painted with a
    brush so; in their files, crowds are objects.

    Folders of photos named like COCO's (train2017) need no annotations: labels then come from
    ``cls_labels.npy`` or ``cls_labels_onehot.npy``, else from the masks.

    Attributes:
        root: the folder of the data set.
        parts: the splits.
        categories: id and name of each class.
        ids: the ids in PNG masks. None takes "stuff" in ``stuffthingmaps``, else "original" if more
            of the first 100 masks agree with the labels that way, else "contiguous".
        voc: use the 20 classes of VOC, by VOC's names; all others become background.
        void: values of PNG masks that are not scored.
        crowds: what annotations with ``iscrowd`` are, see `camkit.data.cocofile.read_coco`.
    """

    root: Path
    parts: tuple[CocoSplit, ...]
    categories: tuple[tuple[int, str], ...]
    ids: CocoIds | None = None
    voc: bool = False
    void: tuple[int, ...] = (IGNORE,)
    crowds: Crowds | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(VOC_IN_COCO) if self.voc else tuple(name for _, name in self.categories)

    @property
    def _official(self) -> bool:
        return self.categories == _OFFICIAL

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, in the order of its annotations or by name."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        part = self.parts[self.splits.index(name)]
        if part.annotations is None:
            yield from self._unannotated(part)
            return
        file = read_coco(part.annotations, crowds=self.crowds)
        index = self._index()
        labels = {image: _classes_of(image, index) for image in file.images}
        names = sample_names(file.images)
        known = {names[image.number]: labels[image] for image in file.images}
        masks = self._masks(name, known)
        finder = PhotoFinder(part.folders)
        for image in file.images:
            try:
                photo = self._photo(image, finder, file)
                mask, form = masks.get(names[image.number]) or _drawn(image, photo, file, index)
                yield Sample(names[image.number], photo, mask, labels[image], form)
            except DataError as error:
                yield error
        for fault in file.stray:
            yield DataError(fault)

    def _index(self) -> dict[int, int]:
        """Return the class index of each category that is a class."""
        if not self.voc:
            return {number: place for place, (number, _) in enumerate(self.categories)}
        pairs = zip(self.categories, _mask_ids(voc=True), strict=True)
        return {number: value - 1 for (number, _), value in pairs if value}

    def _photo(self, image: CocoImage, finder: PhotoFinder, file: CocoFile) -> Path:
        if image.fault is not None:
            raise DataError(image.fault)
        photo = finder.find(image.file_name)
        if photo is None:
            raise DataError(
                f"{file.path} lists {image.file_name}, which is not there; add it or remove it, or "
                "name the folder of the photos (`images` of open_coco)"
            )
        return photo

    def _unannotated(self, part: CocoSplit) -> Iterator[Sample | DataError]:
        """Yield the samples of a folder of photos, with labels from vectors or from masks."""
        photos = next(filter(None, map(photos_in, part.folders)), None)
        if photos is None:
            raise DataError(f"{self.root} no longer holds photos of {part.name}; open it again")
        labels = find_labels(self.root, COCO_CLASSES)
        try:
            known = {} if labels is None else {n: labels.of(n, n) for n in photos}
        except DataError:
            known = {}  # the error is reported with its image
        masks = self._masks(part.name, known)
        for stem, photo in photos.items():
            try:
                yield self._sample(stem, photo, masks.get(stem), labels)
            except DataError as error:
                yield error

    def _sample(
        self,
        stem: str,
        photo: Path,
        mask_and_form: tuple[Path, MaskForm] | None,
        labels: ImageLabels | None,
    ) -> Sample:
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

    def _masks(
        self, name: str, labels: Mapping[str, Sequence[int]]
    ) -> dict[str, tuple[Path, MaskForm]]:
        """Map each image with a PNG mask to the mask and its form."""
        for folder in _MASK_FOLDERS:
            if masks := _files(self.root / folder / name, "png"):
                stuff: CocoIds | None = "stuff" if folder == "stuffthingmaps" else None
                ids = self.ids or stuff or self._recognised(masks, labels)
                form = self._form(ids)
                return {stem: (path, form) for stem, path in masks.items()}
        listing = self.root / "annotations" / f"panoptic_{name}.json"
        if not listing.is_file() or not self._official:  # of others, objects alone are drawn
            return {}
        forms = _panoptic_forms(listing, self._index(), self.crowds)
        masks = _files(listing.with_suffix(""), "png")
        return {stem: (path, forms.get(stem, VOC_FORM)) for stem, path in masks.items()}

    def _form(self, ids: CocoIds) -> MaskForm:
        """Return the form of PNG masks with these ids."""
        if self._official:
            return replace(coco_form(ids, voc=self.voc), ignored=self.void)
        if ids == "stuff":
            raise DataError(f'{self.root} has its own categories, so ids="stuff" has no meaning')
        places = range(1, len(self.categories) + 1)
        values = places if ids == "contiguous" else [number for number, _ in self.categories]
        return MaskForm(ids={0: 0} | dict(zip(values, places, strict=True)), ignored=self.void)

    def _recognised(
        self, masks: Mapping[str, Path], labels: Mapping[str, Sequence[int]]
    ) -> CocoIds:
        """Return the kind of ids with which more of the first masks agree with their labels."""
        kinds: tuple[CocoIds, CocoIds] = ("contiguous", "original")
        forms = {kind: self._form(kind) for kind in kinds}
        fits = dict.fromkeys(kinds, 0)
        for stem, path in list(masks.items())[:100]:
            try:
                values = unique_values(mask_values(path)).tolist()
            except DataError:
                continue  # the error is reported where the mask is used
            allowed = {index + 1 for index in labels.get(stem, ())} | {0}
            for kind, form in forms.items():
                ids = form.ids or {}
                held = {ids.get(value, -1) for value in values if value not in self.void}
                fits[kind] += held <= allowed
        return "original" if fits["original"] > fits["contiguous"] else "contiguous"

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for; this reads the annotations."""
        return tuple(sentence for part in self.parts for sentence in self._described(part))

    def _described(self, part: CocoSplit) -> Iterator[str]:
        if part.annotations is None:
            place = next((folder for folder in part.folders if folder.is_dir()), self.root)
            yield (
                f"{relative_to(place, self.root)}: photos of COCO without annotations; the classes "
                "are COCO's 80"
            )
        else:
            file = read_coco(part.annotations, crowds=self.crowds)
            count = several(len(file.categories), "category")
            own = f"{count} of its own ({in_short(file.categories)})"
            classes = "COCO's 80 categories" if self._official else own
            what = f"{relative_to(file.path, self.root)}: COCO annotations, {classes}"
            yield f"{what}, {_drawn_from(file)}"
        masks = self._masks(part.name, {})
        if masks:
            folder = next(iter(masks.values()))[0].parent
            yield (
                f"{relative_to(folder, self.root)}: {several(len(masks), 'mask')}, read in place "
                "of drawn ones"
            )


_OFFICIAL = tuple((number, name) for name, number in COCO_IDS.items())


def _classes_of(image: CocoImage, index: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(sorted({index[number] for number in image.present if number in index}))


def _drawn(
    image: CocoImage, photo: Path, file: CocoFile, index: Mapping[int, int]
) -> tuple[Path | None, MaskReader]:
    """Return the file and the form of a drawn mask, if the file holds it whole."""
    if image.boxes or not file.drawn:
        return None, VOC_FORM
    return file.path, image.form(file.path, photo, index)


def open_coco(
    root: str | Path,
    *,
    ids: CocoIds | None = None,
    voc: bool = False,
    images: str | Path | None = None,
    void: tuple[int, ...] | None = None,
    crowds: Crowds | None = None,
) -> CocoFolder:
    """Find the splits and classes of a data set with annotations in COCO's form.

    Args:
        root: the folder of the data set, or a file of annotations.
        ids: the ids in PNG masks; None recognises them, see `CocoFolder`.
        voc: use the 20 classes of VOC instead of COCO's 80.
        images: the folder of the photos; None looks near the annotations.
        void: values of PNG masks that are not scored; None takes 255.
        crowds: whether annotations with ``iscrowd`` are "ignored" or "objects". None takes them for
            objects only where CVAT or Datumaro wrote them, see `CocoFolder`.

    Raises:
        DataError: there are no annotations and no photos, or categories that disagree.
        ValueError: there are no such ids, or ``voc`` is asked of other categories than COCO's.
    """
    root = Path(root).absolute()
    if ids not in (None, "contiguous", "original", "stuff"):
        raise ValueError(f'`ids` must be "contiguous", "original" or "stuff", got "{ids}"')
    parts = coco_splits(root)
    if not parts:
        raise DataError(
            f"{root} holds no photos of COCO and no annotations; expected "
            "annotations/instances_*.json, or folders such as train2017/ and val2017/ with photos, "
            "at the top or in images/ or JPEGImages/"
        )
    if images is not None:
        first = Path(images).absolute()
        parts = tuple(replace(part, folders=(first, *part.folders)) for part in parts)
    if root.is_file():
        root = root.parents[root.parent.name == "annotations"]
    categories = merged_categories(
        [part.annotations for part in parts if part.annotations is not None]
    )
    if voc and categories != _OFFICIAL:
        raise ValueError(
            f"`voc` takes the classes of VOC from COCO's 80, but {root} has its own categories "
            f"({in_short(dict(categories))}); leave out `voc`"
        )
    ignored = (IGNORE,) if void is None else void
    return CocoFolder(root, parts, categories, ids, voc, ignored, crowds)


def coco_splits(root: Path) -> tuple[CocoSplit, ...]:
    """Find the splits of a folder, or of a file of annotations; none if it has another layout."""
    if root.is_file():
        if root.parent.name == "annotations":
            return (split_of(root, root.parent.parent),)
        return (split_of(root, root.parent, several=False),)
    lists = [
        path
        for path in sorted((root / "annotations").glob("*.json"))
        if not path.name.startswith(_OTHER_LISTS) and is_coco(path) and not is_panoptic(path)
    ]
    parts = {part.name: part for part in (split_of(path, root) for path in reversed(lists))}
    for folder in _PHOTO_FOLDERS:
        for path in folders_in(root / folder):
            named = _SPLIT.fullmatch(path.name) and path.name not in parts
            if named and holds(path, IMAGE_SUFFIXES, deep=False):
                folders = tuple(root / each / path.name for each in _PHOTO_FOLDERS)
                parts[path.name] = CocoSplit(path.name, None, folders)
    roboflow = (folder / _ROBOFLOW for folder in folders_in(root))
    for path in filter(Path.is_file, roboflow):
        parts.setdefault(path.parent.name, CocoSplit(path.parent.name, path, (path.parent,)))
    return tuple(parts[name] for name in sorted(parts)) or _at_the_top(root)


def _at_the_top(root: Path) -> tuple[CocoSplit, ...]:
    lists = files_in(root, ".json")
    fits = (path for path in lists if is_coco(path) and not is_panoptic(path))
    lists = list(fits) if len(lists) <= _FEW else []
    return tuple(split_of(path, root, several=len(lists) > 1) for path in lists)


def split_of(path: Path, root: Path, *, several: bool = True) -> CocoSplit:
    """Return the split of a file of annotations; the only one of a data set is called all."""
    name = _KIND.sub("", path.stem)
    inner = [folder / name for folder in (root / "images", root, root / "JPEGImages")]
    folders = (*inner, root / "images", root / "JPEGImages", root / "data", path.parent, root)
    if not several and name in _WHOLE:
        name = "all"
    return CocoSplit(name, path, tuple(folder for folder in folders if folder.is_dir()))


def merged_categories(lists: Sequence[Path]) -> tuple[tuple[int, str], ...]:
    """Join the categories of all splits; COCO's own where there are no annotations."""
    whole: dict[int, str] = {}
    for path in lists:
        for number, name in read_categories(path).items():
            if whole.setdefault(number, name) != name:
                raise DataError(
                    f"{path}: the category {number} is {name!r}, but {whole[number]!r} in "
                    f"{lists[0].name}; open the files one by one"
                )
    return tuple(sorted(whole.items())) if lists else _OFFICIAL


def sample_names(images: Sequence[CocoImage]) -> dict[Any, str]:
    """Name each image by its file, with folders where several files have one name."""
    paths = {i.number: PurePosixPath(i.file_name.replace("\\", "/")) for i in images}
    counts = Counter(path.stem for path in paths.values())
    return {
        number: path.stem if counts[path.stem] == 1 else path.with_suffix("").as_posix()
        for number, path in paths.items()
    }


def _drawn_from(file: CocoFile) -> str:
    """Say what the masks of a file are drawn from, and what is not drawn."""
    counts: Counter[str] = Counter()
    for image in file.images:
        counts["box"] += image.boxes
        for _, _, crowd, segmentation in image.annotations:
            counts["crowd"] += crowd
            rings = [segmentation] if isinstance(segmentation, dict) else segmentation
            counts.update(map(_kind, rings if isinstance(rings, list) else ()))
    drawn = [several(counts[kind], kind) for kind in ("polygon", "run length") if counts[kind]]
    notes = {
        "crowd": f"{several(counts['crowd'], 'crowd region')} ignored",
        "painted": f"{several(counts['painted'], 'crowd region')} taken for objects, as CVAT "
        "writes what was painted",
        "short": f"{several(counts['short'], 'polygon')} of fewer than 3 points left out",
        "box": f"{several(counts['box'], 'annotation')} without a segmentation: labels only",
    }
    first = f"masks drawn from {' and '.join(drawn)}" if file.drawn else "labels only"
    order = ["of objects that overlap, the smaller is on top"] * file.drawn
    return "; ".join([first, *(note for kind, note in notes.items() if counts[kind]), *order])


def _kind(segmentation: Any) -> str:
    if isinstance(segmentation, dict):
        return "run length"
    return "polygon" if isinstance(segmentation, list) and len(segmentation) >= 6 else "short"


def _files(folder: Path, ending: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob(f"*.{ending}"))}


def _panoptic_forms(
    path: Path, index: Mapping[int, int], crowds: Crowds | None
) -> dict[str, MaskForm]:
    forms = {}
    expected = "annotations with file_name and segments_info"
    with reading_json(path, "panoptic masks", expected):
        for image in read_json(path)["annotations"]:
            segments = image["segments_info"]
            values = {s["category_id"]: index.get(s["category_id"], -1) + 1 for s in segments}
            name = image["file_name"]
            forms[Path(name).stem] = panoptic_form(segments, values, f"{path}, {name}", crowds)
    return forms
