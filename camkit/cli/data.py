"""Check a data set: every photo, mask and label, and what its splits share."""

import argparse
from pathlib import Path

from camkit.cli.datasets import LAYOUTS_HELP, add_dataset_arguments, reading_of
from camkit.data import Described, check_dataset
from camkit.data.layouts import open_with
from camkit.printing import several

EXAMPLES = f"""examples:
  camkit data check VOC2012
  camkit data check VOC2012 --split train --split val
  camkit data check my_photos
  camkit data check export.json
  camkit data check tree --zero void --data-classes names.txt

PATH is the folder of a data set, a file of annotations, or an archive. The first lines say what its
files are taken for.

{LAYOUTS_HELP}

The exit status is 1 if there are errors; notes are not errors."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="read every photo and mask, and report the faults of each file",
        description="Read every photo and mask, and report the faults of each file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("path", type=Path, metavar="PATH", help="the data set")
    check.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="check only this split; may be repeated (default: all)",
    )
    add_dataset_arguments(check)


def execute(options: argparse.Namespace) -> int:
    dataset = open_with(options.path, reading_of(vars(options)))
    for sentence in dataset.describe() if isinstance(dataset, Described) else ():
        print(sentence)
    splits = dataset.splits if options.split is None else tuple(dict.fromkeys(options.split))
    findings = check_dataset(dataset, splits=splits)
    for finding in findings:
        print(finding)
    errors = sum(finding.certain for finding in findings)
    print(
        f"{options.path}: {several(len(dataset.classes), 'class')}, splits "
        f"{', '.join(splits)}: {several(errors, 'error')}, "
        f"{several(len(findings) - errors, 'note')}"
    )
    return 1 if errors else 0
