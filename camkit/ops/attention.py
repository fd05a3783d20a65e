"""Chosen rows and columns of an attention map, computed from q and k without the whole map.

All functions take queries and keys exactly as the host's attention used them (after norms,
rotations and biases), so they return the host's own attention, whichever fused kernel it ran.
Softmax is computed in at least float32, also under autocast.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from camkit.ops import reweight
from camkit.ops.reweight_plain import at_least_float32, chunks, logits_of, row_logsumexp

Heads = Float[Tensor, "b a t d"]
Keys = Float[Tensor, "b a s d"]
Bias = Float[Tensor, "#b #a #t s"]


def attention_rows(
    q: Heads,
    k: Keys,
    queries: Sequence[int],
    *,
    scale: float,
    bias: Bias | None = None,
) -> Float[Tensor, "b a c s"]:
    """Return the attention of the tokens ``queries``: one softmax row each, per head.

    Args:
        q: queries of all tokens.
        k: keys of all tokens.
        queries: positions of the rows, for example those of the class tokens.
        scale: factor on the dot products, as the host used it.
        bias: added to the logits; a masked key holds -inf.
    """
    return _softmax(take(q, queries, 2), k, scale, rows_of(bias, queries)).to(q.dtype)


def attention_columns(
    q: Heads,
    k: Keys,
    keys: Sequence[int],
    *,
    scale: float,
    bias: Bias | None = None,
    normaliser: Float[Tensor, "b a t"] | None = None,
) -> Float[Tensor, "b a t c"]:
    """Return how much every token attends to the tokens ``keys``, per head.

    Streamed over the queries, forward and backward. With the normaliser of the kernel that ran, the
    forward computes the requested columns only.

    Args:
        q: queries of all tokens.
        k: keys of all tokens.
        keys: positions of the columns.
        scale: factor on the dot products.
        bias: added to the logits.
        normaliser: log-sum-exp of each row, if a kernel computed it.
    """
    weights, count = key_weights(bias, q), len(keys)
    leading = run_of(keys, k.shape[2]) == range(count) and q.shape[2] == k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        if normaliser is not None and leading and (bias is None or weights is not None):
            lse = log_normaliser(q, k, scale, bias, normaliser)
            columns = reweight.class_columns(q, k, lse, weights, columns=count, scale=scale)
        else:
            dtype = at_least_float32(q.dtype)
            logits = (q.to(dtype) * scale) @ take(k.to(dtype), keys, 2).mT
            if bias is not None:
                logits = logits + take(bias, keys, 3).to(dtype)
            lse = log_normaliser(q, k, scale, bias, normaliser)[..., None]
            columns = (logits - lse.clamp_min(torch.finfo(dtype).min)).exp()
    return columns.to(q.dtype)


def head_mean(
    q: Heads,
    k: Keys,
    *,
    scale: float,
    bias: Bias | None = None,
    normaliser: Float[Tensor, "b a t"] | None = None,
) -> Float[Tensor, "b t s"]:
    """Return the whole attention map averaged over heads.

    Built head by head; with the normaliser of the kernel that ran, each weight is one exponential.

    Args:
        q: queries.
        k: keys.
        scale: factor on the dot products.
        bias: added to the logits.
        normaliser: log-sum-exp of each row, if a kernel computed it.
    """
    weights = key_weights(bias, q)
    if normaliser is not None and (bias is None or weights is not None):
        with torch.autocast(q.device.type, enabled=False):
            lse = log_normaliser(q, k, scale, bias, normaliser)
            return reweight.affinity_mean(q, k, lse, weights, scale=scale).to(q.dtype)
    total = q.new_zeros(len(q), q.shape[2], k.shape[2], dtype=at_least_float32(q.dtype))
    for head in range(q.shape[1]):
        only = slice(head, head + 1)
        of_head = bias if bias is None or bias.shape[1] == 1 else bias[:, only]
        total = total + _softmax(q[:, only], k[:, only], scale, of_head)[:, 0]
    return (total / q.shape[1]).to(q.dtype)


def relevance_hop(  # noqa: PLR0913 - all of one attention call
    relevance: Float[Tensor, "b t"],
    q: Heads,
    k: Keys,
    v: Float[Tensor, "b a s e"],
    grad_output: Float[Tensor, "b a t e"],
    *,
    scale: float,
    bias: Bias | None = None,
) -> Float[Tensor, "b s"]:
    """Propagate token relevance one block down, along attention weighted by its own gradient.

    Computes ``relevance @ mean over heads of relu(A * dA)`` (Chefer et al. 2021, generic attention
    explainability). The gradient of the attention map needs no map: with o = A v, dA[i, j] is the
    product of the output gradient at i with the value at j.

    Args:
        relevance: how much each token matters after this block.
        q: queries.
        k: keys.
        v: values.
        grad_output: gradient of the class score at ``A @ v``, per head.
        scale: factor on the dot products, as the host used it.
        bias: added to the logits.
    """
    propagated = relevance.new_zeros(len(relevance), k.shape[2])
    for part in _query_chunks(q, k):
        attention = _softmax(q[:, :, part], k, scale, rows_of(bias, part))
        gradient = grad_output[:, :, part].to(attention.dtype) @ v.mT.to(attention.dtype)
        weighted = (attention * gradient).relu_().mean(1)
        own = relevance[:, part].to(weighted.dtype)
        propagated = propagated + torch.einsum("bi,bij->bj", own, weighted)
    return propagated.to(relevance.dtype)


def log_normaliser(
    q: Heads,
    k: Keys,
    scale: float,
    bias: Bias | None = None,
    known: Float[Tensor, "b a t"] | None = None,
) -> Float[Tensor, "b a t"]:
    """Return the log-sum-exp of each query's logits over all keys, in at least float32.

    Unless the bias needs a gradient, the memory kept for the backward grows with the number of
    tokens, not of their pairs.

    Args:
        q: queries.
        k: keys.
        scale: factor on the dot products.
        bias: added to the logits.
        known: the result, if a kernel computed it; then only the backward has work to do.
    """
    dtype, of_bias = at_least_float32(q.dtype), bias is not None and bias.requires_grad
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or of_bias)
    if known is not None and not differentiable:
        return known.to(dtype)
    symmetric = q is k
    q = q.to(dtype)
    k = q if symmetric else k.to(dtype)
    if bias is not None and of_bias and differentiable:
        return (scale * q @ k.mT + bias).logsumexp(-1)
    result: Tensor = _LogNormaliser.apply(q, k, scale, bias, known, symmetric)
    return result


class _LogNormaliser(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - all of one attention call
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: float,
        bias: Tensor | None,
        known: Tensor | None,
        symmetric: bool,
    ) -> Tensor:
        lse = row_logsumexp(q, k, scale, bias) if known is None else known.to(q.dtype).clone()
        ctx.save_for_backward(q, None if symmetric else k, bias, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, bias, lse = ctx.saved_tensors
        symmetric, k = k is None, q if k is None else k
        to_q, to_k = torch.zeros_like(q), torch.zeros_like(k)
        with torch.autocast(q.device.type, enabled=False):
            for part in _query_chunks(q, k):
                # a query that may attend to nothing has a normaliser of -inf and no gradient
                level = lse[:, :, part, None].clamp_min(torch.finfo(q.dtype).min)
                logits = logits_of(q, k, ctx.scale, bias, part)
                weights = (logits - level if symmetric else logits.sub_(level)).exp_()
                weights.mul_(grad_output[:, :, part, None])
                if symmetric:  # the same logits serve these tokens as keys
                    weights += logits.sub_(lse[:, :, None]).exp_().mul_(grad_output[:, :, None])
                else:
                    to_k += weights.mT @ q[:, :, part]
                to_q[:, :, part] = weights @ k
        return to_q * ctx.scale, None if symmetric else to_k * ctx.scale, *(None,) * 4


def key_weights(bias: Bias | None, q: Heads) -> Float[Tensor, "b a t"] | None:
    """Return a bias that is equal for all queries as log-weights of the keys; None for others."""
    if bias is None or bias.shape[-2] != 1 or bias.shape[-1] != q.shape[2]:
        return None
    return bias[..., 0, :].expand(*q.shape[:2], -1)


def take(tensor: Tensor, places: Sequence[int], axis: int) -> Tensor:
    """Select positions along one axis: a view if they are consecutive, else a copy.

    Indexing with a list would send an index to the device each time, which waits for the device and
    cannot be part of a CUDA graph.

    Args:
        tensor: any tensor.
        places: positions, negative from the end.
        axis: axis they are along.
    """
    size = tensor.shape[axis]
    run = run_of(places, size)
    if run is not None:
        return tensor.narrow(axis, run.start, len(run))
    outside = [place for place in places if not -size <= place < size]
    if outside:
        raise IndexError(f"positions must lie within the {size} tokens, got {outside}")
    index = torch.tensor([place % size for place in places], device=tensor.device)
    return tensor.index_select(axis, index)


def run_of(places: Sequence[int], size: int) -> range | None:
    """Return consecutive positions as a range; None if they are not consecutive."""
    if not places:
        return range(0)
    positions = [place + size if place < 0 else place for place in places]
    run = range(positions[0], positions[0] + len(positions))
    return run if run.start >= 0 and run.stop <= size and positions == list(run) else None


def rows_of(bias: Tensor | None, rows: slice | Sequence[int]) -> Tensor | None:
    """Return the part of a bias that belongs to some queries."""
    if bias is None or bias.shape[-2] == 1:
        return bias
    return bias[..., rows, :] if isinstance(rows, slice) else take(bias, rows, bias.dim() - 2)


def _query_chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    images, heads, tokens, _ = q.shape
    return chunks(tokens, images * heads * k.shape[2], q.device)


def _softmax(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Compute rows of the map; one without any key is zero, as in torch's kernels."""
    dtype = at_least_float32(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        logits = (q.to(dtype) * scale) @ k.to(dtype).mT
        if bias is None:
            return logits.softmax(-1)
        logits = logits + bias.to(dtype)
        nothing = logits.detach().amax(-1, keepdim=True) == -torch.inf
        return logits.softmax(-1).masked_fill(nothing, 0.0)
