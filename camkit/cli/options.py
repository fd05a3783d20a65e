"""Options that commands share: a method in words, classes, and the help on short names."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import torch

from camkit.cli.models import OpenedModel, segmenter_of
from camkit.data import COCO_CLASSES, VOC_CLASSES
from camkit.data.names import read_class_names
from camkit.errors import closest, nearby
from camkit.method import (
    DEFAULT_REFINE,
    EDITS,
    PICTURE_REFINERS,
    PROMPTED,
    REFINERS,
    SEEDS,
    WORDS_OF_REGIONS,
    Method,
    Names,
    read_refiners,
    read_regions,
    settings_of,
    show_value,
    with_readout,
)
from camkit.pipeline import wrap
from camkit.readout import Form, Readout
from camkit.refiners import AtReducedSize, DenseCRF, PromptedRefine, Refiner, Regions
from camkit.refiners.prompted import prompted_in
from camkit.seeds import PredictedClasses
from camkit.segmenters import PretrainedSegmenter

GRAMMAR = """A step is NAME[:SETTINGS]. Join steps with +, or give --refine several times. Settings
are key=value, separated by commas; the key of the first may be left out: crf:clip_es is
crf:preset=clip_es. Sizes and lists are joined by x: size=240x320. Any step may set reduced=0.5 to
refine at half size (camkit.refiners.AtReducedSize). NAME may also be the dotted path of a class or
a function."""

METHOD_GRAMMAR = f"""Seeds: {", ".join(list(SEEDS)[:7])},
{", ".join(list(SEEDS)[7:])}. Edits: {", ".join(EDITS)}, and
gates:EDIT (random gates of the strength of an edit). Settings follow a colon: doei:strength=2,
gradcam:variant=layercam. A name may also be the dotted path of a class, such as
camkit.contrib.LogitLensSeed:9."""


def refiners_help(names: Names = PICTURE_REFINERS) -> str:
    """Return refiners with their settings and defaults, one per line."""
    lines = []
    for name, kind in {**names, **PROMPTED}.items():
        defaults = {field.name: field.default for field in fields(kind)}
        settings = [f"{key}={show_value(defaults[key])}" for key in settings_of(kind)]
        if kind is Regions:
            settings += [f"{key}=" for key in WORDS_OF_REGIONS]
        lines.append(f"  {name:<12} {' '.join(settings)}")
    return "\n".join(lines)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `method_of` reads."""
    add = parser.add_argument
    add(
        "--seed",
        metavar="SPEC",
        help="makes the first maps (default: the first of camkit.method.PRESETS that the model "
        "supports)",
    )
    add(
        "--edit",
        metavar="SPEC",
        help="changes attention blocks during the forward, such as doei; without --seed, the seed "
        "is then gradient",
    )
    add("--edit-blocks", type=int, default=3, metavar="N", help="last blocks to edit; 0 edits all")
    add(
        "--refine",
        action="append",
        metavar="STEP",
        help="refiners, see below (default: propagate:steps=2,blocks=6,balance=3+normalize:minmax"
        "+guided, for short `default`; `without_edges` leaves out the last)",
    )
    add_regions(parser)
    add("--readout", type=Path, metavar="FILE", help="a read-out that `camkit fit` wrote")


