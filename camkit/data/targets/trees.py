"""Targets of mask files: the folders of PASCAL VOC and of MMSegmentation, and CVAT's archives."""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8

from camkit.data.targets.plan import (
    JsonList,
    MaskedImage,
    Plan,
    place_photo,
    png_bytes,
    stream,
    write_bytes,
    write_text,
)
from camkit.data.targets.regions import VOID
from camkit.errors import DataError
from camkit.manifest import unfinished
from camkit.mask import voc_colour, voc_palette
from camkit.tensors import IGNORE

_CVAT_IGNORED = "ignored"


@contextmanager
def write_voc(plan: Plan) -> Iterator[Callable[[MaskedImage, str], None]]:
    """Write ``JPEGImages``, ``SegmentationClass``, lists of names, and camkit's ``labels.json``.

    Classes are numbered without gaps, void is 255. ``regions="component"`` also writes
    ``SegmentationObject``.
    """
    plan.check_room("voc")
    palette = voc_palette()
    with ExitStack() as stack:
        lists = plan.out / "ImageSets" / "Segmentation"
        names = {s: stack.enter_context(stream(lists / f"{s}.txt")) for s in plan.splits}
        table = stack.enter_context(stream(plan.out / "labels.json"))
        classes = json.dumps(list(plan.legend.values()), ensure_ascii=False)
        labels = JsonList(table, f'{{"classes": {classes}, "labels": {{')

        taken: set[str] = set()

        def add(image: MaskedImage, split: str) -> None:
            image = _listable(image, taken)
            place_photo(image, plan.out / "JPEGImages", plan, jpeg=True)
            layers = {
                "SegmentationClass": plan.ids(image),
                "SegmentationObject": _objects(image, plan),
            }
            for folder in tuple(layers) if plan.kind == "component" else ("SegmentationClass",):
                content = png_bytes(layers[folder], palette)
                write_bytes(plan.out / folder / f"{image.name}.png", content)
            shown = sorted({*image.present, *image.values})
            labels.add_entry(image.name, [plan.legend[v] for v in shown if v in plan.legend])
            names[split].write(f"{image.name}\n")

        yield add
        table.write("\n}}\n")


@contextmanager
def write_mmseg(plan: Plan) -> Iterator[Callable[[MaskedImage, str], None]]:
    """Write ``img_dir/SPLIT``, ``ann_dir/SPLIT`` and ``dataset.py``, a part of a configuration.

    Background is class 0, classes are numbered without gaps from 1, void is 255, which
    MMSegmentation ignores (``reduce_zero_label=False``).
    """
    plan.check_room("mmseg")
    palette = voc_palette()

    def add(image: MaskedImage, split: str) -> None:
        place_photo(image, plan.out / "img_dir" / split, plan, jpeg=True)
        for _ in plan.regions(image):
            pass  # counted
        content = png_bytes(plan.ids(image), palette)
        write_bytes(plan.out / "ann_dir" / split / f"{image.name}.png", content)

    yield add
    names = ("background", *plan.legend.values())
    colours = [list(voc_colour(number)) for number in range(len(names))]
    lines = [
        '"""Part of a configuration of MMSegmentation; data_root is the folder of this file."""',
        'dataset_type = "BaseSegDataset"',
        f"data_root = {str(plan.out.absolute())!r}",
        f"num_classes = {len(names)}",
        f"metainfo = dict(classes={names!r}, palette={colours!r})",
    ]
    for split in plan.splits:
        folders = f'dict(img_path="img_dir/{split}", seg_map_path="ann_dir/{split}")'
        lines.append(
            f"{split}_dataset = dict(type=dataset_type, data_root=data_root, metainfo=metainfo, "
            f'data_prefix={folders}, img_suffix=".jpg", seg_map_suffix=".png", '
            "reduce_zero_label=False, ignore_index=255)"
        )
    write_text(plan.out / "dataset.py", "\n".join(lines) + "\n")


@contextmanager
def write_cvat(plan: Plan) -> Iterator[Callable[[MaskedImage, str], None]]:
    """Write ``SPLIT.zip`` in CVAT's format "Segmentation mask 1.1", photos, and ``labels.json``.

    Make a task from ``images/SPLIT`` with the labels of ``labels.json`` (its raw form), then upload
    the archive. Void is a label of its own, "ignored", so that it is seen and can be corrected.
    """
    plan.check_room("cvat")
    for name in plan.legend.values():
        if ":" in name or name.startswith("#") or name in ("background", _CVAT_IGNORED):
            raise DataError(
                f"CVAT's labelmap.txt cannot hold a class called {name!r}; it separates by colons, "
                f'a line that starts with # is a comment, and "background" and "{_CVAT_IGNORED}" '
                "have a meaning; rename it in `classes`"
            )
    colours = np.array([voc_colour(number) for number in range(IGNORE + 1)], np.uint8)
    with ExitStack() as stack:
        archives, lists = {}, {split: list[str]() for split in plan.splits}
        for split in plan.splits:
            draft = stack.enter_context(unfinished(plan.out / f"{split}.zip"))
            # PNG files are compressed already
            archives[split] = stack.enter_context(zipfile.ZipFile(draft, "w"))

        taken: set[str] = set()

        def add(image: MaskedImage, split: str) -> None:
            image = _listable(image, taken)
            place_photo(image, plan.out / "images" / split, plan)
            layers = {
                "SegmentationClass": plan.ids(image),
                "SegmentationObject": _objects(image, plan),
            }
            for folder, ids in layers.items():
                content = png_bytes(np.take(colours, ids, axis=0))
                archives[split].writestr(f"{folder}/{image.name}.png", content)
            lists[split].append(image.name)

        yield add
        numbers = {"background": 0, _CVAT_IGNORED: IGNORE}
        numbers |= {plan.legend[value]: number for value, number in plan.numbers.items()}
        rows = [f"{name}:{','.join(map(str, voc_colour(n)))}::" for name, n in numbers.items()]
        for split, archive in archives.items():
            archive.writestr("labelmap.txt", "\n".join(["# label:color_rgb:parts:actions", *rows]))
            text = "".join(f"{name}\n" for name in lists[split])
            archive.writestr("ImageSets/Segmentation/default.txt", text)
        labels = [
            {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*voc_colour(n)), "attributes": []}
            for name, n in numbers.items()
            if n
        ]
        write_text(plan.out / "labels.json", json.dumps(labels, ensure_ascii=False, indent=1))


def _listable(image: MaskedImage, taken: set[str]) -> MaskedImage:
    """Return the image under a name that a line of a list can hold.

    In such lists, numbers after a space are classes: "IMG 1" becomes "IMG_1".
    """
    name = image.name
    if _NUMBERS.search(name):
        name = _BETWEEN.sub("_", name)
    if name in taken:
        raise DataError(f"{image.key} and another image would both be called {name}; rename one")
    taken.add(name)
    return replace(image, key=name)


_NUMBERS, _BETWEEN = re.compile(r"[\s,;]-?\d+$"), re.compile(r"[\s,;]+")


def _objects(image: MaskedImage, plan: Plan) -> UInt8[np.ndarray, "H W"]:
    """Return the numbers of the regions, from 1; void is 255."""
    objects, last = np.zeros(image.size, np.uint8), 0
    for region in plan.regions(image):
        left, top, width, height = region.box
        number = IGNORE
        if region.value != VOID:
            last = number = last % (IGNORE - 1) + 1  # past 254 regions the numbers come again
        objects[top : top + height, left : left + width][region.inside] = number
    return objects
