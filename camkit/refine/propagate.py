"""Spread class scores along the attention between patches."""

from dataclasses import dataclass

import torch

from camkit.capture.record import Capture
from camkit.tensors import Cam


@dataclass(frozen=True)
class Propagate:
    """Spread scores along the patch-to-patch attention of the captured blocks.

    Each step replaces a patch's score by the average over the patches it attends to, heads and
    blocks averaged, as MCTformer and TransCAM do with their summed maps; rows scaled to sum to one
    are our choice, they keep scores within the range of the incoming map. No token-by-token map is
    built.

    Attributes:
        steps: how many times the scores are spread.
        blocks: use only the last n captured blocks; None uses all.
        mix: share of the spread scores in the result; the rest is the incoming map.
    """

    steps: int = 1
    blocks: int | None = None
    mix: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, got {self.blocks}")
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"`mix` must lie in [0, 1], got {self.mix}")

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        blocks = capture.blocks if self.blocks is None else capture.blocks[-self.blocks :]
        patches = capture.patches
        scores = capture.grid.flatten(cam)
        for _ in range(self.steps):
            spread = torch.stack([block.propagate(scores, patches) for block in blocks]).mean(0)
            scores = torch.lerp(scores, spread, self.mix)
        return capture.grid.fold(scores)
