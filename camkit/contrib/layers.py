"""Seeds read from inner or chosen blocks: logit lens, single blocks, the seed that agrees best."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.capture.tail import token_scores
from camkit.ops.scaling import scaled_to_max, scaled_to_range
from camkit.seeds.protocol import (
    Seed,
    above_mean,
    check_classes,
    fold_maps,
    leaving_tokens,
    pick,
)
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class LogitLensSeed:
    """The classifier's scores of the patches that leave an inner block, through the last norm.

    Patches of inner blocks differ more than those of the last block, which is why ToCo (Ru et al.
    2023) trains an auxiliary classifier there. The logit lens (nostalgebraist 2020) needs no
    training; using it in that place, and for class maps, is ours. Scores below the image's mean
    patch score become zero, as in `camkit.seeds.ClassWeightSeed`. At the last block of a model that
    applies only norms and the classifier to its patches, the two seeds are equal.

    Attributes:
        layer: index of the block, from 0, or negative from the last; ToCo has its auxiliary
            classifier at -3.
    """

    layer: int = -3

    requires: ClassVar[WatchSpec] = WatchSpec(leaving=True)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        scores = lens_scores(capture, leaving_tokens(capture, self.layer, self)[:, capture.patches])
        check_classes(classes, len(scores), scores.shape[-1])
        return fold_maps(capture, above_mean(pick(scores, classes)), classes)


def lens_scores(capture: Capture, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n C"]:
    """Score each token with the last norm and the classifier, as if it were the pooled token."""
    with torch.no_grad():
        flat = token_scores(capture.tail, capture.outputs, tokens.flatten(0, 1))
        scores = flat.unflatten(0, tokens.shape[:2])
        return scores if capture.vocabulary is None else capture.vocabulary.score(scores)


@dataclass(frozen=True)
class BlockSeed:
    """An attention seed read from some of the watched blocks only.

    Attributes:
        seed: such as `camkit.GradientSeed`, which averages the blocks it is given.
        blocks: indices of watched blocks, negative from the last.
    """

    seed: Seed
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("`blocks` must name at least one block, got none")

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return required_by(self.seed)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        count = len(capture.blocks)
        outside = [block for block in self.blocks if not -count <= block < count]
        if outside:
            raise ValueError(
                f"`blocks` must lie in {-count} to {count - 1}, as {count} were watched, got "
                f"{outside[0]}"
            )
        chosen = sorted({block % count for block in self.blocks})
        part = replace(
            capture,
            blocks=tuple(capture.blocks[block] for block in chosen),
            names=tuple(capture.names[block] for block in chosen),
        )
        return self.seed(part, classes)


@dataclass(frozen=True)
class BestAgreementSeed:
    """For each image and class, the candidate seed that agrees best with a reference.

    After the layer selection of DoNuSeg (2024), which compares binary maps of every layer with a
    first label and takes the most similar layer. There the label comes from points; here it is
    another seed, or the mean of all candidates. Neither the threshold nor the measure of similarity
    is published: 0.5 of the range of each map, and intersection over union, are ours.

    Attributes:
        seeds: candidates, such as one seed at several layers.
        reference: the seed they are compared with; None is the mean of all candidates.
        threshold: share of a map's range above which a patch counts.
    """

    seeds: tuple[Seed, ...]
    reference: Seed | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if len(self.seeds) < 2:
            raise ValueError(f"`seeds` must hold at least two seeds, got {len(self.seeds)}")
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"`threshold` must lie in (0, 1), got {self.threshold}")

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return required_by(*self.seeds, *((self.reference,) if self.reference else ()))

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        maps = torch.stack([scaled_to_max(seed(capture, classes).float()) for seed in self.seeds])
        reference = maps.mean(0)
        if self.reference is not None:
            reference = self.reference(capture, classes).float()
        expected, shown = self._binary(reference), self._binary(maps)
        shared = (shown & expected).sum((-2, -1))
        agreement = shared / (shown | expected).sum((-2, -1)).clamp_min(1)
        best = agreement.argmax(0)[None, :, :, None, None]
        return maps.gather(0, best.expand_as(maps[:1]))[0]

    def _binary(self, maps: Tensor) -> Tensor:
        return scaled_to_range(maps) > self.threshold
