"""Seed from attention alone, carried from the class token down through all blocks."""

from dataclasses import dataclass
from typing import ClassVar

from camkit.capture.record import Capture
from camkit.seed.protocol import check_classes, keep_asked
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class AttentionRolloutSeed:
    """Attention rollout; the same map for every class.

    The row of the class token in the product of all blocks' ``(1 - residual) * A + residual * I``,
    A being the attention averaged over heads (Abnar and Zuidema 2020). Only that row is carried, so
    no product of maps is made. A host without class token starts from the mean of its patches,
    which is ours. Watch all blocks for the published method.

    Attributes:
        residual: share of the residual connection; the paper's is one half.
    """

    residual: float = 0.5

    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.residual <= 1.0:
            raise ValueError(f"`residual` must lie in [0, 1], got {self.residual}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, None)
        starts = list(capture.anatomy.class_tokens) or capture.patches
        attention = capture.blocks[-1]
        relevance = attention.rows([0]).new_zeros(capture.images, 1, attention.shape[2]).detach()
        relevance[..., starts] = 1.0 / len(starts)
        for block in reversed(capture.blocks):
            carried = relevance @ block.head_mean().detach().to(relevance)
            relevance = self.residual * relevance + (1 - self.residual) * carried
        maps = relevance[..., capture.patches].expand(-1, classes.shape[1], -1)
        return keep_asked(capture.grid.fold(maps), classes)
