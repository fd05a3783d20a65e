"""Chosen rows and columns of an attention map, computed from q and k without the whole map.

All functions take queries and keys exactly as the host's attention used them (after norms,
rotations and biases), so what they return is what the host computed, whichever fused kernel it ran.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from camkit.ops import reweight


def take(tensor: Tensor, places: Sequence[int], axis: int) -> Tensor:
    """The chosen positions of one axis: a view of a run of them, else a copy.

    An index made of a list would be sent to the device each time, which waits, and which no CUDA
    graph can hold.

    Args:
        tensor: to be read.
        places: positions, negative from the end.
        axis: which they are along.
    """
    run = run_of(places, tensor.shape[axis])
    if run is not None:
        return tensor.narrow(axis, run.start, len(run))
    size = tensor.shape[axis]
    outside = [place for place in places if not -size <= place < size]
    if outside:
        raise IndexError(f"positions must lie within the {size} tokens, got {outside}")
    index = torch.tensor([place % size for place in places], device=tensor.device)
    return tensor.index_select(axis, index)


def run_of(places: Sequence[int], size: int) -> range | None:
    """The places as a range without gaps; None where they are none."""
    if not places:
        return range(0)
    first = places[0] + size if places[0] < 0 else places[0]
    run = range(first, first + len(places))
    found = [place + size if place < 0 else place for place in places]
    return run if first >= 0 and run.stop <= size and found == list(run) else None


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


Heads = Float[Tensor, "b a t d"]
Bias = Float[Tensor, "#b #a #t s"]


def attention_rows(
    q: Heads,
    k: Float[Tensor, "b a s d"],
    queries: Sequence[int],
    *,
    scale: float,
    bias: Bias | None = None,
) -> Float[Tensor, "b a c s"]:
    """What the tokens ``queries`` attend to: one softmax row each, per head.

    Args:
        q: queries of all tokens.
        k: keys of all tokens.
        queries: positions of the wanted rows, for example the class tokens.
        scale: factor on the dot products, as the host used it.
        bias: added to the logits; a masked key holds -inf.
    """
    rows = list(queries)
    return _attend(take(q, rows, 2), k, scale, rows_of(bias, rows)).to(q.dtype)


def attention_columns(
    q: Heads,
    k: Float[Tensor, "b a s d"],
    keys: Sequence[int],
    *,
    scale: float,
    bias: Bias | None = None,
    normaliser: Float[Tensor, "b a t"] | None = None,
) -> Float[Tensor, "b a t c"]:
    """How much every token attends to the tokens ``keys``, per head.

    Streamed over the queries, forward and backward; see `camkit.ops.attention`. With the
    normaliser of the kernel that ran, the forward needs the asked columns alone.
    """
    columns, tilt = list(keys), key_weights(bias, q)
    dtype = _soft_dtype(q)
    first = run_of(columns, k.shape[2]) == range(len(columns)) and q.shape[2] == k.shape[2]
    if normaliser is not None and first and (bias is None or tilt is not None):
        with torch.autocast(q.device.type, enabled=False):
            level = known_normaliser(q, k, scale, bias, normaliser)
            found = reweight.class_columns(q, k, level, tilt, columns=len(columns), scale=scale)
        return found.to(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q_wide, k_wide = q.to(dtype), k.to(dtype)
        logits = (q_wide * scale) @ take(k_wide, columns, 2).mT
        if bias is not None:
            logits = logits + take(bias, columns, 3).to(dtype)
        level = log_normaliser(q_wide, k_wide, scale, bias, normaliser)[..., None]
        found = (logits - level.clamp_min(torch.finfo(dtype).min)).exp()
    return found.to(q.dtype)


def relevance_hop(  # noqa: PLR0913 - all of one attention call
    relevance: Float[Tensor, "b t"],
    q: Heads,
    k: Float[Tensor, "b a s d"],
    v: Float[Tensor, "b a s e"],
    grad_output: Float[Tensor, "b a t e"],
    *,
    scale: float,
    bias: Bias | None = None,
) -> Float[Tensor, "b s"]:
    """Carry token relevance one block down, along attention weighted by its own gradient.

    Computes ``relevance @ mean over heads of relu(A * dA)`` (Chefer et al. 2021, generic attention
    explainability), where the gradient of the attention map needs no map: with o = A v,
    dA[i, j] is the product of the output gradient at i with the value at j.

    Args:
        relevance: how much each token matters after this block.
        q: queries.
        k: keys.
        v: values.
        grad_output: gradient of the class score at ``A @ v``, per head.
        scale: factor on the dot products, as the host used it.
        bias: added to the logits.
    """
    carried = relevance.new_zeros(len(relevance), k.shape[2])
    for part in query_chunks(q, k):
        attention = _attend(q[:, :, part], k, scale, rows_of(bias, part))
        gradient = grad_output[:, :, part].to(attention.dtype) @ v.mT.to(attention.dtype)
        weighted = (attention * gradient).relu_().mean(1)
        carried = carried + torch.einsum(
            "bi,bij->bj", relevance[:, part].to(weighted.dtype), weighted
        )
    return carried.to(relevance.dtype)


def head_mean(
    q: Heads,
    k: Float[Tensor, "b a s d"],
    *,
    scale: float,
    bias: Bias | None = None,
    normaliser: Float[Tensor, "b a t"] | None = None,
) -> Float[Tensor, "b t s"]:
    """The whole attention map averaged over heads, for those who ask for it.

    Built head by head, small ones at once. With the normaliser of the kernel that ran, weights are
    one exponential each, and nothing is summed or divided.
    """
    keys = key_weights(bias, q)
    if normaliser is not None and (bias is None or keys is not None):
        with torch.autocast(q.device.type, enabled=False):
            level = known_normaliser(q, k, scale, bias, normaliser)
            return reweight.affinity_mean(q, k, level, keys, scale=scale).to(q.dtype)
    total = q.new_zeros(q.shape[0], q.shape[2], k.shape[2], dtype=_soft_dtype(q))
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        of_head = bias if bias is None or bias.shape[1] == 1 else bias[:, one]
        total = total + _attend(q[:, one], k[:, one], scale, of_head)[:, 0]
    return (total / q.shape[1]).to(q.dtype)


def key_weights(bias: Bias | None, q: Heads) -> Float[Tensor, "b a t"] | None:
    """A bias that is the same for all queries, as log-weights of the keys; None for any other."""
    if bias is None or bias.shape[-2] != 1 or bias.shape[-1] != q.shape[2]:
        return None
    return bias[..., 0, :].expand(*q.shape[:2], -1)


def known_normaliser(
    q: Heads,
    k: Float[Tensor, "b a s d"],
    scale: float,
    bias: Bias | None,
    known: Float[Tensor, "b a t"],
) -> Float[Tensor, "b a t"]:
    """What a kernel said of the normaliser, with a gradient where one is wanted."""
    dtype = _soft_dtype(q)
    if not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad):
        return known.to(dtype)
    return log_normaliser(q.to(dtype), k.to(dtype), scale, bias, known)


def _soft_dtype(q: Tensor) -> torch.dtype:
    return torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype


def _attend(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Softmax of dot products in at least float32: rows of half precision do not sum to one.

    A query that may attend to nothing attends to nothing, as in torch's kernels.
    """
    dtype = _soft_dtype(q)
    with torch.autocast(q.device.type, enabled=False):  # which would cut the products short
        logits = (q.to(dtype) * scale) @ k.to(dtype).mT
        if bias is None:
            return logits.softmax(-1)
        logits = logits + bias.to(dtype)
        nothing = logits.detach().amax(-1, keepdim=True) == -torch.inf
        return logits.softmax(-1).masked_fill(nothing, 0.0)
