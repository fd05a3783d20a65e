"""Class maps carried along attention, likeness and colour: propagation, hybrid, random walk."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.capture.record import NO_MODEL, Capture, WatchSpec
from camkit.errors import CaptureError
from camkit.ops.propagation import balance, check_share, component_boxes, random_walk
from camkit.ops.similarity import check_positive, colour_smooth, cosine_smooth
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
        balance: rounds of Sinkhorn normalisation of the affinity
            (`camkit.ops.propagation.balance`), as CLIP-ES does with 3. With 0 scores
            are streamed through fused attention; else one
            ``(b, n, n)`` affinity, heads and blocks averaged, lives for the length of the call.
        boxes: only scores within boxes around the parts of a map above this share of its maximum
            are spread (`camkit.ops.propagation`), as in CLIP-ES at 0.4. None spreads all.
    """

    steps: int = 1
    blocks: int | None = None
    mix: float = 1.0
    balance: int = 0
    boxes: float | None = None

    requires: ClassVar[WatchSpec] = NO_MODEL

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


@dataclass(frozen=True)
class HybridPropagate:
    """Average scores over the patches a patch attends to, looks like, and is coloured like.

    ``cam <- (A cam + weight * K G cam) / (1 + weight)``, the hybrid attention of DOEI
    (`camkit.edits.HybridAlignment`) between patches and applied to a map: A is the attention
    of the last
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

    requires: ClassVar[WatchSpec] = WatchSpec()

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
                "HybridPropagate looks at colours; watch with `rgb=`, or set `colour_width=None`"
            )
        size = (capture.grid.rows, capture.grid.cols)
        return F.adaptive_avg_pool2d(capture.rgb, size).flatten(2).mT


Affinity: TypeAlias = Float[Tensor, "b n n"]


@dataclass(frozen=True, eq=False)
class RandomWalk:
    """Walk scores over an affinity between patches: ``cam <- T^(2^logt) cam``.

    As PSA (Ahn and Kwak 2018) and IRN (Ahn et al. 2019) do with affinities that they learn: T is
    ``affinity ** beta``, its rows scaled to sum to one; there ``beta`` is 8 and 10, ``logt`` 6 and
    8, for affinities that are 1 between alike pixels and 0 across an edge. Attention is spread much
    wider, so the defaults here are ours. T is never squared: it is applied 2^logt times to the maps
    (`camkit.ops.propagation`), which keeps their range.

    Attributes:
        beta: larger values let only the strongest affinities count.
        logt: logarithm, to the base of 2, of the number of steps.
        affinity: ``(b, n, n)``, or a function that takes it from the capture; n is the number of
            scores in a map, row by row, here of any size. None is the attention between patches,
            heads and blocks averaged.
        blocks: use only the last n captured blocks; None uses all. For attention.
        balance: rounds of Sinkhorn normalisation of the attention
            (`camkit.ops.propagation.balance`); 0 takes it as it is.
        boxes: only scores within boxes around the parts of a map above this share of its maximum
            set out (`camkit.ops.propagation`), as in CLIP-ES at 0.4. None lets all.
    """

    beta: float = 1.0
    logt: int = 1
    affinity: Tensor | Callable[[Capture], Tensor] | None = None
    blocks: int | None = 6
    balance: int = 3
    boxes: float | None = None

    requires: ClassVar[WatchSpec] = WatchSpec()

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
