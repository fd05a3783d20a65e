"""Draw the CAM files of any codebase as masks: palette PNGs, class + 1 at each pixel."""

import argparse
from pathlib import Path

from camkit.bulk import DrawMask, write_all
from camkit.cli.refine import add_cam_arguments, opened_folder, tell

EXAMPLES = """examples:
  camkit mask cams --out masks
  camkit mask refined --background-score 0.5 --out masks
  camkit mask cams --background power --alpha 1 --out masks        the background of CLIP-ES
  camkit mask cams --background-score 0.3 --ignore-below 0.05 --out masks     255 in between

Files that are there already are kept, so the same command goes on where it was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cam_arguments(parser)
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of the photos, for maps that are not of their size and images without classes",
    )
    add_background(parser)
    parser.add_argument(
        "--ignore-below",
        type=float,
        help="pixels that lose to the background, yet score more than this, become 255",
    )


def add_background(parser: argparse.ArgumentParser) -> None:
    """Options that tell the background from the classes."""
    parser.add_argument(
        "--background-score",
        type=float,
        help="what a class must beat to own a pixel, in [0, 1] (default: 0.45; 0.5, the highest "
        "map, for files that hold a map of the background)",
    )
    parser.add_argument(
        "--background",
        choices=("constant", "power"),
        default="constant",
        help="power: a class must beat (1 - max) ** ALPHA (default: %(default)s)",
    )
    parser.add_argument("--alpha", type=float, help="exponent of --background power")


def background_score(options: argparse.Namespace) -> float | None:
    """The background score or the exponent, whichever is meant.

    Raises:
        ValueError: the options do not fit each other.
    """
    power = options.background == "power"
    if power and options.background_score is not None:
        raise ValueError("--background power takes --alpha, not --background-score")
    if power and options.alpha is None:
        raise ValueError("--background power needs --alpha: 1 of CLIP-ES, 4 to 24 of PSA")
    if not power and options.alpha is not None:
        raise ValueError("--alpha goes with --background power")
    score: float | None = options.alpha if power else options.background_score
    return score


def execute(options: argparse.Namespace) -> int:
    job = DrawMask(background_score(options), options.background, options.ignore_below)
    written = write_all(
        job,
        opened_folder(options),
        options.out,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    return tell(written, options.out, "masks")
