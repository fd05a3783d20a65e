"""Class maps that follow the edges of the picture: guided filter, fast global smoothing, PAR."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import NO_MODEL, Capture, WatchSpec
from camkit.errors import CamkitError, CaptureError
from camkit.ops.edge_aware import (
    DILATIONS,
    adapt_to_colours,
    check_dilations,
    check_guided_settings,
    guided_upsample,
)
from camkit.ops.images import resize_cam
from camkit.ops.similarity import check_positive
from camkit.refiners.protocol import check_finite, picture_bytes, picture_of, scaled_size
from camkit.tensors import Cam


@dataclass(frozen=True)
class GuidedFilter:
    """Make maps, in every window, a linear function of the colours: He et al. 2013.

    The formula (`camkit.ops.edge_aware`) is the paper's; with ``scale`` below 1 the functions are
    found on a reduced picture, as in the fast guided filter (He and Sun 2015). Ours: the
    defaults, chosen
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

    requires: ClassVar[WatchSpec] = NO_MODEL

    def __post_init__(self) -> None:
        check_guided_settings(self.radius, self.eps)
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


_MOST_MAPS = 4  # that OpenCV filters in one call
_MOST_SMOOTHNESS = 1e5  # single precision loses the third digit beyond it


@dataclass(frozen=True)
class FastGlobalSmooth:
    """Smooth each map as a whole, less across edges of colour: Min et al. 2014.

    The map sought differs little from the given one, and little between neighbouring pixels of like
    colour: a weighted least squares problem, solved along rows and columns in turn, three times.
    Every result is an average of scores, so maps keep their range. By far the fastest refiner here
    that looks at the picture. Runs in OpenCV, one image at a time on the CPU, in float32; not
    differentiable.

    Attributes:
        smoothness: weight of likeness between neighbours against likeness to the given map; the
            paper's lambda. At most 1e5, where single precision has lost all but three digits.
        colour_width: distance in RGB, in [0, 1], at which likeness of neighbours fades; the paper's
            sigma over 255.

    Returns, when called, maps of the picture's size.
    """

    smoothness: float = 1000.0
    colour_width: float = 0.02

    requires: ClassVar[WatchSpec] = NO_MODEL

    def __post_init__(self) -> None:
        if not 0.0 < self.smoothness <= _MOST_SMOOTHNESS:
            raise ValueError(
                f"`smoothness` must lie in (0, {_MOST_SMOOTHNESS:g}], got {self.smoothness}"
            )
        check_positive("colour_width", self.colour_width)

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        rgb = picture_of(capture, "FastGlobalSmooth")
        check_finite(cam)
        library = _ximgproc()
        maps = resize_cam(cam.detach().float(), (rgb.shape[-2], rgb.shape[-1]))
        smooth = torch.empty_like(maps, device="cpu")
        for image, colours in enumerate(picture_bytes(rgb)):
            smoother = library.createFastGlobalSmootherFilter(
                colours, self.smoothness, 255.0 * self.colour_width
            )
            for first in range(0, maps.shape[1], _MOST_MAPS):
                planes = maps[image, first : first + _MOST_MAPS].cpu().numpy()
                found = smoother.filter(np.ascontiguousarray(planes.transpose(1, 2, 0)))
                found = found.reshape(*found.shape[:2], -1).transpose(2, 0, 1)
                smooth[image, first : first + _MOST_MAPS] = torch.from_numpy(found)
        return smooth.to(cam)


def _ximgproc() -> Any:
    library = getattr(cv2, "ximgproc", None)
    if not hasattr(library, "createFastGlobalSmootherFilter"):
        raise CamkitError(
            "FastGlobalSmooth needs the extra modules of OpenCV, which this build lacks; "
            "uninstall every other opencv package, then "
            "`pip install opencv-contrib-python-headless`"
        )
    return library


@dataclass(frozen=True)
class PixelAdaptive:
    """Average scores over neighbouring pixels of like colour, again and again: PAR.

    The pixel-adaptive refinement of AFA (Ru et al. 2022), which ToCo and its followers keep. The
    formula (`camkit.ops.edge_aware`), its dilations, ``colour_width`` and ``position_weight``
    are AFA's, and so are 10 steps (15 on COCO there). ToCo refines at half size: ``scale=0.5``.

    Ours: both are resized by `camkit.resize_cam`, where AFA aligns corners; and maps are divided by
    ``(1 + position_weight) ** steps``, by which the formula makes them larger, so that scores keep
    their range and can meet a fixed background score. Where background and classes are compared
    after the same refinement, as in the papers, this changes nothing.

    ``rgb`` must be the colours in [0, 1]. Some repositories feed the normalised picture; that is
    harmless, as the formula takes out each channel's shift and scale. A picture cast to bytes while
    it is normalised is not: values wrap around, and edges appear that are not there.

    Attributes:
        steps: how often.
        scale: the picture is refined at this share of its size, 0.5 being about four times faster.
        size: rows and columns to refine at instead, for pictures of any size.
        dilations: distances of the neighbours, in pixels of the size refined at.
        colour_width: difference in colour at which likeness fades, in standard deviations of the
            neighbours.
        position_weight: of nearness beside likeness.

    Returns, when called, maps of the size refined at. They are differentiable in the maps.
    """

    steps: int = 10
    scale: float = 1.0
    size: tuple[int, int] | None = None
    dilations: tuple[int, ...] = DILATIONS
    colour_width: float = 0.3
    position_weight: float = 0.01

    requires: ClassVar[WatchSpec] = NO_MODEL

    def __post_init__(self) -> None:
        check_dilations(self.steps, self.dilations, self.colour_width, self.position_weight)
        if not 0.0 < self.scale < math.inf:
            raise ValueError(f"`scale` must be positive and finite, got {self.scale}")
        if self.size is not None and self.scale != 1.0:
            raise ValueError(f"give `scale` or `size`, got {self.scale} and {self.size}")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"`size` must be at least 1x1, got {self.size[0]}x{self.size[1]}")

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        if capture.rgb is None:
            raise CaptureError("PixelAdaptive needs the picture; watch with `rgb=photo.rgb`")
        rows, cols = capture.rgb.shape[-2:]
        size = self.size or (max(1, round(rows * self.scale)), max(1, round(cols * self.scale)))
        dtype = torch.promote_types(cam.dtype, torch.float32)  # rounded once, at the end
        rgb = capture.rgb.detach().to(cam.device, dtype)
        refined = adapt_to_colours(
            resize_cam(cam.to(dtype), size),
            rgb if size == (rows, cols) else resize_cam(rgb, size),
            steps=self.steps,
            dilations=self.dilations,
            colour_width=self.colour_width,
            position_weight=self.position_weight,
        )
        return (refined / (1.0 + self.position_weight) ** self.steps).to(cam.dtype)
