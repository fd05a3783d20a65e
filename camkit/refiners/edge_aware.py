"""Refiners that follow the edges of the picture without a CRF, and any refiner at reduced size."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import NO_PATCH_TOKENS, Capture, WatchSpec, required_by
from camkit.errors import CamkitError
from camkit.ops.edge_aware import (
    DILATIONS,
    adapt_to_colours,
    check_dilations,
    check_guided_settings,
    guided_filter,
)
from camkit.ops.finite import check_finite
from camkit.ops.images import resize_cam
from camkit.ops.similarity import check_positive
from camkit.refiners.crf import PRESETS, DenseCRF
from camkit.refiners.protocol import (
    Chain,
    Refiner,
    clip_to_range,
    picture_bytes,
    picture_of,
    scaled_size,
)
from camkit.tensors import Cam

_TOGETHER = 16  # maps that are filtered at once: each takes several planes of the picture's size


@dataclass(frozen=True)
class GuidedFilter:
    """Make each map, in every window, a linear function of the colours (He et al. 2013).

    The formula (`camkit.ops.edge_aware`) is the paper's. With ``scale`` below 1 the functions are
    computed on a reduced picture, as in the fast guided filter (He and Sun 2015). Ours: the
    defaults, chosen for maps of patches of 16 pixels, and clipping to the range of each map.

    Attributes:
        radius: windows have 2 radius + 1 pixels on a side, at the size of the computation.
        eps: variance of a colour, in [0, 1], below which a window counts as flat; larger values
            smooth more.
        scale: share of the picture's size at which the functions are computed, at most 1.

    Returns, when called, maps of the picture's size. They are differentiable in the maps.
    """

    radius: int = 4
    eps: float = 1e-3
    scale: float = 0.25

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        check_guided_settings(self.radius, self.eps)
        if not 0.0 < self.scale <= 1.0:
            raise ValueError(f"`scale` must lie in (0, 1], got {self.scale}")

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        rgb = picture_of(capture, "GuidedFilter", cam)
        check_finite("cam", cam)
        size = scaled_size(rgb, self.scale)
        dtype = torch.promote_types(cam.dtype, torch.float32)  # rounded once, at the end
        rgb = rgb.to(cam.device, dtype)
        low = rgb if self.scale == 1.0 else resize_cam(rgb, size)
        maps = resize_cam(cam.to(dtype), size)
        parts = [
            guided_filter(part, low, rgb, radius=self.radius, eps=self.eps)
            for part in maps.split(_TOGETHER, dim=1)
        ]
        return clip_to_range(torch.cat(parts, 1), cam).to(cam.dtype)


@dataclass(frozen=True)
class AtReducedSize:
    """Refine on a reduced picture, then bring the maps to its full size by guided upsampling.

    At half size, a refiner such as `camkit.DenseCRF`, whose cost grows with the pixels, takes about
    a quarter of the time for masks about as good. The upsampling is the fast guided filter of He
    and Sun (2015). Applying it to maps refined at a small size is ours, as are the defaults.

    Attributes:
        refiner: gets a capture with the small picture, and must return maps of that size. The reach
            of the bilateral kernel of a DenseCRF shrinks with the picture; its Gaussian kernel and
            the settings of other refiners are in pixels of the small picture.
        scale: share of the picture's rows and columns that the refiner gets, in (0, 1].
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
        rgb = picture_of(capture, "AtReducedSize", cam)
        check_finite("cam", cam)
        size = scaled_size(rgb, self.scale)
        if size == (rgb.shape[-2], rgb.shape[-1]):
            return self.refiner(cam, capture)
        dtype = torch.promote_types(rgb.dtype, torch.float32)
        small = resize_cam(rgb.to(dtype), size)
        # Regions reads files of masks at the size of the photo
        sizes = capture.sizes or ((rgb.shape[-2], rgb.shape[-1]),) * len(rgb)
        reduced = replace(capture, rgb=small, sizes=sizes)
        refined = _shrunk(self.refiner, self.scale)(cam, reduced)
        if (refined.shape[-2], refined.shape[-1]) != size:
            raise ValueError(
                f"`refiner` must return maps of the size of its picture, {size[0]}x{size[1]}, got "
                f"{refined.shape[-2]}x{refined.shape[-1]}; {self.refiner!r} does not"
            )
        large = guided_filter(refined, small, rgb, radius=self.radius, eps=self.eps)
        return clip_to_range(large, refined)


def _shrunk(refiner: Refiner, scale: float) -> Refiner:
    """Return the refiner for a reduced picture, with a shorter reach if it is a DenseCRF."""
    if isinstance(refiner, Chain):
        return Chain(tuple(_shrunk(part, scale) for part in refiner.refiners))
    if isinstance(refiner, DenseCRF):
        kernels = PRESETS[refiner.preset] if isinstance(refiner.preset, str) else refiner.preset
        reach = kernels.bilateral_sxy * scale
        return replace(refiner, preset=kernels._replace(bilateral_sxy=reach))
    return refiner


