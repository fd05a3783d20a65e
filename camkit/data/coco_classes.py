"""The 80 classes of MS COCO: names, category ids, which are classes of VOC, how masks hold them."""

from typing import Literal, TypeAlias

from camkit.data.sample import MaskForm

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
