"""Score masks or CAM files against ground truth: IoU, precision and recall of each class."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch

from camkit import __version__
from camkit.bulk import (
    FileItem,
    ScoreResult,
    pair_truth,
    read_list,
    score_cams,
    score_masks,
)
from camkit.bulk.camfiles import CAM_SUFFIXES, MASK_SUFFIXES
from camkit.cli.datasets import MASK_OPTIONS, add_mask_arguments, reading_of
from camkit.cli.mask import add_background, background_score
from camkit.cli.options import class_names
from camkit.cli.refine import add_workers, show_failures
from camkit.data import VOC_CLASSES
from camkit.data.labels import read_labels
from camkit.errors import CamkitError, DataError, nearby
from camkit.manifest import unfinished
from camkit.mask import power_threshold
from camkit.printing import several
from camkit.score import (
    Definition,
    class_scores,
    class_table,
    few_images,
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
  camkit eval masks --gt cells --num-classes 2 --mask-values 255=1
  camkit eval masks --gt ade20k --classes names.txt --zero void

Masks are PNGs with class + 1 at each pixel and 0 for background; so is the ground truth, which may
be TIFF or .npy, too, have names such as NAME_mask, and hold other values (--void, --zero,
--mask-values). 255 is ignored in the truth and counts as background in a mask. CAM files become
masks at a background score: the one given, the best one on --tune-list, or else the best one on the
images that are scored, which overestimates them and is called ORACLE. FP and FN are shares of the
union: with IoU they add up to 100. mIoU is the mean over the classes in the truth (present: ToCo,
CLIP-ES and most), in truth or masks (union: IRN), or over all (psa: PSA, MCTformer, TransCAM).
--against adds the gain over a second folder on the same images, with the 95% interval of a paired
bootstrap."""

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
    parser.add_argument(
        "--classes", help="class names in order: voc, coco, a file, or names with commas between"
    )
    parser.add_argument("--cams", action="store_true", help="MASKS has both: score the CAM files")
    parser.add_argument("--labels", type=Path, help="classes of each image, as for camkit refine")
    parser.add_argument("--tune-list", type=Path, help="images to choose the background score on")
    parser.add_argument(
        "--resize",
        action="store_true",
        help="resize the maps of CAM files to the size of the truth",
    )
    add_mask_arguments(parser)
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
    failures = result.failures
    means = {name: float(mean_iou(result.confusion, definition=name)) for name in DEFINITIONS}
    classes, accuracy = class_scores(result.confusion, names), pixel_accuracy(result.confusion)
    listed = f" of {options.list}" if options.list else ""
    others = [f"{n} {percent(mean)}" for n, mean in means.items() if n != options.definition]
    print(f"{options.masks}: {several(result.images, 'image')}{listed}, truth in {options.gt}")
    _print_score(options, result)
    print(f"\n{class_table(classes)}\n")
    print(
        f"mIoU ({options.definition}) {percent(means[options.definition])}"
        f"    by the other definitions: {', '.join(others)}"
    )
    print(f"pixel accuracy {percent(accuracy)}")
    if result.unseen:
        _warn(
            f"the labels of {result.unseen} of {result.images} images name a class that the truth "
            "shows nowhere; check the labels, and whether the truth marks objects with 255"
        )
    figures: dict[str, object] = {
        "camkit": __version__,
        "masks": str(options.masks),
        "truth": str(options.gt),
        "images": result.images,
        "labels_without_a_pixel": result.unseen,
        "definition": options.definition,
        "background_score": result.background_score,
        "background_score_is": None if result.background_score is None else result.choice,
        "mean_iou": {name: _number(mean) for name, mean in means.items()},
        "pixel_accuracy": _number(accuracy),
        "classes": [{k: _number(value) for k, value in asdict(row).items()} for row in classes],
        "failed": {failure.key: failure.reason for failure in failures},
    }
    if options.against is not None:
        other = _score(options, options.against, cams, len(names))
        failures += other.failures
        figures["gain"] = _compare(options, result, other)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(options.json) as draft:
            text = json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False)
            draft.write_text(text + "\n", encoding="utf-8")
    show_failures(failures)
    if failures:
        message = f"camkit: {several(len(failures), 'image')} could not be counted"
        print(message, file=sys.stderr)
    return 1 if failures else 0


def _compare(
    options: argparse.Namespace, result: ScoreResult, other: ScoreResult
) -> dict[str, object]:
    """Print the gain over another folder, on the images of both; return its figures."""
    both = [name for name in result.each if name in other.each]
    if len(both) < 2:
        message = f"the folders share {several(len(both), 'image')}; a comparison needs at least 2"
        raise CamkitError(message)
    base, ours = (torch.stack([side.each[name] for name in both]) for side in (other, result))
    gain = paired_gain(base, ours, definition=options.definition)
    print(f"\nagainst {options.against}: mIoU {percent(gain.mean_iou_base)}")
    _print_score(options, other)
    low, high = 100 * gain.low, 100 * gain.high
    print(f"gain {100 * gain.gain:+.2f}, 95% interval {low:+.2f} to {high:+.2f}")
    if gain.few_images:
        _warn(few_images(gain.images))
    return {"against": str(options.against), **asdict(gain), "few_images": gain.few_images}


def _warn(message: str) -> None:
    print(f"camkit: warning: {message}", file=sys.stderr)


def _class_names(options: argparse.Namespace) -> Sequence[str]:
    count = options.num_classes
    if options.classes is None and count in (None, len(VOC_CLASSES) + 1):
        return ("background", *VOC_CLASSES)
    if options.classes is None:
        return ("background", *(f"class {number}" for number in range(1, count)))
    names = list(class_names("--classes", options.classes))
    if names[0].strip("_").casefold() not in ("background", "bg"):
        names.insert(0, "background")
    if count is not None and len(names) != count:
        raise ValueError(
            f"{options.classes} names {several(len(names), 'class')} with background, but "
            f"--num-classes is {count}; omit --num-classes"
        )
    return names


def _are_cams(options: argparse.Namespace) -> bool:
    if not options.masks.is_dir():
        hint = nearby(options.masks) or "; give the folder of the masks"
        raise DataError(f"{options.masks} is not a folder{hint}")
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
    form = reading_of({key: getattr(options, key) for key in MASK_OPTIONS}).form(num_classes - 1)
    if not cams:
        return score_masks(
            items,
            num_classes=num_classes,
            form=form,
            keep_each=keep_each,
            workers=options.workers,
        )
    score = background_score(options)
    if options.background == "power" and score is not None:
        score = power_threshold(score)  # draws the same masks
    return score_cams(
        items,
        num_classes=num_classes,
        form=form,
        background_score=score,
        tune=paired(options.tune_list) if options.tune_list else (),
        definition=options.definition,
        resize=options.resize,
        keep_each=keep_each,
        workers=options.workers,
    )


def _print_score(options: argparse.Namespace, result: ScoreResult) -> None:
    if result.background_score is not None:
        why = {
            "given": "given",
            "tuned": f"the best on {options.tune_list}",
            "oracle": "ORACLE: the best on the images scored; choose it on others with --tune-list",
        }
        print(f"background score {result.background_score:.4g}, {why[result.choice]}")


def _number(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value
