"""Class maps carried along attention, likeness of embeddings and likeness of colours at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.errors import CaptureError
from camkit.ops.similarity import check_positive, colour_smooth, cosine_smooth
from camkit.refine.propagate import Propagate, Spread
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
        check_positive("temperature", self.temperature)
        if self.colour_width is not None:
            check_positive("colour_width", self.colour_width)
        self._attention()

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        attend = self._attention().operator(capture)
        resemble = self._cues(capture) if self.weight > 0 else None
        scores = capture.grid.flatten(cam)
        for _ in range(self.steps):
            joined = attend(scores)
            if resemble is not None:
                joined = torch.lerp(joined, resemble(scores), self.weight / (1.0 + self.weight))
            scores = joined
        return capture.grid.fold(scores)

    def _attention(self) -> Propagate:
        return Propagate(steps=1, blocks=self.blocks, balance=self.balance)

    def _cues(self, capture: Capture) -> Callable[[Spread], Spread]:
        """One step along likeness of embeddings, and of colours where they count."""
        embeddings, colours = capture.patch_embeddings(), self._colours(capture)

        def resemble(scores: Spread) -> Spread:
            values = scores.mT
            values = cosine_smooth(
                embeddings.to(values.dtype), values, temperature=self.temperature
            )
            if colours is not None and self.colour_width is not None:
                values = colour_smooth(colours.to(values), values, width=self.colour_width)
            return values.mT

        return resemble

    def _colours(self, capture: Capture) -> Float[Tensor, "b n 3"] | None:
        if self.colour_width is None:
            return None
        if capture.rgb is None:
            raise CaptureError(
                "HybridAlign looks at colours; watch with `rgb=`, or set `colour_width=None`"
            )
        size = (capture.grid.rows, capture.grid.cols)
        return F.adaptive_avg_pool2d(capture.rgb, size).flatten(2).mT