def add_sam_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `read_segmenter` reads."""
    parser.add_argument(
        "--sam",
        metavar="hf:NAME",
        help="promptable segmenter of transformers, in a folder or on the hub, such as "
        "hf:facebook/sam-vit-base: it draws what the maps point at. The step sam[:SETTINGS] of "
        "--refine says where and how; without such a step it comes last",
    )
    parser.add_argument("--sam-device", help="of the segmenter (default: a GPU if there is one)")


def read_segmenter(options: argparse.Namespace) -> PretrainedSegmenter | None:
    """Return the segmenter that the options name, opened where it is first used."""
    return named_segmenter(options.sam, options.sam_device)


def named_segmenter(name: str | None, device: str | None) -> PretrainedSegmenter | None:
    """Return the segmenter of ``--sam`` and ``--sam-device``, if there is one."""
    if name is None:
        if device is not None:
            raise ValueError("--sam-device needs a segmenter; add --sam hf:NAME, or omit it")
        return None
    # otherwise the process that opens it decides: with Ray it may be on another machine
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = os.environ.get("LOCAL_RANK", "")  # as torchrun numbers the processes of a machine
    if device is None and gpus and local.isdigit():
        device = f"cuda:{int(local) % gpus}"
    return segmenter_of(name, device)


def with_segmenter(
    options: argparse.Namespace,
    names: Names,
    segmenter: PretrainedSegmenter | None,
    default: tuple[Refiner, ...] = (),
) -> tuple[Refiner, ...]:
    """Return the refiners of the options: steps, regions, a segmenter without a step of its own."""
    texts = options.refine
    refine = read_refiners(texts, names, segmenter=segmenter) if texts else default
    refine = (*refine, *regions_of(options))
    if segmenter is None or prompted_in(refine):
        return refine
    return (*refine, PromptedRefine(segmenter))


def add_regions(parser: argparse.ArgumentParser) -> None:
    """Add the options that `regions_of` reads."""
    parser.add_argument(
        "--regions",
        type=Path,
        metavar="FOLDER",
        help="mask proposals of the photos, such as those of segment-anything (see "
        "camkit.data.ProposalFolder); their step follows those of --refine",
    )
    parser.add_argument(
        "--region-settings",
        metavar="SETTINGS",
        help="of this step, see `regions` below, such as rule=sepl,background_score=0.4",
    )


def regions_of(options: argparse.Namespace) -> tuple[Refiner, ...]:
    """Return the refiner of the proposals that the options name, if they name any."""
    settings = options.region_settings
    if options.regions is None:
        if settings is not None:
            raise ValueError("--region-settings needs the masks; add --regions FOLDER, or omit it")
        return ()
    return (read_regions(options.regions, settings or ""),)


def method_of(options: argparse.Namespace, opened: OpenedModel) -> Method:
    """Return the method that the options describe.

    Chains that end with a CRF return probabilities, those with regions that vote shares of labels,
    so their background score is 0.5.
    """
    try:
        return _method(options, opened)
    except TypeError as error:  # a dotted path of something else
        raise ValueError(str(error)) from error


def method_to_fit(options: argparse.Namespace, opened: OpenedModel) -> Method:
    """Return the method whose maps a read-out is fitted on, with all refiners of the options."""
    try:
        return _unfitted(options, opened)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _unfitted(options: argparse.Namespace, opened: OpenedModel) -> Method:
    segmenter = read_segmenter(options)
    refine = with_segmenter(options, REFINERS, segmenter, DEFAULT_REFINE)
    if options.seed is None and options.edit is None:
        method = default_method(opened)
    else:
        method = Method.from_words(
            seed=options.seed or "gradient",
            edit=options.edit,
            edit_blocks=options.edit_blocks or None,
        )
    return replace(method, refine=refine)


def _method(options: argparse.Namespace, opened: OpenedModel) -> Method:
    method = _unfitted(options, opened)
    if options.readout is not None:
        return with_readout([method], Readout.load(options.readout), opened.model)
    _, finish = split_refiners(method.refine)
    if any(_returns_shares(_inner(refiner)) for refiner in finish):
        method = replace(method, background_score=0.5)
    return method


def split_refiners(refine: Sequence[Refiner]) -> tuple[tuple[Refiner, ...], tuple[Refiner, ...]]:
    """Return the refiners up to the last that needs a model, and the rest, which need a photo."""
    cut = len(refine)
    while cut and isinstance(_inner(refine[cut - 1]), tuple(PICTURE_REFINERS.values())):
        cut -= 1
    return tuple(refine[:cut]), tuple(refine[cut:])


def _inner(refiner: Refiner) -> Refiner:
    return refiner.refiner if isinstance(refiner, AtReducedSize) else refiner


def _returns_shares(refiner: Refiner) -> bool:
    """Return whether maps are shares of class and background, equal at 0.5."""
    votes = isinstance(refiner, Regions) and refiner.rule != "mean"
    return votes or isinstance(refiner, DenseCRF)


def default_method(opened: OpenedModel) -> Method:
    """Return the method that `camkit.wrap` decides on, tried on a grey picture of photo size."""
    size, step = opened.photos.size, opened.photos.multiple
    sides = (size, size) if isinstance(size, int) else size
    rows, cols = (max(1, round(side / step)) * step for side in sides)
    grey = torch.linspace(0, 1, cols).expand(1, 3, rows, cols)
    pixels = grey[:, : opened.photos.channels] * 2 - 1
    pipeline = wrap(opened.model, vocabulary=opened.vocabulary, call=opened.call)
    return pipeline.decide(pixels, grey)


def add_form(parser: argparse.ArgumentParser) -> None:
    """Add the form of a read-out."""
    parser.add_argument(
        "--form",
        choices=get_args(Form),
        help="of the read-out: one column for all objects, or one for each class (default: auto, "
        "by the number of photos)",
    )


def read_predicted(text: str) -> PredictedClasses | None:
    """Read ``predicted[:THRESHOLD]`` of --labels; return None for any other text."""
    kind, _, threshold = text.partition(":")
    if kind != "predicted":
        return None
    try:
        return PredictedClasses(float(threshold or 0.1), "softmax", least=0)
    except ValueError as error:
        raise ValueError(f"--labels {text}: {error}") from error


def class_names(option: str, text: str) -> tuple[str, ...]:
    """Read names of classes: voc, coco, a file (see `read_class_names`), or names with commas.

    Raises:
        ValueError: the text is none of these; the message names the option.
    """
    known = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}
    path = Path(text)
    if text in known and not path.exists():
        return known[text]
    if "," in text and not path.exists():
        return tuple(name.strip() for name in text.split(",") if name.strip())
    if not path.exists():
        hint = nearby(path) or f"; {closest(text, known)}"
        raise ValueError(f"{option} {text}: no such file{hint}")
    return read_class_names(path)
