"""Seeds made of seeds: single blocks, averages, and products that are checked."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.seeds.protocol import Seed
from camkit.tensors import Cam, Classes

_TINY = 1e-8  # a map without evidence stays zero


@dataclass(frozen=True)
class BlockSeed:
    """A seed that reads attention, read from some of the watched blocks alone.

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
        return WatchSpec() | required_by(self.seed)

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
class FusedSeed:
    """Maps of several seeds, each divided by its maximum into one.

    Mean and maximum over layers are torchcam's fusions (its mean is a sum), the product is ours.

    Attributes:
        seeds: such as `camkit.seeds.LogitLensSeed` at several layers.
        join: "mean"; "max", what any of them sees; or "product", what all of them see, as the
            geometric mean.
    """

    seeds: tuple[Seed, ...]
    join: Literal["mean", "max", "product"] = "mean"

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("`seeds` must hold at least one seed, got none")
        if self.join not in ("mean", "max", "product"):
            raise ValueError(f'`join` must be "mean", "max" or "product", got {self.join!r}')

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec() | required_by(*self.seeds)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        maps = torch.stack([_scaled(seed(capture, classes).float()) for seed in self.seeds])
        if self.join == "max":
            return maps.amax(0)
        return maps.mean(0) if self.join == "mean" else maps.prod(0).pow(1 / len(maps))


@dataclass(frozen=True)
class BestAgreementSeed:
    """Of several seeds the one that agrees best with a reference, for each image and class.

    After the layer selection of DoNuSeg (2024): binary maps of every layer are compared with a
    first label, and the most similar layer is taken. There the label comes from points; here it is
    another seed, or the mean of all candidates. Neither the threshold nor the form of similarity is
    published: 0.5 of the range of each map, and intersection over union, are ours.

    Attributes:
        seeds: candidates, such as one seed at several layers.
        reference: what they are compared with; None is the mean of all of them.
        threshold: share of a map's range from which a patch counts.
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
        return WatchSpec() | required_by(*self._all())

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        maps = torch.stack([_scaled(seed(capture, classes).float()) for seed in self.seeds])
        best = self._agreement(maps, capture, classes).argmax(0)
        return maps.gather(0, best[None, :, :, None, None].expand_as(maps[:1]))[0]

    def chosen(self, capture: Capture, classes: Classes) -> Tensor:
        """Which of ``seeds`` is taken for each image and class, ``(b, k)``."""
        maps = torch.stack([_scaled(seed(capture, classes).float()) for seed in self.seeds])
        return self._agreement(maps, capture, classes).argmax(0)

    def _agreement(
        self, maps: Float[Tensor, "s b k h w"], capture: Capture, classes: Classes
    ) -> Float[Tensor, "s b k"]:
        reference = maps.mean(0)
        if self.reference is not None:
            reference = self.reference(capture, classes).float()
        wanted, found = self._binary(reference), self._binary(maps)
        shared = (found & wanted).sum((-2, -1))
        return shared / (found | wanted).sum((-2, -1)).clamp_min(1)

    def _binary(self, maps: Tensor) -> Tensor:
        low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
        return (maps - low) > self.threshold * (high - low)

    def _all(self) -> tuple[Seed, ...]:
        return self.seeds if self.reference is None else (*self.seeds, self.reference)


@dataclass(frozen=True)
class GatedProductSeed:
    """A seed, times another one as far as both agree (ours).

    Maps a and b, each divided by its maximum, become ``a * b ** e``; e is ``trust`` times the
    correlation over the patches of the square root of a with b, held in [0, 1]. So the second seed
    sharpens the first where they see the same thing, and is left out where it sees the opposite,
    for each image and class.

    Attributes:
        seed: what is trusted, such as `camkit.GradientSeed`.
        other: what may be wrong, such as `camkit.seeds.ClassWeightSeed` of patches that no
        loss ever saw.
        trust: above 0; at 3, a correlation of a third is enough for the whole product.
    """

    seed: Seed
    other: Seed
    trust: float = 3.0

    def __post_init__(self) -> None:
        if not self.trust > 0.0:
            raise ValueError(f"`trust` must be above 0, got {self.trust}")

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec() | required_by(self.seed, self.other)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        first, other = (_scaled(seed(capture, classes).float()) for seed in (self.seed, self.other))
        agreed = (self.trust * _correlation(first.sqrt(), other)).clamp(0, 1)
        return first * other.clamp_min(_TINY) ** agreed


def _correlation(one: Cam, other: Cam) -> Float[Tensor, "b k 1 1"]:
    """Of two maps over their patches; 0 where one of them is even."""
    one, other = (cam - cam.mean((-2, -1), keepdim=True) for cam in (one, other))
    norms = [cam.pow(2).sum((-2, -1), keepdim=True).sqrt() for cam in (one, other)]
    return (one * other).sum((-2, -1), keepdim=True) / (norms[0] * norms[1]).clamp_min(_TINY)


def _scaled(cam: Cam) -> Cam:
    top = cam.amax((-2, -1), keepdim=True)
    return cam / top.clamp_min(_TINY) * (top > _TINY)
