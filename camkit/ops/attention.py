"""Chosen rows and columns of an attention map, computed from q and k without the whole map.

Softmax is computed in at least float32, also under autocast. Arguments that the functions share:

- ``q``, ``k``, ``v``: queries, keys and values of all tokens, exactly as the host's attention used
  them (after norms and rotations), so that results are the host's own attention;
- ``scale``: factor on the dot products, as the host used it;
- ``bias``: added to the logits, broadcast over images, heads and queries; a masked key holds -inf;
- ``normaliser``: log-sum-exp of each row, if the kernel that ran returned it. Then a weight is one
  exponential, and no other logits are computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from camkit.ops import reweight
from camkit.ops.head_mean import mean_of_heads
from camkit.ops.reweight import Heads as Heads, LogWeights, Normaliser as Normaliser
from camkit.ops.reweight_plain import (
    ALL,
    at_least_float32,
    logits_of,
    query_chunks,
    row_logsumexp,
)

Keys = Float[Tensor, "b a s d"]
Bias = Float[Tensor, "#b #a #t s"]


def attention_rows(
    q: Heads,
    k: Keys,
    queries: Sequence[int],
    *,
    scale: float,
    bias: Bias | None = None,
    normaliser: Normaliser | None = None,
) -> Float[Tensor, "b a c s"]:
    """Return the attention of the tokens at positions ``queries``, one softmax row each."""
    if normaliser is not None and run_of(queries, q.shape[2]) == range(len(queries)):
        with torch.autocast(q.device.type, enabled=False):
            inputs = operator_inputs(q, k, scale, bias, normaliser)
            if inputs is not None:
                found, _ = reweight.rows_and_columns(
                    q, k, *inputs, rows=len(queries), columns=0, scale=scale
                )
                return found.to(q.dtype)
    return _softmax(take(q, queries, 2), k, scale, rows_of(bias, queries)).to(q.dtype)


def attention_columns(
    q: Heads,
    k: Keys,
    keys: Sequence[int],
    *,
    scale: float,
    bias: Bias | None = None,
    normaliser: Normaliser | None = None,
) -> Float[Tensor, "b a t c"]:
    """Return how much every token attends to the tokens at positions ``keys``, per head.

    Streamed over the queries, forward and backward.
    """
    leading = run_of(keys, k.shape[2]) == range(len(keys)) and q.shape[2] == k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        inputs = operator_inputs(q, k, scale, bias, normaliser) if leading else None
        if inputs is not None:
            _, columns = reweight.rows_and_columns(
                q, k, *inputs, rows=0, columns=len(keys), scale=scale
            )
        else:
            dtype = at_least_float32(q.dtype)
            at_keys = None if bias is None else take(bias, keys, 3)
            logits = logits_of(q.to(dtype), take(k.to(dtype), keys, 2), scale, at_keys, ALL)
            lse = log_normaliser(q, k, scale, bias, normaliser)[..., None]
            columns = (logits - lse.clamp_min(torch.finfo(dtype).min)).exp()
    return columns.to(q.dtype)


def head_mean(
    q: Heads,
    k: Keys,
    *,
    scale: float,
    bias: Bias | None = None,
    normaliser: Normaliser | None = None,
    tokens: Sequence[int] | None = None,
) -> Float[Tensor, "b _ _"]:
    """Return the attention map averaged over heads, built head by head.

    Args:
        q: these and other arguments are explained in `camkit.ops.attention`.
        k: keys.
        scale: factor on the dot products.
        bias: added to the logits.
        normaliser: log-sum-exp of each row.
        tokens: rows and columns to return; None returns the whole map.
    """
    if tokens is not None:
        run = run_of(tokens, q.shape[2])
        fast = bias is None and run is not None and q.shape[2] == k.shape[2]
        found = _fast_head_mean(q, k, normaliser, scale, run) if fast and run else None
        if found is not None:
            return found
        if run and run.stop == q.shape[2] == k.shape[2]:
            with torch.autocast(q.device.type, enabled=False):
                inputs = operator_inputs(q, k, scale, bias, normaliser)
                if inputs is not None:
                    found = reweight.affinity_mean(q, k, *inputs, scale=scale, skip=run.start)
                    return found.to(q.dtype)
        whole = head_mean(q, k, scale=scale, bias=bias, normaliser=normaliser)
        return take(take(whole, tokens, 1), tokens, 2)
    found = None if bias is not None else _fast_head_mean(q, k, normaliser, scale)
    if found is not None:
        return found
    with torch.autocast(q.device.type, enabled=False):
        inputs = operator_inputs(q, k, scale, bias, normaliser)
        if inputs is not None:
            return reweight.affinity_mean(q, k, *inputs, scale=scale).to(q.dtype)
    total = q.new_zeros(len(q), q.shape[2], k.shape[2], dtype=at_least_float32(q.dtype))
    for head in range(q.shape[1]):
        only = slice(head, head + 1)
        of_head = bias if bias is None or bias.shape[1] == 1 else bias[:, only]
        total = total + _softmax(q[:, only], k[:, only], scale, of_head)[:, 0]
    return (total / q.shape[1]).to(q.dtype)


def _fast_head_mean(
    q: Heads, k: Keys, normaliser: Normaliser | None, scale: float, run: range | None = None
) -> Float[Tensor, "b _ _"] | None:
    tokens = slice(None) if run is None else slice(run.start, run.stop)
    found = mean_of_heads(q, k, normaliser, scale=scale, tokens=tokens)
    return None if found is None else found.to(q.dtype)


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
    explainability), with ``grad_output`` the gradient of the class score at ``A @ v``. The gradient
    of the attention map needs no map: dA[i, j] is the product of the output gradient at i with the
    value at j.
    """
    propagated = relevance.new_zeros(len(relevance), k.shape[2])
    for part in query_chunks(q, k):
        attention = _softmax(q, k, scale, bias, part)
        gradient = grad_output[:, :, part].to(attention.dtype) @ v.mT.to(attention.dtype)
        weighted = (attention * gradient).relu_().mean(1)
        own = relevance[:, part].to(weighted.dtype)
        propagated = propagated + torch.einsum("bi,bij->bj", own, weighted)
    return propagated.to(relevance.dtype)


