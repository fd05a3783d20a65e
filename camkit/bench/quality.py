"""Judgements without masks: insertion, deletion, and the seed or threshold that suits one photo.

They say whether a map holds what the classifier needs, not whether its edges are right.
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
class Quality:
    """Measures maps by what the classifier says of altered photos.

    Attributes:
        steps: pictures along each curve, the last one included.
        images: at most so many of the reported images are measured; None takes all.
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
    ) -> list["QualityScores"]:
        """Measure each class of one photo.

        Args:
            model: borrowed, in evaluation mode.
            photo: as the maps were made of it.
            cam: one map for each class, in [0, 1], of the size the model sees.
            classes: of the vocabulary.
            vocabulary: joins classifier outputs.
        """
        pixels = photo.pixels
        blurred = gaussian_blur(pixels, self.blur_width)
        removed = pixels.mean((-2, -1), keepdim=True).expand_as(pixels)
        found = []
        for one, index in zip(cam[0], classes, strict=True):
            kept = _kept_first(one, self.steps).to(pixels.dtype)
            pictures = torch.cat(
                [
                    torch.where(kept > 0, pixels, blurred),  # more and more is shown
                    torch.where(kept > 0, removed, pixels),  # more and more is removed
                    pixels * (1 - one.to(pixels.dtype)),
                    pixels,
                ]
            )
            logits, chance = self.ask(model, pictures, index, vocabulary)
            insertion, deletion = chance[: self.steps], chance[self.steps : 2 * self.steps]
            found.append(
                QualityScores(
                    insertion=float(torch.trapezoid(insertion) / (self.steps - 1)),
                    deletion=float(torch.trapezoid(deletion) / (self.steps - 1)),
                    background=float(left_behind(logits[-2], logits[-1])),
                )
            )
        return found

    def ask(
        self, model: nn.Module, pictures: Pixels, index: int, vocabulary: Vocabulary
    ) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
        """Score and probability of a class in each picture."""
        weight = next(model.parameters())
        outputs = []
        with torch.no_grad():
            for part in pictures.split(self.batch):
                scores = scores_of(model(part.to(weight)))
                if scores is None:
                    raise CamkitError("the quality of maps needs a model that returns class scores")
                outputs.append(scores.float().cpu())
        scores = torch.cat(outputs)
        logits = vocabulary.score(scores)[:, index]
        return logits, (logits - scores.logsumexp(-1)).exp()


@dataclass(frozen=True)
class QualityScores:
    """Of one class in one photo, each in [0, 1].

    Attributes:
        insertion: area under the class's probability while the pixels that score highest are shown
            first over a blurred picture (RISE, Petsiuk et al. 2018); higher is better.
        deletion: the same while they are replaced by the mean colour; lower is better.
        background: what remains of the class's score when the map's pixels are faded out, after
            BAS (Wu et al. 2022), on pixels instead of features (ours); lower is better, and 0 for
            a map that covers everything: read it beside the mask.
    """

    insertion: float
    deletion: float
    background: float


