"""Seeds that combine the maps of other seeds, or refine them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.ops.scaling import scaled_to_max
from camkit.seeds.protocol import Seed
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class ProductSeed:
    """The product of two seeds' maps: high where both are high.

    Class attention times patch head is MCTformer-V2's map; its square root, ``root``, is
    MCTformer+'s.
    """

    first: Seed
    second: Seed
    root: bool = False

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return required_by(self.first, self.second)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        first = self.first(capture, classes).clamp_min(0.0)
        product = first * self.second(capture, classes).clamp_min(0.0).to(first)
        return product.sqrt() if self.root else product


@dataclass(frozen=True)
class RefinedSeed:
    """A seed whose maps are refined before anything else is done with them.

    `Views` reads a seed from the capture of each view, so these refiners use each view's own
    attention, as MCTformer and WeakTr do. Refiners of a pipeline see the photo as given only.

    Attributes:
        seed: its maps reach the refiners as they are, not scaled to [0, 1], and with their sign.
        refine: refiners, applied in order.
    """

    seed: Seed
    refine: tuple[Callable[[Cam, Capture], Cam], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "refine", tuple(self.refine))
        if not self.refine:
            raise ValueError("`refine` must hold at least one refiner, got none")

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return required_by(self.seed, *self.refine)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        cam = self.seed(capture, classes)
        for refiner in self.refine:
            cam = refiner(cam, capture)
        return cam.masked_fill((classes < 0)[:, :, None, None], 0.0)


@dataclass(frozen=True)
class FusedSeed:
    """Maps of several seeds, each divided by its maximum, fused into one.

    The mean and the maximum are torchcam's fusions of layers (its mean is a sum). The "product",
    the geometric mean, is ours.
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
        return required_by(*self.seeds)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        maps = torch.stack([_scaled(seed, capture, classes) for seed in self.seeds])
        if self.join == "max":
            return maps.amax(0)
        return maps.mean(0) if self.join == "mean" else maps.prod(0).pow(1 / len(maps))


@dataclass(frozen=True)
class GatedProductSeed:
    """A seed times another seed, to the degree that the two agree (ours).

    Maps a and b, each divided by its maximum, become ``a * b ** e``. The exponent e is ``trust``
    times the correlation of ``sqrt(a)`` with b over the patches, clamped to [0, 1], for each image
    and class. So the second seed sharpens the first where the two agree, and is left out where they
    disagree.

    Attributes:
        seed: the seed to trust, such as `camkit.GradientSeed`.
        other: the seed that may be wrong, such as `camkit.seeds.ClassWeightSeed` of patches that no
            loss has trained.
        trust: above 0; at 3, a correlation of a third is enough for the full product.
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
        return required_by(self.seed, self.other)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        tiny = 1e-8  # a constant map has correlation 0, not NaN
        first = _scaled(self.seed, capture, classes)
        other = _scaled(self.other, capture, classes)
        a, b = (cam - cam.mean((-2, -1), keepdim=True) for cam in (first.sqrt(), other))
        norms = [cam.pow(2).sum((-2, -1), keepdim=True).sqrt() for cam in (a, b)]
        correlation = (a * b).sum((-2, -1), keepdim=True) / (norms[0] * norms[1]).clamp_min(tiny)
        return first * other.clamp_min(tiny) ** (self.trust * correlation).clamp(0, 1)


def _scaled(seed: Seed, capture: Capture, classes: Classes) -> Cam:
    return scaled_to_max(seed(capture, classes).float().clamp_min(0.0))
