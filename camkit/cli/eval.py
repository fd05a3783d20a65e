"""Score masks or CAM files against ground truth: IoU, precision and recall of each class."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch

from camkit.atomic import unfinished
from camkit.bulk import (
    FileItem,
    ScoreResult,
    pair_truth,
    read_labels,
    read_list,
    score_cams,
    score_masks,
)
from camkit.bulk.camfiles import CAM_SUFFIXES, MASK_SUFFIXES
from camkit.cli.mask import add_background, background_score
from camkit.cli.refine import add_workers, show_failures
from camkit.data import VOC_CLASSES
from camkit.data.labels import read_names
from camkit.errors import CamkitError, DataError
from camkit.mask import power_threshold
from camkit.score import (
    Definition,
    Gain,
    class_scores,
    class_table,
    mean_iou,
    paired_gain,
    percent,
    pixel_accuracy,
)

EXAMPLES = """examples:
  camkit eval masks --gt SegmentationClass --list ImageSets/Segmentation/val.txt
  camkit eval masks --gt SegmentationClass --against other_masks
  camkit eval cams --gt SegmentationClass --list val.txt --tune-list train.txt
  camkit eval cams --gt SegmentationClass --background-score 0.45
  camkit eval masks --gt masks_coco --num-classes 81 --json result.json

