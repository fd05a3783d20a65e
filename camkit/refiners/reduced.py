"""A slow refiner on a small picture, its maps brought back along the edges of the large one."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.ops.edge_aware import check_guided_settings, guided_upsample
from camkit.ops.images import resize_cam
from camkit.refiners.crf import PRESETS, DenseCRF
from camkit.refiners.edge_aware import clip_to_range
from camkit.refiners.protocol import Chain, Refiner, picture_of, scaled_size
from camkit.tensors import Cam


@dataclass(frozen=True)
class AtReducedSize:
    """Refine on a reduced picture, then bring the maps to its full size by guided upsampling.

    For refiners that look at the picture, as `camkit.DenseCRF`, whose cost grows with its pixels:
    at half size they take about a quarter of the time. The masks are not those at full size, only
    about as good. The upsampling is the fast guided filter of He and Sun (2015); applying it to
    maps refined at a small size is ours, as are the defaults.

    Attributes:
        refiner: gets a capture with the small picture, and must return maps of that size. The reach
            of the bilateral kernel of a DenseCRF shrinks with the picture; its Gaussian kernel and
            the settings of other refiners are in pixels of the small picture.
        scale: share of the picture's rows and columns that the refiner sees, in (0, 1].
        radius: of the guided filter, in pixels of the small picture.
        eps: of the guided filter (`camkit.refiners.GuidedFilter`).
    """

    refiner: Refiner
    scale: float = 0.5
    radius: int = 4
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not callable(self.refiner):
            raise TypeError(f"`refiner` must be a refiner such as DenseCRF(), got {self.refiner!r}")
        if not 0.0 < self.scale <= 1.0:
            raise ValueError(f"`scale` must lie in (0, 1], got {self.scale}")
        check_guided_settings(self.radius, self.eps)

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return required_by(self.refiner)

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        rgb = picture_of(capture, "AtReducedSize")
        size = scaled_size(rgb, self.scale)
        if size == (rgb.shape[-2], rgb.shape[-1]):
            return self.refiner(cam, capture)
        dtype = torch.promote_types(rgb.dtype, torch.float32)
        small = resize_cam(rgb.to(dtype), size)
        refined = _shrunk(self.refiner, self.scale)(cam, replace(capture, rgb=small))
        if (refined.shape[-2], refined.shape[-1]) != size:
            raise ValueError(
                f"`refiner` must return maps of the size of its picture, {size[0]}x{size[1]}, got "
                f"{refined.shape[-2]}x{refined.shape[-1]}; {self.refiner!r} does not"
            )
        large = guided_upsample(refined, small, rgb, radius=self.radius, eps=self.eps)
        return clip_to_range(large, refined)


def _shrunk(refiner: Refiner, scale: float) -> Refiner:
    if isinstance(refiner, Chain):
        return Chain(tuple(_shrunk(one, scale) for one in refiner.refiners))
    if isinstance(refiner, DenseCRF):
        kernels = PRESETS[refiner.preset] if isinstance(refiner.preset, str) else refiner.preset
        reach = kernels.bilateral_sxy * scale  # a few pixels of the Gaussian one stay a few pixels
        return replace(refiner, preset=kernels._replace(bilateral_sxy=reach))
    return refiner
