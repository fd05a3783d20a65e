"""Fit a read-out over photos with image-level labels, for better maps (`--readout`)."""

import argparse
import sys
from dataclasses import replace
from functools import reduce
from operator import add as plus
from pathlib import Path

from camkit.bulk.recipe import Loading, Recipe
from camkit.bulk.running import fit_readout
from camkit.bulk.sources import PhotoFolder
from camkit.cli.models import MODELS, add_model_arguments, open_named
from camkit.cli.options import (
    add_form,
    add_method_arguments,
    add_sam_arguments,
    method_to_fit,
)
from camkit.cli.sources import (
    add_input_arguments,
    check_has_images,
    guesses_for,
    labelled,
    name_skipped,
    open_input,
    vocabulary_for,
)
from camkit.method import split_refine
from camkit.printing import several
from camkit.readout import Readout
from camkit.vocabulary import read_classes

EXAMPLES = f"""examples:
  camkit fit photos --labels labels.json --out readout.safetensors
  camkit fit VOC2012 --split train --out readout.safetensors
  camkit fit photos --out guessed.safetensors              labels: what the classifier is sure of
  camkit fit --join a.safetensors b.safetensors --out both.safetensors
  camkit run photos --readout readout.safetensors --out masks

INPUT is what `camkit run` takes. The model runs once on each photo; photos that show none of the
classes, or that the classifier is not sure of, teach nothing. A read-out belongs to one model and
one method: give the same options to `camkit run` and `camkit cam`. An interrupted command leaves
the folder OUT.part: the same command does the rest.

{MODELS}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, nargs="?", metavar="INPUT", help="images")
    add("--out", type=Path, required=True, help="file to write, .safetensors")
    add("--join", type=Path, nargs="+", metavar="FILE", help="add up read-outs instead")
    add_input_arguments(parser)
    add_method_arguments(parser)
    add_sam_arguments(parser)
    add_form(parser)
    add("--max-pixels", type=int, default=Loading.max_pixels, help="larger images are refused")
    add("--batch", type=int, default=8, help="images per forward (default: 8)")
    add("--workers", type=int, help="processes that read (default: the cores left)")
    add("--threads", type=int, help="of the model on a CPU (default: half of the cores)")
    add("--device", help="of the model (default: a GPU if there is one)")
    add("--overwrite", action="store_true", help="remove what an interrupted command left")
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    if (options.join is None) == (options.input is None):
        raise ValueError("give either INPUT or --join FILE FILE ...")
    if options.readout is not None:
        raise ValueError("a read-out is fitted on the maps of a method without one; omit --readout")
    failed = 0
    if options.join is not None:
        readout = reduce(plus, map(Readout.load, options.join))
        readout.save(options.out)
    else:
        readout, failed = _fit(options)
    print(f"{options.out}: {readout}")
    unknown = [name for name in readout.classes if not readout.knows(name)]
    if unknown:
        print(
            f"camkit: not enough photos for {', '.join(unknown)}; their maps stay unfitted",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _fit(options: argparse.Namespace) -> tuple[Readout, int]:
    """Return the read-out of the photos of INPUT, and how many could not be read."""
    source = photos = open_input(options)
    check_has_images(source, options.input)
    source, predicted = labelled(source, options, partial=True)
    opened = open_named(vars(options))
    vocabulary = vocabulary_for(options, source, opened.vocabulary)
    same = read_classes(vocabulary, options.classes) if options.classes is not None else None
    method = method_to_fit(options, opened)
    recipe = Recipe(
        model=opened.opener,
        method=replace(method, refine=split_refine(method.refine)[0]),
        loading=Loading(**opened.photos.arguments(), max_pixels=options.max_pixels),
        vocabulary=vocabulary,
        labels=predicted if same is None else same,
        call=opened.call,
        batch=options.batch,
        chunk=max(32, options.batch),
        fit=options.form or "auto",
        guesses=guesses_for(options.labels, predicted),
    )
    summary = fit_readout(
        recipe,
        source,
        options.out,
        device=options.device,
        workers=options.workers,
        threads=options.threads,
        overwrite=options.overwrite,
    )
    if isinstance(photos, PhotoFolder):
        name_skipped(photos)
    for failure in summary.failures:
        print(f"camkit: {failure.key}: {failure.reason}", file=sys.stderr)
    failed = len(summary.failures)
    print(f"{options.out}: {several(summary.offered, 'image')} offered, {failed} failed")
    return summary.readout, failed
