"""Class maps that follow the colours of the picture, by linear fits in windows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.ops.guided import check_settings, guided_upsample
from camkit.ops.resampling import resize_cam
from camkit.refine.pictures import check_finite, picture_of, scaled_size
from camkit.tensors import Cam


@dataclass(frozen=True)
class GuidedFilter:
    """Make maps, in every window, a linear function of the colours: He et al. 2013.

    The formula (`camkit.ops.guided`) is the paper's; with ``scale`` below 1 the functions are found
    on a reduced picture, as in the fast guided filter (He and Sun 2015). Ours: the defaults, chosen
    for maps of patches of 16 pixels (a quarter of the size does no worse than half or all of it),
    and that results are clipped to the range of each map.

    Attributes:
        radius: windows have 2 radius + 1 pixels on a side, of the size the functions are found at.
        eps: variance of a colour, in [0, 1], below which a window counts as flat; larger values
            smooth more.
        scale: the functions are found at this share of the picture's size, at most 1.

    Returns, when called, maps of the picture's size. They are differentiable in the maps.
    """

    radius: int = 4
    eps: float = 1e-3
    scale: float = 0.25

    def __post_init__(self) -> None:
        check_settings(self.radius, self.eps)
        if not 0.0 < self.scale <= 1.0:
            raise ValueError(f"`scale` must lie in (0, 1], got {self.scale}")

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        rgb = picture_of(capture, "GuidedFilter")
        check_finite(cam)
        size = scaled_size(rgb, self.scale)
        dtype = torch.promote_types(cam.dtype, torch.float32)  # rounded once, at the end
        rgb = rgb.to(cam.device, dtype)
        low = rgb if self.scale == 1.0 else resize_cam(rgb, size)
        maps = resize_cam(cam.to(dtype), size)
        filtered = guided_upsample(maps, low, rgb, radius=self.radius, eps=self.eps)
        return clip_to_range(filtered, cam).to(cam.dtype)


def clip_to_range(maps: Float[Tensor, "b k H W"], cam: Cam) -> Float[Tensor, "b k H W"]:
    """Keep each map between the smallest and the largest score of another."""
    if cam.numel() == 0:
        return maps
    bounds = cam.detach().to(maps.dtype)
    return maps.clamp(bounds.amin((-2, -1), keepdim=True), bounds.amax((-2, -1), keepdim=True))
