"""ImageNet: the classifier outputs of VOC classes, and the folder layout of ImageNet-S."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from camkit.data.names import check_split, read_names
from camkit.data.sample import MaskForm, Sample, all_usable
from camkit.errors import DataError
from camkit.printing import several
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


OBJECTS_IN_IMAGENET: dict[str, tuple[int, ...]] = {
    "fish": (
        *range(7),
        *range(389, 398),
    ),
    "salamander": (*range(25, 30),),
    "frog": (*range(30, 33),),
    "turtle": (*range(33, 38),),
    "lizard": (*range(38, 49),),
    "crocodilian": (
        49,
        50,
    ),
    "snake": (*range(52, 69),),
    "spider": (*range(72, 78),),
    "crab": (*range(118, 122),),
    "lobster": (
        122,
        123,
    ),
    "beetle": (*range(300, 308),),
    "butterfly": (*range(321, 327),),
    "whale": (
        147,
        148,
    ),
    "wolf": (*range(269, 273),),
    "wild dog": (*range(273, 276),),
    "fox": (*range(277, 281),),
    "wildcat": (
        286,
        287,
    ),
    "big cat": (*range(288, 294),),
    "bear": (*range(294, 298),),
    "mustelid": (*range(356, 363),),
    "rabbit": (*range(330, 333),),
    "pig": (*range(341, 344),),
    "antelope": (*range(351, 354),),
    "ape": (*range(365, 370),),
    "monkey": (*range(370, 383),),
    "lemur": (
        383,
        384,
    ),
    "elephant": (
        385,
        386,
    ),
    "fungus": (
        947,
        *range(991, 998),
    ),
    "personal computer": (
        527,
        590,
        620,
        681,
    ),
    "keyboard": (
        508,
        878,
    ),
    "clock": (
        409,
        530,
        892,
    ),
    "guitar": (
        402,
        546,
    ),
    "piano": (
        579,
        881,
    ),
    "brass instrument": (
        513,
        566,
        875,
    ),
    "firearm": (
        413,
        763,
        764,
    ),
    "ship": (
        403,
        510,
        628,
        724,
        833,
        913,
    ),
    "truck": (
        555,
        569,
        675,
        717,
        734,
        864,
        867,
    ),
    "cart": (
        603,
        612,
        690,
    ),
    "bag": (
        414,
        636,
        728,
        748,
        797,
    ),
    "basket": (
        588,
        790,
    ),
    "bowl": (
        659,
        809,
    ),
    "ball": (
        429,
        430,
        522,
        574,
        722,
        747,
        768,
        805,
        852,
        890,
    ),
    "dumbbell or barbell": (
        422,
        543,
    ),
    "telephone": (
        487,
        528,
        707,
    ),
    "camera": (
        732,
        759,
    ),
    "pen": (
        418,
        563,
        749,
    ),
    "pan": (
        567,
        909,
    ),
    "baby bed": (
        431,
        516,
        520,
    ),
    "cabinet": (
        495,
        648,
    ),
    "swimsuit": (
        445,
        639,
        842,
    ),
    "necktie": (
        451,
        457,
        906,
    ),
    "sweater": (
        474,
        841,
    ),
    "coat": (
        568,
        617,
        869,
    ),
    "skirt": (
        601,
        655,
        689,
        775,
    ),
    "hat": (
        439,
        452,
        515,
        808,
    ),
    "helmet": (
        518,
        560,
    ),
    "body armor": (
        465,
        490,
        524,
    ),
    "shoe": (
        502,
        514,
        630,
        770,
        774,
    ),
    "shop": (
        415,
        424,
        454,
        467,
        509,
        788,
        860,
        865,
    ),
    "building": (
        410,
        425,
        449,
        497,
        498,
        500,
        580,
        598,
        624,
        663,
        668,
        698,
        727,
        762,
        832,
        915,
    ),
    "bridge": (
        821,
        839,
        888,
    ),
    "fence": (
        489,
        716,
        825,
        912,
    ),
    "sandwich": (
        933,
        934,
    ),
    "bread": (
        *range(930, 933),
        962,
    ),
    "squash": (*range(939, 943),),
    "lock": (
        507,
        695,
    ),
    "mountain": (
        970,
        980,
    ),
    "shore": (
        975,
        978,
    ),
}
"""Output indices by object, beyond those of VOC, grouped by WordNet
(``benchmarks/imagenet_groups.py``): sister classes that a photo shows as one object."""


@cache
def imagenet_vocabulary() -> Vocabulary:
    """Name the 1000 outputs of an ImageNet-1k classifier (as timm does) and groups of them.

    Classes 0 to 999 are the outputs, the next 20 those of VOC (`VOC_IN_IMAGENET`), then the groups
    of `OBJECTS_IN_IMAGENET`; so "tabby", "cat" and "fox" are all known. First guesses choose from
    the VOC classes, the groups, and the outputs that are in none. In masks, VOC classes have their
    own ids 1 to 20, groups follow them, and output i has the value 1000 + i.
    """
    groups = VOC_IN_IMAGENET | OBJECTS_IN_IMAGENET
    outputs = tuple(_wordnet_names().values())
    grouped = {index for members in groups.values() for index in members}
    alone = (index for index in range(len(outputs)) if index not in grouped)
    return Vocabulary(
        (*outputs, *groups),
        (*((index,) for index in range(len(outputs))), *groups.values()),
        values=(*range(1000, 1000 + len(outputs)), *range(1, len(groups) + 1)),
        candidates=(*range(len(outputs), len(outputs) + len(groups)), *alone),
    )


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

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        names = f"{several(len(self.classes), 'class')}, in the order of their WordNet ids"
        folders = (f"{split}/: one folder for each class" for split in self.splits)
        return (f"ImageNet-S: {names}; ids are colours, 1000 is not scored", *folders)


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
