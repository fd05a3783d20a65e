"""Quality of maps without masks: whether they contain what the classifier needs.

These figures say nothing about outlines.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.bench.evaluator import Evaluator
from camkit.bench.protocol import Variant
from camkit.capture.parameters import to_input
from camkit.capture.scores import candidates
from camkit.data import Sample
from camkit.errors import CamkitError, DataError, UnsupportedModelError
from camkit.ops.images import gaussian_blur, resize_cam
from camkit.photo import Photo
from camkit.seeds.views import ModelCall, ModelRunner
from camkit.tensors import Cam, Pixels
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True)
class QualityScores:
    """Scores of one map of one photo, each in [0, 1].

    Attributes:
        insertion: area under the class's probability while the pixels that score highest are shown
            first over a blurred picture (RISE, Petsiuk et al. 2018); higher is better.
        deletion: the same while they are replaced by the mean colour; lower is better.
        background: the part of the class's score that remains when the map's pixels are faded out,
            after BAS (Wu et al. 2022), on pixels instead of features (ours); lower is better, and 0
            for a map that covers everything: read it together with the mask.
    """

    insertion: float
    deletion: float
    background: float


@dataclass(frozen=True)
class MeanQuality:
    """Means over all maps of all images, their standard errors, and the number of maps."""

    means: QualityScores
    errors: QualityScores
    maps: int


@dataclass(frozen=True)
class Quality:
    """Measures maps by the classifier's scores of altered photos.

    Attributes:
        steps: number of pictures along each curve, both ends included.
        images: measure at most this many of the reported images; None measures all.
        blur_width: standard deviation in pixels of the blurred picture that insertion starts from.
        batch: pictures per forward.
    """

    steps: int = 16
    images: int | None = 50
    blur_width: float = 10.0
    batch: int = 16

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("images", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        if not self.blur_width > 0.0:
            raise ValueError(f"`blur_width` must be above 0, got {self.blur_width}")

    def __call__(
        self,
        model: nn.Module,
        photo: Photo,
        cam: Cam,
        classes: tuple[int, ...],
        vocabulary: Vocabulary,
        call: ModelCall | None = None,
    ) -> list[QualityScores]:
        """Measure the map of each class of one photo.

        Args:
            model: borrowed, in evaluation mode.
            photo: the photo that the maps were made of.
            cam: one map for each class, in [0, 1], at the size of the model's input.
            classes: of the vocabulary.
            vocabulary: joins classifier outputs to classes.
            call: as in `camkit.wrap`.
        """
        pixels = photo.pixels
        blurred = gaussian_blur(pixels, self.blur_width)
        removed = pixels.mean((-2, -1), keepdim=True).expand_as(pixels)
        results = []
        for heat, index in zip(cam[0], classes, strict=True):
            # masks of the pixels that score highest: none of them, more in equal steps, all
            order = heat.flatten().argsort(descending=True, stable=True)
            rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
            shares = torch.linspace(0, 1, self.steps)[:, None]
            highest = rank[None] < (shares * len(order)).round()
            highest = highest.view(self.steps, 1, *heat.shape)
            pictures = torch.cat(
                [
                    torch.where(highest, pixels, blurred),
                    torch.where(highest, removed, pixels),
                    pixels * (1 - heat.to(pixels.dtype)),
                    pixels,
                ]
            )
            logits, chance = class_scores(
                model, pictures, index, vocabulary, batch=self.batch, call=call
            )
            insertion, deletion = chance[: self.steps], chance[self.steps : 2 * self.steps]
            results.append(
                QualityScores(
                    insertion=float(torch.trapezoid(insertion) / (self.steps - 1)),
                    deletion=float(torch.trapezoid(deletion) / (self.steps - 1)),
                    background=float(
                        (logits[-2].clamp_min(0) / logits[-1].clamp_min(1e-8)).clamp_max(1)
                    ),
                )
            )
        return results


def class_scores(
    model: nn.Module,
    pictures: Pixels,
    index: int,
    vocabulary: Vocabulary,
    *,
    batch: int,
    call: ModelCall | None,
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Return score and probability of a class in each picture; needs class scores."""
    with torch.no_grad():
        parts = [_scores(model, to_input(model, part), call) for part in pictures.split(batch)]
    outputs = [part.float().cpu() for part in parts]
    scores = torch.cat(outputs)
    logits = vocabulary.score(scores)[:, index]
    return logits, (logits - scores.logsumexp(-1)).exp()


def _scores(model: nn.Module, pictures: Pixels, call: ModelCall | None) -> Float[Tensor, "p o"]:
    """Return the scores before softmax or sigmoid, if the model is a Vision Transformer."""
    try:
        return ModelRunner(model, call=call)(pictures).scores
    except UnsupportedModelError:
        found = candidates(model(pictures) if call is None else call(model, pictures))
    if len(found) != 1:
        raise CamkitError("the quality of maps needs a model that returns class scores")
    return found[0]


def measure_quality(
    evaluator: Evaluator, samples: Sequence[Sample], variants: Sequence[Variant], settings: Quality
) -> Mapping[Variant, MeanQuality]:
    """Measure the maps of variants on the first usable images that have a class."""
    scores: dict[Variant, list[QualityScores]] = {variant: [] for variant in variants}
    measured = 0
    for sample in samples if variants else ():
        if settings.images is not None and measured == settings.images:
            break
        try:
            labelled = evaluator.load(sample)
        except DataError:  # already in the report's list of skipped images
            continue
        if not labelled.classes:
            continue
        measured += 1
        photo, classes = labelled.photo, labelled.classes
        size = (photo.pixels.shape[-2], photo.pixels.shape[-1])
        for variant, cam in evaluator.maps(labelled, variants).items():
            maps, names = resize_cam(cam, size), evaluator.vocabulary
            scores[variant] += settings(
                evaluator.model, photo, maps, classes, names, evaluator.call
            )
    return {variant: _mean(each) for variant, each in scores.items() if each}


def _mean(scores: Sequence[QualityScores]) -> MeanQuality:
    columns = {f.name: [getattr(each, f.name) for each in scores] for f in fields(QualityScores)}
    means = {name: statistics.fmean(values) for name, values in columns.items()}
    errors = {
        name: statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        for name, values in columns.items()
    }
    return MeanQuality(QualityScores(**means), QualityScores(**errors), len(scores))
