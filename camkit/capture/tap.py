"""Sees attention in any host: a torch-function mode that is on while an attention module runs.

The module's own hooks enter and leave the mode, so nothing of the host is replaced or un-fused.
Three functions are known; everything else passes through untouched.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from camkit.capture.mha import multi_head_attention


class Tap(TorchFunctionMode):
    """Reports the attention calls made while it is on.

    Args:
        on_fused: called with ``(output, q, k, v, scale, bias)`` of each fused attention.
        on_explicit: called with ``(weights,)`` of each softmax that looks like attention.

    Both return the tensor the host goes on with, normally the one they were given.
    """

    def __init__(self, on_fused: Callable[..., Tensor], on_explicit: Callable[..., Tensor]) -> None:
        super().__init__()
        self._on_fused = on_fused
        self._on_explicit = on_explicit

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # by name: research hosts carry private copies of these functions
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(func, *args, **kwargs)
        if name == "softmax":
            return self._explicit(func(*args, **kwargs), *args, **kwargs)
        if name == "multi_head_attention_forward":
            with self:  # so that the calls inside are seen in their turn
                return multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _fused(  # noqa: PLR0913 - the signature is torch's
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        output = func(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if query.dim() != 4:
            return output
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        bias = _bias(attn_mask, is_causal, query, key)
        return self._on_fused(output, query, key, value, scale, bias)

    def _explicit(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if output.dim() != 4 or dim not in (-1, 3):
            return output
        return self._on_explicit(output)


def _bias(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """What was added to the logits, broadcastable to ``(b, a, t, s)``."""
    if is_causal:
        mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:  # here True takes part
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
