"""Refiner: the type, chains of refiners, and functions that refiners share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.errors import CaptureError
from camkit.tensors import RGB, Cam

Refiner: TypeAlias = Callable[[Cam, Capture], Cam]
"""``(cam, capture) -> cam``: a plain function, or a frozen dataclass whose ``requires`` (a
`camkit.capture.WatchSpec`) states what it reads."""


@dataclass(frozen=True)
class Chain:
    """Refiners applied in order; itself a refiner."""

    refiners: tuple[Refiner, ...]

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return required_by(*self.refiners)

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        refined = cam
        for refiner in self.refiners:
            refined = refiner(refined, capture)
        return refined


def chain(*refiners: Refiner) -> Chain:
    """Apply refiners in order.

    >>> chain().refiners
    ()
    """
    return Chain(refiners)


class Once:
    """Tells the first time from others: `warnings` forgets when somebody changes its filters."""

    def __init__(self) -> None:
        self._before = False

    def is_first(self) -> bool:
        before, self._before = self._before, True
        return not before


def picture_of(capture: Capture, refiner: str, cam: Cam | None = None) -> RGB:
    """Return the detached pictures in [0, 1], or raise an error in the refiner's name.

    Args:
        capture: of the pictures.
        refiner: its name.
        cam: maps that must be of as many images.

    Raises:
        CaptureError: there are no pictures.
        ValueError: there are more or fewer than images in ``cam``.
    """
    if capture.rgb is None:
        raise CaptureError(f"{refiner} needs the picture; watch with `rgb=photo.rgb`")
    if cam is not None and len(cam) != len(capture.rgb):
        raise ValueError(
            f"{refiner} needs a picture for each image in `cam`, got {len(capture.rgb)} for "
            f"{len(cam)}; give the capture of the same batch"
        )
    return capture.rgb.detach()


def picture_bytes(rgb: RGB) -> UInt8[Tensor, "b H W 3"]:
    """Convert pictures to 0..255, channels last."""
    return (rgb.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def scaled_size(rgb: RGB, scale: float) -> tuple[int, int]:
    """Return rows and columns of the pictures times ``scale``, at least 1 each."""
    rows, cols = rgb.shape[-2:]
    return max(1, round(rows * scale)), max(1, round(cols * scale))


def clip_to_range(maps: Float[Tensor, "b k H W"], cam: Cam) -> Float[Tensor, "b k H W"]:
    """Clip each map to the smallest and the largest score of its map in ``cam``."""
    if cam.numel() == 0:
        return maps
    bounds = cam.detach().to(maps.dtype)
    return maps.clamp(bounds.amin((-2, -1), keepdim=True), bounds.amax((-2, -1), keepdim=True))
