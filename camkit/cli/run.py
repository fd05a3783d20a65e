"""Write masks and class maps of any number of images; the same command continues a stopped run."""

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

from camkit.bulk.parquet_rows import ParquetRows
from camkit.bulk.ray_engine import RayEngine
from camkit.bulk.recipe import CamOutput, Loading, Recipe, Writing
from camkit.bulk.running import RunSummary, rank_of, run
from camkit.bulk.sources import PhotoFolder, Source
from camkit.bulk.tars import TarShards
from camkit.cli.mask import add_background, add_ignore_below, background_score
from camkit.cli.models import MODELS, add_model_arguments, open_named
from camkit.cli.options import (
    add_form,
    add_method_arguments,
    add_sam_arguments,
    method_of,
    method_to_fit,
    refiners_help,
    split_refiners,
)
from camkit.cli.sources import (
    add_input_arguments,
    check_has_images,
    guesses_for,
    labelled,
    name_notes,
    name_skipped,
    open_input,
    vocabulary_for,
)
from camkit.errors import one_line
from camkit.formats import is_image
from camkit.method import REFINERS, split_refine
from camkit.printing import several
from camkit.seeds import FITTED_SCORE, PredictedClasses
from camkit.vocabulary import read_classes

EXAMPLES = f"""examples:
  camkit run photos --out masks
  camkit run VOC2012 --split train --refine propagate+normalize:minmax+crf --cams both --out labels
  camkit run list.txt --root JPEGImages --labels cls_labels.npy --vocabulary voc --out masks
  camkit run shards --labels predicted:0.2 --cams parquet --out maps           tar shards
  camkit run photos --regions masks --region-settings rule=sepl --out masks
  camkit run photos --labels labels.json --fit --out masks                     two passes
  camkit run photos.parquet --key-column name --out masks
  torchrun --nproc-per-node 8 -m camkit run photos --out masks                 one GPU per process
  camkit run photos --out masks --engine ray --address auto --gpus 0.5         a cluster
  camkit run photos --out masks --model vit_tiny_patch16_224 --checkpoint own.pth --names names.txt
  camkit run photos --out masks --sam hf:facebook/sam-vit-base --sam-device cuda:1
  camkit run photos --out masks --model mymodels:build                         your own code

INPUT is a folder of photos, a list of paths, a data set in the layout of VOC, COCO or ImageNet-S, a
folder of WebDataset tar files or of Parquet, or one such file. A journal in OUT records what is
done: the same command does the rest, however the last one ended. With --fit the model runs twice
on each image: the first pass fits OUT/readout.safetensors, the second makes the maps with it.

{MODELS}

{refiners_help(REFINERS)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="images")
    add("--out", type=Path, required=True, help="results folder")
    add_input_arguments(parser)
    add_method_arguments(parser)
    add_sam_arguments(parser)
    add(
        "--cams",
        choices=get_args(CamOutput),
        default="none",
        help="also write class maps: files as those of `camkit refine --form`, float16 npz, or "
        "Parquet with float16 maps at the size of the refiners (default: none)",
    )
    add("--no-masks", action="store_true", help="write class maps only")
    add_background(parser, default="that of the method")
    add_ignore_below(parser)
    add(
        "--max-pixels",
        type=int,
        default=Loading.max_pixels,
        help="larger images are refused; a worker needs about 20 bytes for each pixel (default: "
        "%(default)s)",
    )
    add("--fit", action="store_true", help="first fit a read-out over all images, for better maps")
    add_form(parser)
    add("--batch", type=int, default=8, help="images per forward (default: 8)")
    add("--chunk", type=int, default=32, help="images planned together (default: 32)")
    add("--workers", type=int, help="processes that read and finish (default: the cores left)")
    add("--threads", type=int, help="of the model on a CPU (default: half of the cores)")
    add("--device", help="of the model (default: a GPU if there is one)")
    add("--overwrite", action="store_true", help="remove earlier results in OUT and start again")
    add("--retry", action="store_true", help="try images again that failed before")
    add(
        "--verify",
        action="store_true",
        help="read the files of images done before, and do images again whose files are missing or "
        "damaged",
    )
    add("--moved", action="store_true", help="INPUT is the same as before, at another place")
    add("--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster")
    add("--address", help="of the Ray cluster (default: RAY_ADDRESS, else this machine)")
    add("--actors", type=int, help="Ray: processes with a model (default: as GPUs or cores allow)")
    add("--gpus", type=float, help="Ray: GPUs per actor, such as 0.5 (default: 1 if any)")
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    _check_options(options)
    cluster = None
    if options.engine == "ray":
        cluster = RayEngine(options.address, options.actors, options.gpus)
    source = open_input(options)
    photos, rank = source, rank_of(os.environ)
    _check_input(options, source)
    source, labels = labelled(source, options, partial=options.fit)
    recipe = _recipe(options, source, labels)
    summary = run(
        recipe,
        source,
        options.out,
        device=options.device,
        workers=options.workers,
        threads=options.threads,
        rank=rank,
        ray=cluster,
        overwrite=options.overwrite,
        retry=options.retry,
        moved=options.moved,
        verify=options.verify,
    )
    _report(summary, options.out)
    name_notes(summary.notes)
    if rank.number == 0:
        _name_others(photos, options.input)
    return 1 if summary.failed or summary.taken or summary.errors or summary.unread else 0


def _report(summary: RunSummary, out: Path) -> None:
    """Print what became of the images."""
    before = f", {summary.settled} were settled before" if summary.settled else ""
    print(
        f"{out}: {several(summary.written, 'image')} done, {summary.failed} failed{before}; "
        f"{summary.offered} offered"
    )
    for number, what in (
        (summary.taken, "done before failed now: another image has the same name"),
        (summary.damaged, "done before had a file that was missing or damaged"),
    ):
        if number:
            print(f"camkit: {several(number, 'image')} {what}", file=sys.stderr)
    if summary.errors:
        print(
            f"camkit: {several(summary.errors, 'image')} failed in total, see "
            f"{out / 'errors.tsv'}; --retry tries them again",
            file=sys.stderr,
        )
    if summary.unfitted:
        print(
            f"camkit: the read-out does not know {', '.join(summary.unfitted)}; their maps stay "
            "unfitted, as the manifest says of each image",
            file=sys.stderr,
        )
    if summary.unread:
        print(
            f"camkit: the read-out lacks {several(summary.unread, 'image')} that failed, see "
            f"{out / 'errors.tsv'}",
            file=sys.stderr,
        )


def _name_others(source: Source, place: Path) -> None:
    """Say which files of INPUT are not read."""
    if isinstance(source, PhotoFolder):
        name_skipped(source)
    if isinstance(source, TarShards) and source.skipped_files:
        kinds = source.skipped_files
        listed = ", ".join(f"{number} {suffix}" for suffix, number in kinds.most_common(8))
        print(
            f"camkit: {several(kinds.total(), 'file')} in the shards without an image "
            f"({one_line(listed)})",
            file=sys.stderr,
        )
    if isinstance(source, TarShards | ParquetRows) and place.is_dir():
        read = {path.name for path in source.paths}
        others = sorted(path.name for path in place.iterdir() if path.name not in read)
        if others:
            listed = one_line(", ".join(others), most=100)
            print(f"camkit: {place} holds more than shards, not read: {listed}", file=sys.stderr)


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    for name in ("address", "actors", "gpus"):
        if options.engine != "ray" and getattr(options, name) is not None:
            raise ValueError(f"--{name} needs a cluster; add --engine ray, or omit it")
    if options.fit and options.readout is not None:
        raise ValueError(
            "--fit fits a read-out of its own; omit --readout, or omit --fit to use that file"
        )
    if options.form is not None and not options.fit:
        raise ValueError("--form is that of the read-out of --fit; add --fit, or omit it")


def _check_input(options: argparse.Namespace, source: Source) -> None:
    """Refuse an input without images, and results inside of it, which would become images."""
    place, out = options.input, options.out.resolve()
    if isinstance(source, PhotoFolder) and out.is_relative_to(place.resolve()):
        raise ValueError(
            f"--out {options.out} lies in {place}, so its masks would be taken for photos; choose "
            "a folder outside of it"
        )
    if place.is_file() and is_image(place.name):
        command = shlex.join(["camkit", "cam", str(place)])
        raise ValueError(f"{place} is a single photo; give its folder, or use: {command}")
    check_has_images(source, place)


def _recipe(options: argparse.Namespace, source: Source, labels: PredictedClasses | None) -> Recipe:
    """Open the model and return the recipe that the options describe."""
    opened = open_named(vars(options))
    vocabulary = vocabulary_for(options, source, opened.vocabulary)
    classes = None
    if options.classes is not None:
        if options.labels is not None:
            raise ValueError("--classes gives the classes of every image; omit --labels")
        classes = read_classes(vocabulary, options.classes)
    score = background_score(options)
    if options.fit:
        # the fit reads the first maps, and its own maps have another background score
        method = method_to_fit(options, opened)
        first, edges = split_refine(method.refine)
        kept, finish = split_refiners(edges)
        refine, default = (*first, *kept), FITTED_SCORE
    else:
        method = method_of(options, opened)
        refine, finish = split_refiners(method.refine)
        default = method.background_score
    return Recipe(
        model=opened.opener,
        method=replace(method, refine=refine),
        loading=Loading(**opened.photos.arguments(), max_pixels=options.max_pixels),
        writing=Writing(
            finish,
            default if score is None else score,
            options.background,
            options.ignore_below,
            not options.no_masks,
            options.cams,
        ),
        vocabulary=vocabulary,
        labels=labels if classes is None else classes,
        call=opened.call,
        batch=options.batch,
        chunk=max(options.chunk, options.batch),
        fit=(options.form or "auto") if options.fit else None,
        guesses=guesses_for(options.labels, labels) if options.fit else None,
    )
