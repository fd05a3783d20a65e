"""Spread class scores along the attention between patches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.capture.record import Capture
from camkit.ops.affinity import balance
from camkit.ops.boxes import check_share, component_boxes
from camkit.tensors import Cam

Spread: TypeAlias = Float[Tensor, "b k n"]


@dataclass(frozen=True)
class Propagate:
    """Spread scores along the patch-to-patch attention of the captured blocks.

    Each step replaces a patch's score by the average over the patches it attends to, heads and
    blocks averaged, as MCTformer and TransCAM do with their summed maps; that rows are scaled to
    sum to one is our choice, it keeps scores within the range of the incoming map.

    Attributes:
        steps: how many times the scores are spread.
        blocks: use only the last n captured blocks; None uses all.
        mix: share of the spread scores in the result; the rest is the incoming map.
        balance: rounds of Sinkhorn normalisation of the affinity (`camkit.ops.affinity.balance`),
            as CLIP-ES does with 3. With 0 scores are streamed through fused attention; else one
            ``(b, n, n)`` affinity, heads and blocks averaged, lives for the length of the call.
        boxes: only scores within boxes around the parts of a map above this share of its maximum
            are spread (`camkit.ops.boxes`), as in CLIP-ES at 0.4. None spreads all.
    """

    steps: int = 1
    blocks: int | None = None
    mix: float = 1.0
    balance: int = 0
    boxes: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, got {self.blocks}")
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"`mix` must lie in [0, 1], got {self.mix}")
        if self.balance < 0:
            raise ValueError(f"`balance` must be at least 0, got {self.balance}")
        if self.boxes is not None:
            check_share(self.boxes)

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        spread = self.operator(capture)
        if self.boxes is not None:
            cam = cam * component_boxes(cam, self.boxes)
        scores = capture.grid.flatten(cam)
        for _ in range(self.steps):
            scores = torch.lerp(scores, spread(scores), self.mix)
        return capture.grid.fold(scores)

    def operator(self, capture: Capture) -> Callable[[Spread], Spread]:
        """One step of spreading, ready to be taken as often as wanted."""
        if self.balance:
            affinity = balance(attention_between_patches(capture, self.blocks), rounds=self.balance)
            return lambda scores: scores @ affinity.to(scores.dtype).mT
        blocks = last_blocks(capture, self.blocks)
        patches = capture.patches
        return lambda scores: torch.stack([b.propagate(scores, patches) for b in blocks]).mean(0)


def attention_between_patches(capture: Capture, blocks: int | None) -> Float[Tensor, "b n n"]:
    """Attention of patches to patches, summed over the last blocks and averaged over heads.

    Args:
        capture: what was watched.
        blocks: use only the last n captured blocks; None uses all.
    """
    first, *others = last_blocks(capture, blocks)
    patches = capture.patches
    total = first.head_mean()[:, patches][:, :, patches]
    for block in others:
        total = total + block.head_mean()[:, patches][:, :, patches]
    return total


def last_blocks(capture: Capture, blocks: int | None) -> tuple[Attention, ...]:
    """The last n captured blocks, or all."""
    return capture.blocks if blocks is None else capture.blocks[-blocks:]