def left_behind(faded: Float[Tensor, "..."], whole: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What remains of a class's score once the pixels of its map are faded out, in [0, 1]."""
    return (faded.clamp_min(0) / whole.clamp_min(0).clamp_min(1e-8)).clamp_max(1.0)


def _kept_first(one: Float[Tensor, "H W"], steps: int) -> Float[Tensor, "s 1 H W"]:
    """Masks of the pixels that score highest: none of them, more in equal steps, all."""
    order = one.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    shares = torch.linspace(0, 1, steps)[:, None]
    return (rank[None] < (shares * len(order)).round()).float().view(steps, 1, *one.shape)


@dataclass(frozen=True)
class MeanQuality:
    """Means over every asked class of every image, their standard errors, and how many maps."""

    means: QualityScores
    errors: QualityScores
    maps: int


def measure_quality(
    meter: Evaluator, samples: Sequence[Sample], variants: Sequence[Variant], settings: Quality
) -> Mapping[Variant, MeanQuality]:
    """Measure the maps of variants on the first images that have an asked class and can be used."""
    found: dict[Variant, list[QualityScores]] = {variant: [] for variant in variants}
    done = 0
    for sample in samples if variants else ():
        if settings.images is not None and done == settings.images:
            break
        try:
            picture = meter.load(sample)
        except DataError:  # listed by the measurement of the masks
            continue
        if not picture.asked:
            continue
        done += 1
        photo = picture.photo
        seen = (photo.pixels.shape[-2], photo.pixels.shape[-1])
        for variant, cam in meter.maps(picture, variants).items():
            scored = settings(
                meter.model, photo, resize_cam(cam, seen), picture.asked, meter.vocabulary
            )
            found[variant] += scored
    return {variant: _mean(scores) for variant, scores in found.items() if scores}


def _mean(scores: Sequence[QualityScores]) -> MeanQuality:
    columns = {f.name: [getattr(one, f.name) for one in scores] for f in fields(QualityScores)}
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
        variant: it made the map.
        threshold: from where on a pixel belongs to the class.
        left: share of the class's score that is left without those pixels.
        area: their share of the picture.
        cam: the map, at the size the model sees, bent so that the threshold lies at 0.5: one
            background score then suits all classes and photos.
    """

    variant: Variant
    threshold: float
    left: float
    area: float
    cam: Float[Tensor, "H W"]


@dataclass(frozen=True)
class SuppressionChoice:
    """Takes the candidate that leaves least of the class's score outside a small area.

    After BAS (Wu et al. 2022), which trains with the sum of both; to choose by it, among binary
    maps and on faded pixels instead of features, is ours.

    Attributes:
        thresholds: tried on each map, in (0, 1).
        area_weight: how much area counts beside what is left; 1.2 is what BAS trains with.
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
        """Choose for each class.

        Args:
            model: borrowed, in evaluation mode.
            photo: what the maps are made of.
            classes: of the vocabulary, present in the photo.
            variants: candidates: seeds, layers, views, refiners.
            vocabulary: joins classifier outputs.
        """
        if not variants or not classes:
            raise ValueError("name at least one variant and one class to choose for")
        asked = torch.tensor([list(classes)], dtype=torch.int64)
        size = (photo.pixels.shape[-2], photo.pixels.shape[-1])
        found = variant_maps(model, photo, asked, variants, vocabulary)
        maps = [resize_cam(found[v], size).clamp(0, 1).cpu().float() for v in variants]
        return [
            self._pick(model, photo, index, [cam[0, slot] for cam in maps], variants, vocabulary)
            for slot, index in enumerate(classes)
        ]

    def _pick(
        self,
        model: nn.Module,
        photo: Photo,
        index: int,
        maps: Sequence[Tensor],
        variants: Sequence[Variant],
        vocabulary: Vocabulary,
    ) -> Picked:
        pairs = [(v, t) for v in range(len(variants)) for t in self.thresholds]
        shown = torch.stack([(maps[v] > t).float() for v, t in pairs])[:, None]
        pictures = torch.cat([photo.pixels, photo.pixels * (1 - shown)])
        scores, _ = Quality(batch=self.batch).ask(model, pictures, index, vocabulary)
        left, area = left_behind(scores[1:], scores[0]), shown.mean((1, 2, 3))
        best = int((left + self.area_weight * area).argmin())
        variant, threshold = pairs[best]
        return Picked(
            variants[variant],
            threshold,
            float(left[best]),
            float(area[best]),
            bent(maps[variant], threshold),
        )


def bent(cam: Cam | Float[Tensor, "H W"], threshold: float) -> Tensor:
    """A map in [0, 1] to the power that takes the threshold to 0.5.

    >>> bent(torch.tensor([[0.0, 0.25, 1.0]]), 0.25)
    tensor([[0.0000, 0.5000, 1.0000]])
    """
    return cam.pow(math.log(0.5) / math.log(threshold))