@dataclass(frozen=True)
class FastGlobalSmooth:
    """Smooth each map globally, less across edges of colour (Min et al. 2014).

    Minimises a weighted least-squares energy: the result stays close to the given map, within its
    range, and varies little between neighbouring pixels of similar colour. The fastest refiner here
    that uses the picture. Runs in OpenCV, one image at a time on the CPU, in float32; not
    differentiable.

    Attributes:
        smoothness: weight of the smoothness term, the paper's lambda; at most 1e5, where single
            precision loses the third digit.
        colour_width: difference in RGB, in [0, 1], at which neighbours stop being smoothed; the
            paper's sigma over 255.

    Returns, when called, maps of the picture's size.
    """

    smoothness: float = 1000.0
    colour_width: float = 0.02

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        if not 0.0 < self.smoothness <= 1e5:
            raise ValueError(f"`smoothness` must lie in (0, 100000], got {self.smoothness}")
        check_positive("colour_width", self.colour_width)

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        rgb = picture_of(capture, "FastGlobalSmooth", cam)
        check_finite("cam", cam)
        library: Any = getattr(cv2, "ximgproc", None)
        if not hasattr(library, "createFastGlobalSmootherFilter"):
            raise CamkitError(
                "FastGlobalSmooth needs the extra modules of OpenCV, which this build lacks; "
                "uninstall every other opencv package, then "
                "`pip install opencv-contrib-python-headless`"
            )
        maps = resize_cam(cam.detach().float(), (rgb.shape[-2], rgb.shape[-1]))
        smooth = torch.empty_like(maps, device="cpu")
        for image, colours in enumerate(picture_bytes(rgb).cpu().numpy()):
            smoother = library.createFastGlobalSmootherFilter(
                colours, self.smoothness, 255.0 * self.colour_width
            )
            for first in range(0, maps.shape[1], 4):  # OpenCV filters up to four maps in one call
                planes = maps[image, first : first + 4].cpu().numpy()
                filtered = smoother.filter(np.ascontiguousarray(planes.transpose(1, 2, 0)))
                filtered = filtered.reshape(*filtered.shape[:2], -1).transpose(2, 0, 1)
                smooth[image, first : first + 4] = torch.from_numpy(filtered)
        return smooth.to(cam)


@dataclass(frozen=True)
class PixelAdaptive:
    """Average scores over neighbouring pixels of similar colour, repeatedly (PAR).

    The pixel-adaptive refinement of AFA (Ru et al. 2022), which ToCo and its followers keep. The
    formula (`camkit.ops.edge_aware`), its dilations, ``colour_width`` and ``position_weight`` are
    AFA's, and so are 10 steps (15 on COCO there). ToCo refines at half size: ``scale=0.5``.

    Ours: map and picture are resized by `camkit.resize_cam`, where AFA aligns corners. Maps are
    divided by ``(1 + position_weight) ** steps``, the growth of the formula, so that scores keep
    their range and can be compared with a fixed background score.

    Attributes:
        steps: number of steps.
        scale: share of the picture's size to refine at; 0.5 is about four times faster.
        size: rows and columns to refine at, instead of ``scale``.
        dilations: distances of the neighbours, in pixels at the size of refinement.
        colour_width: difference in colour at which similarity fades, in standard deviations of the
            neighbours.
        position_weight: weight of nearness, against 1 for similarity.

    Returns, when called, maps of the size of refinement. They are differentiable in the maps.
    """

    steps: int = 10
    scale: float = 1.0
    size: tuple[int, int] | None = None
    dilations: tuple[int, ...] = DILATIONS
    colour_width: float = 0.3
    position_weight: float = 0.01

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        check_dilations(self.steps, self.dilations, self.colour_width, self.position_weight)
        check_positive("scale", self.scale)
        if self.size is not None and self.scale != 1.0:
            raise ValueError(f"give `scale` or `size`, got {self.scale} and {self.size}")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"`size` must be at least 1x1, got {self.size[0]}x{self.size[1]}")

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        dtype = torch.promote_types(cam.dtype, torch.float32)  # rounded once, at the end
        rgb = picture_of(capture, "PixelAdaptive", cam).to(cam.device, dtype)
        check_finite("cam", cam)
        size = self.size or scaled_size(rgb, self.scale)
        refined = adapt_to_colours(
            resize_cam(cam.to(dtype), size),
            rgb if size == (rgb.shape[-2], rgb.shape[-1]) else resize_cam(rgb, size),
            steps=self.steps,
            dilations=self.dilations,
            colour_width=self.colour_width,
            position_weight=self.position_weight,
        )
        return (refined / (1.0 + self.position_weight) ** self.steps).to(cam.dtype)
