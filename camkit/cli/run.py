"""Make masks and class maps of any number of images; the same command goes on after a stop."""

import argparse
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from camkit.bulk import ImageLabels, read_labels
from camkit.bulk.opening import Opening
from camkit.bulk.ray_engine import RayEngine
from camkit.bulk.recipe import Reading, Recipe, Writing
from camkit.bulk.running import RunSummary, rank_of, run
from camkit.bulk.sources import Labelled, Source
from camkit.cli.mask import add_background, background_score
from camkit.cli.models import OpenedModel, add_model_arguments, open_model
from camkit.cli.options import (
    add_method_arguments,
    method_of,
    read_classes,
    refiners_help,
    split_refiners,
)
from camkit.data import COCO_CLASSES, VOC_CLASSES
from camkit.data.labels import read_names
from camkit.method import REFINERS
from camkit.seeds import PredictedClasses
from camkit.vocabulary import Vocabulary

_LIKELIEST = PredictedClasses(0.5, "softmax")  # at most one class can have more than half


@dataclass(frozen=True)
class TimmModel:
    """Opens a timm model with its weights, wherever it is called."""

    name: str
    size: int

    def __call__(self) -> nn.Module:
        return open_model(self.name, size=self.size).model


def labelled(source: Source, text: str | None) -> tuple[Source, PredictedClasses | None]:
    """The source with its labels, and the guess that stands for labels otherwise."""
    kind, _, threshold = (text or "").partition(":")
    if text is None:
        entry = next((one for one in source if hasattr(one, "classes")), None)
        return source, None if entry is not None and entry.classes is not None else _LIKELIEST
    if text == "dataset":
        return source, None
    if text == "first":
        return source, _LIKELIEST
    if kind == "predicted":
        try:
            return source, PredictedClasses(
                float(threshold) if threshold else 0.1, "softmax", least=0
            )
        except ValueError as error:
            raise ValueError(f"--labels {text}: {error}") from error
    labels: ImageLabels = read_labels(text)
    return Labelled(source, labels), None


def recipe_of(
    options: argparse.Namespace,
    opened: OpenedModel,
    source: Source,
    labels: PredictedClasses | None,
) -> Recipe:
    """Everything that decides what is made of an image."""
    vocabulary = _vocabulary(options.vocabulary, opened, source)
    chosen = None
    if options.classes is not None:
        if options.labels is not None:
            raise ValueError("--classes says what is in every image; leave --labels away")
        chosen = read_classes(vocabulary, options.classes)
    method = method_of(options, opened)
    refine, finish = split_refiners(method.refine)
    score = background_score(options)
    if score is None:
        score = method.background_score
    photos = opened.photos
    return Recipe(
        model=TimmModel(options.model, options.size),
        reading=Reading(photos.size, photos.mean, photos.std, photos.multiple, options.max_pixels),
        writing=Writing(
            finish,
            score,
            options.background,
            options.ignore_below,
            not options.no_masks,
            options.cams,
        ),
        seed=method.seed,
        edit=method.edit,
        edit_blocks=method.edit_blocks,
        refine=refine,
        vocabulary=vocabulary,
        labels=labels if chosen is None else chosen,
        batch=options.batch,
        chunk=max(options.chunk, options.batch),
    )


def _vocabulary(named: str | None, opened: OpenedModel, source: Source) -> Vocabulary:
    if named is None:
        names = source.classes
    else:
        known = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}
        names = known[named] if named in known else tuple(read_names(Path(named)))
    return opened.vocabulary if names is None else opened.vocabulary.subset(list(names))


