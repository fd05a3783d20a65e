"""Oracles, which read the true masks, and shares of wrong pixels: where a method loses its points.

An oracle replaces one part of a method by what the masks say. Its figure shows how much may depend
on that part, and is no result of the method: it has no gain, is not cached, and chooses nothing.
Only the best background scores and the removal of errors are bounded: they are never below the
measured figure. Another rule in place of the same part may reach more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor
from torch.nn import functional as F

from camkit.bench.evaluator import Evaluator, LabelledPhoto
from camkit.bench.protocol import Variant
from camkit.capture.record import NO_PATCH_TOKENS, Capture, WatchSpec, required_by
from camkit.data import Sample
from camkit.errors import DataError
from camkit.mask import to_mask
from camkit.printing import short_repr
from camkit.refiners.normalize import normalize_cam
from camkit.score import THRESHOLDS, best_threshold, sweep_confusions
from camkit.score.confusion import Overlap
from camkit.screen import progress
from camkit.tensors import IGNORE, Cam, Classes

BAND = 10
"""Pixels of a photo from an outline to the end of the band around it."""

SIZES = {"small": 0.05, "medium": 0.25, "large": math.inf}
"""A class is small in a picture if it covers less than this share of it; limits are ours."""

KINDS = ("false", "missed", "wrong_class")
"""Background taken for a class, a class taken for background, a class taken for another."""

_NOT_SHOWN = "not in the mask"  # classes that were asked for
_GROUPS = (_NOT_SHOWN, *SIZES)
_MOST_ROUNDS = 20  # over all images; two to four are usual

ErrorCounts: TypeAlias = Int[Tensor, "kinds c sizes 2"]
"""Wrong pixels by kind (`KINDS`), class, size of the class in its picture, and 1 in the band."""


@dataclass(frozen=True)
class Oracle:
    """The figure of a method of which one part reads the true masks.

    Attributes:
        name: what reads the masks.
        mean_iou: over the classes present, in [0, 1].
        class_iou: IoU of each class, background first; NaN for absent classes.
        background_score: the best on the reported images; for rows without one kind of error that
            of the method; None if each image has its own.
    """

    name: str
    mean_iou: float
    class_iou: tuple[float, ...]
    background_score: float | None

    @classmethod
    def of(cls, name: str, overlap: Overlap, background_score: float | None) -> "Oracle":
        iou = tuple(overlap.class_iou().tolist())
        return cls(name, float(overlap.mean_iou()), iou, background_score)


@dataclass(frozen=True)
class ErrorShares:
    """The wrong pixels of a group by kind; an ignored pixel is never wrong.

    A wrong pixel belongs to its true class, or to the painted class if it is background.

    Attributes:
        kind: what the group holds: all wrong pixels, those of a class, or those of the classes that
            have this size in their picture.
        group: its name; a size is one of `SIZES`, or "not in the mask" for a class that the labels
            name and the mask does not show.
        wrong: number of wrong pixels.
        share: of the wrong pixels of all groups; NaN without any, as all below.
        false: background taken for a class, as a share of the group.
        missed: a class taken for background.
        wrong_class: a class taken for another.
        near_outline: within `BAND` pixels of an outline of the true mask (`near_outline`).
    """

    kind: Literal["all", "class", "size"]
    group: str
    wrong: int
    share: float
    false: float
    missed: float
    wrong_class: float
    near_outline: float


@dataclass(frozen=True)
class ErrorAnalysis:
    """Where a variant loses its points on the reported split, at its background score.

    Attributes:
        oracles: see docs/benchmark.md; a variant without refiners has none that replace these.
        errors: all wrong pixels, then those by class, then by size; empty groups are left out.
    """

    oracles: tuple[Oracle, ...]
    errors: tuple[ErrorShares, ...]


ONE_SCORE = "best background score on these images"
SCORE_EACH = "best background score of each image"
WITHOUT = {
    "false": "no background taken for a class",
    "missed": "no class taken for background",
    "wrong_class": "no class taken for another",
}
AFFINITY = "perfect affinity: mean of the seed in each true segment, on its grid"
ON_GRID = "truth on the patch grid"
ON_GRID_REFINED = "truth on the patch grid, then the refiners"
SEED_REGIONS = "perfect regions: mean of the seed in each, at pixels"
MAP_REGIONS = "perfect regions: mean of the final map in each, at pixels"


def measure_oracles(
    evaluator: Evaluator, samples: Sequence[Sample], scores: Mapping[Variant, float]
) -> dict[Variant, ErrorAnalysis]:
    """Analyse variants on all usable images; nothing is read from a cache or written to it.

    Args:
        evaluator: of the benchmark.
        samples: the reported images.
        scores: background score of each variant to analyse, as picked on the tuning split.
    """
    tallies = [_Tally(variant, score, evaluator) for variant, score in scores.items()]
    for sample in progress(samples, desc="oracles", unit="image", mininterval=0.5):
        try:
            labelled = evaluator.load(sample)
        except DataError:  # already in the report's list of skipped images
            continue
        wanted = [oracle_variants(tally.variant, labelled.truth) for tally in tallies]
        variants = dict.fromkeys(v for each in wanted for v in each.values())
        maps = evaluator.maps(labelled, tuple(variants))
        regions = true_regions(labelled.truth)
        for tally, each in zip(tallies, wanted, strict=True):
            tally.add(labelled, {name: maps[v] for name, v in each.items()}, regions)
    return {tally.variant: tally.analysis() for tally in tallies}


def oracle_variants(variant: Variant, truth: Int[Tensor, "H W"]) -> dict[str, Variant]:
    """Return a variant, its seed, and the oracles of one image that change the method."""
    method = variant.method
    seed = replace(method, refine=())
    told = replace(seed, seed=TruthOnGrid(truth, required_by(method.seed)), views=None)
    methods = {
        MAP_REGIONS: method,
        SEED_REGIONS: seed,
        AFFINITY: replace(seed, refine=(SegmentMeans(truth),)),
        ON_GRID: told,
        ON_GRID_REFINED: replace(told, refine=method.refine),
    }
    return {name: Variant(name, each) for name, each in methods.items()}


class _Tally:
    """Sums over the images of one variant."""

    def __init__(self, variant: Variant, background_score: float, evaluator: Evaluator) -> None:
        self.variant = variant
        self._score = background_score
        self._names = evaluator.vocabulary.names
        self._values = len(self._names) + 1
        self._swept: dict[str, Tensor] = {}
        self._images: list[Overlap] = []
        shape = len(KINDS), self._values, len(_GROUPS), 2
        self._errors = torch.zeros(shape, dtype=torch.int64)

    def add(
        self, labelled: LabelledPhoto, maps: Mapping[str, Cam], regions: Int[Tensor, "H W"]
    ) -> None:
        """Count one image: maps at the size of the photo, and regions of the truth."""
        truth, final = labelled.truth, maps[MAP_REGIONS]
        swept = self._count(labelled, ONE_SCORE, final)
        self._images.append(Overlap.of(swept))
        for name in (AFFINITY, ON_GRID, ON_GRID_REFINED):
            self._count(labelled, name, maps[name])
        for name in (SEED_REGIONS, MAP_REGIONS):
            self._count(labelled, name, region_means(maps[name], regions))
        mask = to_mask(final, labelled.slots, background_score=self._score)[0]
        self._errors += count_errors(truth, mask, num_classes=self._values)

    def _count(self, labelled: LabelledPhoto, name: str, cam: Cam) -> Int[Tensor, "s c c"]:
        truth, classes = labelled.truth, labelled.slots[0]
        swept = sweep_confusions(cam[0], classes, truth, num_classes=self._values)
        self._swept[name] = swept + self._swept.get(name, 0)
        return swept

    def analysis(self) -> ErrorAnalysis:
        """Return oracles and error shares of all images."""
        step = int((THRESHOLDS - self._score).abs().argmin())
        measured = self._swept[ONE_SCORE][step]
        oracles = [
            self._swept_oracle(ONE_SCORE),
            Oracle.of(SCORE_EACH, score_each(self._images), None),
        ]
        oracles += [
            Oracle.of(name, Overlap.of(without(measured, kind)), self._score)
            for kind, name in WITHOUT.items()
        ]
        names = [AFFINITY, ON_GRID, ON_GRID_REFINED, SEED_REGIONS, MAP_REGIONS]
        if not self.variant.method.refine:
            names = [AFFINITY, ON_GRID, SEED_REGIONS]
        oracles += [self._swept_oracle(name) for name in names]
        return ErrorAnalysis(tuple(oracles), error_shares(self._errors, self._names))

    def _swept_oracle(self, name: str) -> Oracle:
        score = best_threshold(self._swept[name]).threshold
        step = int((THRESHOLDS - score).abs().argmin())
        return Oracle.of(name, Overlap.of(self._swept[name][step]), score)


@dataclass(frozen=True, eq=False)
class TruthOnGrid:
    """A seed that knows the true mask: the share of each patch that each class covers.

    Attributes:
        truth: 0 background, class + 1, 255 ignored; ignored pixels count in no patch.
        requires: what the true seed of the method reads, so that both share a forward.
    """

    truth: Int[Tensor, "H W"]
    requires: WatchSpec

    __repr__ = short_repr

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        values = [index + 1 if index >= 0 else IGNORE for index in classes[0].tolist()]
        covered, _ = _covered(self.truth, values, (capture.grid.rows, capture.grid.cols))
        return covered[None].to(classes.device)


@dataclass(frozen=True, eq=False)
class SegmentMeans:
    """A refiner that knows the true mask: propagation along a perfect affinity.

    Every patch gets the mean over the patches of its true class, as if these attended to each other
    and to no others; patches of ignored pixels alone are a segment of their own. Then the lowest
    score becomes 0, as behind propagation; a map of one segment stays as it is.

    Attributes:
        truth: 0 background, class + 1, 255 ignored.
    """

    truth: Int[Tensor, "H W"]

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    __repr__ = short_repr

    def __call__(self, cam: Cam, capture: Capture) -> Cam:  # noqa: ARG002 - every refiner takes both
        values = sorted({0, *self.truth.unique().tolist()} - {IGNORE})
        size = (cam.shape[-2], cam.shape[-1])
        covered, counted = _covered(self.truth, values, size)
        segments = covered.argmax(0).masked_fill(counted == 0, len(values)).to(cam.device)
        means = region_means(cam, segments)
        return normalize_cam(means, mode="minmax") if len(segments.unique()) > 1 else means


def _covered(
    truth: Int[Tensor, "H W"], values: Sequence[int], size: tuple[int, int]
) -> tuple[Float[Tensor, "v h w"], Float[Tensor, "h w"]]:
    """Return the share of each cell that each mask value covers, and the share that counts."""
    counted = truth != IGNORE
    planes = torch.stack([*((truth == value) & counted for value in values), counted]).float()
    pooled = F.adaptive_avg_pool2d(planes, size)
    return pooled[:-1] / pooled[-1].clamp_min(torch.finfo(pooled.dtype).eps), pooled[-1]


def true_regions(truth: Int[Tensor, "H W"]) -> Int[Tensor, "H W"]:
    """Number the connected components of each value of a true mask, as perfect regions of it."""
    regions = np.zeros(truth.shape, dtype=np.int64)
    first = 0
    for value in truth.unique().tolist():
        inside = (truth == value).numpy().astype(np.uint8)
        count, found = cv2.connectedComponents(inside, connectivity=8)
        regions += np.where(inside, found - 1 + first, 0)
        first += count - 1
    return torch.from_numpy(regions)


def region_means(cam: Cam, regions: Int[Tensor, "h w"]) -> Cam:
    """Give each pixel the mean of each map over its region; regions are numbered from 0."""
    flat, places = cam.flatten(2).double(), regions.flatten()
    sums = flat.new_zeros(*flat.shape[:2], int(places.max()) + 1)
    sums.index_add_(2, places, flat)
    means = sums / places.bincount(minlength=sums.shape[-1]).clamp_min(1)
    return means[..., places].view_as(cam).to(cam.dtype)


def without(confusion: Int[Tensor, "c c"], kind: str) -> Int[Tensor, "c c"]:
    """Return a confusion matrix in which the errors of one of `KINDS` are correct pixels."""
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}")
    object_rows = torch.zeros_like(confusion, dtype=torch.bool)
    object_rows[1:] = True
    to_object = torch.zeros_like(object_rows)
    to_object[:, 1:] = True
    chosen = {
        "false": ~object_rows & to_object,
        "missed": object_rows & ~to_object,
        "wrong_class": object_rows & to_object,
    }[kind]
    corrected = confusion.masked_fill(chosen, 0)
    corrected.diagonal().add_(confusion.masked_fill(~chosen, 0).sum(-1))
    # the diagonal of "wrong_class" is chosen too, and so returns to its place
    return corrected


def score_each(images: Sequence[Overlap]) -> Overlap:
    """Return the pixels of all images, each at the background score that serves the mean IoU best.

    All images begin at the best common score; then one after the other moves to the score that
    raises the mean IoU of the whole set, until none moves. So the result is never below that of the
    common score; a better combination may exist.

    Args:
        images: counts of each image at each of `camkit.score.THRESHOLDS`.
    """
    hit = torch.stack([image.hit for image in images])
    predicted = torch.stack([image.predicted for image in images])
    true = torch.stack([image.true[0] for image in images]).sum(0).expand(hit.shape[1:])
    common = Overlap(hit.sum(0), true, predicted.sum(0)).mean_iou()
    steps = torch.full((len(images),), int(common.argmax()))
    every = torch.arange(len(images))
    for _ in range(_MOST_ROUNDS):
        before = steps.clone()
        hits, claims = hit[every, steps].sum(0), predicted[every, steps].sum(0)
        for image, step in enumerate(steps.tolist()):
            others = hits - hit[image, step], claims - predicted[image, step]
            means = Overlap(others[0] + hit[image], true, others[1] + predicted[image]).mean_iou()
            best = int(means.argmax())
            if means[best] > means[step]:
                steps[image] = best
                hits, claims = others[0] + hit[image, best], others[1] + predicted[image, best]
        if (steps == before).all():
            break
    return Overlap(hit[every, steps].sum(0), true[0], predicted[every, steps].sum(0))


def near_outline(truth: Integer[Tensor, "H W"], band: float = BAND) -> Bool[Tensor, "H W"]:
    """Select the pixels within ``band`` pixels of one with another value, as in a trimap.

    The ignored line around the objects of VOC is another value, as in the trimaps of DeepLab (Chen
    et al. 2018); the edge of the image is no outline.
    """
    near = torch.zeros(truth.shape, dtype=torch.bool)
    for value in truth.unique().tolist():
        inside = (truth == value).numpy().astype(np.uint8)
        if not inside.all():
            distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            near |= torch.from_numpy(inside.astype(bool) & (distance <= band))
    return near


def count_errors(
    truth: Int[Tensor, "H W"], mask: Integer[Tensor, "H W"], *, num_classes: int
) -> ErrorCounts:
    """Count the wrong pixels of one image; see `ErrorShares` for the class they belong to.

    Args:
        truth: 0 background, class + 1, 255 ignored.
        mask: 0 background, class + 1.
        num_classes: number of classes, the background included.
    """
    predicted = mask.long()
    wrong = (truth != predicted) & (truth != IGNORE)
    kind = torch.where(truth == 0, 0, torch.where(predicted == 0, 1, 2))
    owner = torch.where(truth == 0, predicted, truth)
    pixels = truth[truth != IGNORE].bincount(minlength=num_classes)
    limits = torch.tensor(list(SIZES.values()), dtype=torch.float64)
    sizes = torch.bucketize(pixels.double() / truth.numel(), limits, right=True) + 1
    sizes[pixels == 0] = 0
    shape = len(KINDS), num_classes, len(_GROUPS), 2
    kind, owner, near = kind[wrong], owner[wrong], near_outline(truth)[wrong].long()
    cells = ((kind * shape[1] + owner) * shape[2] + sizes[owner]) * 2 + near
    return cells.bincount(minlength=math.prod(shape)).view(shape)


def error_shares(counts: ErrorCounts, names: Sequence[str]) -> tuple[ErrorShares, ...]:
    """Return the shares of all errors, then by class, then by size; empty groups are left out.

    Args:
        counts: summed over the images.
        names: of the classes, without the background.
    """
    whole = int(counts.sum())

    def shares(kind: Any, group: str, part: Int[Tensor, "kinds 2"]) -> ErrorShares:
        wrong = int(part.sum())
        parts = [*part.sum(1).tolist(), int(part[:, 1].sum())]
        share = wrong / whole if whole else math.nan
        return ErrorShares(
            kind, group, wrong, share, *(n / wrong if wrong else math.nan for n in parts)
        )

    groups = [shares("all", "all", counts.sum((1, 2)))]
    by_class, by_size = counts.sum(2)[:, 1:], counts.sum(1)
    groups += [shares("class", name, by_class[:, index]) for index, name in enumerate(names)]
    groups += [shares("size", name, by_size[:, index]) for index, name in enumerate(_GROUPS)]
    return tuple(group for group in groups if group.wrong or group.kind == "all")
