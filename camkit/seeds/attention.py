"""Seeds from attention: class rows, rollout, gradients, and relevance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.capture.record import Capture, WatchSpec
from camkit.seeds.protocol import (
    HeadWeights,
    check_classes,
    class_score,
    fold_maps,
    read_head_weights,
    required_by_weights,
    score_gradients,
)
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class ClassAttentionSeed:
    """Class-to-patch attention, averaged over heads and watched blocks.

    A model with one class token per class (MCTformer) has a row for each class. A model with a
    single class token gives every class the same map.

    Attributes:
        head_weights: weighs the heads of each block (`camkit.seeds.HeadWeights`), in place of a
            plain mean: the mean of weight times attention, as in WeakTr (Zhu et al. 2023), whose
            weights a network of its own derives from the image.
        blocks: average over the last n watched blocks; None takes all.
    """

    head_weights: HeadWeights | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, or None for all, got {self.blocks}")

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec() | required_by_weights(self.head_weights)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        rows = self._rows(capture).detach()
        known = None if rows.shape[1] == 1 else rows.shape[1]  # a single token serves any class
        if known is not None and capture.vocabulary is not None:
            known = len(capture.vocabulary)
        check_classes(classes, len(rows), known)
        shares = [capture.class_token_shares(column).to(rows) for column in classes.unbind(1)]
        maps = torch.einsum("bkc,bcn->bkn", torch.stack(shares, 1), rows)
        return fold_maps(capture, maps, classes)

    def _rows(self, capture: Capture) -> Float[Tensor, "b c n"]:
        if self.head_weights is None:
            return capture.class_to_patch(self.blocks)
        used = slice(-(self.blocks or 0), None)
        calls = capture.class_calls()
        weights = read_head_weights(self.head_weights, capture, [c.attention for c in calls])
        rows = []
        for call, weight in zip(calls[used], weights.unbind(1)[used], strict=True):
            row = call.attention.rows(call.queries)[..., call.patches]
            rows.append((row * weight[:, :, None, None].to(row)).mean(1))
        return torch.stack(rows).mean(0)


@dataclass(frozen=True)
class AttentionRolloutSeed:
    """Attention rollout; the same map for every class.

    The row of the class token in the product of all blocks' ``(1 - residual) * A + residual * I``,
    where A is the attention averaged over heads (Abnar and Zuidema 2020). Ours: a model without a
    class token starts from the mean of its patches. Watch all blocks for the published method.

    Attributes:
        residual: share of the residual connection; the paper's is one half.
    """

    residual: float = 0.5

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        if not 0.0 <= self.residual <= 1.0:
            raise ValueError(f"`residual` must lie in [0, 1], got {self.residual}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        attention = capture.blocks[-1]
        images, _, tokens, _ = attention.shape
        check_classes(classes, images, None)
        patches = capture.patches
        starts = list(capture.anatomy.class_tokens) or patches
        # only the row of the class token is carried, so maps are never multiplied with maps
        relevance = attention.rows([0]).new_zeros(images, 1, tokens).detach()
        relevance[..., starts] = 1.0 / len(starts)
        for block in reversed(capture.blocks):
            carried = relevance @ block.head_mean().detach().to(relevance)
            relevance = self.residual * relevance + (1 - self.residual) * carried
        return fold_maps(capture, relevance[..., patches].expand(*classes.shape, -1), classes)


def class_gradients(
    capture: Capture, column: Int[Tensor, " b"], calls: Sequence[Attention]
) -> tuple[Tensor, ...]:
    """Differentiate one class score per image with respect to attention calls of the capture.

    The gradient is zero where ``column`` is -1. Parameters get no gradient.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        watched = [call.watched() for call in calls]
        total = class_score(capture.scores, column)
        return score_gradients(total, watched)


@dataclass(frozen=True)
class GradientSeed:
    """Class-to-patch attention times its gradient, averaged over heads and watched blocks.

    A class with its own token (MCTformer) is read from that token's rows alone. Negative products
    count as zero. Source: grad-weighted attention of Chefer et al. 2021. The mean over blocks is
    our choice.
    """

    requires: ClassVar[WatchSpec] = WatchSpec(gradients=True)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        scores = capture.scores
        check_classes(classes, len(scores), scores.shape[-1])
        calls = capture.class_calls()
        rows = [call.attention.rows(call.queries).detach() for call in calls]
        maps = []
        for column in classes.unbind(1):
            gradients = class_gradients(capture, column, [call.attention for call in calls])
            shares = capture.class_token_shares(column)
            weighted = []
            for row, call, gradient in zip(rows, calls, gradients, strict=True):
                product = row * call.attention.gradient_rows(gradient, call.queries)
                evidence = product[..., call.patches].clamp_min(0.0).mean(1)
                weighted.append((evidence * shares[:, :, None].to(evidence)).sum(1))
            maps.append(torch.stack(weighted).mean(0))
        return fold_maps(capture, torch.stack(maps, 1).detach(), classes)


@dataclass(frozen=True)
class RelevanceSeed:
    """Class relevance carried from the class token down through all watched blocks.

    Each block adds ``relevance @ mean over heads of relu(A * dA)`` to the relevance above it, where
    dA is the gradient of the class score (Chefer et al. 2021). Ours: where single queries pool the
    patches (SigLIP, CaiT), relevance starts from the patches these attend to; a model with neither
    class token nor pooling query starts from the mean of its patches. Watch all blocks for the
    published method.
    """

    requires: ClassVar[WatchSpec] = WatchSpec(gradients=True)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        scores = capture.scores
        check_classes(classes, len(scores), scores.shape[-1])
        class_tokens, patches = list(capture.anatomy.class_tokens), capture.patches
        pooling = () if class_tokens else capture.pooling
        calls = [call.attention for call in pooling] + list(capture.blocks)
        maps = []
        for column in classes.unbind(1):
            gradients = class_gradients(capture, column, calls)
            start = scores.new_zeros(len(scores), capture.blocks[0].shape[2]).detach()
            for call, gradient in zip(pooling, gradients, strict=False):  # blocks come behind
                query = start.new_ones(len(scores), 1)
                start[:, patches] += call.attention.hop(query, gradient)[:, call.patches]
            if class_tokens:
                start[:, class_tokens] = capture.class_token_shares(column).to(start)
            elif not pooling:
                start[:, patches] = 1.0 / len(patches)
            relevance = start
            below = zip(capture.blocks, gradients[len(pooling) :], strict=True)
            for block, gradient in reversed(list(below)):
                relevance = relevance + block.hop(relevance, gradient)
            maps.append((relevance if pooling else relevance - start)[:, patches])
        return fold_maps(capture, torch.stack(maps, 1), classes)
