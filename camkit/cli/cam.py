"""Segment photos: mask, overlay, maps and manifest of each into its own folder."""

import argparse
import shlex
import sys
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from tqdm import tqdm

from camkit.cli.models import MODELS, add_model_arguments, open_named
from camkit.cli.options import (
    GRAMMAR,
    METHOD_GRAMMAR,
    add_method_arguments,
    add_sam_arguments,
    method_of,
    refiners_help,
)
from camkit.errors import CamkitError, DataError, nearby, one_line
from camkit.method import REFINERS
from camkit.pipeline import Pipeline
from camkit.printing import several
from camkit.screen import progress
from camkit.vocabulary import read_classes

EXAMPLES = f"""examples:
  camkit cam cat.jpg --classes cat
  camkit cam photos/*.jpg --classes cat,dog --out masks
  camkit cam bird.jpg --classes "junco, snowbird" --background-score 0.6
  camkit cam lap.jpg --classes 281,282        ImageNet outputs by index
  camkit cam cat.jpg --classes cat --seed gradcam:variant=layercam --refine propagate+crf
  camkit cam cat.jpg --model vit_tiny_patch16_224 --checkpoint own.pth --names names.txt
  camkit cam cat.jpg --model mymodels:build --names names.txt     a model that your code makes

Names are ImageNet's own (any synonym) or the 20 of PASCAL VOC, each of which stands for several
ImageNet outputs. A name that contains commas must be the only one. Without --classes, the most
probable class is taken.

{MODELS}

{METHOD_GRAMMAR}

{GRAMMAR}

{refiners_help(REFINERS)}
"""


_OUT = Path("out/cam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    add("--classes", help="classes in the pictures: names or indices, by commas")
    add(
        "--out",
        type=Path,
        default=_OUT,
        help="folder to write to, one sub-folder per photo (default: %(default)s)",
    )
    add(
        "--background-score",
        type=float,
        help="score that a class must exceed to own a pixel, in [0, 1]; a higher score means "
        "smaller masks",
    )
    add_method_arguments(parser)
    add_sam_arguments(parser)
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    _check_photos(options)
    opened = open_named(vars(options), or_embedded=True)
    classes = None if options.classes is None else read_classes(opened.vocabulary, options.classes)
    method = method_of(options, opened)
    if options.background_score is not None:
        method = replace(method, background_score=options.background_score)
    pipeline = Pipeline(opened.model, method, vocabulary=opened.vocabulary, call=opened.call)

    folders: dict[str, None] = {}  # one per photo; photos of the same name get numbers
    for path in options.images:
        names = chain([path.stem], (f"{path.stem}-{number}" for number in count(2)))
        folders[next(name for name in names if name not in folders)] = None

    failed = 0
    pairs = list(zip(options.images, folders, strict=True))
    for path, name in progress(pairs, unit="photo") if len(pairs) > 1 else pairs:
        try:
            result = pipeline(opened.photos.load(path), classes=classes)
            folder = result.save(options.out / name)
        except (CamkitError, ValueError, OSError) as error:  # continue with the other photos
            failed += 1
            tqdm.write(f"camkit: {path}: {one_line(error)}", file=sys.stderr)
        else:
            tqdm.write(f"{folder}: {', '.join(result.names)}")
    if failed:
        print(f"camkit: {failed} of {several(len(pairs), 'photo')} failed", file=sys.stderr)
    return 1 if failed else 0


def _check_photos(options: argparse.Namespace) -> None:
    """Refuse folders, and paths of which none exists, before the model is opened."""
    folder = next((path for path in options.images if path.is_dir()), None)
    if folder is not None:
        raise ValueError(f"{folder} is a folder; for all photos in it: {_as_run(options, folder)}")
    if not any(path.exists() for path in options.images):
        path = options.images[0]
        raise DataError(f"{path} does not exist{nearby(path) or '; check the path'}")


def _as_run(options: argparse.Namespace, folder: Path) -> str:
    """Return the command that does with a folder what these options do with photos."""
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    words = ["camkit", "run", str(folder)]
    given = vars(options) | {"out": "masks" if options.out == _OUT else options.out}
    for name, value in given.items():
        if name not in ("images", "execute") and value != defaults.get_default(name):
            values = value if isinstance(value, list) else [value]
            words += [
                word for each in values for word in (f"--{name.replace('_', '-')}", str(each))
            ]
    return shlex.join(words)
