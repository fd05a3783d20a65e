"""What `camkit run` does with each image, read from its options."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from camkit.bulk import ImageLabels, read_labels
from camkit.bulk.recipe import Reading, Recipe, Writing
from camkit.bulk.sources import Labelled, Source
from camkit.cli.cam import read_classes
from camkit.cli.mask import background_score
from camkit.cli.models import OpenedModel, open_model
from camkit.cli.plan import EDITS, SEEDS
from camkit.cli.presets import preset_of
from camkit.cli.spec import make
from camkit.cli.steps import MODEL_STEPS, STEPS, read_steps
from camkit.data import COCO_CLASSES, VOC_CLASSES
from camkit.data.names import read_names
from camkit.preset import DEFAULT_REFINE, GRADIENT, Preset
from camkit.refine import Chain, DenseCRF, Reduced, Refiner
from camkit.seed import Present
from camkit.vocabulary import Vocabulary

_LIKELIEST = Present(0.5, "softmax")  # at most one class can have more than half


@dataclass(frozen=True)
class TimmModel:
    """Opens a timm model with its weights, wherever it is called."""

    name: str
    size: int

    def __call__(self) -> nn.Module:
        return open_model(self.name, size=self.size).model


def labelled(source: Source, text: str | None) -> tuple[Source, Present | None]:
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
            return source, Present(float(threshold) if threshold else 0.1, "softmax", least=0)
        except ValueError as error:
            raise ValueError(f"--labels {text}: {error}") from error
    labels: ImageLabels = read_labels(text)
    return Labelled(source, labels), None


def recipe_of(
    options: argparse.Namespace, opened: OpenedModel, source: Source, labels: Present | None
) -> Recipe:
    """Everything that decides what is made of an image."""
    vocabulary = _vocabulary(options.vocabulary, opened, source)
    chosen = None
    if options.classes is not None:
        if options.labels is not None:
            raise ValueError("--classes says what is in every image; leave --labels away")
        chosen = read_classes(vocabulary, options.classes)
    refine, finish = _parts(DEFAULT_REFINE if not options.refine else _steps(options.refine))
    preset = _preset(options, opened)
    score = background_score(options)
    if score is None:
        crf = any(isinstance(_inner(one), DenseCRF) for one in finish)
        score = 0.5 if crf else preset.background_score
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
        seed=preset.seed,
        edit=preset.edit,
        edit_blocks=preset.edit_blocks,
        refine=refine,
        vocabulary=vocabulary,
        labels=labels if chosen is None else chosen,
        batch=options.batch,
        chunk=max(options.chunk, options.batch),
    )


def _preset(options: argparse.Namespace, opened: OpenedModel) -> Preset:
    if options.seed is None and options.edit is None:
        return preset_of(opened)
    return replace(
        GRADIENT,
        seed=GRADIENT.seed if options.seed is None else make(options.seed, SEEDS, "seed"),
        edit=None if options.edit is None else make(options.edit, EDITS, "edit"),
        edit_blocks=options.edit_blocks or None,
    )


def _vocabulary(named: str | None, opened: OpenedModel, source: Source) -> Vocabulary:
    if named is None:
        names = source.classes
    else:
        known = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}
        names = known[named] if named in known else tuple(read_names(Path(named)))
    return opened.vocabulary if names is None else opened.vocabulary.subset(list(names))


def _steps(texts: list[str]) -> tuple[Refiner, ...]:
    found = read_steps(texts, MODEL_STEPS)
    return found.refiners if isinstance(found, Chain) else (found,)


def _parts(refine: tuple[Refiner, ...]) -> tuple[tuple[Refiner, ...], tuple[Refiner, ...]]:
    """Refiners that run beside the model, and those behind it that need only the picture."""
    cut = len(refine)
    while cut and isinstance(_inner(refine[cut - 1]), tuple(STEPS.values())):
        cut -= 1
    return refine[:cut], refine[cut:]


def _inner(refiner: Refiner) -> Refiner:
    return refiner.refiner if isinstance(refiner, Reduced) else refiner
