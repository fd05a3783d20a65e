"""Seeds from attention: class rows, rollout, gradients, and relevance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec
from camkit.seeds.protocol import check_classes, class_gradients, keep_asked
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class ClassAttentionSeed:
    """Class-to-patch attention, averaged over heads and watched blocks.

    A host with one class token per class (MCTformer) gives each class its own row; a host with a
    single one gives every class the same map, which then says where something is, not what.
    """

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        rows = capture.class_to_patch().detach()
        check_classes(capture, classes, _known(capture, rows.shape[1]))
        shares = [capture.class_token_shares(column).to(rows) for column in classes.unbind(1)]
        maps = torch.einsum("bkc,bcn->bkn", torch.stack(shares, 1), rows)
        return keep_asked(capture.grid.fold(maps), classes)


def _known(capture: Capture, tokens: int) -> int | None:
    """How many classes there are; any number will do for a host whose one token serves them all."""
    if tokens == 1:
        return None
    return tokens if capture.vocabulary is None else len(capture.vocabulary)


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

    requires: ClassVar[WatchSpec] = WatchSpec()

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


@dataclass(frozen=True)
class GradientSeed:
    """Class-to-patch attention times its gradient, averaged over heads and watched blocks.

    A class with a token of its own (MCTformer) is read from that token's rows alone. Negative
    products count as zero. The gradient of the attention map is computed from the gradient
    of the attention output, so no map exists and no parameter gradient is touched. Source:
    grad-weighted attention of Chefer et al. 2021; the mean over blocks is our choice.
    """

    requires: ClassVar[WatchSpec] = WatchSpec(gradients=True)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, capture.scores.shape[-1])
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
        return keep_asked(capture.grid.fold(torch.stack(maps, 1).detach()), classes)


@dataclass(frozen=True)
class RelevanceSeed:
    """Class relevance carried from the class token down through all watched blocks.

    Each block adds ``relevance @ mean over heads of relu(A * dA)`` to the relevance above it, where
    dA is the gradient of the class score (Chefer et al. 2021). Where single queries pool the
    patches (SigLIP, CaiT), relevance starts from what they weigh; a host with neither class token
    nor pooling query starts from the mean of its patches, which is our extension. Watch all blocks
    for the published method.
    """

    requires: ClassVar[WatchSpec] = WatchSpec(gradients=True)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, capture.scores.shape[-1])
        pooling = () if capture.anatomy.class_tokens else capture.pooling
        calls = [call.attention for call in pooling] + list(capture.blocks)
        maps = []
        for column in classes.unbind(1):
            gradients = class_gradients(capture, column, calls)
            start = _pooled(capture, gradients) if pooling else _origin(capture, column)
            relevance = start
            below = zip(capture.blocks, gradients[len(pooling) :], strict=True)
            for block, gradient in reversed(list(below)):
                relevance = relevance + block.hop(relevance, gradient)
            maps.append((relevance if pooling else relevance - start)[:, capture.patches])
        return keep_asked(capture.grid.fold(torch.stack(maps, 1)), classes)


def _origin(capture: Capture, column: Int[Tensor, " b"]) -> Float[Tensor, "b t"]:
    """Relevance of one, at the class tokens that speak for a class, or spread over the patches."""
    start = capture.scores.new_zeros(capture.images, capture.blocks[0].shape[2]).detach()
    tokens = list(capture.anatomy.class_tokens)
    if tokens:
        start[:, tokens] = capture.class_token_shares(column).to(start)
    else:
        start[:, capture.patches] = 1.0 / capture.grid.size
    return start


def _pooled(capture: Capture, gradients: Sequence[Tensor]) -> Float[Tensor, "b t"]:
    """Relevance that the pooling queries hand to the patches."""
    start = capture.scores.new_zeros(capture.images, capture.blocks[0].shape[2]).detach()
    query = start.new_ones(capture.images, 1)
    for call, gradient in zip(capture.pooling, gradients, strict=False):  # blocks come behind
        start[:, capture.patches] += call.attention.hop(query, gradient)[:, call.patches]
    return start
