"""Write masks and class maps of any number of images; the same command continues a stopped run."""

import argparse
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from torch import nn

from camkit.bulk import Item, read_labels
from camkit.bulk.ray_engine import RayEngine
from camkit.bulk.recipe import CamOutput, Loading, Recipe, Writing
from camkit.bulk.running import rank_of, run
from camkit.bulk.sources import Labelled, Source, SourceKind, open_source
from camkit.cli.mask import add_background, add_ignore_below, background_score
from camkit.cli.models import add_model_arguments, open_model
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
from camkit.method import REFINERS
from camkit.seeds import PredictedClasses

_FIRST = PredictedClasses(0.5, "softmax")  # at most one class can have more than half

EXAMPLES = f"""examples:
  camkit run photos --out masks
  camkit run VOC2012 --split train --refine propagate+normalize:minmax+crf --cams both --out labels
  camkit run list.txt --root JPEGImages --labels cls_labels.npy --vocabulary voc --out masks
  camkit run shards --labels predicted:0.2 --cams parquet --out maps           tar shards
  camkit run photos.parquet --key-column name --out masks
  torchrun --nproc-per-node 8 -m camkit run photos --out masks                 one GPU per process
  camkit run photos --out masks --engine ray --address auto --gpus 0.5         a cluster

INPUT is a folder of photos, a list of paths, a data set in the layout of VOC, COCO or ImageNet-S, a
folder of WebDataset tar files or of Parquet, or one such file. A journal in OUT records what is
done: the same command does the rest, however the last one ended.

{refiners_help(REFINERS)}"""


@dataclass(frozen=True)
class TimmModel:
    """Opens a timm model with its weights, in any process.

    Attributes:
        name: of the model.
        size: long side of photos, see `camkit.cli.models.open_model`.
        opened: the model, if this process has opened it; copies in other processes do without.
    """

    name: str
    size: int
    opened: nn.Module | None = field(default=None, repr=False, compare=False)

    def __call__(self) -> nn.Module:
        return open_model(self.name, size=self.size).model if self.opened is None else self.opened

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return TimmModel, (self.name, self.size)


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
        rank=rank_of(os.environ),
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
    return 1 if summary.failed else 0


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
    return (Labelled(source, read_labels(text)), None) if predicted is None else (source, predicted)


def _recipe(options: argparse.Namespace, source: Source, labels: PredictedClasses | None) -> Recipe:
    """Open the model and return the recipe that the options describe."""
    opened, names = open_model(options.model, size=options.size), source.classes
    if options.vocabulary is not None:
        known = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}
        names = known.get(options.vocabulary) or tuple(read_names(Path(options.vocabulary)))
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
        model=TimmModel(options.model, options.size, opened.model),
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
        batch=options.batch,
        chunk=max(options.chunk, options.batch),
    )
