"""Which outputs of an ImageNet-1k classifier speak of a PASCAL VOC class."""

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
