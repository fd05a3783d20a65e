"""Refiners that know nothing of the model: what a real one must beat."""

import math
from dataclasses import dataclass

from camkit.capture.record import Capture
from camkit.ops.resampling import gaussian_blur
from camkit.tensors import Cam


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of every map, edges repeated.

    Attributes:
        width: standard deviation, in patches.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.width < math.inf:
            raise ValueError(f"`width` must be positive and finite, got {self.width}")

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        del capture
        return gaussian_blur(cam, self.width)
