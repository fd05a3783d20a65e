"""Refiners that need the map alone: normalize, amplify, blur."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from camkit.capture.record import NO_PATCH_TOKENS, Capture, WatchSpec
from camkit.ops.confidence import Confidence, TanhAroundMean, amplify
from camkit.ops.finite import check_finite
from camkit.ops.images import gaussian_blur
from camkit.ops.scaling import rounding_of, scaled_to_max
from camkit.ops.similarity import check_positive
from camkit.tensors import Cam


def normalize_cam(cam: Cam, *, mode: Literal["max", "minmax"] = "max", epsilon: float = 0.0) -> Cam:
    """Scale each map of each image to [0, 1]; negative scores count as zero.

    A map without evidence becomes zero: one without a positive score, or whose scores (with
    ``"minmax"``, their differences) are no more than the rounding of its largest magnitude
    (`camkit.ops.scaling.rounding_of`).

    Args:
        cam: class scores.
        mode: ``"max"`` divides by the largest score, so that zero stays zero; ``"minmax"`` also
            moves the smallest score to zero, as in MCTformer and ToCo.
        epsilon: added to the largest score before the division, so that maps with little evidence
            stay faint: 1e-5 in ToCo and AFA, 1e-7 in CLIP-ES, 1e-8 in MCTformer and WeakTr.

    Raises:
        ValueError: a score is NaN or infinite, or a setting is out of range.
    """
    check_epsilon(epsilon)
    check_finite("cam", cam)
    rounding = rounding_of(cam)  # of the scores as they came, before anything is cut or subtracted
    cam = cam.clamp_min(0.0)
    if mode == "minmax":
        cam = cam - cam.amin((-2, -1), keepdim=True)
    if not epsilon:
        return scaled_to_max(cam, rounding=rounding)
    top = cam.amax((-2, -1), keepdim=True)
    # float16 has no 1e-8
    return cam / (top + epsilon).clamp_min(torch.finfo(cam.dtype).tiny) * (top > rounding)


def scale_seed(seed: object, maps: Cam) -> Cam:
    """Bring the maps of a seed to [0, 1], unless its ``absolute`` says that they lie there."""
    return maps if getattr(seed, "absolute", False) else normalize_cam(maps)


def check_epsilon(epsilon: float) -> None:
    """Raise a ValueError if `normalize_cam` cannot add ``epsilon``."""
    if not 0.0 <= epsilon < math.inf:
        raise ValueError(f"`epsilon` must be at least 0 and finite, got {epsilon}")


@dataclass(frozen=True)
class Normalize:
    """`normalize_cam` as a refiner."""

    mode: Literal["max", "minmax"] = "max"
    epsilon: float = 0.0

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        if self.mode not in ("max", "minmax"):
            raise ValueError(f'`mode` must be "max" or "minmax", got {self.mode!r}')
        check_epsilon(self.epsilon)

    def __call__(self, cam: Cam, capture: Capture) -> Cam:  # noqa: ARG002 - every refiner takes both
        return normalize_cam(cam, mode=self.mode, epsilon=self.epsilon)


@dataclass(frozen=True)
class Amplify:
    """Raise the confident scores of each class map and lower the others, at a constant sum.

    The rule of DOEI for class-to-patch interactions (`camkit.edits.PatchDecoupling`), applied to
    maps. The smooth rules keep the order of scores within a map, so they matter where classes
    compete or the background score is fixed.

    Attributes:
        strength: how far scores are raised and lowered, in [0, 1); 0 changes nothing.
        rule: decides which scores are confident.
    """

    strength: float = 0.5
    rule: Confidence = field(default_factory=TanhAroundMean)

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < 1.0:
            raise ValueError(f"`strength` must lie in [0, 1), got {self.strength}")

    def __call__(self, cam: Cam, capture: Capture) -> Cam:  # noqa: ARG002 - as above
        check_finite("cam", cam)
        return amplify(cam.flatten(2), self.rule, self.strength).view_as(cam).clamp(0, 1)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of every map, with repeated edges.

    Attributes:
        width: standard deviation, in patches.
    """

    width: float = 1.0

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        check_positive("width", self.width)

    def __call__(self, cam: Cam, capture: Capture) -> Cam:  # noqa: ARG002 - as above
        check_finite("cam", cam)
        return gaussian_blur(cam, self.width)
