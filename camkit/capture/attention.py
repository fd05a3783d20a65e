"""One attention call: computed from q and k if it was fused, else read from its map."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.errors import CaptureError
from camkit.ops.attention import (
    AttentionInputs,
    Bias,
    Heads,
    add_head_mean,
    attention_columns,
    attention_rows,
    head_mean,
    relevance_hop,
    rows_and_columns,
    take,
)
from camkit.ops.paired import PairBias
from camkit.ops.propagation import propagate
from camkit.ops.reweight import compiled_for
from camkit.ops.reweight_plain import at_least_float32
from camkit.printing import short_repr


def key_bias(log_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log-weights as an additive mask, in the queries' type: cuDNN misreads any other."""
    per_head = log_weights if log_weights.dim() == 3 else log_weights[:, None]
    return per_head[:, :, None].to(dtype)


def gated_bias(log_weights: Tensor | None, gated_rows: int | None, q: Tensor) -> Tensor | None:
    """Return the bias of `camkit.ops.reweight`, whose ``gated_rows`` of None means all rows."""
    if log_weights is None:
        return None
    bias = key_bias(log_weights, log_weights.dtype)
    if gated_rows is None:
        return bias
    gated = torch.arange(q.shape[2], device=q.device)[:, None] < gated_rows
    return torch.where(gated, bias, 0.0)