EXAMPLES = f"""examples:
  camkit run photos --out masks
  camkit run VOC2012 --split train --refine propagate+normalize:minmax+crf --cams both --out labels
  camkit run list.txt --root JPEGImages --labels cls_labels.npy --vocabulary voc --out masks
  camkit run shards --labels predicted:0.2 --cams parquet --out maps           tar shards
  camkit run photos.parquet --key-column name --out masks
  torchrun --nproc-per-node 8 -m camkit run photos --out masks                 a GPU a process
  camkit run photos --out masks --engine ray --address auto --gpus 0.5         a cluster

INPUT is a folder of photos, a list of paths, a data set in the layout of VOC, COCO or ImageNet-S, a
folder of WebDataset tar files or of Parquet, or one such file. What is done is kept in a journal in
OUT: the same command does the rest, however the last one ended.

{refiners_help(REFINERS)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="where the images are")
    add("--out", type=Path, required=True, help="folder to write to")
    kinds = ("auto", "folder", "list", "dataset", "tar", "parquet")
    add("--as", dest="kind", choices=kinds, default="auto", help="what INPUT is (default: auto)")
    add("--split", help="split of a data set")
    add("--root", type=Path, help="where the paths of a list begin (default: its own folder)")
    add("--image-column", default="image", help="of Parquet: image bytes (default: image)")
    add("--key-column", help="of Parquet: names of the images (default: numbers of the rows)")
    add("--label-column", help="of Parquet: class indices")
    _add_asked(parser)
    _add_written(parser)
    add("--max-pixels", type=int, default=Reading.max_pixels, help="larger images are refused")
    add("--batch", type=int, default=8, help="images the model takes at once (default: 8)")
    add("--chunk", type=int, default=32, help="images planned together (default: 32)")
    add("--workers", type=int, help="processes that read and finish (default: the cores left)")
    add("--threads", type=int, help="of the model on a CPU (default: half of the cores)")
    add("--device", help="of the model (default: a GPU if there is one)")
    add("--overwrite", action="store_true", help="remove earlier results in OUT, and begin anew")
    add("--retry", action="store_true", help="try images again that failed before")
    add("--moved", action="store_true", help="INPUT is the same as before, at another place")
    _add_cluster(parser)
    add_model_arguments(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster")
    add("--address", help="of the Ray cluster (default: RAY_ADDRESS, else this machine)")
    add("--actors", type=int, help="Ray: processes with a model (default: as GPUs or cores allow)")
    add("--gpus", type=float, help="Ray: GPUs each of them takes, such as 0.5 (default: 1 if any)")


def _add_asked(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--classes", help="what is in every image: names or indices, by commas")
    add(
        "--labels",
        help="dataset (what INPUT says), first (the classifier's first guess), predicted[:SCORE] "
        "(all it gives this probability), or a file: cls_labels.npy, JSON (default: dataset where "
        "INPUT has labels, else first)",
    )
    add(
        "--vocabulary",
        help="what label indices count: voc, coco, or a file of names, one a line (default: the "
        "classes of the data set, else of the model)",
    )
    add_method_arguments(parser)


def _add_written(parser: argparse.ArgumentParser) -> None:
    forms = ("none", "both", "psa", "irn", "clip-es", "npz", "parquet")
    parser.add_argument(
        "--cams",
        choices=forms,
        default="none",
        help="class maps too: files as `camkit refine --form` writes them, float16 npz, or Parquet "
        "with float16 maps of the refiners' size (default: none)",
    )
    parser.add_argument("--no-masks", action="store_true", help="class maps only")
    add_background(parser)
    parser.add_argument(
        "--ignore-below",
        type=float,
        help="pixels that lose to the background, yet score more than this, become 255",
    )


def execute(options: argparse.Namespace) -> int:
    opening = Opening(
        options.kind,
        options.split,
        options.root,
        options.image_column,
        options.key_column,
        options.label_column,
    )
    cluster = _cluster(options)
    source, labels = labelled(opening(options.input), options.labels)
    opened = open_model(options.model, size=options.size)
    recipe = recipe_of(options, opened, source, labels)
    rank = rank_of()
    signal.signal(signal.SIGTERM, _interrupt)  # how clusters end a job
    ran = run(
        recipe,
        source,
        options.out,
        device=options.device or (rank.device if cluster is None else None),
        workers=options.workers,
        threads=options.threads,
        share=rank.share,
        neighbours=rank.neighbours,
        ray=cluster,
        overwrite=options.overwrite,
        retry=options.retry,
        moved=options.moved,
    )
    return _tell(ran, options.out)


def _cluster(options: argparse.Namespace) -> RayEngine | None:
    """The cluster that is asked for."""
    if options.engine == "ray":
        return RayEngine(options.address, options.actors, options.gpus)
    for name in ("address", "actors", "gpus"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is of a cluster; say --engine ray, or leave it away")
    return None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _tell(ran: RunSummary, out: Path) -> int:
    kept = f", {ran.settled} were settled already" if ran.settled else ""
    print(f"{out}: {ran.written} images done, {ran.failed} failed{kept}")
    if ran.errors:
        print(
            f"camkit: {ran.errors} images failed in all, listed in {out / 'errors.tsv'}; --retry "
            "tries them again",
            file=sys.stderr,
        )
    return 1 if ran.failed else 0
