"""Class maps that follow the colours of the picture, by local averages."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.errors import CaptureError
from camkit.ops.pixel_adaptive import DILATIONS, adapt_to_colours, check_settings
from camkit.ops.resampling import resize_cam
from camkit.tensors import Cam


@dataclass(frozen=True)
class PixelAdaptive:
    """Average scores over neighbouring pixels of like colour, again and again: PAR.

    The pixel-adaptive refinement of AFA (Ru et al. 2022), which ToCo and its followers keep. The
    formula (`camkit.ops.pixel_adaptive`), its dilations, ``colour_width`` and ``position_weight``
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

    def __post_init__(self) -> None:
        check_settings(self.steps, self.dilations, self.colour_width, self.position_weight)
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
