"""The folder layout of PASCAL VOC: photos, masks and lists of names."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from camkit.data.colours import ColourForm, voc_colours
from camkit.data.files import in_short, masks_of, photos_in
from camkit.data.labels import ImageLabels, find_labels
from camkit.data.names import check_split, composed, on_disk, read_image_names
from camkit.data.reading import Reading, some_class
from camkit.data.sample import MaskForm, MaskReader, Sample, all_usable, mask_classes
from camkit.errors import DataError
from camkit.photo import decode
from camkit.printing import several

_NAMES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor"""

VOC_CLASSES = tuple(_NAMES.split())
"""The 20 classes of PASCAL VOC in the order of their mask ids, which start at 1."""

_MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")


@dataclass(frozen=True)
class VOCFolder:
    """A data set laid out like PASCAL VOC; `open_voc` finds its classes and splits.

    Photos are in ``JPEGImages``, masks in ``SegmentationClass``, and each file
    ``ImageSets/Segmentation/<split>.txt`` lists names, one per line, as
    `camkit.data.names.read_image_names` reads a line. Labels come from the first of
    `camkit.data.labels.LABEL_FILES`, such as ``labels.json``, else from the masks.

    Masks hold ids, or the colours of VOC's palette, as the first mask of a split does.

    ``SegmentationClassAug`` holds the coarser masks of SBD for the 10 582 names of train_aug. With
    ``masks=None`` a split is read from the folder that has more masks of it, or from
    ``SegmentationClass`` if both have as many.

    Attributes:
        root: the folder of the data set.
        classes: in the order of their ids.
        splits: names of the lists.
        masks: the folder of the masks.
        reading: settings of the masks.
        colours: the form of masks whose colours a file lists, as CVAT's do; their labels come from
            the masks.
        photos: folders of the photos, the likeliest first.
    """

    root: Path
    classes: tuple[str, ...] = VOC_CLASSES
    splits: tuple[str, ...] = ("train", "val")
    masks: Literal["SegmentationClass", "SegmentationClassAug"] | None = None
    reading: Reading = field(default=Reading())
    colours: ColourForm | None = None
    photos: tuple[Path, ...] = ()

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split; without a file of labels, every mask is read once."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        labels = None if self.colours is not None else find_labels(self.root, self.classes)
        entries = self._entries(name, labels)
        return some_class(entries, name, self.root) if labels is None else entries

    def _entries(self, name: str, labels: ImageLabels | None) -> Iterator[Sample | DataError]:
        listing = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
        photos = _Photos(self.photos or (self.root / "JPEGImages",))
        lines = read_image_names(listing)
        masks = self._masks(lines)
        form = self._form(masks)
        for stem, line in lines.items():
            try:
                source = f"{listing}, line {line}"
                sample = Sample(stem, photos.find(stem, source), masks.get(stem), (), form)
                yield self._labelled(sample, labels, source)
            except DataError as error:
                yield error

    def _masks(self, names: dict[str, int]) -> dict[str, Path]:
        """Return the masks of the folder that has more of them."""
        masks: dict[str, Path] = {}
        for folder in _MASK_FOLDERS if self.masks is None else (self.masks,):
            files = (self.root / folder).glob("*.png")
            listed = {name: path for path in files if (name := composed(path.stem)) in names}
            if not listed:  # perhaps names such as a_mask.png, or other formats
                places = {name: self.root / "JPEGImages" / f"{name}.jpg" for name in names}
                listed = masks_of(places, self.root / "JPEGImages", self.root / folder)
            masks = max(masks, listed, key=len)
        return masks

    def _form(self, masks: dict[str, Path]) -> MaskReader:
        if self.colours is not None:
            return self.colours
        given = self.reading.given()
        first = next(iter(masks.values()), None)
        if first is not None and not given and first.suffix == ".png" and _in_colours(first):
            return voc_colours(len(self.classes))
        return self.reading.form(len(self.classes))

    def _labelled(self, sample: Sample, labels: ImageLabels | None, source: str) -> Sample:
        """Return the sample with its labels."""
        if labels is not None:
            return replace(sample, classes=labels.of(sample.name, source))
        if sample.mask is None:
            folder = self.masks or _MASK_FOLDERS[0]
            raise DataError(
                f"{source}: {sample.name} has neither a mask in {folder} nor labels; "
                "add the mask or a labels.json"
            )
        count = len(self.classes)
        return replace(
            sample, classes=mask_classes(sample.mask, num_classes=count, form=sample.form)
        )

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        labels = None if self.colours is not None else find_labels(self.root, self.classes)
        names = f"{several(len(self.classes), 'class')} ({in_short(self.classes)})"
        source = "labels from the masks" if labels is None else f"labels from {labels.path.name}"
        sentences = [f"ImageSets/Segmentation: a layout of PASCAL VOC, {names}, {source}"]
        for split in self.splits:
            listing = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
            lines = read_image_names(listing)
            masks = self._masks(lines)
            form = self._form(masks)
            what = "ids" if isinstance(form, MaskForm) else "colours"
            if isinstance(form, ColourForm):
                what = f"the colours of {form.source}"
            place = next((path.parent.name for path in masks.values()), "no folder")
            counts = f"{several(len(lines), 'name')}, {several(len(masks), 'mask')}"
            sentences.append(f"{split}: {counts} in {place}, {what}")
        return tuple(sentences)


