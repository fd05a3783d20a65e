"""Refiners that spread scores between patches: along attention, similarity, or any affinity."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import sum_of_head_means
from camkit.capture.record import NO_PATCH_TOKENS, Capture, WatchSpec
from camkit.errors import CaptureError
from camkit.ops.attention import take
from camkit.ops.finite import check_finite
from camkit.ops.propagation import BoxRule, balance, check_boxes, component_boxes, random_walk
from camkit.ops.similarity import check_positive, colour_smooth, cosine_smooth
from camkit.seeds.protocol import HeadWeights, read_head_weights, required_by_weights
from camkit.tensors import Cam

Spread: TypeAlias = Float[Tensor, "b k n"]


_KEPT: "WeakKeyDictionary[Capture, dict[tuple[object, ...], Tensor]]" = WeakKeyDictionary()


def _weighted_maps(
    capture: Capture, blocks: int | None, head_weights: HeadWeights
) -> Iterator[Float[Tensor, "b n n"]]:
    """Yield each block's patch-to-patch attention, averaged over weighted heads."""
    patches, used = capture.patches, slice(-(blocks or 0), None)
    weights = read_head_weights(head_weights, capture, capture.blocks).unbind(1)
    for block, weight in zip(capture.blocks[used], weights[used], strict=True):
        rows = take(block.rows(patches), patches, 3)
        yield (rows * weight[:, :, None, None].to(rows)).mean(1)


def _patch_attention(
    capture: Capture,
    blocks: int | None,
    balance_rounds: int,
    head_weights: HeadWeights | None = None,
) -> Float[Tensor, "b n n"]:
    """Return patch-to-patch attention, averaged over heads, summed over blocks, balanced.

    It is kept with the capture unless it has a graph: several refiners may read it.
    """
    kept = _KEPT.setdefault(capture, {}) if head_weights is None else {}
    key = (blocks, balance_rounds, torch.is_grad_enabled())
    if key in kept:
        return kept[key]
    if head_weights is None:
        total = sum_of_head_means(capture.blocks[-(blocks or 0) :], capture.patches)
    else:
        total = reduce(torch.add, _weighted_maps(capture, blocks, head_weights))
    total = balance(total, rounds=balance_rounds) if balance_rounds else total
    if not total.requires_grad and not total.is_inference():
        kept[key] = total
    return total


def _attention_step(
    capture: Capture,
    blocks: int | None,
    balance_rounds: int,
    scale_rows: bool = True,
    head_weights: HeadWeights | None = None,
) -> Callable[[Spread], Spread]:
    """Return a function that averages scores over the patches that each patch attends to."""
    used = capture.blocks[-(blocks or 0) :]
    if not balance_rounds and scale_rows:
        if head_weights is None:
            patches = capture.patches
            return lambda scores: torch.stack([b.propagate(scores, patches) for b in used]).mean(0)
        maps = _weighted_maps(capture, blocks, head_weights)
        affinity = reduce(torch.add, (m / m.sum(-1, keepdim=True) for m in maps))
    else:
        affinity = _patch_attention(capture, blocks, balance_rounds, head_weights)
    count = 1 if balance_rounds else len(used)
    return lambda scores: scores @ affinity.to(scores.dtype).mT / count


def _check_attention(blocks: int | None, balance_rounds: int) -> None:
    if blocks is not None and blocks < 1:
        raise ValueError(f"`blocks` must be at least 1, got {blocks}")
    if balance_rounds < 0:
        raise ValueError(f"`balance` must be at least 0, got {balance_rounds}")


@dataclass(frozen=True)
class Propagate:
    """Spread scores along the patch-to-patch attention of the captured blocks.

    Each step replaces a patch's score by the average over the patches it attends to, heads and
    blocks averaged, as in MCTformer and TransCAM. Scaling rows to sum to one is our choice; it
    keeps scores within the range of the incoming map.

    Attributes:
        steps: number of steps.
        blocks: use only the last n captured blocks; None uses all.
        mix: share of the spread scores in the result; the rest is the incoming map.
        balance: rounds of Sinkhorn normalisation of the attention
            (`camkit.ops.propagation.balance`), which needs a ``(b, n, n)`` map; CLIP-ES uses 3.
            With 0, scores are streamed through fused attention.
        boxes: spread only scores within boxes around the parts of a map above this share of its
            maximum (`camkit.ops.propagation`); CLIP-ES uses 0.4. None spreads all scores.
        box_rule: "whole", or "clip-es" for boxes with the extents and the rounding of the code of
            CLIP-ES and ExCEL (`camkit.ops.propagation.component_boxes`).
        scale_rows: scale rows to sum to one. False takes attention as it is: a patch loses what it
            attends to in class and register tokens, as in MCTformer, TransCAM and WeakTr. The first
            two add up the blocks, which differs from our mean by a factor only.
        head_weights: as in `camkit.seeds.ClassAttentionSeed`; WeakTr spreads with the same weights.
            Needs a ``(b, n, n)`` map, and each head of one block at a time.
    """

    steps: int = 1
    blocks: int | None = None
    mix: float = 1.0
    balance: int = 0
    boxes: float | None = None
    box_rule: BoxRule = "whole"
    scale_rows: bool = True
    head_weights: HeadWeights | None = None

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return NO_PATCH_TOKENS | required_by_weights(self.head_weights)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}")
        _check_attention(self.blocks, self.balance)
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"`mix` must lie in [0, 1], got {self.mix}")
        check_boxes(self.boxes, self.box_rule)
        if self.balance and not self.scale_rows:
            raise ValueError(
                "`balance` scales the rows, so it excludes `scale_rows=False`; set one of the two"
            )

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        check_finite("cam", cam)
        scale, weights = self.scale_rows, self.head_weights
        step = _attention_step(capture, self.blocks, self.balance, scale, weights)
        if self.boxes is not None:
            cam = cam * component_boxes(cam, self.boxes, rule=self.box_rule)
        scores = capture.grid.flatten(cam)
        for _ in range(self.steps):
            scores = torch.lerp(scores, step(scores), self.mix)
        return capture.grid.fold(scores)


