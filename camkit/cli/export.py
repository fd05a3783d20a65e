"""Write masks for training and labelling tools: COCO, YOLO, VOC, MMSegmentation, CVAT and more."""

import argparse
from pathlib import Path
from typing import get_args

from camkit.cli.datasets import LAYOUTS_HELP, add_dataset_arguments, reading_of
from camkit.cli.options import class_names
from camkit.data import TARGETS, ExportOptions, export
from camkit.data.layouts import open_with
from camkit.data.reading import Reading
from camkit.data.targets.plan import Photos
from camkit.data.targets.regions import Regions

EXAMPLES = f"""examples:
  camkit export out --to coco --out coco                            a folder of `camkit run`
  camkit export out --to yolo --val 0.1 --out yolo
  camkit export masks --classes voc --images JPEGImages --to cvat --out cvat
  camkit export masks --classes names.txt --images photos --splits lists --to mmseg --out mmseg
  camkit export VOC2012 --to coco-polygons --tolerance 0 --photos link --out coco

SOURCE is a folder that `camkit run` wrote, a folder of mask PNGs (0 background, then the classes,
255 void), or a data set. {LAYOUTS_HELP}

formats:
{chr(10).join(f"  {name:14} {target.title}" for name, target in TARGETS.items())}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, ExportOptions()
    add("source", type=Path, metavar="SOURCE", help="results of a run, masks, or a data set")
    add("--to", choices=tuple(TARGETS), required=True, metavar="FORMAT", help="see below")
    add("--out", type=Path, required=True, help="folder to write, new or empty")
    add(
        "--classes",
        help="names of the mask values 1, 2, ...: voc, coco, a file with one name per line, or "
        "names with commas between them; required for a folder of masks",
    )
    add("--images", type=Path, help="folder of the photos, with the names of the masks")
    add("--cams", type=Path, help="folder of CAM files of the masks, for confidences")
    add(
        "--regions",
        choices=get_args(Regions),
        help="an annotation is a class of an image or a connected component (default: component "
        "for yolo and labelme, else class)",
    )
    add(
        "--tolerance",
        type=float,
        default=default.tolerance,
        help="pixels that polygons may be off; 0 keeps every corner (default: %(default)s)",
    )
    add(
        "--least-area",
        type=int,
        default=default.least_area,
        help="components of fewer pixels become background (default: %(default)s)",
    )
    add("--val", type=float, help="share of the images for the split val (default: keep splits)")
    add("--rng-seed", type=int, default=default.rng_seed, help="of --val (default: %(default)s)")
    add("--splits", type=Path, help="folder of lists, such as train.txt and val.txt")
    add(
        "--photos",
        choices=get_args(Photos),
        default=default.photos,
        help="copy photos, link to them, or write annotations only (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="remove an earlier export in OUT")
    add_dataset_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    settings = ExportOptions(
        regions=options.regions,
        tolerance=options.tolerance,
        least_area=options.least_area,
        cams=options.cams,
        splits=options.splits,
        val=options.val,
        rng_seed=options.rng_seed,
        photos=options.photos,
        overwrite=options.overwrite,
    )
    reading = reading_of(vars(options))
    source = options.source if reading == Reading() else open_with(options.source, reading)
    summary = export(
        source,
        options.to,
        options.out,
        classes=options.classes and class_names("--classes", options.classes),
        images=options.images,
        options=settings,
    )
    print(summary)
    return 0
