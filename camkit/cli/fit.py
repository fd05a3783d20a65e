"""Fit a read-out over photos with image-level labels, for better maps (`--readout`)."""

import argparse
import sys
from collections.abc import Sequence
from functools import reduce
from operator import add as plus
from pathlib import Path

import torch
from tqdm import tqdm

from camkit.bulk import Failure, Item
from camkit.bulk.recipe import Loading
from camkit.bulk.stages import ReadImage, chunks, read
from camkit.cli.models import MODELS, add_model_arguments, open_named
from camkit.cli.options import add_method_arguments, method_of, read_classes
from camkit.cli.sources import (
    add_input_arguments,
    check_has_images,
    labelled,
    open_input,
    vocabulary_for,
)
from camkit.errors import CamkitError
from camkit.fitting import GUESSES, Fitter
from camkit.photo import Photo
from camkit.pipeline import Pipeline
from camkit.readout import Readout
from camkit.screen import progress
from camkit.seeds import PredictedClasses

EXAMPLES = f"""examples:
  camkit fit photos --labels labels.json --out readout.safetensors
  camkit fit VOC2012 --split train --out readout.safetensors
  camkit fit photos --out guessed.safetensors              labels: what the classifier is sure of
  camkit fit --join a.safetensors b.safetensors --out both.safetensors
  camkit run photos --readout readout.safetensors --out masks

INPUT is what `camkit run` takes. The model runs once on each photo; photos that show none of the
classes, or that the classifier is not sure of, teach nothing. A read-out belongs to one model and
one method: give the same options to `camkit run` and `camkit cam`.

{MODELS}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, nargs="?", metavar="INPUT", help="images")
    add("--out", type=Path, required=True, help="file to write, .safetensors")
    add("--join", type=Path, nargs="+", metavar="FILE", help="add up read-outs instead")
    add_input_arguments(parser)
    add_method_arguments(parser)
    add(
        "--form",
        choices=("auto", "object", "classes"),
        default="auto",
        help="one column for all objects, or one for each class (default: by the number of photos)",
    )
    add("--max-pixels", type=int, default=Loading.max_pixels, help="larger images are refused")
    add("--batch", type=int, default=8, help="images per forward (default: 8)")
    add("--device", help="of the model (default: a GPU if there is one)")
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    if (options.join is None) == (options.input is None):
        raise ValueError("give either INPUT or --join FILE FILE ...")
    if options.readout is not None:
        raise ValueError("a read-out is fitted on the maps of a method without one; omit --readout")
    failed = 0
    if options.join is not None:
        readout = reduce(plus, map(Readout.load, options.join))
    else:
        readout, failed = _fit(options)
    print(f"{readout.save(options.out)}: {readout}")
    unknown = [name for name in readout.classes if not readout.knows(name)]
    if unknown:
        print(
            f"camkit: not enough photos for {', '.join(unknown)}; their maps stay unfitted",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _fit(options: argparse.Namespace) -> tuple[Readout, int]:
    """Return the read-out of the photos of INPUT, and how many could not be read."""
    source = open_input(options)
    check_has_images(source, options.input)
    source, predicted = labelled(source, options.labels)
    opened = open_named(vars(options))
    vocabulary = vocabulary_for(options, source, opened.vocabulary)
    same = read_classes(vocabulary, options.classes) if options.classes is not None else None
    method = method_of(options, opened)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Pipeline(opened.model.to(device), method, vocabulary=vocabulary, call=opened.call)
    loading = Loading(**opened.photos.arguments(), max_pixels=options.max_pixels)
    # by default only what the classifier is sure of: a wrong guess would teach a wrong class
    guesses = predicted if options.labels is not None and predicted is not None else GUESSES
    fitter, failures = Fitter(pipeline, guesses=guesses), 0
    bar = progress(desc="fitting", unit="photo")
    for chunk in chunks(source, max(32, options.batch)):
        images: list[ReadImage] = []
        for entry in chunk:
            image = _read(entry, loading)
            if isinstance(image, ReadImage):
                images.append(image)
                continue
            failures += 1
            tqdm.write(f"camkit: {image.key}: {image.reason}", file=sys.stderr)
        _add(fitter, images, loading, options.batch, predicted, same)
        bar.update(len(chunk))
    bar.close()
    return fitter.readout(options.form), failures


def _read(entry: Item | Failure, loading: Loading) -> ReadImage | Failure:
    if isinstance(entry, Failure):
        return entry
    try:
        return read(entry, loading)
    except CamkitError as error:
        return Failure(entry.key, "read", " ".join(str(error).split()))


def _add(
    fitter: Fitter,
    images: Sequence[ReadImage],
    loading: Loading,
    batch: int,
    predicted: PredictedClasses | None,
    same: tuple[int, ...] | None,
) -> None:
    """Add the photos of a chunk, in batches of one size."""
    groups: dict[tuple[object, ...], list[tuple[Photo, tuple[int, ...] | None]]] = {}
    for image in images:
        labels = None if predicted is not None else image.classes
        labels = labels if same is None else same
        if labels is None or labels:
            key = (image.rgb.shape, labels is None)
            photo = loading.photo(image.rgb, size=image.rgb.shape[:2])
            groups.setdefault(key, []).append((photo, labels))
    for group in groups.values():
        for part in chunks(group, batch):
            fitter.add_photos(part)
