"""Chosen rows and columns of an attention map, computed from q and k; the whole map is never held.

All functions take queries and keys exactly as the host's attention used them (after norms,
rotations and biases), so what they return is what the host computed, whichever fused kernel it ran.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.ops import reweight
from camkit.ops.normaliser import log_normaliser, query_chunks, rows_of
from camkit.ops.places import run_of, take

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

    Streamed over the queries, forward and backward; see `camkit.ops.normaliser`. With the
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
