"""A forward while it runs: what has been seen so far, and whether it can be read as patches."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import Attention
from camkit.capture.tail import TailCall
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid


@dataclass
class Forward:
    """What has been seen of the forward that is running."""

    kept: list[tuple[int, str, Attention]] = field(default_factory=list)
    calls: int = 0
    modules: int = 0
    images: int = 0
    running: nn.Module | None = None
    grid: Grid | None = None
    anatomy: Anatomy | None = None
    tail: list[TailCall] = field(default_factory=list)
    outputs: Tensor | None = None


def checked_grid(forward: Forward, anatomy: Anatomy, shape: tuple[int, int, int, int]) -> Grid:
    """The patch grid of a finished forward, or why its attention cannot be read by patches."""
    images, _, tokens, keys = shape
    if images != forward.images:
        raise UnsupportedModelError(
            f"attention ran on {images} windows for {forward.images} images: windowed "
            "attention (Swin) has no class-to-patch rows and no affinity across windows"
        )
    if tokens != keys:
        raise UnsupportedModelError(
            f"{tokens} queries attend to {keys} keys: spatially reduced or channel attention "
            "(PVT, MiT, XCiT) does not relate patches one to one"
        )
    if forward.grid is None:
        raise UnsupportedModelError(
            "no patch embedding found (a convolution with 3 input channels, stride = kernel >= 4), "
            "so the patch grid is unknown"
        )
    patches = len(anatomy.patches(tokens))
    if patches != forward.grid.size:
        raise CaptureError(
            f"{tokens} tokens less {len(anatomy.special_tokens)} special ones leave {patches}, "
            f"but the patch grid is {forward.grid.rows}x{forward.grid.cols}"
        )
    return forward.grid
