"""Draw the CAM files of any codebase as masks: palette PNGs, class + 1 at each pixel."""

import argparse
from pathlib import Path

from camkit.bulk import DrawMask
from camkit.cli.refine import add_cam_arguments, write_files

EXAMPLES = """examples:
  camkit mask cams --out masks
  camkit mask refined --background-score 0.5 --out masks
  camkit mask cams --background power --alpha 1 --out masks        the background of CLIP-ES
  camkit mask cams --background-score 0.3 --ignore-below 0.05 --out masks     255 in between

Existing files are kept, so the same command continues an interrupted run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cam_arguments(parser)
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of the photos, for maps of another size and for images without classes",
    )
    add_background(parser)
    add_ignore_below(parser)


def add_ignore_below(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-below",
        type=float,
        help="background pixels with a class score above this become 255",
    )


OF_FILES = "0.45; 0.5, which draws the highest map, for files with a background map"


def add_background(parser: argparse.ArgumentParser, *, default: str = OF_FILES) -> None:
    """Add the options that `background_score` reads; ``default`` describes the default score."""
    parser.add_argument(
        "--background-score",
        type=float,
        help=f"score in [0, 1] that a class must exceed to get a pixel (default: {default})",
    )
    parser.add_argument(
        "--background",
        choices=("constant", "power"),
        default="constant",
        help="power: a class must exceed (1 - max) ** ALPHA (default: %(default)s)",
    )
    parser.add_argument("--alpha", type=float, help="exponent of --background power")


def background_score(options: argparse.Namespace) -> float | None:
    """Return the background score, or the exponent of a power background."""
    power = options.background == "power"
    if power and options.background_score is not None:
        raise ValueError("--background power takes --alpha, not --background-score")
    if power and options.alpha is None:
        raise ValueError("--background power needs --alpha: 1 of CLIP-ES, 4 to 24 of PSA")
    if not power and options.alpha is not None:
        raise ValueError("--alpha needs --background power")
    score: float | None = options.alpha if power else options.background_score
    return score


def execute(options: argparse.Namespace) -> int:
    job = DrawMask(background_score(options), options.background, options.ignore_below)
    return write_files(options, job, "masks")
