"""Refiners that know nothing of the model: normalise, amplify, blur."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from camkit.capture.record import NO_MODEL, Capture, WatchSpec
from camkit.ops.confidence import Confidence, TanhAroundMean, amplify
from camkit.ops.images import gaussian_blur
from camkit.tensors import Cam

TINY = 1e-8  # a flat or empty map holds no evidence: it becomes zeros, not NaN


def normalize_cam(cam: Cam, *, mode: Literal["max", "minmax"] = "max") -> Cam:
    """Scale each map of each image to [0, 1]; negative scores count as none.

    Args:
        cam: class scores.
        mode: ``"max"`` divides by the largest score, so that zero stays zero; ``"minmax"`` also
            takes the smallest score to zero, as MCTformer and ToCo do.
    """
    cam = cam.clamp_min(0.0)
    if mode == "minmax":
        cam = cam - cam.amin((-2, -1), keepdim=True)
    top = cam.amax((-2, -1), keepdim=True)
    floor = max(TINY, torch.finfo(cam.dtype).tiny)  # float16 has no 1e-8
    return cam / top.clamp_min(floor) * (top > floor)


@dataclass(frozen=True)
class Normalize:
    """`normalize_cam` as a refiner; ``mode`` is told there."""

    mode: Literal["max", "minmax"] = "max"

    requires: ClassVar[WatchSpec] = NO_MODEL

    def __post_init__(self) -> None:
        if self.mode not in ("max", "minmax"):
            raise ValueError(f'`mode` must be "max" or "minmax", got {self.mode!r}')

    def __call__(self, cam: Cam, capture: Capture) -> Cam:  # noqa: ARG002 - every refiner takes both
        return normalize_cam(cam, mode=self.mode)


@dataclass(frozen=True)
class Amplify:
    """Raise confident scores of each class map and lower the others; its sum is kept.

    What DOEI does to class-to-patch interactions (`camkit.edits.PatchDecoupling`), for people
    who have
    maps. The order of scores within a map stays under the smooth rules, so it acts where classes
    compete or a background score is fixed.

    Attributes:
        strength: how far scores are raised and lowered, in [0, 1); 0 changes nothing.
        rule: what is confident.
    """

    strength: float = 0.5
    rule: Confidence = field(default_factory=TanhAroundMean)

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < 1.0:
            raise ValueError(f"`strength` must lie in [0, 1), got {self.strength}")

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        del capture
        return amplify(cam.flatten(2), self.rule, self.strength).view_as(cam).clamp(0, 1)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of every map, edges repeated.

    Attributes:
        width: standard deviation, in patches.
    """

    width: float = 1.0

    requires: ClassVar[WatchSpec] = NO_MODEL

    def __post_init__(self) -> None:
        if not 0.0 < self.width < math.inf:
            raise ValueError(f"`width` must be positive and finite, got {self.width}")

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        del capture
        return gaussian_blur(cam, self.width)
