"""What is added to the logits of an attention call, as a tensor that fits them."""

import torch
from torch import Tensor


def key_bias(tilt: Tensor, dtype: torch.dtype) -> Tensor:
    """Log-weights as an additive mask, in the queries' own type: cuDNN misreads any other."""
    return (tilt[:, None, None] if tilt.dim() == 2 else tilt[:, :, None]).to(dtype)


def gated_bias(log_weights: Tensor | None, gated_rows: int, q: Tensor) -> Tensor | None:
    """Log-weights as `camkit.ops.reweight` takes them: -1 rows are all, others the first ones."""
    if log_weights is None:
        return None
    bias = key_bias(log_weights, log_weights.dtype)
    if gated_rows < 0:
        return bias
    gated = torch.arange(q.shape[2], device=q.device)[:, None] < gated_rows
    return torch.where(gated, bias, 0.0)


def bias_of(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
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
