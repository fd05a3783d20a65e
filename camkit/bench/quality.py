"""Quality of maps without masks: insertion, deletion, and the variant that suits one photo.

These figures show whether a map contains what the classifier needs, not whether its outline is
right.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.bench.evaluator import Evaluator, variant_maps
from camkit.bench.protocol import Variant
from camkit.capture.record import scores_of
from camkit.data import Sample
from camkit.errors import CamkitError, DataError
from camkit.ops.images import gaussian_blur, resize_cam
from camkit.photo import Photo
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
        if self.steps < 2:
            raise ValueError(f"`steps` must be at least 2, got {self.steps}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"`images` must be at least 1, got {self.images}")
        if not self.blur_width > 0.0:
            raise ValueError(f"`blur_width` must be above 0, got {self.blur_width}")
        if self.batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {self.batch}")

    def __call__(
        self,
        model: nn.Module,
        photo: Photo,
        cam: Cam,
        classes: tuple[int, ...],
        vocabulary: Vocabulary,
    ) -> list[QualityScores]:
        """Measure the map of each class of one photo.

        Args:
            model: borrowed, in evaluation mode.
            photo: the photo that the maps were made of.
            cam: one map for each class, in [0, 1], at the size of the model's input.
            classes: of the vocabulary.
            vocabulary: joins classifier outputs to classes.
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
            logits, chance = class_scores(model, pictures, index, vocabulary, self.batch)
            insertion, deletion = chance[: self.steps], chance[self.steps : 2 * self.steps]
            results.append(
                QualityScores(
                    insertion=float(torch.trapezoid(insertion) / (self.steps - 1)),
                    deletion=float(torch.trapezoid(deletion) / (self.steps - 1)),
                    background=float(_remaining(logits[-2], logits[-1])),
                )
            )
        return results


def class_scores(
    model: nn.Module, pictures: Pixels, index: int, vocabulary: Vocabulary, batch: int
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Return score and probability of a class in each picture."""
    weight = next(model.parameters())
    outputs = []
    with torch.no_grad():
        for part in pictures.split(batch):
            scores = scores_of(model(part.to(weight)))
            if scores is None:
                raise CamkitError("the quality of maps needs a model that returns class scores")
            outputs.append(scores.float().cpu())
    scores = torch.cat(outputs)
    logits = vocabulary.score(scores)[:, index]
    return logits, (logits - scores.logsumexp(-1)).exp()


def _remaining(faded: Float[Tensor, "..."], whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the part of a class's score that remains without the pixels of its map, in [0, 1]."""
    return (faded.clamp_min(0) / whole.clamp_min(0).clamp_min(1e-8)).clamp_max(1.0)


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
        photo = labelled.photo
        size = (photo.pixels.shape[-2], photo.pixels.shape[-1])
        for variant, cam in evaluator.maps(labelled, variants).items():
            scores[variant] += settings(
                evaluator.model,
                photo,
                resize_cam(cam, size),
                labelled.classes,
                evaluator.vocabulary,
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


@dataclass(frozen=True, eq=False)
class Picked:
    """The best candidate for one class of one photo.

    Attributes:
        variant: the candidate.
        threshold: a pixel belongs to the class from this value of the map.
        left: the part of the class's score that remains without those pixels.
        area: their share of the picture.
        cam: the map, at the size of the model's input, raised to the power that takes the threshold
            to 0.5: one background score then suits all classes and photos.
    """

    variant: Variant
    threshold: float
    left: float
    area: float
    cam: Float[Tensor, "H W"]


@dataclass(frozen=True)
class SuppressionChoice:
    """Chooses the candidate that leaves least of the class's score outside a small area.

    After BAS (Wu et al. 2022), which trains with the sum of both; choosing by it, among binary maps
    and on faded pixels instead of features, is ours.

    Attributes:
        thresholds: thresholds to try on each map, in (0, 1).
        area_weight: weight of the area in the sum; 1.2 is what BAS trains with.
        batch: pictures per forward.
    """

    thresholds: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    area_weight: float = 1.2
    batch: int = 16

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0.0 < t < 1.0 for t in self.thresholds):
            raise ValueError(f"`thresholds` must lie in (0, 1), got {self.thresholds}")
        if not self.area_weight >= 0.0:
            raise ValueError(f"`area_weight` must be at least 0, got {self.area_weight}")
        if self.batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {self.batch}")

    def __call__(
        self,
        model: nn.Module,
        photo: Photo,
        classes: Sequence[int],
        variants: Sequence[Variant],
        vocabulary: Vocabulary,
    ) -> list[Picked]:
        """Choose a candidate for each class.

        Args:
            model: borrowed, in evaluation mode.
            photo: the photo to make maps of.
            classes: classes of the vocabulary that the photo shows.
            variants: candidates: seeds, layers, views, refiners.
            vocabulary: joins classifier outputs to classes.
        """
        if not variants or not classes:
            raise ValueError("name at least one variant and one class to choose for")
        indices = torch.tensor([list(classes)], dtype=torch.int64)
        size = (photo.pixels.shape[-2], photo.pixels.shape[-1])
        cams = variant_maps(model, photo, indices, variants, vocabulary)
        maps = [resize_cam(cams[v], size).clamp(0, 1).cpu().float() for v in variants]
        pairs = [(v, t) for v in range(len(variants)) for t in self.thresholds]
        choices = []
        for slot, index in enumerate(classes):
            shown = torch.stack([(maps[v][0, slot] > t).float() for v, t in pairs])[:, None]
            pictures = torch.cat([photo.pixels, photo.pixels * (1 - shown)])
            scores, _ = class_scores(model, pictures, index, vocabulary, self.batch)
            left, area = _remaining(scores[1:], scores[0]), shown.mean((1, 2, 3))
            best = int((left + self.area_weight * area).argmin())
            place, threshold = pairs[best]
            cam = gamma_to_half(maps[place][0, slot], threshold)
            choices.append(
                Picked(variants[place], threshold, float(left[best]), float(area[best]), cam)
            )
        return choices


def gamma_to_half(cam: Float[Tensor, "H W"], threshold: float) -> Float[Tensor, "H W"]:
    """Raise a map in [0, 1] to the power that takes the threshold to 0.5.

    >>> gamma_to_half(torch.tensor([[0.0, 0.25, 1.0]]), 0.25)
    tensor([[0.0000, 0.5000, 1.0000]])
    """
    return cam.pow(math.log(0.5) / math.log(threshold))