class _Photos:
    """The photos of folders, looked up by name."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self._folders = folders
        self._known: dict[str, Path] | None = None

    def find(self, stem: str, source: str) -> Path:
        """Return the photo of a name; ``source`` is the line that lists it."""
        usual = on_disk(self._folders[0] / f"{stem}.jpg")
        if usual.is_file():
            return usual
        if self._known is None:
            self._known = {}
            for folder in reversed(self._folders):
                self._known |= photos_in(folder)
        if stem not in self._known:
            raise DataError(f"{source}: {usual} does not exist; add the photo or remove the line")
        return self._known[stem]


def _in_colours(mask: Path) -> bool:
    try:
        return decode(mask).mode == "RGB"
    except DataError:
        return False  # the error is reported where the mask is used


def open_voc(
    root: str | Path,
    *,
    masks: Literal["SegmentationClass", "SegmentationClassAug"] | None = None,
    reading: Reading | None = None,
) -> VOCFolder:
    """Find the classes and splits of a folder laid out like PASCAL VOC.

    Args:
        root: the folder that holds ``JPEGImages`` and ``ImageSets``.
        masks: the folder of the masks; None picks one for each split, see `VOCFolder`.
        reading: classes and settings of the masks.

    Returns:
        The data set, with the classes of ``labels.json``, of ``reading``, or the 20 of VOC.

    Raises:
        DataError: the folder lists no split, has no such masks, or its labels have another form.
    """
    root, reading = Path(root).absolute(), reading or Reading()
    splits = voc_splits(root)
    if masks is not None and not (root / masks).is_dir():
        raise DataError(f"{root / masks} does not exist; add the folder or leave out `masks`")
    classes = reading.classes or VOC_CLASSES
    labels = find_labels(root, classes)
    names = classes if labels is None else labels.classes or classes
    if labels is not None and reading.classes is not None and names != classes:
        raise ValueError(f"{labels.path} names the classes; leave out `classes`")
    return VOCFolder(root, names, splits, masks, replace(reading, classes=None, layout=None))


def voc_splits(root: Path) -> tuple[str, ...]:
    """List the splits of a folder laid out like PASCAL VOC; a DataError if there are none."""
    lists = root / "ImageSets" / "Segmentation"
    splits = tuple(sorted(path.stem for path in lists.glob("*.txt")))
    if not splits:
        raise DataError(f"{lists} holds no list of names; add one, such as train.txt")
    return splits
