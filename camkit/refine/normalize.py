"""Bring each class map to [0, 1]."""

from dataclasses import dataclass
from typing import Literal

import torch

from camkit.capture.record import Capture
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

    def __post_init__(self) -> None:
        if self.mode not in ("max", "minmax"):
            raise ValueError(f'`mode` must be "max" or "minmax", got {self.mode!r}')

    def __call__(self, cam: Cam, capture: Capture) -> Cam:  # noqa: ARG002 - every refiner takes both
        return normalize_cam(cam, mode=self.mode)
