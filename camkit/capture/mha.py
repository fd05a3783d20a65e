"""torch's ``multi_head_attention_forward`` written out, so that its inner attention can be seen.

To a torch-function mode the original is one opaque call, and calling it again from inside the mode
would recurse. This follows its documented behaviour step by step with the same torch functions, and
is tested to return the same bits.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from camkit.errors import UnsupportedModelError


def multi_head_attention(  # noqa: PLR0913 - the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,  # noqa: ARG001
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **unknown: Any,
) -> tuple[Tensor, Tensor | None]:
    """Project, attend and project back; tokens come first, as ``(t, b, d)`` or ``(t, d)``."""
    if (
        unknown
        or bias_k is not None
        or add_zero_attn
        or static_k is not None
        or static_v is not None
    ):
        raise UnsupportedModelError(
            "multi_head_attention_forward was called with bias_k, add_zero_attn or static keys, "
            "which camkit does not support; no Vision Transformer it knows uses them"
        )
    single = query.dim() == 2
    if single:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    tokens, images, dim = query.shape
    q, k, v = _project(
        (query, key, value),
        in_proj_weight,
        in_proj_bias,
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
    )
    head_dim = dim // num_heads
    q, k, v = (x.view(x.shape[0], images * num_heads, head_dim).transpose(0, 1) for x in (q, k, v))
    mask = _merge(attn_mask, key_padding_mask, q.dtype, (images, num_heads))
    causal = is_causal and key_padding_mask is None
    dropout = dropout_p if training else 0.0
    split = (images, num_heads)
    if need_weights:
        scaled = q * math.sqrt(1.0 / head_dim)
        logits = torch.bmm(scaled, k.mT) if mask is None else torch.baddbmm(mask, scaled, k.mT)
        weights = torch.softmax(logits.unflatten(0, split), dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        output = torch.bmm(weights.flatten(0, 1), v).transpose(0, 1)
    else:
        weights = None
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.unflatten(0, split)
        q, k, v = (x.unflatten(0, split) for x in (q, k, v))
        output = F.scaled_dot_product_attention(
            q, k, v, None if causal else mask, dropout_p=dropout, is_causal=causal
        ).permute(2, 0, 1, 3)
    output = F.linear(output.reshape(tokens * images, dim), out_proj_weight, out_proj_bias)
    output = output.view(tokens, images, -1)
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if single:
        output = output.squeeze(1)
        weights = None if weights is None else weights.squeeze(0)
    return output, weights


def _project(
    inputs: tuple[Tensor, Tensor, Tensor],
    joined_weight: Tensor | None,
    bias: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
) -> tuple[Tensor, ...]:
    query, key, value = inputs
    dim = query.shape[-1]
    if separate is None and joined_weight is not None and key is value:
        if query is key:
            return _linear_parts(query, joined_weight, bias, 3)
        own, shared = (None, None) if bias is None else (bias[:dim], bias[dim:])
        q = F.linear(query, joined_weight[:dim], own)
        return q, *_linear_parts(key, joined_weight[dim:], shared, 2)
    nothing = (None, None, None)
    joined = nothing if joined_weight is None else joined_weight.chunk(3)
    weights = joined if separate is None else separate
    biases = nothing if bias is None else bias.chunk(3)
    return tuple(
        F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True) if w is not None
    )


def _linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> tuple[Tensor, ...]:
    projected = F.linear(x, weight, bias).unflatten(-1, (parts, x.shape[-1]))
    return tuple(projected.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous())


def _merge(
    attn_mask: Tensor | None,
    padding: Tensor | None,
    dtype: torch.dtype,
    layout: tuple[int, int],
) -> Tensor | None:
    """Merge masks into an additive one, ``(1 or b * a, t, s)``; True in a boolean mask excludes."""
    images, heads = layout
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, dtype)
        merged = merged.unsqueeze(0) if merged.dim() == 2 else merged
    if padding is not None:
        padded = _additive(padding, dtype).view(images, 1, 1, -1).expand(-1, heads, -1, -1)
        padded = padded.reshape(images * heads, 1, -1)
        merged = padded if merged is None else merged + padded
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
