"""Refine the CAM files of any codebase by their photos; needs no model and no GPU."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from camkit.bulk import CamFolder, Failure, RefineCam, read_list, write_all
from camkit.bulk.camjobs import CamJob
from camkit.cli.options import (
    GRAMMAR,
    add_regions,
    add_sam_arguments,
    read_segmenter,
    refiners_help,
    with_segmenter,
)
from camkit.data.labels import read_labels
from camkit.method import PICTURE_REFINERS
from camkit.refiners import chain
from camkit.refiners.crf import PRESETS

EXAMPLES = f"""examples:
  camkit refine cams --images JPEGImages --refine crf:clip_es --out refined
  camkit refine cams --images JPEGImages --refine par:steps=15,scale=0.5+crf:psa --out refined
  camkit refine cams --images JPEGImages --refine crf --regions masks --out refined
  camkit refine cams --images JPEGImages --regions masks --region-settings rule=sepl --out refined
  camkit refine cams --images JPEGImages --refine guided --form psa --workers 16 --out refined
  camkit refine cams --images JPEGImages --sam hf:facebook/sam-vit-base --out refined
  camkit refine cams --images JPEGImages --sam sam2 --refine sam:samrefiner+crf --out refined

CAM files are .npy, .npz or .safetensors in any form that camkit.data.read_cam supports; they are
read without running code. Photos are matched by name. Existing files are kept, so the same command
continues an interrupted run. OUT also gets settings.json, and errors.tsv if files failed.

{GRAMMAR}

{refiners_help()}

The step sam needs --sam, and then the default of --workers is 0: each worker would open a segmenter
of its own. The weights are part of the settings, so another segmenter does not continue a run.

Presets of crf: {", ".join(PRESETS)}.
After crf, and after regions with rule=vote or rule=sepl, class and background are equal at 0.5:
camkit mask OUT --background-score 0.5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cam_arguments(parser)
    parser.add_argument("--images", type=Path, required=True, help="folder of the photos")
    parser.add_argument(
        "--refine",
        action="append",
        metavar="STEP",
        help="refiner with settings, see below; repeat the option for further steps",
    )
    add_sam_arguments(parser)
    add_regions(parser)
    parser.add_argument(
        "--form",
        choices=("both", "psa", "irn", "clip-es"),
        default="both",
        help="codebases whose evaluators can read the result: both = ToCo, CLIP-ES and IRN; psa = "
        "MCTformer, TransCAM, PSA (default: %(default)s)",
    )


def execute(options: argparse.Namespace) -> int:
    segmenter = read_segmenter(options)
    steps = with_segmenter(options, PICTURE_REFINERS, segmenter)
    if not steps:
        raise ValueError(
            "nothing says how to refine; give steps (--refine), mask proposals (--regions FOLDER) "
            "or a segmenter (--sam hf:NAME)"
        )
    if segmenter is not None and options.workers is None:
        options.workers = 0  # each worker would open a segmenter of its own
    refine = steps[0] if len(steps) == 1 else chain(*steps)
    return write_files(options, RefineCam(refine, options.form), "CAM files")


def add_cam_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that read a folder of CAM files and write another one."""
    parser.add_argument("cams", type=Path, metavar="CAM_DIR", help="folder of CAM files")
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument(
        "--labels",
        type=Path,
        help="classes of each image, for CAM files without them: cls_labels.npy or JSON",
    )
    parser.add_argument(
        "--list", type=Path, help="file of image names, one per line (default: all CAM files)"
    )
    parser.add_argument(
        "--any-aspect",
        action="store_true",
        help="stretch maps onto photos of another aspect ratio, for models that resize photos to "
        "squares",
    )
    parser.add_argument("--overwrite", action="store_true", help="write files again that exist")
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        help="worker processes, 0 for this process only (default: one per core)",
    )


def write_files(options: argparse.Namespace, job: CamJob, kind: str) -> int:
    """Run a job on the folder of the options; return the exit status: 1 if files failed, else 0."""
    folder = CamFolder(
        options.cams,
        options.images,
        labels=None if options.labels is None else read_labels(options.labels),
        names=None if options.list is None else read_list(options.list),
        any_aspect=options.any_aspect,
    )
    out, workers = options.out, options.workers
    summary = write_all(job, folder, out, workers=workers, overwrite=options.overwrite)
    show_failures(summary.failures)
    kept = f", {summary.kept} existed already" if summary.kept else ""
    print(f"{out}: {summary.written} {kind} written{kept}")
    if not summary.failures:
        return 0
    failed = len(summary.failures)
    total = summary.written + summary.kept + failed
    print(f"camkit: {failed} of {total} failed, see {out / 'errors.tsv'}", file=sys.stderr)
    return 1


def show_failures(failures: Sequence[Failure], most: int = 20) -> None:
    """Print the first failures on the error stream."""
    for failure in failures[:most]:
        print(f"camkit: {failure.key}: {failure.reason}", file=sys.stderr)
    if len(failures) > most:
        print(f"camkit: ... and {len(failures) - most} more", file=sys.stderr)