Masks are PNGs with class + 1 at each pixel and 0 for background; so is the ground truth. 255 is
ignored in the truth and counts as background in a mask. CAM files become masks at a background
score: the one given, the best one on --tune-list, or else the best one on the images that are
scored, which overestimates them and is called ORACLE. FP and FN are shares of the union: with IoU
they add up to 100. mIoU is the mean over the classes in the truth (present: ToCo, CLIP-ES and
most), in truth or masks (union: IRN), or over all (psa: PSA, MCTformer, TransCAM). --against adds
the gain over a second folder on the same images, with the 95% interval of a paired bootstrap."""

DEFINITIONS: tuple[Definition, ...] = get_args(Definition)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("masks", type=Path, metavar="MASKS", help="folder of masks or CAM files")
    parser.add_argument("--gt", type=Path, required=True, help="folder of ground-truth masks")
    parser.add_argument("--list", type=Path, help="image names, one per line (default: all of GT)")
    parser.add_argument(
        "--num-classes",
        type=int,
        help="number of classes with background (default: those of --classes, else 21)",
    )
    parser.add_argument("--classes", type=Path, help="file of class names in order, one per line")
    parser.add_argument("--cams", action="store_true", help="MASKS has both: score the CAM files")
    parser.add_argument("--labels", type=Path, help="classes of each image, as for camkit refine")
    parser.add_argument("--tune-list", type=Path, help="images to choose the background score on")
    parser.add_argument(
        "--resize",
        action="store_true",
        help="resize the maps of CAM files to the size of the truth",
    )
    add_background(parser)
    parser.add_argument("--against", type=Path, help="second folder of the same kind to compare")
    parser.add_argument(
        "--definition", choices=DEFINITIONS, default="present", help="of mIoU (default: present)"
    )
    parser.add_argument("--partial", action="store_true", help="skip images without a mask")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    add_workers(parser)


def execute(options: argparse.Namespace) -> int:
    names = _class_names(options)
    cams = _are_cams(options)
    result = _score(options, options.masks, cams, len(names))
    print(_report(options, result, names))
    figures = _figures(options, result, names)
    failures = result.failures
    if options.against is not None:
        other = _score(options, options.against, cams, len(names))
        failures += other.failures
        gain = _gain(result, other, options.definition)
        print(f"\n{_gain_report(options, other, gain)}")
        figures["gain"] = {"against": str(options.against), **asdict(gain)}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(options.json) as draft:
            text = json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False)
            draft.write_text(text + "\n", encoding="utf-8")
    show_failures(failures)
    if failures:
        message = f"camkit: {len(failures)} images could not be counted and are in no figure"
        print(message, file=sys.stderr)
    return 1 if failures else 0


def _class_names(options: argparse.Namespace) -> Sequence[str]:
    count = options.num_classes
    if options.classes is None and count in (None, len(VOC_CLASSES) + 1):
        return ("background", *VOC_CLASSES)
    if options.classes is None:
        return ("background", *(f"class {number}" for number in range(1, count)))
    names = list(read_names(options.classes))
    if names[0].strip("_").casefold() not in ("background", "bg"):
        names.insert(0, "background")
    if count is not None and len(names) != count:
        raise ValueError(
            f"{options.classes} names {len(names)} classes with background, but --num-classes is "
            f"{count}; omit --num-classes"
        )
    return names


def _are_cams(options: argparse.Namespace) -> bool:
    if not options.masks.is_dir():
        raise DataError(f"{options.masks} is not a folder; give the folder of the masks")
    suffixes = {path.suffix.lower() for path in options.masks.iterdir()}
    cams = options.cams or (suffixes & set(CAM_SUFFIXES) and not suffixes & set(MASK_SUFFIXES))
    score = background_score(options)
    if not cams and (score is not None or options.tune_list or options.resize or options.labels):
        raise ValueError(
            f"{options.masks} holds masks: --background-score, --alpha, --tune-list, --labels and "
            "--resize are for CAM files; --cams scores the CAM files of a folder with both"
        )
    return bool(cams)


def _score(options: argparse.Namespace, folder: Path, cams: bool, num_classes: int) -> ScoreResult:
    labels = None if options.labels is None else read_labels(options.labels)

    def paired(listing: Path | None) -> list[FileItem]:
        return pair_truth(
            folder,
            options.gt,
            cams=cams,
            names=None if listing is None else read_list(listing),
            labels=labels,
            partial=options.partial,
        )

    items, keep_each = paired(options.list), options.against is not None
    if not cams:
        return score_masks(
            items, num_classes=num_classes, keep_each=keep_each, workers=options.workers
        )
    score = background_score(options)
    if options.background == "power" and score is not None:
        score = power_threshold(score)  # draws the same masks
    return score_cams(
        items,
        num_classes=num_classes,
        background_score=score,
        tune=paired(options.tune_list) if options.tune_list else (),
        definition=options.definition,
        resize=options.resize,
        keep_each=keep_each,
        workers=options.workers,
    )


def _report(options: argparse.Namespace, result: ScoreResult, names: Sequence[str]) -> str:
    means = _means(result)
    others = [
        f"{definition} {percent(mean)}"
        for definition, mean in means.items()
        if definition != options.definition
    ]
    listed = f" of {options.list}" if options.list else ""
    return "\n".join(
        [
            f"{options.masks}: {result.images} images{listed}, truth in {options.gt}",
            *_score_line(options, result),
            "",
            class_table(class_scores(result.confusion, names)),
            "",
            f"mIoU ({options.definition}) {percent(means[options.definition])}"
            f"    by the other definitions: {', '.join(others)}",
            f"pixel accuracy {percent(pixel_accuracy(result.confusion))}",
        ]
    )


def _score_line(options: argparse.Namespace, result: ScoreResult) -> list[str]:
    if result.background_score is None:
        return []
    why = {
        "given": "given",
        "tuned": f"the best on {options.tune_list}",
        "oracle": "ORACLE: the best on the images scored; choose it on others with --tune-list",
    }
    return [f"background score {result.background_score:.4g}, {why[result.choice]}"]


def _means(result: ScoreResult) -> dict[Definition, float]:
    return {
        definition: float(mean_iou(result.confusion, definition=definition))
        for definition in DEFINITIONS
    }


def _figures(
    options: argparse.Namespace, result: ScoreResult, names: Sequence[str]
) -> dict[str, object]:
    return {
        "camkit": version("camkit"),
        "masks": str(options.masks),
        "truth": str(options.gt),
        "images": result.images,
        "definition": options.definition,
        "background_score": result.background_score,
        "background_score_is": None if result.background_score is None else result.choice,
        "mean_iou": {name: _number(mean) for name, mean in _means(result).items()},
        "pixel_accuracy": _number(pixel_accuracy(result.confusion)),
        "classes": [
            {key: _number(value) for key, value in asdict(score).items()}
            for score in class_scores(result.confusion, names)
        ],
        "failed": {failure.key: failure.reason for failure in result.failures},
    }


def _number(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _gain(result: ScoreResult, other: ScoreResult, definition: Definition) -> Gain:
    names = [name for name in result.each if name in other.each]
    if len(names) < 2:
        raise CamkitError(f"{len(names)} images are in both folders; a comparison needs at least 2")
    base, ours = (torch.stack([side.each[name] for name in names]) for side in (other, result))
    return paired_gain(base, ours, definition=definition)


def _gain_report(options: argparse.Namespace, other: ScoreResult, gain: Gain) -> str:
    low, high = 100 * gain.low, 100 * gain.high
    return "\n".join(
        [
            f"against {options.against}: mIoU {percent(gain.mean_iou_base)}",
            *_score_line(options, other),
            f"gain {100 * gain.gain:+.2f}, 95% interval {low:+.2f} to {high:+.2f}",
        ]
    )
