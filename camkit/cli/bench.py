"""Measure seeds and refiners on a data set with masks, tuned on one split, reported on another."""

import argparse
import sys
from pathlib import Path

from camkit.atomic import unfinished
from camkit.bench import measure, standard_variants, to_json, to_markdown
from camkit.cli.models import add_model_arguments, open_model
from camkit.data import open_dataset

EXAMPLES = """examples:
  camkit bench VOC2012 --split val --tune-split train
  camkit bench VOC2012 --split val --tune-split train --classes cat,dog,horse --out results.json
  camkit bench my_photos --split test --tune-split dev --limit 50

DATASET is a folder in the VOC layout (JPEGImages, SegmentationClass, ImageSets/Segmentation) or a
plain one (images, masks, labels.csv). Background scores are picked on --tune-split only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder of the data set")
    parser.add_argument("--split", default="val", help="split that is reported (default: val)")
    parser.add_argument(
        "--tune-split", default="train", help="split for background scores (default: train)"
    )
    parser.add_argument(
        "--classes", default=None, help="classes to measure, by commas (default: all of the set)"
    )
    parser.add_argument("--limit", type=int, default=None, help="only the first N images of each")
    parser.add_argument(
        "--oracle-threshold",
        action="store_true",
        help="allow both splits to be the same; the table is marked ORACLE",
    )
    parser.add_argument("--out", type=Path, default=None, help="write JSON (and .md) there too")
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    dataset = open_dataset(options.dataset)
    names = dataset.classes if options.classes is None else options.classes.split(",")
    opened = open_model(options.model, size=options.size)
    print(f"model {options.model} from {opened.source}", file=sys.stderr)
    report = measure.run(
        opened.model,
        dataset,
        vocabulary=opened.vocabulary.subset([name.strip() for name in names]),
        variants=standard_variants(),
        split=options.split,
        tune_split=options.tune_split,
        photos=opened.photos,
        limit=options.limit,
        oracle_threshold=options.oracle_threshold,
    )
    print(to_markdown(report))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (options.out.with_suffix(".json"), to_json(report)),
            (options.out.with_suffix(".md"), to_markdown(report)),
        ):
            with unfinished(path) as draft:
                draft.write_text(text, encoding="utf-8")
    return 1 if report.skipped else 0
