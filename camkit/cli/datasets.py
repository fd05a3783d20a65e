"""Options that say how a data set is read, of every command that opens one."""

import argparse
from collections.abc import Mapping
from typing import Any, get_args

from camkit.cli.options import class_names
from camkit.data.layouts import LAYOUTS
from camkit.data.reading import Reading, Zero
from camkit.errors import closest

LAYOUTS_HELP = """Layouts: those of VOC, COCO (also CVAT, Label Studio, FiftyOne, Roboflow), CVAT's
masks, ImageNet-S, YOLO, LabelMe, Hugging Face, MMSegmentation, ADE20K; folders of photos and masks;
and a plain folder (images, labels.csv). The page "Data sets: what is read" describes them."""
"""What the help of a command says of data sets."""


MASK_OPTIONS = ("void", "zero", "mask_values")
"""The options that `add_mask_arguments` adds."""


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `reading_of` reads."""
    add = parser.add_argument
    add(
        "--layout",
        metavar="NAME",
        help=f"of the data set: {', '.join(LAYOUTS)} (default: recognised)",
    )
    add(
        "--data-classes",
        metavar="NAMES",
        help="classes of the data set in the order of their ids, without background: names by "
        "commas, or a file with one per line",
    )
    add_mask_arguments(parser)


def add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the options that are about the values in masks."""
    add = parser.add_argument
    add("--void", metavar="VALUES", help="mask values that are not scored, such as 0,254")
    add(
        "--zero",
        metavar="MEANING",
        help=f"of 0 in masks: {', '.join(get_args(Zero))} (default: as the files say, or "
        "background)",
    )
    add(
        "--mask-values",
        metavar="VALUE=CLASS",
        help="class numbers, from 1, of mask values: 255=1 if 255 marks the only class",
    )


def reading_of(settings: Mapping[str, Any]) -> Reading:
    """Return the settings of a data set from options; names may have ``-`` or ``_``."""
    given = {key.replace("-", "_"): value for key, value in settings.items()}
    classes, layout = given.get("data_classes"), given.get("layout")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"--layout {layout}: no such layout; {closest(layout, LAYOUTS)}")
    zero = given.get("zero")
    if zero is not None and zero not in get_args(Zero):
        raise ValueError(f"--zero {zero}: {closest(zero, get_args(Zero))}")
    void, values = given.get("void"), given.get("mask_values")
    return Reading(
        classes=None if classes is None else class_names("--data-classes", classes),
        void=None if void is None else tuple(_whole("--void", text) for text in void.split(",")),
        zero=zero,
        values=None if values is None else _values(values),
        layout=layout,
    )


def _values(text: str) -> dict[int, int]:
    values = {}
    for part in text.split(","):
        value, equals, number = part.partition("=")
        if not equals:
            raise ValueError(f"--mask-values {text}: expected VALUE=CLASS, such as 255=1")
        values[_whole("--mask-values", value)] = _whole("--mask-values", number)
    return values


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{option}: {text.strip()!r} is no whole number") from error
