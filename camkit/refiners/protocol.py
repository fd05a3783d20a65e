"""What a refiner is, how refiners are chained, and what they ask of a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.errors import CaptureError
from camkit.tensors import RGB, Cam

Refiner: TypeAlias = Callable[[Cam, Capture], Cam]
"""``(cam, capture) -> cam``: a frozen dataclass, its repr the settings, or a plain function."""


@dataclass(frozen=True)
class Chain:
    """Refiners one after the other; itself a refiner."""

    refiners: tuple[Refiner, ...]

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for, so that all of them can read it."""
        return required_by(*self.refiners)

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        refined = cam
        for refiner in self.refiners:
            refined = refiner(refined, capture)
        return refined


def chain(*refiners: Refiner) -> Chain:
    """Put refiners in a row.

    >>> chain().refiners
    ()
    """
    return Chain(refiners)


def picture_of(capture: Capture, refiner: str) -> RGB:
    """The pictures in [0, 1], apart from any graph.

    Args:
        capture: what was watched.
        refiner: who asks, for the message.

    Raises:
        CaptureError: the model was watched without them.
    """
    if capture.rgb is None:
        raise CaptureError(f"{refiner} needs the picture; watch with `rgb=photo.rgb`")
    return capture.rgb.detach()


def picture_bytes(rgb: RGB) -> UInt8[np.ndarray, "b H W 3"]:
    """The pictures in 0..255, red first, channels last, as libraries outside torch take them."""
    pixels = (rgb.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return np.ascontiguousarray(pixels.cpu().numpy())


def scaled_size(rgb: RGB, scale: float) -> tuple[int, int]:
    """Rows and columns of the pictures at a share of their size, at least 1 each."""
    rows, cols = rgb.shape[-2:]
    return max(1, round(rows * scale)), max(1, round(cols * scale))


def check_finite(cam: Cam) -> None:
    """Refuse maps with NaN or inf."""
    if not cam.isfinite().all():
        raise ValueError("`cam` must be finite, got NaN or inf; a filter would spread it")