def operator_inputs(
    q: Heads, k: Keys, scale: float, bias: Bias | None, normaliser: Normaliser | None
) -> tuple[Normaliser, LogWeights | None] | None:
    """Return the normaliser and the log-weights of the keys that `camkit.ops.reweight` takes.

    Returns None if the normaliser is unknown or the bias differs between queries.
    """
    if normaliser is None:
        return None
    weights = None
    if bias is not None:
        if bias.shape[-2] != 1 or bias.shape[-1] != q.shape[2]:
            return None
        weights = bias[..., 0, :].expand(*q.shape[:2], -1)
    return log_normaliser(q, k, scale, bias, normaliser), weights


def log_normaliser(
    q: Heads,
    k: Keys,
    scale: float,
    bias: Bias | None = None,
    normaliser: Normaliser | None = None,
) -> Normaliser:
    """Return the log-sum-exp of each query's logits over all keys, in at least float32.

    Unless the bias needs a gradient, the memory kept for the backward grows with the number of
    tokens, not of their pairs. If ``normaliser`` is given, only the backward computes anything.
    """
    dtype, has_gradient = at_least_float32(q.dtype), torch.is_grad_enabled()
    if has_gradient and bias is not None and bias.requires_grad:
        return (scale * q.to(dtype) @ k.to(dtype).mT + bias).logsumexp(-1)
    if normaliser is not None and not (has_gradient and (q.requires_grad or k.requires_grad)):
        return normaliser.to(dtype)
    result: Tensor = _LogNormaliser.apply(q.to(dtype), k.to(dtype), scale, bias, normaliser)
    return result


class _LogNormaliser(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: float, bias: Tensor | None, known: Tensor | None
    ) -> Tensor:
        lse = row_logsumexp(q, k, scale, bias) if known is None else known.to(q.dtype).clone()
        ctx.save_for_backward(q, k, bias, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, bias, lse = ctx.saved_tensors
        to_q, to_k = torch.zeros_like(q), torch.zeros_like(k)
        with torch.autocast(q.device.type, enabled=False):
            for part in query_chunks(q, k):
                # a query that may attend to no key has a normaliser of -inf and no gradient
                level = lse[:, :, part, None].clamp_min(torch.finfo(q.dtype).min)
                weights = logits_of(q, k, ctx.scale, bias, part).sub_(level).exp_()
                weights.mul_(grad_output[:, :, part, None])
                to_k += weights.mT @ q[:, :, part]
                to_q[:, :, part] = weights @ k
        return to_q * ctx.scale, to_k * ctx.scale, None, None, None


def take(tensor: Tensor, places: Sequence[int], axis: int) -> Tensor:
    """Select positions along one axis, negative from the end: a view if they are consecutive.

    Indexing with a list would send an index to the device each time, which waits for the device and
    cannot be part of a CUDA graph.
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


def rows_of(bias: Tensor | None, queries: Sequence[int]) -> Tensor | None:
    """Return the part of a bias that belongs to some queries."""
    return bias if bias is None or bias.shape[-2] == 1 else take(bias, queries, bias.dim() - 2)


def _softmax(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, rows: slice = ALL) -> Tensor:
    """Compute rows of the map; a row without any key is zero, as in torch's kernels."""
    dtype = at_least_float32(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        logits = logits_of(q.to(dtype), k.to(dtype), scale, bias, rows)
        if bias is None:
            return logits.softmax(-1)
        no_key = logits.detach().amax(-1, keepdim=True) == -torch.inf
        return logits.softmax(-1).masked_fill(no_key, 0.0)
