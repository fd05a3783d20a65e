"""Targets of polygons: YOLO's segmentation labels, LabelMe's files, and outlines for COCO."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from camkit.data.targets.plan import MaskedImage, Plan, place_photo, write_text
from camkit.data.targets.regions import VOID, Region, Ring, filled, joined, rings_of, simplified

IGNORED_LABEL = "__ignore__"
"""LabelMe's own name of pixels without a label."""


def outlines(region: Region, plan: Plan, *, one: bool = False) -> list[Ring]:
    """Return an outline of each part of a region, holes joined to it, and count what is lost.

    Args:
        region: of an image.
        plan: of the export, whose options hold the tolerance.
        one: join the outlines of all parts to one.
    """
    parts = [
        joined([simplified(ring, plan.options.tolerance) for ring in (outer, *holes)])
        for outer, holes in rings_of(region)
    ]
    if region.value != VOID:
        missed, added = filled(parts, region)
        plan.tally.missed += missed
        plan.tally.added += added
    return [joined(parts)] if one else parts


@contextmanager
def write_yolo(plan: Plan) -> Iterator[Callable[[MaskedImage, str], None]]:
    """Write ``images/SPLIT``, ``labels/SPLIT/NAME.txt`` and ``data.yaml``.

    A line is a class, from 0, and one outline, x and y as shares of width and height. There is no
    void in this format: its pixels become background.
    """
    place_of = {value: number - 1 for value, number in plan.numbers.items()}

    def add(image: MaskedImage, split: str) -> None:
        place_photo(image, plan.out / "images" / split, plan)
        rows, columns = image.size
        lines = []
        for region in plan.regions(image):
            if region.value == VOID:
                plan.tally.void_dropped += region.area
                continue
            (ring,) = outlines(region, plan, one=True)
            shares = (ring / (columns, rows)).ravel().tolist()
            numbers = " ".join([f"{share:.6f}" for share in shares])
            lines.append(f"{place_of[region.value]} {numbers}\n")
        write_text(plan.out / "labels" / split / f"{image.name}.txt", "".join(lines))

    yield add
    train, val = plan.splits[0], plan.splits[-1]
    if "train" in plan.splits:
        train = "train"
    others = [split for split in plan.splits if split != train]
    val = "val" if "val" in others else others[0] if others else train
    splits = {"train": train, "val": val} | {split: split for split in others if split != val}
    lines = [f"{name}: images/{split}" for name, split in splits.items()]
    # the text of JSON is text of YAML, whatever is in a name
    names = [
        f"  {place_of[value]}: {json.dumps(name, ensure_ascii=False)}"
        for value, name in plan.legend.items()
    ]
    text = "\n".join([*lines, f"nc: {len(names)}", "names:", *names])
    write_text(plan.out / "data.yaml", f"{text}\n")


@contextmanager
def write_labelme(plan: Plan) -> Iterator[Callable[[MaskedImage, str], None]]:
    """Write ``SPLIT/NAME.json`` beside each photo, and ``labels.txt`` for LabelMe's ``--labels``.

    Parts of one region share a ``group_id``; ``description`` holds the confidence; void has the
    label ``__ignore__``.
    """

    def add(image: MaskedImage, split: str) -> None:
        folder, shapes = plan.out / split, list[dict[str, Any]]()
        photo, confidence = place_photo(image, folder, plan), image.confidence()
        for number, region in enumerate(plan.regions(image), start=1):
            parts, score = outlines(region, plan), confidence(region)
            shapes += [
                {
                    "label": plan.legend.get(region.value, IGNORED_LABEL),
                    "points": ring.astype(float).tolist(),
                    "group_id": number if len(parts) > 1 else None,
                    "description": "" if score is None else f"confidence {score}",
                    "shape_type": "polygon",
                    "flags": {},
                    "mask": None,
                }
                for ring in parts
            ]
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": photo,
            "imageData": None,
            "imageHeight": image.size[0],
            "imageWidth": image.size[1],
        }
        write_text(folder / f"{image.name}.json", json.dumps(content, ensure_ascii=False))

    yield add
    names = [IGNORED_LABEL, "_background_", *plan.legend.values()]
    write_text(plan.out / "labels.txt", "\n".join(names) + "\n")
