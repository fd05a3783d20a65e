"""Refine the CAM files of any codebase by their photos; needs no model and no GPU."""

import argparse
import sys
from pathlib import Path

from camkit.bulk import CamFolder, Failure, FileResult, RefineCam, read_labels, read_list, write_all
from camkit.cli.options import GRAMMAR, refiners_help
from camkit.method import read_refiners
from camkit.refiners import chain
from camkit.refiners.crf import PRESETS

EXAMPLES = f"""examples:
  camkit refine cams --images JPEGImages --refine crf:clip_es --out refined
  camkit refine cams --images JPEGImages --refine par:steps=15,scale=0.5+crf:psa --out refined
  camkit refine cams --images JPEGImages --refine guided --form psa --workers 16 --out refined

CAM files are .npy, .npz or .safetensors in any form that camkit.data.read_cam knows; none of their
code is run. Photos are found by name. Files that are there already are kept, so the same command
goes on where it was interrupted. Where each file came from and what failed stands in OUT.

{GRAMMAR}

{refiners_help()}

Presets of crf: {", ".join(PRESETS)}.
Behind crf, class and background are even at 0.5: camkit mask OUT --background-score 0.5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cam_arguments(parser)
    parser.add_argument("--images", type=Path, required=True, help="folder of the photos")
    parser.add_argument(
        "--refine",
        action="append",
        required=True,
        metavar="STEP",
        help="refiner and its settings, see below; give it again for steps one after another",
    )
    parser.add_argument(
        "--form",
        choices=("both", "psa", "irn", "clip-es"),
        default="both",
        help="whose evaluators can read the result: both = ToCo, CLIP-ES and IRN; psa = MCTformer, "
        "TransCAM, PSA (default: %(default)s)",
    )


def execute(options: argparse.Namespace) -> int:
    steps = read_refiners(options.refine)
    job = RefineCam(steps[0] if len(steps) == 1 else chain(*steps), options.form)
    written = write_all(
        job,
        opened_folder(options),
        options.out,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    return tell(written, options.out, "CAM files")


def add_cam_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command shares which reads a folder of CAM files and writes another."""
    parser.add_argument("cams", type=Path, metavar="CAM_DIR", help="folder of CAM files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--labels",
        type=Path,
        help="classes of each image, for CAM files that do not say them: cls_labels.npy or JSON",
    )
    parser.add_argument(
        "--list", type=Path, help="file of image names, one a line (default: all CAM files)"
    )
    parser.add_argument(
        "--any-aspect",
        action="store_true",
        help="stretch maps onto photos of another aspect ratio: of models that squash photos",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make files again that are there already"
    )
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        help="processes to work in, 0 for none but this one (default: one a core)",
    )


def opened_folder(options: argparse.Namespace) -> CamFolder:
    """The folder of CAM files that the options name."""
    return CamFolder(
        options.cams,
        options.images,
        labels=None if options.labels is None else read_labels(options.labels),
        names=None if options.list is None else read_list(options.list),
        any_aspect=options.any_aspect,
    )


def tell(written: FileResult, out: Path, kind: str) -> int:
    """Say what became of the files.

    Returns:
        1 when some failed, else 0.
    """
    show_failures(written.failures)
    kept = f", {written.kept} were there already" if written.kept else ""
    print(f"{out}: {written.written} {kind} written{kept}")
    if written.failures:
        total = written.written + written.kept + len(written.failures)
        print(
            f"camkit: {len(written.failures)} of {total} failed, listed in {out / 'errors.tsv'}",
            file=sys.stderr,
        )
    return 1 if written.failures else 0


def show_failures(failures: tuple[Failure, ...], most: int = 20) -> None:
    """Tell the first failures on the error stream."""
    for failure in failures[:most]:
        print(f"camkit: {failure.name}: {failure.reason}", file=sys.stderr)
    if len(failures) > most:
        print(f"camkit: ... and {len(failures) - most} more", file=sys.stderr)