def bias_of(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Return what a mask adds to the logits, broadcastable to ``(b, a, t, s)``."""
    if is_causal:
        mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:  # True takes part
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)


Map = Float[Tensor, "b a t s"]


@runtime_checkable
class Attention(Protocol):
    """What every attention call provides, however it was computed."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, heads, queries, keys."""

    def watched(self) -> Tensor:
        """Return the tensor of the host's graph that gradients are taken at."""

    def rows(self, queries: Sequence[int]) -> Float[Tensor, "b a c s"]:
        """Return what the tokens ``queries`` attend to."""

    def columns(self, keys: Sequence[int]) -> Float[Tensor, "b a t c"]:
        """Return how much every token attends to the tokens ``keys``."""

    def rows_and_columns(
        self, tokens: Sequence[int]
    ) -> tuple[Float[Tensor, "b a c s"], Float[Tensor, "b a t c"]]:
        """Return both of the same tokens, in one pass where that is possible."""

    def head_mean(self, tokens: Sequence[int] | None = None) -> Float[Tensor, "b _ _"]:
        """Return the map averaged over heads, whole or between ``tokens``; it is large."""

    def add_head_mean(
        self, total: Float[Tensor, "b _ _"] | None, tokens: Sequence[int]
    ) -> Float[Tensor, "b _ _"]:
        """Return ``total + head_mean(tokens)`` in at least float32; None begins a sum.

        Without a graph, ``total`` is written in place.
        """

    def propagate(
        self, values: Float[Tensor, "b k n"], patches: Sequence[int]
    ) -> Float[Tensor, "b k n"]:
        """Average ``values`` over the patches each patch attends to."""

    def gradient_rows(self, gradient: Tensor, queries: Sequence[int]) -> Float[Tensor, "b a c s"]:
        """Return the gradient of the rows ``queries``, given the gradient at ``watched``."""

    def hop(self, relevance: Float[Tensor, "b t"], gradient: Tensor) -> Float[Tensor, "b s"]:
        """Carry token relevance one block down (`camkit.ops.attention.relevance_hop`)."""


@dataclass(frozen=True, eq=False)
class FusedAttention:
    """Attention that ran in a fused kernel: everything is computed from q and k on demand.

    Attributes:
        q: queries, as the host computed them.
        k: keys.
        scale: factor on the dot products.
        bias: added to the logits, masks included.
        v: values, if they were kept.
        output: of each head, if it was kept.
        normaliser: log-sum-exp of each row, if the kernel returned it.
        pairs: also added to the logits, as features of the tokens; everything read from the
            attention includes it.
    """

    q: Heads
    k: Float[Tensor, "b a s d"]
    scale: float
    bias: Bias | None = None
    v: Float[Tensor, "b a s e"] | None = None
    output: Float[Tensor, "b a t e"] | None = None
    normaliser: Float[Tensor, "b a t"] | None = None
    pairs: PairBias | None = None

    __repr__ = short_repr

    @property
    def shape(self) -> tuple[int, int, int, int]:
        images, heads, tokens, _ = self.q.shape
        return images, heads, tokens, self.k.shape[2]

    def paired(self, pairs: PairBias) -> "FusedAttention":
        """Return the attention as it would be with more added to its logits; its output is lost."""
        pairs.check(self.q, self.k)
        own = pairs if self.pairs is None else self.pairs + pairs
        return replace(self, pairs=own, output=None, normaliser=None)

    def watched(self) -> Tensor:
        if self.output is None or not self.output.requires_grad:
            raise CaptureError(_NO_GRAPH)
        return self.output

    def rows(self, queries: Sequence[int]) -> Map:
        # a softmax on a CPU, where it takes less time
        known = self.normaliser if compiled_for(self.q, self.k, width=64) else None
        return attention_rows(replace(self._call, normaliser=known), queries)

    def columns(self, keys: Sequence[int]) -> Map:
        return attention_columns(self._call, keys)

    def rows_and_columns(self, tokens: Sequence[int]) -> tuple[Map, Float[Tensor, "b a u c"]]:
        return rows_and_columns(self._call, tokens)

    def head_mean(self, tokens: Sequence[int] | None = None) -> Float[Tensor, "b _ _"]:
        return head_mean(self._call, tokens)

    def add_head_mean(
        self, total: Float[Tensor, "b _ _"] | None, tokens: Sequence[int]
    ) -> Float[Tensor, "b _ _"]:
        return add_head_mean(total, self._call, tokens)

    def propagate(
        self, values: Float[Tensor, "b k n"], patches: Sequence[int]
    ) -> Float[Tensor, "b k n"]:
        return propagate(self._call, values, patches)

    def gradient_rows(self, gradient: Tensor, queries: Sequence[int]) -> Map:
        # o = A v, so the gradient at A[i, j] is the output gradient at i times the value at j
        return take(gradient, queries, 2) @ self._values.mT.to(gradient.dtype)

    def hop(self, relevance: Float[Tensor, "b t"], gradient: Tensor) -> Float[Tensor, "b s"]:
        own = self.detached(values=True)
        return relevance_hop(relevance, own._call, own._values, gradient)

    def detached(self, *, values: bool) -> "FusedAttention":
        """Return the call without its graph, with or without what gradients are computed from."""
        keep = ("q", "k", "bias", "pairs", "v", "output")[: None if values else 4]
        parts: dict[str, Any] = {"v": None, "output": None}
        for name in keep:
            part = getattr(self, name)
            parts[name] = None if part is None else part.detach()
        return replace(self, **parts)

    @property
    def _call(self) -> AttentionInputs:
        return AttentionInputs(self.q, self.k, self.scale, self.bias, self.normaliser, self.pairs)

    @property
    def _values(self) -> Tensor:
        if self.v is None:
            raise CaptureError(_NO_GRAPH)
        return self.v


@dataclass(frozen=True, eq=False)
class ExplicitAttention:
    """Attention whose host computes the map itself."""

    weights: Map

    __repr__ = short_repr

    @property
    def shape(self) -> tuple[int, int, int, int]:
        images, heads, tokens, keys = self.weights.shape
        return images, heads, tokens, keys

    def watched(self) -> Tensor:
        if not self.weights.requires_grad:
            raise CaptureError(_NO_GRAPH)
        return self.weights

    def rows(self, queries: Sequence[int]) -> Map:
        return take(self.weights, queries, 2)

    def columns(self, keys: Sequence[int]) -> Map:
        return take(self.weights, keys, 3)

    def rows_and_columns(self, tokens: Sequence[int]) -> tuple[Map, Float[Tensor, "b a u c"]]:
        return self.rows(tokens), self.columns(tokens)

    def head_mean(self, tokens: Sequence[int] | None = None) -> Float[Tensor, "b _ _"]:
        if tokens is None:
            return self.weights.mean(1)
        return take(take(self.weights, tokens, 2), tokens, 3).mean(1)

    def add_head_mean(
        self, total: Float[Tensor, "b _ _"] | None, tokens: Sequence[int]
    ) -> Float[Tensor, "b _ _"]:
        mean = self.head_mean(tokens)
        mean = mean.to(at_least_float32(mean.dtype))
        if total is None:
            return mean
        graph = mean.requires_grad or total.requires_grad
        return total + mean if graph else total.add_(mean)

    def propagate(
        self, values: Float[Tensor, "b k n"], patches: Sequence[int]
    ) -> Float[Tensor, "b k n"]:
        affinity = self.head_mean(patches).to(values.dtype)
        affinity = affinity / affinity.sum(-1, keepdim=True)
        return values @ affinity.mT

    def gradient_rows(self, gradient: Tensor, queries: Sequence[int]) -> Map:
        return take(gradient, queries, 2)

    def hop(self, relevance: Float[Tensor, "b t"], gradient: Tensor) -> Float[Tensor, "b s"]:
        weighted = (self.weights.detach() * gradient).relu().mean(1)
        return torch.einsum("bi,bij->bj", relevance.to(weighted.dtype), weighted)


_NO_GRAPH = (
    "this capture holds no gradients; watch the forward with "
    "camkit.watch(model, gradients=True) and do not detach its scores"
)


@dataclass(frozen=True, eq=False)
class ClassRows:
    """Rows of some queries, computed during the forward; q and k are dropped.

    Attributes:
        shape: images, heads, queries, keys of the whole map.
        queries: whose rows these are.
        weights: the rows, detached.
    """

    shape: tuple[int, int, int, int]
    queries: tuple[int, ...]
    weights: Map

    __repr__ = short_repr

    @classmethod
    def of(cls, attention: Attention, class_tokens: Sequence[int]) -> "ClassRows":
        """Keep the rows of the class tokens, or of the one query that pools."""
        queries = (0,) if attention.shape[2] == 1 else tuple(class_tokens)
        return cls(attention.shape, queries, attention.rows(queries))

    def rows(self, queries: Sequence[int]) -> Map:
        if not set(queries) <= set(self.queries):
            self._refuse()
        return take(self.weights, [self.queries.index(query) for query in queries], 2)

    def _refuse(self, *_: Any) -> NoReturn:
        raise CaptureError(
            "this watch kept only the class rows of the attention, but more of it is needed; watch "
            "without `class_rows_only`"
        )

    watched = columns = rows_and_columns = head_mean = add_head_mean = _refuse
    propagate = gradient_rows = hop = _refuse


def sum_of_head_means(blocks: Sequence[Attention], tokens: Sequence[int]) -> Float[Tensor, "b _ _"]:
    """Add up the maps of blocks, averaged over heads, in at least float32, holding one of them."""
    total: Tensor | None = None
    for block in blocks:
        total = block.add_head_mean(total, tokens)
    if total is None:
        raise ValueError("`blocks` must hold at least one attention call, got none")
    return total
