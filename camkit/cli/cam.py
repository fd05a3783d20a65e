"""Segment photos: mask, overlay, maps and manifest of each into its own folder."""

import argparse
import sys
from itertools import chain, count
from pathlib import Path

from tqdm import tqdm

from camkit.cli.models import OpenedModel, add_model_arguments, open_model
from camkit.errors import CamkitError
from camkit.pipeline import Pipeline, wrap
from camkit.vocabulary import Vocabulary

EXAMPLES = """examples:
  camkit cam cat.jpg --classes cat
  camkit cam photos/*.jpg --classes cat,dog --out masks
  camkit cam bird.jpg --classes "junco, snowbird" --background-score 0.6
  camkit cam lap.jpg --classes 281,282        ImageNet outputs by index

Names are ImageNet's own (any synonym) or the 20 of PASCAL VOC, which gather ImageNet outputs. A
name with commas in it works when it is the only one. Without --classes, the first guess is taken.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument(
        "--classes", default=None, help="what is in the pictures: names or indices, by commas"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/cam"),
        help="folder to write to, one sub-folder per photo (default: %(default)s)",
    )
    parser.add_argument(
        "--background-score",
        type=float,
        default=None,
        help="what a class must beat to own a pixel, in [0, 1]; higher means smaller masks",
    )
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    opened = open_model(options.model, size=options.size, or_embedded=True)
    classes = None if options.classes is None else read_classes(opened.vocabulary, options.classes)
    settings = {}
    if options.background_score is not None:
        settings["background_score"] = options.background_score
    pipeline = wrap(opened.model, vocabulary=opened.vocabulary, **settings)
    folders = _folders(options.images, options.out)
    failed = 0
    pairs = list(zip(options.images, folders, strict=True))
    for path, folder in tqdm(pairs, unit="photo", delay=2, disable=len(pairs) < 2):
        try:
            names = _segment(pipeline, opened, path, classes, folder)
        except (CamkitError, ValueError, OSError) as error:  # the other photos go on
            failed += 1
            tqdm.write(f"camkit: {path}: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            tqdm.write(f"{folder}: {', '.join(names)}")
    if failed:
        print(f"camkit: {failed} of {len(pairs)} photos failed", file=sys.stderr)
    return 1 if failed else 0


def _segment(
    pipeline: Pipeline,
    opened: OpenedModel,
    path: Path,
    classes: tuple[int, ...] | None,
    folder: Path,
) -> tuple[str, ...]:
    photo = opened.photos.load(path)
    result = pipeline(photo, classes=classes)
    result.save(folder)
    return result.names


def read_classes(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """Read ``cat,dog``, ``281,282`` or one ImageNet name that has commas in it."""
    if text.strip().lower() in {name.lower() for name in vocabulary.names}:
        return vocabulary.resolve([text])
    items = [item.strip() for item in text.split(",") if item.strip()]
    return vocabulary.resolve([int(item) if item.isdigit() else item for item in items])


def _folders(images: list[Path], out: Path) -> list[Path]:
    """One folder per photo, named after it; photos of the same name get numbers."""
    taken: dict[str, None] = {}
    for path in images:
        numbered = (f"{path.stem}-{number}" for number in count(2))
        taken[next(name for name in chain([path.stem], numbered) if name not in taken)] = None
    return [out / name for name in taken]
