"""Write masks and class maps of any number of images; the same command continues a stopped run."""

import argparse
import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

from camkit.bulk import Item, read_labels
from camkit.bulk.items import IMAGE_SUFFIXES, is_image
from camkit.bulk.ray_engine import RayEngine
from camkit.bulk.recipe import CamOutput, Loading, Recipe, Writing
from camkit.bulk.running import rank_of, run
from camkit.bulk.sources import Labelled, PhotoFolder, Source, SourceKind, open_source
from camkit.cli.mask import add_background, add_ignore_below, background_score
from camkit.cli.models import MODELS, add_model_arguments, open_named
from camkit.cli.options import (
    add_method_arguments,
    method_of,
    read_classes,
    read_predicted,
    refiners_help,
    split_refiners,
)
from camkit.data import COCO_CLASSES, VOC_CLASSES
from camkit.data.labels import read_names
from camkit.errors import CamkitError, closest, nearby
from camkit.method import REFINERS
from camkit.seeds import PredictedClasses

_KNOWN = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}
_FIRST = PredictedClasses(0.5, "softmax")  # at most one class can have more than half

EXAMPLES = f"""examples:
  camkit run photos --out masks
  camkit run VOC2012 --split train --refine propagate+normalize:minmax+crf --cams both --out labels
  camkit run list.txt --root JPEGImages --labels cls_labels.npy --vocabulary voc --out masks
  camkit run shards --labels predicted:0.2 --cams parquet --out maps           tar shards
  camkit run photos.parquet --key-column name --out masks
  torchrun --nproc-per-node 8 -m camkit run photos --out masks                 one GPU per process
  camkit run photos --out masks --engine ray --address auto --gpus 0.5         a cluster
  camkit run photos --out masks --model vit_tiny_patch16_224 --checkpoint own.pth --names names.txt
  camkit run photos --out masks --model mymodels:build                         your own code

INPUT is a folder of photos, a list of paths, a data set in the layout of VOC, COCO or ImageNet-S, a
folder of WebDataset tar files or of Parquet, or one such file. A journal in OUT records what is
done: the same command does the rest, however the last one ended.

{MODELS}

{refiners_help(REFINERS)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="images")
    add("--out", type=Path, required=True, help="results folder")
    kinds = get_args(SourceKind)
    add("--as", dest="kind", choices=kinds, default="auto", help="kind of INPUT (default: auto)")
    add("--split", help="split of a data set")
    add("--root", type=Path, help="folder that the paths of a list start at (default: its own)")
    add("--image-column", default="image", help="Parquet column of image bytes (default: image)")
    add("--key-column", help="Parquet column of image names (default: numbers of the rows)")
    add("--label-column", help="Parquet column of class indices")
    add("--classes", help="classes of every image: names or indices, separated by commas")
    add(
        "--labels",
        help="dataset (from INPUT), first (the classifier's most probable class), "
        "predicted[:SCORE] (all classes with this probability), or a file: cls_labels.npy, JSON "
        "(default: dataset if INPUT has labels, else first)",
    )
    add(
        "--vocabulary",
        help="classes that label indices count: voc, coco, or a file of names, one per line "
        "(default: the classes of the data set, else of the model)",
    )
    add_method_arguments(parser)
    add(
        "--cams",
        choices=get_args(CamOutput),
        default="none",
        help="also write class maps: files as those of `camkit refine --form`, float16 npz, or "
        "Parquet with float16 maps at the size of the refiners (default: none)",
    )
    add("--no-masks", action="store_true", help="write class maps only")
    add_background(parser)
    add_ignore_below(parser)
    add("--max-pixels", type=int, default=Loading.max_pixels, help="larger images are refused")
    add("--batch", type=int, default=8, help="images per forward (default: 8)")
    add("--chunk", type=int, default=32, help="images planned together (default: 32)")
    add("--workers", type=int, help="processes that read and finish (default: the cores left)")
    add("--threads", type=int, help="of the model on a CPU (default: half of the cores)")
    add("--device", help="of the model (default: a GPU if there is one)")
    add("--overwrite", action="store_true", help="remove earlier results in OUT and start again")
    add("--retry", action="store_true", help="try images again that failed before")
    add("--moved", action="store_true", help="INPUT is the same as before, at another place")
    add("--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster")
    add("--address", help="of the Ray cluster (default: RAY_ADDRESS, else this machine)")
    add("--actors", type=int, help="Ray: processes with a model (default: as GPUs or cores allow)")
    add("--gpus", type=float, help="Ray: GPUs per actor, such as 0.5 (default: 1 if any)")
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    cluster = None
    if options.engine == "ray":
        cluster = RayEngine(options.address, options.actors, options.gpus)
    for name in ("address", "actors", "gpus"):
        if cluster is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} needs a cluster; add --engine ray, or omit it")
    source = open_source(
        options.input,
        kind=options.kind,
        split=options.split,
        root=options.root,
        image=options.image_column,
        key=options.key_column,
        labels=options.label_column,
    )
    photos, rank = source, rank_of(os.environ)
    _check_input(options, source)
    source, labels = _labelled(source, options.labels)
    recipe = _recipe(options, source, labels)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the way clusters end a job
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
    )
    before = f", {summary.settled} were settled before" if summary.settled else ""
    print(f"{options.out}: {summary.written} images done, {summary.failed} failed{before}")
    if summary.errors:
        print(
            f"camkit: {summary.errors} images failed in total, see {options.out / 'errors.tsv'}; "
            "--retry tries them again",
            file=sys.stderr,
        )
    if isinstance(photos, PhotoFolder) and rank.number == 0:
        _name_skipped(photos)
    return 1 if summary.failed else 0


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
    if next(iter(source), None) is None:
        if isinstance(source, PhotoFolder):
            _name_skipped(source)
        raise CamkitError(f"{place} has no images; read are {', '.join(IMAGE_SUFFIXES)}")


def _name_skipped(photos: PhotoFolder) -> None:
    """Say how many files of a folder are not read, because of their suffixes."""
    skipped = photos.skipped()
    if skipped:
        listed = ", ".join(f"{number} {suffix}" for suffix, number in skipped.most_common(8))
        files = "file is" if skipped.total() == 1 else "files are"
        print(
            f"camkit: {skipped.total()} {files} not read ({listed}); "
            f"read are {', '.join(IMAGE_SUFFIXES)}",
            file=sys.stderr,
        )


def _labelled(source: Source, text: str | None) -> tuple[Source, PredictedClasses | None]:
    """Return the source with the labels of ``--labels``, or the prediction that replaces them."""
    if text is None:
        first = next((entry for entry in source if isinstance(entry, Item)), None)
        return source, None if first is not None and first.classes is not None else _FIRST
    if text == "dataset":
        return source, None
    if text == "first":
        return source, _FIRST
    predicted = read_predicted(text)
    if predicted is None and not Path(text).exists():
        word = closest(text, ("dataset", "first", "predicted"))
        hint = f"; {word}" if word.startswith("did you mean") else nearby(Path(text)) or f"; {word}"
        raise ValueError(f"--labels {text}: no such file{hint}")
    return (Labelled(source, read_labels(text)), None) if predicted is None else (source, predicted)


def _read_names(text: str) -> tuple[str, ...]:
    path = Path(text)
    if not path.exists():
        hint = nearby(path) or f"; {closest(text, _KNOWN)}"
        raise ValueError(f"--vocabulary {text}: no such file{hint}")
    return tuple(read_names(path))


def _recipe(options: argparse.Namespace, source: Source, labels: PredictedClasses | None) -> Recipe:
    """Open the model and return the recipe that the options describe."""
    opened, names = open_named(vars(options)), source.classes
    if options.vocabulary is not None:
        names = _KNOWN.get(options.vocabulary) or _read_names(options.vocabulary)
    vocabulary = opened.vocabulary if names is None else opened.vocabulary.subset(list(names))
    classes = None
    if options.classes is not None:
        if options.labels is not None:
            raise ValueError("--classes gives the classes of every image; omit --labels")
        classes = read_classes(vocabulary, options.classes)
    method = method_of(options, opened)
    refine, finish = split_refiners(method.refine)
    score = background_score(options)
    return Recipe(
        model=opened.opener,
        method=replace(method, refine=refine),
        loading=Loading(**opened.photos.arguments(), max_pixels=options.max_pixels),
        writing=Writing(
            finish,
            method.background_score if score is None else score,
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
    )
