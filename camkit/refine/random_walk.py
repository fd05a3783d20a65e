"""Class scores carried over the patches by a random walk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.ops.affinity import balance
from camkit.ops.boxes import check_share, component_boxes
from camkit.ops.random_walk import random_walk
from camkit.ops.similarity import check_positive
from camkit.refine.propagate import attention_between_patches
from camkit.tensors import Cam

Affinity: TypeAlias = Float[Tensor, "b n n"]


@dataclass(frozen=True, eq=False)
class RandomWalk:
    """Walk scores over an affinity between patches: ``cam <- T^(2^logt) cam``.

    As PSA (Ahn and Kwak 2018) and IRN (Ahn et al. 2019) do with affinities that they learn: T is
    ``affinity ** beta``, its rows scaled to sum to one; there ``beta`` is 8 and 10, ``logt`` 6 and
    8, for affinities that are 1 between alike pixels and 0 across an edge. Attention is spread much
    wider, so the defaults here are ours. T is never squared: it is applied 2^logt times to the maps
    (`camkit.ops.random_walk`), which keeps their range.

    Attributes:
        beta: larger values let only the strongest affinities count.
        logt: logarithm, to the base of 2, of the number of steps.
        affinity: ``(b, n, n)``, or a function that takes it from the capture; n is the number of
            scores in a map, row by row, here of any size. None is the attention between patches,
            heads and blocks averaged.
        blocks: use only the last n captured blocks; None uses all. For attention.
        balance: rounds of Sinkhorn normalisation of the attention (`camkit.ops.affinity.balance`);
            0 takes it as it is.
        boxes: only scores within boxes around the parts of a map above this share of its maximum
            set out (`camkit.ops.boxes`), as in CLIP-ES at 0.4. None lets all.
    """

    beta: float = 1.0
    logt: int = 1
    affinity: Tensor | Callable[[Capture], Tensor] | None = None
    blocks: int | None = 6
    balance: int = 3
    boxes: float | None = None

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if not 0 <= self.logt <= 20:
            raise ValueError(f"`logt` must lie in [0, 20], got {self.logt}: 2^logt steps are taken")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, got {self.blocks}")
        if self.balance < 0:
            raise ValueError(f"`balance` must be at least 0, got {self.balance}")
        if self.boxes is not None:
            check_share(self.boxes)

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        if self.boxes is not None:
            cam = cam * component_boxes(cam, self.boxes)
        affinity = self._affinity(capture).to(cam.device)
        scores = cam.flatten(-2) if self.affinity is not None else capture.grid.flatten(cam)
        walked = random_walk(scores, affinity, beta=self.beta, steps=2**self.logt)
        return walked.view_as(cam)

    def _affinity(self, capture: Capture) -> Affinity:
        if callable(self.affinity):
            return self.affinity(capture)
        if self.affinity is not None:
            return self.affinity
        attention = attention_between_patches(capture, self.blocks)
        return balance(attention, rounds=self.balance) if self.balance else attention
