"""The softmax normaliser of every query, without a map of all pairs in memory or in the graph."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from camkit.ops.places import take

CHUNK_ELEMENTS = 1 << 23  # logits held at a time: 32 MiB in float32


def log_normaliser(
    q: Float[Tensor, "b a t d"],
    k: Float[Tensor, "b a s d"],
    scale: float,
    bias: Float[Tensor, "#b #a #t s"] | None = None,
    known: Float[Tensor, "b a t"] | None = None,
) -> Float[Tensor, "b a t"]:
    """Log of the summed exponentials of each query's logits over all keys.

    Where the bias has no gradient, what the backward keeps grows with the tokens, not their pairs.

    Args:
        q: queries, in at least float32.
        k: keys, in the same dtype.
        scale: factor on the dot products.
        bias: added to the logits.
        known: the same, from a kernel that computed it; then only the backward has work to do.
    """
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return (scale * q @ k.mT + bias).logsumexp(-1)
    found: Tensor = _LogNormaliser.apply(q, k, scale, bias, known)
    return found


class _LogNormaliser(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: float, bias: Tensor | None, known: Tensor | None
    ) -> Tensor:
        if known is None:
            parts = [_logits(q, k, scale, bias, part).logsumexp(-1) for part in query_chunks(q, k)]
            normaliser = torch.cat(parts, 2)
        else:
            normaliser = known.to(q.dtype).clone()
        ctx.save_for_backward(q, k, bias, normaliser)
        ctx.scale = scale
        return normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        q, k, bias, normaliser = ctx.saved_tensors
        to_keys = torch.zeros_like(k)
        to_queries = []
        for part in query_chunks(q, k):
            logits = _logits(q, k, ctx.scale, bias, part)
            # a query that may attend to nothing has a normaliser of -inf and no gradient
            level = normaliser[:, :, part, None].clamp_min(torch.finfo(q.dtype).min)
            pull = logits.sub_(level).exp_().mul_(grad_output[:, :, part, None])
            to_queries.append(pull @ k)
            to_keys += pull.mT @ q[:, :, part]
        return torch.cat(to_queries, 2) * ctx.scale, to_keys * ctx.scale, None, None, None


def query_chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the queries whose logits fit in `CHUNK_ELEMENTS`."""
    images, heads, tokens, _ = q.shape
    step = max(1, CHUNK_ELEMENTS // max(1, images * heads * k.shape[2]))
    return (slice(start, start + step) for start in range(0, tokens, step))


def rows_of(bias: Tensor | None, rows: "slice | list[int]") -> Tensor | None:
    """The part of a bias that belongs to some queries."""
    if bias is None or bias.shape[-2] == 1:
        return bias
    return bias[..., rows, :] if isinstance(rows, slice) else take(bias, rows, bias.dim() - 2)


def _logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, part: slice) -> Tensor:
    logits = (q[:, :, part] * scale) @ k.mT
    own = rows_of(bias, part)
    return logits if own is None else logits + own.to(logits.dtype)
