"""ImageNet: classifier outputs that stand for VOC classes, and the layout of ImageNet-S."""

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
    "person": (981, 982, 983),  # ballplayer, groom, scuba diver: all the people there are
    "pottedplant": (738,),
    "sheep": (348, 349),  # ram, bighorn
    "sofa": (831,),  # studio couch
    "train": (466, 547, 705, 820),  # bullet train, electric and steam locomotive, passenger car
    "tvmonitor": (664, 782, 851),  # monitor, screen, television
}
"""Output indices by VOC class, after the WordNet names of the outputs; a class's score is the
logsumexp of its outputs. Close relatives stand in where VOC's own animal is missing."""


def imagenet_vocabulary() -> Vocabulary:
    """Name the 1000 outputs of an ImageNet-1k classifier, and behind them the 20 classes of VOC.

    Names of outputs are timm's, in the order of the outputs; ``camkit.wrap(model,
    vocabulary=imagenet_vocabulary())`` understands "tabby" as well as "cat".
    """
    from timm.data.imagenet_info import ImageNetInfo

    names = tuple(ImageNetInfo("imagenet-1k").label_descriptions())
    single = tuple((index,) for index in range(len(names)))
    return Vocabulary((*names, *VOC_IN_IMAGENET), (*single, *VOC_IN_IMAGENET.values()))


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
