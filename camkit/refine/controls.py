"""Refiners that know nothing of the model: what a real one must beat."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from camkit.capture.record import Capture
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
        reach = max(1, round(3 * self.width))
        steps = torch.arange(-reach, reach + 1, device=cam.device, dtype=cam.dtype)
        kernel = (-(steps**2) / (2 * self.width**2)).softmax(0)
        maps = F.pad(cam, (reach, reach, reach, reach), mode="replicate").flatten(0, 1)[:, None]
        maps = F.conv2d(F.conv2d(maps, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
        return maps.view_as(cam)