@dataclass(frozen=True)
class HybridPropagate:
    """Average scores over the patches that a patch attends to, resembles, and shares colours with.

    ``cam <- (A cam + weight * K G cam) / (1 + weight)``: the hybrid attention of DOEI
    (`camkit.edits.HybridAlignment`) between patches, applied to a map. A is the attention of the
    last blocks, G the row-softmax of the cosines between patch embeddings, K that of the similarity
    of their mean colours. Applying it to a map is our choice, after the propagation of MCTformer
    and CLIP-ES.

    Attributes:
        steps: number of steps.
        weight: of similarity, against 1 for attention; at least 0.
        temperature: divides the cosines.
        colour_width: difference in RGB, in [0, 1], at which similarity fades; None ignores colours.
        blocks: use the attention of the last n captured blocks; None uses all.
        balance: as in `camkit.Propagate`.
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
        _check_attention(self.blocks, self.balance)

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        check_finite("cam", cam)
        attend = _attention_step(capture, self.blocks, self.balance)
        smooth = self._similarity_step(capture) if self.weight > 0 else None
        scores = capture.grid.flatten(cam)
        for _ in range(self.steps):
            spread = attend(scores)
            if smooth is not None:
                spread = torch.lerp(spread, smooth(scores), self.weight / (1.0 + self.weight))
            scores = spread
        return capture.grid.fold(scores)

    def _similarity_step(self, capture: Capture) -> Callable[[Spread], Spread]:
        """Return a function that averages scores by similarity of embeddings, then of colours."""
        embeddings = capture.patch_embeddings()
        colours = None
        if self.colour_width is not None:
            if capture.rgb is None:
                raise CaptureError(
                    "HybridPropagate compares colours; watch with `rgb=`, or set "
                    "`colour_width=None`"
                )
            size = (capture.grid.rows, capture.grid.cols)
            colours = F.adaptive_avg_pool2d(capture.rgb, size).flatten(2).mT

        def smooth(scores: Spread) -> Spread:
            keys = embeddings.to(scores.dtype)
            values = cosine_smooth(keys, scores.mT, temperature=self.temperature)
            if colours is not None and self.colour_width is not None:
                values = colour_smooth(colours.to(values), values, width=self.colour_width)
            return values.mT

        return smooth


@dataclass(frozen=True, eq=False)
class RandomWalk:
    """Walk scores over an affinity between patches: ``cam <- T^(2^logt) cam``.

    As in PSA (Ahn and Kwak 2018) and IRN (Ahn et al. 2019), with their learned affinities: T is
    ``affinity ** beta`` with rows scaled to sum to one. Their ``beta`` is 8 and 10, their ``logt``
    6 and 8, for affinities that are 1 between similar pixels and 0 across an edge. Attention is
    spread much wider, so the defaults here are ours. T is not squared but applied 2^logt times,
    which keeps the range of the maps.

    Attributes:
        beta: exponent of the affinity; larger values keep only the strongest affinities.
        logt: base-2 logarithm of the number of steps.
        affinity: ``(b, n, n)``, or a function that returns it for a capture; n is the number of
            scores in a map of any size, row by row. None is the attention between patches, heads
            and blocks averaged.
        blocks: use the attention of the last n captured blocks; None uses all.
        balance: as in `camkit.Propagate`.
        boxes: as in `camkit.Propagate`.
        box_rule: as in `camkit.Propagate`.
    """

    beta: float = 1.0
    logt: int = 1
    affinity: Tensor | Callable[[Capture], Tensor] | None = None
    blocks: int | None = 6
    balance: int = 3
    boxes: float | None = None
    box_rule: BoxRule = "whole"

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if not 0 <= self.logt <= 20:
            raise ValueError(f"`logt` must lie in [0, 20], got {self.logt}: 2^logt steps are taken")
        _check_attention(self.blocks, self.balance)
        check_boxes(self.boxes, self.box_rule)

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        check_finite("cam", cam)
        if self.boxes is not None:
            cam = cam * component_boxes(cam, self.boxes, rule=self.box_rule)
        if self.affinity is None:
            affinity = _patch_attention(capture, self.blocks, self.balance)
            scores = capture.grid.flatten(cam)
        else:
            affinity = self.affinity(capture) if callable(self.affinity) else self.affinity
            scores = cam.flatten(-2)
        affinity = affinity.to(cam.device)
        walked = random_walk(scores, affinity, beta=self.beta, steps=2**self.logt)
        return walked.view_as(cam)
