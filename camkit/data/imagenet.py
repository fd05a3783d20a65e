"""ImageNet: the classifier outputs of VOC classes, and the folder layout of ImageNet-S."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from camkit.data.labels import check_split, read_names
from camkit.data.sample import MaskForm, Sample, all_usable
from camkit.errors import DataError
from camkit.vocabulary import Vocabulary

VOC_IN_IMAGENET: dict[str, tuple[int, ...]] = {
    "aeroplane": (404, 895),  # airliner, warplane
    "bicycle": (444, 671),  # bicycle-built-for-two, mountain bike
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "boat": (472, 484, 554, 576, 625, 780, 814, 871, 914),  # canoe, catamaran, ... yawl
    "bottle": (440, 720, 737, 898, 907),  # beer, pill, pop, water, wine bottle
    "bus": (654, 779, 874),  # minibus, school bus, trolleybus
    "car": (407, 436, 468, 511, 609, 627, 656, 661, 751, 817),
    "cat": tuple(range(281, 286)),  # the domestic cats
    "chair": (423, 559, 765),  # barber, folding, rocking chair
    "cow": (345, 346, 347),  # ox, water buffalo, bison
    "diningtable": (532,),
    "dog": tuple(range(151, 269)),  # the domestic dogs
    "horse": (339,),  # sorrel
    "motorbike": (665, 670),  # moped, motor scooter
    "person": (981, 982, 983),  # ballplayer, groom, scuba diver: the only people
    "pottedplant": (738,),
    "sheep": (348, 349),  # ram, bighorn
    "sofa": (831,),  # studio couch
    "train": (466, 547, 705, 820),  # bullet train, electric and steam locomotive, passenger car
    "tvmonitor": (664, 782, 851),  # monitor, screen, television
}
"""Output indices by VOC class, chosen by the WordNet names of the outputs. Close relatives replace
animals of VOC that ImageNet lacks."""


def imagenet_vocabulary() -> Vocabulary:
    """Name the 1000 outputs of an ImageNet-1k classifier (as timm does), then the 20 VOC classes.

    ``camkit.wrap(model, vocabulary=imagenet_vocabulary())`` understands "tabby" as well as "cat".
    """
    names = tuple(_wordnet_names().values())
    single = tuple((index,) for index in range(len(names)))
    return Vocabulary((*names, *VOC_IN_IMAGENET), (*single, *VOC_IN_IMAGENET.values()))


def _wordnet_names() -> dict[str, str]:
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return dict(zip(info.label_names(), info.label_descriptions(), strict=True))


IMAGENET_S_FORM = MaskForm(colours=True, ignored=(1000,))
"""An id is red + 256 * green; 0 is any other category, pixels of 1000 are not scored."""

_SPLITS = ("train", "train-semi", "validation", "test")
_CLASS_FOLDER = re.compile(r"n\d{8}")
_PHOTOS = (".jpeg", ".jpg")
_SIZES = (50, 300, 919)


@dataclass(frozen=True)
class ImageNetSFolder:
    """ImageNet-S with 50, 300 or 919 classes; `open_imagenet_s` finds its classes and splits.

    Photos are ``<split>/<WordNet id>/*.JPEG``, masks ``<split>-segmentation/<WordNet id>/*.png``,
    for train-semi and validation. The label of an image is its folder. Classes have ImageNet's
    names; in the set of 919, five classes join two ImageNet classes each (such as sunglasses and
    sunglass) and have the name of the folder's class.
    """

    root: Path
    folders: tuple[str, ...]
    classes: tuple[str, ...]
    splits: tuple[str, ...]

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, class by class."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error for each folder that is not a class."""
        check_split(name, self.splits)
        for folder in sorted((self.root / name).glob("n*/")):
            if folder.name not in self.folders:
                yield DataError(f"{folder} is none of the {len(self.folders)} classes; remove it")
                continue
            masks = self.root / f"{name}-segmentation" / folder.name
            mask_of = {path.stem: path for path in masks.glob("*.png")}
            classes = (self.folders.index(folder.name),)
            for photo in sorted(folder.iterdir()):
                if photo.suffix.lower() in _PHOTOS:
                    mask = mask_of.get(photo.stem)
                    yield Sample(photo.stem, photo, mask, classes, IMAGENET_S_FORM)


def open_imagenet_s(root: str | Path) -> ImageNetSFolder:
    """Find the classes and splits of a folder of ImageNet-S.

    Mask ids follow the sorted WordNet ids of all classes, so all must be known: from the official
    ``ImageNetS_categories_im*.txt`` in the folder, or else from its class folders.

    Args:
        root: such as ImageNetS50, the folder that holds ``validation`` and its masks.

    Raises:
        DataError: the folder has no split, or some of its classes are missing and not listed.
    """
    root = Path(root).absolute()
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
        present = {path.name for name in splits for path in (root / name).glob("n*/")}
        folders = tuple(sorted(name for name in present if _CLASS_FOLDER.fullmatch(name)))
        if len(folders) not in _SIZES:
            raise DataError(
                f"{root} has {len(folders)} class folders, expected 50, 300 or 919; ids count all "
                f"classes, so put ImageNetS_categories_im50.txt (or 300, 919) of ImageNet-S there"
            )
    known = _wordnet_names()
    names = [known.get(folder, folder) for folder in folders]
    classes = tuple(
        name if names.count(name) == 1 else f"{name} ({folder})"  # two classes share the name
        for name, folder in zip(names, folders, strict=True)
    )
    return ImageNetSFolder(root, folders, classes, splits)
