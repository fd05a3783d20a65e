"""Controls of the hybrid attention seed: the same attention with another likeness."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from camkit.capture import Capture, WatchSpec
from camkit.seeds import HybridAttentionSeed
from camkit.seeds.protocol import fold_maps
from camkit.tensors import Cam, Classes

Likeness = Literal["another class", "another image", "shuffled", "class-agnostic"]

_EARLIER: dict[int, tuple[Tensor, tuple[int, int]]] = {}  # likeness of the image before, by seed


@dataclass(frozen=True)
class OtherLikeness:
    """A hybrid seed whose likeness is that of something else.

    Attributes:
        seed: whose attention and temperature are used.
        likeness: "another class" takes the next class of the vocabulary; "another image" the image
            before, resized; "shuffled" the patches in random order; "class-agnostic" the mean over
            all classes.
    """

    seed: HybridAttentionSeed
    likeness: Likeness

    @property
    def requires(self) -> WatchSpec:
        return self.seed.requires

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        other = self._other(capture, classes)
        attended = self.seed.attended(capture, classes).to(other)
        maps = attended * ((other - other.amax(-1, keepdim=True)) / self.seed.temperature).exp()
        return fold_maps(capture, maps, classes)

    def _other(self, capture: Capture, classes: Classes) -> Tensor:
        count = capture.class_count or 1
        every = torch.arange(count).expand(capture.images, -1)
        own = self.seed.likeness(capture, classes)
        if self.likeness == "another class":
            return self.seed.likeness(capture, (classes + 1) % count)
        if self.likeness == "class-agnostic":
            return self.seed.likeness(capture, every).mean(1, keepdim=True).expand_as(own)
        if self.likeness == "shuffled":
            order = torch.randperm(own.shape[-1], generator=torch.Generator().manual_seed(0))
            return own[..., order]
        size = capture.grid.rows, capture.grid.cols
        found = self.seed.likeness(capture, every)
        earlier, grid = _EARLIER.get(id(self), (found.flip(-1), size))
        _EARLIER[id(self)] = found, size
        resized = F.interpolate(earlier.unflatten(-1, grid), size=size, mode="bilinear").flatten(2)
        return resized.gather(1, classes.clamp_min(0)[..., None].expand(-1, -1, resized.shape[-1]))


@dataclass(frozen=True)
class Power:
    """A seed to a power: sharper or flatter maps from nothing but the seed itself."""

    seed: HybridAttentionSeed
    exponent: float

    @property
    def requires(self) -> WatchSpec:
        return self.seed.requires

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        attended = self.seed.attended(capture, classes).float()
        top = attended.amax(-1, keepdim=True).clamp_min(1e-12)
        return fold_maps(capture, (attended / top) ** self.exponent, classes)
