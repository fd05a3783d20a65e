"""The folder layout of PASCAL VOC: photos, palette masks and lists of names."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from camkit.data.labels import ImageLabels, find_labels
from camkit.data.names import check_split, read_image_names
from camkit.data.sample import Sample, all_usable, mask_classes
from camkit.errors import DataError

_NAMES = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor"""

VOC_CLASSES = tuple(_NAMES.split())
"""The 20 classes of PASCAL VOC in the order of their mask ids, which start at 1."""

_MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")


@dataclass(frozen=True)
class VOCFolder:
    """A data set laid out like PASCAL VOC; `open_voc` finds its classes and splits.

    Photos are ``JPEGImages/*.jpg``, masks ``SegmentationClass/*.png``, and each file
    ``ImageSets/Segmentation/<split>.txt`` lists names, one per line; a line of PSA's lists,
    ``/JPEGImages/a.jpg /SegmentationClassAug/a.png``, is read as the name a. Labels come from
    ``labels.json``, ``{"classes": [...], "labels": {name: [class names]}}``, else from
    ``cls_labels.npy`` or ``cls_labels_onehot.npy``, {name: 0/1 vector}, else from the masks.

    ``SegmentationClassAug`` holds the coarser masks of SBD for the 10 582 names of train_aug. With
    ``masks=None`` a split is read from the folder that has more masks of it, or from
    ``SegmentationClass`` if both have as many.
    """

    root: Path
    classes: tuple[str, ...] = VOC_CLASSES
    splits: tuple[str, ...] = ("train", "val")
    masks: Literal["SegmentationClass", "SegmentationClassAug"] | None = None

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split; without a file of labels, every mask is read once."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        check_split(name, self.splits)
        labels = find_labels(self.root, VOC_CLASSES)
        listing = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
        lines = read_image_names(listing)
        masks: dict[str, Path] = {}
        for folder in _MASK_FOLDERS if self.masks is None else (self.masks,):
            files = (self.root / folder).glob("*.png")
            listed = {path.stem: path for path in files if path.stem in lines}
            masks = max(masks, listed, key=len)
        for stem, line in lines.items():
            try:
                yield self._sample(stem, masks.get(stem), labels, f"{listing}, line {line}")
            except DataError as error:
                yield error

    def _sample(
        self, stem: str, mask: Path | None, labels: ImageLabels | None, source: str
    ) -> Sample:
        photo = self.root / "JPEGImages" / f"{stem}.jpg"
        if not photo.is_file():
            raise DataError(f"{source}: {photo} does not exist; add the photo or remove the line")
        if labels is not None:
            return Sample(stem, photo, mask, labels.of(stem, source))
        if mask is None:
            folder = self.masks or _MASK_FOLDERS[0]
            raise DataError(
                f"{source}: {stem} has neither a mask in {folder} nor labels; "
                "add the mask or a labels.json"
            )
        return Sample(stem, photo, mask, mask_classes(mask, num_classes=len(self.classes)))


def open_voc(
    root: str | Path,
    *,
    masks: Literal["SegmentationClass", "SegmentationClassAug"] | None = None,
) -> VOCFolder:
    """Find the classes and splits of a folder laid out like PASCAL VOC.

    Args:
        root: the folder that holds ``JPEGImages`` and ``ImageSets``.
        masks: the folder of the masks; None picks one for each split, see `VOCFolder`.

    Returns:
        The data set, with the classes of ``labels.json`` or the 20 of VOC.

    Raises:
        DataError: the folder lists no split, has no such masks, or its labels have another form.
    """
    root = Path(root).absolute()
    lists = root / "ImageSets" / "Segmentation"
    splits = tuple(sorted(path.stem for path in lists.glob("*.txt")))
    if not splits:
        raise DataError(f"{lists} holds no list of names; add one, such as train.txt")
    if masks is not None and not (root / masks).is_dir():
        raise DataError(f"{root / masks} does not exist; add the folder or leave out `masks`")
    labels = find_labels(root, VOC_CLASSES)
    classes = VOC_CLASSES if labels is None else labels.classes or VOC_CLASSES
    return VOCFolder(root, classes, splits, masks)
