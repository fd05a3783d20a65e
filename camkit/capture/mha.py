"""torch's multi-head attention written out, so that the attention inside can be seen.

To a torch-function mode ``multi_head_attention_forward`` is one opaque call, and calling it again
from inside the mode would recurse. `multi_head_attention` follows its documented behaviour step by
step with the same torch functions, and is tested to return the same bits.

`torch.nn.MultiheadAttention` has a second way, its fast path, that rounds otherwise. It takes it
in evaluation without gradients, unless a mode is on. `fast_multi_head_attention` follows that one.
"""

import math
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from camkit.capture.modes import THREAD, measurement
from camkit.errors import UnsupportedModelError
from camkit.torch_internals import function_modes_disabled

_FUSED: dict[tuple[Any, ...], bool | None] = {}  # the form of the fast path; None if not taken


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


def with_values_shown(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Attend through scaled_dot_product_attention, also where the map is asked for.

    The map is computed once more, out of sight. Arguments are those of `multi_head_attention`.
    """
    given = signature(multi_head_attention).bind(*args, **kwargs).arguments
    given |= given.pop("unknown", {})
    output, _ = multi_head_attention(**given | {"need_weights": False})
    if not given.get("need_weights", True):
        return output, None
    with function_modes_disabled():
        return output, multi_head_attention(**given)[1]


def by_fast_path(
    module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None] | None:
    """Attend as the module would without torch-function modes, if that is its fast path.

    Whether it is, is measured once for each form of a call, by the bits of the output.

    Args:
        module: whose forward is under way, or that holds the module.
        args: positional arguments of multi_head_attention_forward.
        kwargs: its arguments by name.

    Returns:
        Output ``(t, b, d)`` and weights as multi_head_attention_forward; None if the module does
        not take its fast path.
    """
    if module is None or len(args) < 7 or args[6] is None:
        return None
    query, masks = args[0], (kwargs.get("attn_mask"), kwargs.get("key_padding_mask"))
    if any(x is not query for x in args[1:3]) or query.dim() != 3 or masks != (None, None):
        return None
    owners = (m for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    owner = next((m for m in owners if m.in_proj_weight is args[5]), None)
    if owner is None or not owner.batch_first or owner.training or _graph_is_host_s(owner, query):
        return None
    weights = {name: bool(kwargs.get(name, True)) for name in _WEIGHTS}
    tokens, device = query.transpose(0, 1), query.device
    kinds = (query.dtype, owner.in_proj_weight.dtype, device, tokens.is_contiguous())
    settings = (torch.is_autocast_enabled(device.type), torch.is_autocast_enabled())
    enabled = torch.backends.mha.get_fastpath_enabled()
    sizes = (owner.num_heads, query.shape[-1], len(query) == 1)  # its rounding differs
    form = (type(owner).forward, enabled, *sizes, *weights.values(), *kinds, *settings)
    if form not in _FUSED:
        _FUSED[form] = _measure_form(owner, tokens.detach(), weights)
    fused = _FUSED[form]
    if fused is None:
        return None
    output, maps = fast_multi_head_attention(tokens, owner, fused=fused, **weights)
    return output.transpose(0, 1), maps


_WEIGHTS = ("need_weights", "average_attn_weights")


def _graph_is_host_s(module: nn.MultiheadAttention, query: Tensor) -> bool:
    """Whether the module would build a graph if camkit did not."""
    if not torch.is_grad_enabled():
        return False
    graph, trains = THREAD.graph, any(p.requires_grad for p in module.parameters())
    if graph is None:
        return trains or query.requires_grad
    return trains and not graph.caller_has_none


def _measure_form(
    module: nn.MultiheadAttention, tokens: Tensor, weights: dict[str, bool]
) -> bool | None:
    with function_modes_disabled(), measurement(tokens.device), torch.no_grad():
        given: dict[str, Any] = dict(weights)
        expected = module.forward(tokens, tokens, tokens, **given)
        for fused in (False, True):
            if fused and weights["need_weights"]:
                continue
            found = fast_multi_head_attention(tokens, module, fused=fused, **weights)
            if all(map(same_bits, found, expected)):
                return fused
    return None


def same_bits(mine: Any, theirs: Any) -> bool:
    """Whether two tensors are equal in type and bits, or both are None."""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return mine is None and theirs is None


def fast_multi_head_attention(
    tokens: Tensor,
    module: nn.MultiheadAttention,
    *,
    fused: bool,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend from tokens to themselves as torch's fast path does.

    Args:
        tokens: ``(b, t, d)``.
        module: with joined projections, and biases.
        fused: as on CUDA, where scaled_dot_product_attention is called; else softmax is.
        need_weights: return the map, too; not if fused.
        average_attn_weights: over heads.
    """
    heads, joined, bias = module.num_heads, module.in_proj_weight, module.in_proj_bias
    images, length, dim = tokens.shape
    if fused:
        q, k, v = (
            x.view(images, length, heads, -1).transpose(1, 2)
            for x in F.linear(tokens, joined, bias).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        attended = attended.reshape(images, length, dim)
        return F.linear(attended, module.out_proj.weight, module.out_proj.bias), None
    if tokens.is_contiguous():
        projected = F.linear(tokens, joined)
    else:  # as torch's matmul, whose rounding of short sequences differs
        projected = torch.bmm(tokens, joined.mT.expand(images, -1, -1))
    kind = projected.dtype
    exact = torch.promote_types(kind, torch.float32)  # half precision is rounded only once
    projected = projected.to(exact) + bias.to(kind).to(exact)
    q, k, v = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scale, weights = 1 / (dim // heads) ** 0.5, None
    if kind == exact and not need_weights:
        attended = attend_explicitly(q, k, v, scale=scale)
    else:
        q, k, v = (x.to(kind).flatten(0, 1) for x in (q * scale, k, v))
        weights = torch.softmax(torch.bmm(q, k.mT).unflatten(0, (images, heads)), dim=-1)
        attended = torch.bmm(weights.flatten(0, 1), v).unflatten(0, (images, heads))
    attended = attended.transpose(1, 2).reshape(images * length, dim)
    output = F.linear(attended, module.out_proj.weight, module.out_proj.bias)
    if weights is not None and average_attn_weights:
        weights = weights.sum(1) / heads
    return output.view(images, length, dim), weights if need_weights else None


def attend_explicitly(  # noqa: PLR0913 - the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float = 1.0,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend by a softmax over whole maps, and let torch-function modes see it as one call.

    It has the signature of scaled_dot_product_attention, so that a mode which shows or weights that
    one can do the same here.
    """
    if has_torch_function_variadic(query, key, value):
        seen: Tensor = handle_torch_function(
            attend_explicitly,
            (query, key, value),
            *(query, key, value, attn_mask, dropout_p),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return seen
    split = query.shape[:2]
    scaled = (query * scale).flatten(0, 1)
    logits = torch.bmm(scaled, key.flatten(0, 1).mT).unflatten(0, split)
    logits = logits if attn_mask is None else logits + attn_mask
    weights = torch.softmax(logits, dim=-1)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).unflatten(0, split)


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
