"""The layouts that data sets come in, and the function that recognises and opens them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from camkit.data.coco import coco_splits, open_coco
from camkit.data.cocofile import is_panoptic
from camkit.data.cvat import is_cvat, open_cvat, refuse_xml_of_others
from camkit.data.folders import open_folder, plain_label_file
from camkit.data.huggingface import is_huggingface, open_huggingface
from camkit.data.imagenet import open_imagenet_s
from camkit.data.labelme import labelme_splits, open_labelme
from camkit.data.mmseg import mask_folders, open_mmseg, refuse_lossy_masks
from camkit.data.panoptic import open_panoptic, panoptic_splits
from camkit.data.reading import Reading, Zero
from camkit.data.sample import VOC_FORM, DataSet, Described, MaskForm, Sample
from camkit.data.voc import open_voc
from camkit.data.yolo import is_yolo, open_yolo
from camkit.errors import DataError, closest, nearby


@dataclass(frozen=True)
class Layout:
    """A layout of data sets.

    Attributes:
        holds: what a folder of this layout holds, in a few words.
        fits: returns whether a folder, or a file, has this layout.
        open: opens it.
        settings: the settings of `Reading` that it takes.
        files: whether it may be a single file, too.
    """

    holds: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, Reading], DataSet]
    settings: tuple[str, ...] = ()
    files: bool = False


_MASKS = ("void", "zero", "values")


def _is_voc(root: Path) -> bool:
    return (root / "JPEGImages").is_dir() and (root / "ImageSets" / "Segmentation").is_dir()


def _is_plain(root: Path) -> bool:
    return (root / "images").is_dir() and plain_label_file(root) is not None


def _is_imagenet_s(root: Path) -> bool:
    return any((root / f"{split}-segmentation").is_dir() for split in ("validation", "train-semi"))


LAYOUTS: dict[str, Layout] = {
    "cvat": Layout(
        "labelmap.txt and SegmentationClass/, or annotations.xml, or archives of these",
        is_cvat,
        lambda root, _: open_cvat(root),
        files=True,
    ),
    "voc": Layout(
        "JPEGImages/ and ImageSets/Segmentation/",
        _is_voc,
        lambda root, reading: open_voc(root, reading=reading),
        ("classes", *_MASKS),
    ),
    "imagenet-s": Layout(
        "validation/ and validation-segmentation/",
        _is_imagenet_s,
        lambda root, _: open_imagenet_s(root),
    ),
    "yolo": Layout(
        "data.yaml, images/ and labels/", is_yolo, lambda root, _: open_yolo(root), files=True
    ),
    "panoptic": Layout(
        "annotations/panoptic_*.json with PNG files of segments, without instances",
        lambda root: bool(panoptic_splits(root)),
        lambda root, _: open_panoptic(root),
        files=True,
    ),
    "coco": Layout(
        "annotations/*.json, result.json, labels.json or folders such as train2017/",
        lambda root: bool(coco_splits(root)),
        lambda root, reading: open_coco(root, void=reading.void),
        ("void",),
        files=True,
    ),
    "plain": Layout(
        "images/ and a file of labels such as labels.csv",
        _is_plain,
        lambda root, reading: _reformed(open_folder(root), reading),
        _MASKS,
    ),
    "labelme": Layout(
        "*.json with shapes beside photos",
        lambda root: bool(labelme_splits(root)),
        lambda root, reading: open_labelme(root, reading=reading),
        ("classes",),
    ),
    "huggingface": Layout(
        "dataset_dict.json, state.json or data/*.parquet",
        is_huggingface,
        lambda root, reading: open_huggingface(root, reading=reading),
        ("classes", *_MASKS),
    ),
    "mmseg": Layout(
        "folders of photos and masks such as img_dir/ and ann_dir/, images/ and masks/",
        lambda root: bool(mask_folders(root)),
        lambda root, reading: open_mmseg(root, reading=reading),
        ("classes", *_MASKS),
    ),
}
"""The layouts that `open_dataset` knows, in the order in which they are tried."""

_SUFFIXES = {".json": "coco", ".zip": "cvat", ".xml": "cvat", ".yaml": "yolo", ".yml": "yolo"}
DATASET_FILES = tuple(_SUFFIXES)
"""Suffixes of files that are a data set by themselves."""


def open_dataset(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    void: Sequence[int] | None = None,
    zero: Zero | None = None,
    values: Mapping[int, int] | None = None,
    layout: str | None = None,
) -> DataSet:
    """Open a data set of any layout in `LAYOUTS`.

    ``docs/data.md`` lists what is read of each. The settings are for files that do not say how
    their masks are meant; a setting that the layout has no use for is an error.

    Args:
        path: the folder of the data set; or a file of annotations in COCO's form, an archive or
            an XML file of CVAT, or the ``data.yaml`` of YOLO.
        classes: names of the classes, background not counted, in the order of their ids.
        void: values of masks that are not scored, in place of 255.
        zero: whether 0 in a mask is background, not scored, or the first class.
        values: the class number (from 1; 0 for background) of each value of the masks, such as
            {255: 1} for masks in which 255 marks the only class.
        layout: a name of `LAYOUTS`; None recognises the layout.

    Raises:
        DataError: the folder has another layout, or a file in it cannot be used.
        ValueError: there is no such layout, or it does not take a setting.
    """
    return open_with(
        path,
        Reading(
            None if classes is None else tuple(classes),
            None if void is None else tuple(void),
            zero,
            values,
            layout,
        ),
    )


def open_with(path: str | Path, reading: Reading) -> DataSet:
    """Open a data set with settings; see `open_dataset`."""
    root = Path(path)
    single = root.is_file() and root.suffix.lower() in _SUFFIXES
    if not root.is_dir() and not single:
        hint = nearby(root) or "; name the folder that holds the data set"
        raise DataError(f"{root} is not a folder{hint}")
    name = reading.layout or (_of_file(root) if single else find_layout(root))
    if name is None:
        refuse_lossy_masks(root)
        refuse_xml_of_others(root)
        raise DataError(_unknown(root))
    if name not in LAYOUTS:
        raise ValueError(
            f"`layout` must be the name of a layout, got {name!r}; {closest(name, LAYOUTS)}"
        )
    found = LAYOUTS[name]
    if single and not found.files:
        raise DataError(f"{root} is a file, but the layout {name} is a folder; name the folder")
    for setting in reading.given():
        if setting not in found.settings:
            raise ValueError(
                f"the layout of {root} is {name}, whose files say what `{setting}` would; leave it "
                "out"
            )
    return found.open(root, reading)


def find_layout(root: Path) -> str | None:
    """Return the name of the layout of a folder, or None if it has none that is known."""
    return next((name for name, layout in LAYOUTS.items() if layout.fits(root)), None)


def _of_file(path: Path) -> str:
    """Return the name of the layout of a single file."""
    name = _SUFFIXES[path.suffix.lower()]
    return "panoptic" if name == "coco" and is_panoptic(path) else name


def _unknown(root: Path) -> str:
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    shown = ", ".join(entries[:8]) or "nothing"
    more = ", ..." if len(entries) > 8 else ""
    expected = ", or ".join(f"{layout.holds} ({name})" for name, layout in LAYOUTS.items())
    return (
        f"{root} is no known data set: expected {expected}; got {shown}{more}; name the folder "
        "that holds these"
    )


@dataclass(frozen=True)
class Reformed:
    """A data set whose masks of ids are read with other settings.

    Attributes:
        data: the data set.
        form: of its masks.
    """

    data: DataSet
    form: MaskForm

    @property
    def root(self) -> Path:
        return self.data.root

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.classes

    @property
    def splits(self) -> tuple[str, ...]:
        return self.data.splits

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split."""
        return tuple(map(self._reformed, self.data.split(name)))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        for entry in self.data.entries(name):
            yield entry if isinstance(entry, DataError) else self._reformed(entry)

    def _reformed(self, sample: Sample) -> Sample:
        return replace(sample, form=self.form) if sample.form == VOC_FORM else sample

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        own = self.data.describe() if isinstance(self.data, Described) else ()
        return (*own, f"masks are read as {self.form}")


def _reformed(data: DataSet, reading: Reading) -> DataSet:
    """Return the data set with the settings of the masks, if there are any."""
    form = reading.form(len(data.classes))
    return data if form == VOC_FORM else Reformed(data, form)
