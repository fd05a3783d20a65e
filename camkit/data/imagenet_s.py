"""The folder layout of ImageNet-S: ImageNet photos by class, with masks in colours."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from camkit.data.names import check_split, read_names
from camkit.data.sample import MaskForm, Sample, all_usable
from camkit.errors import DataError

IMAGENET_S_FORM = MaskForm(colours=True, ignored=(1000,))
"""An id is red + 256 * green; 0 is any other category, 1000 counts nowhere."""

_SPLITS = ("train", "train-semi", "validation", "test")
_CLASS_FOLDER = re.compile(r"n\d{8}")
_PHOTOS = (".jpeg", ".jpg")
_SIZES = (50, 300, 919)


@dataclass(frozen=True)
class ImageNetSFolder:
    """ImageNet-S with 50, 300 or 919 classes; `open_imagenet_s` finds its classes and splits.

    Photos are ``<split>/<WordNet id>/*.JPEG``, masks ``<split>-segmentation/<WordNet id>/*.png``;
    train-semi and validation have them. The label of an image is its folder. Classes bear
    ImageNet's names, as the vocabulary of an ImageNet classifier does.

    In the set of 919, five classes stand for two ImageNet classes each (sunglasses and sunglass,
    such twins); their names are those of the twin that names the folder.
    """

    root: Path
    folders: tuple[str, ...]
    classes: tuple[str, ...]
    splits: tuple[str, ...]

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of one split, class by class.

        Raises:
            ValueError: there is no such split.
            DataError: a folder of the split is no class.
        """
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Go through one split; a folder that is no class is given as an error."""
        check_split(name, self.splits)
        for folder in sorted((self.root / name).glob("n*/")):
            if folder.name not in self.folders:
                yield DataError(f"{folder} is none of the {len(self.folders)} classes; remove it")
                continue
            masks = self.root / f"{name}-segmentation" / folder.name
            known = {path.stem: path for path in masks.glob("*.png")}
            index = self.folders.index(folder.name)
            for photo in sorted(folder.iterdir()):
                if photo.suffix.lower() in _PHOTOS:
                    mask = known.get(photo.stem)
                    yield Sample(photo.stem, photo, mask, (index,), IMAGENET_S_FORM)


def open_imagenet_s(root: str | Path) -> ImageNetSFolder:
    """Find the classes and splits of a folder of ImageNet-S.

    Ids follow the sorted WordNet ids of all classes, so all must be known: from the official
    ``ImageNetS_categories_im*.txt`` in the folder, or else from its class folders.

    Args:
        root: such as ImageNetS50, the folder that holds ``validation`` and its masks.

    Returns:
        The data set.

    Raises:
        DataError: the folder has no split, or some of its classes are missing and not listed.
    """
    root = Path(root)
    splits = tuple(name for name in _SPLITS if next((root / name).glob("n*/"), None))
    if not splits:
        raise DataError(
            f"{root} is no folder of ImageNet-S; expected {', '.join(_SPLITS)} with one folder for "
            "each class, such as n01443537"
        )
    lists = sorted(root.glob("ImageNetS_categories_im*.txt"))
    if lists:
        folders = tuple(sorted(read_names(lists[0])))
    else:
        found = {path.name for name in splits for path in (root / name).glob("n*/")}
        folders = tuple(sorted(name for name in found if _CLASS_FOLDER.fullmatch(name)))
        if len(folders) not in _SIZES:
            raise DataError(
                f"{root} has {len(folders)} class folders, expected 50, 300 or 919; ids count all "
                f"classes, so put ImageNetS_categories_im50.txt (or 300, 919) of ImageNet-S there"
            )
    return ImageNetSFolder(root, folders, _names(folders), splits)


def _names(folders: tuple[str, ...]) -> tuple[str, ...]:
    """ImageNet's names, with the WordNet id behind a name that two classes bear."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    known = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    names = [known.get(folder, folder) for folder in folders]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({folder})"
        for name, folder in zip(names, folders, strict=True)
    )
