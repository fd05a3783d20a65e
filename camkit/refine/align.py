"""Class maps carried along attention, likeness of embeddings and likeness of colours at once."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from camkit.capture.record import Capture
from camkit.errors import CaptureError
from camkit.ops.similarity import colour_smooth, cosine_smooth
from camkit.refine.propagate import Propagate
from camkit.tensors import Cam


@dataclass(frozen=True)
class HybridAlign:
    """Average scores over the patches a patch attends to, looks like, and is coloured like.

    ``cam <- (A cam + weight * K G cam) / (1 + weight)``, the hybrid attention of DOEI
    (`camkit.HybridAlignment`) between patches and applied to a map: A is the attention of the last
    blocks, G the row-softmax of the cosines between patch embeddings, K that of the likeness of
    their mean colours. The map of pairs is not held, except for A where ``balance`` asks for it.
    Applying it to a map is our choice, after the propagation of MCTformer and CLIP-ES.

    Attributes:
        steps: how often.
        weight: of the cues beside attention, at least 0.
        temperature: divides the cosines.
        colour_width: distance in RGB, in [0, 1], at which likeness fades; None leaves colours out.
        blocks: how many of the last watched blocks make A; None is all.
        balance: Sinkhorn rounds on A (`camkit.Propagate`); 0 takes it as it is.
    """

    steps: int = 1
    weight: float = 0.5
    temperature: float = 0.1
    colour_width: float | None = 0.15
    blocks: int | None = 6
    balance: int = 3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}")
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"`weight` must be at least 0 and finite, got {self.weight}")
        for name in ("temperature", "colour_width"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}")
        self._attention()

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        attention = self._attention()
        for _ in range(self.steps):
            joined = attention(cam, capture)
            if self.weight > 0:
                cues = self._cues(cam, capture)
                joined = torch.lerp(joined, cues, self.weight / (1.0 + self.weight))
            cam = joined
        return cam

    def _attention(self) -> Propagate:
        return Propagate(steps=1, blocks=self.blocks, balance=self.balance)

    def _cues(self, cam: Cam, capture: Capture) -> Cam:
        scores = capture.grid.flatten(cam).mT
        scores = cosine_smooth(
            capture.patch_embeddings().to(scores.dtype), scores, temperature=self.temperature
        )
        if self.colour_width is not None:
            if capture.rgb is None:
                raise CaptureError(
                    "HybridAlign looks at colours; watch with `rgb=`, or set `colour_width=None`"
                )
            size = (capture.grid.rows, capture.grid.cols)
            colours = F.adaptive_avg_pool2d(capture.rgb.to(scores), size).flatten(2).mT
            scores = colour_smooth(colours, scores, width=self.colour_width)
        return capture.grid.fold(scores.mT)
