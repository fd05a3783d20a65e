"""The host's fused attention call, and the softmax normaliser that its kernel computes anyway."""

from typing import Any

import torch
from torch import Tensor

ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_FLASH = 1  # what torch answers when it chooses that kernel


def normaliser_at_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Whether `attend_on_cpu` runs the very kernel that scaled_dot_product_attention would.

    Only there it hands the normaliser out beside the same bits; elsewhere it is computed anew.
    """
    plain = query.device.type == "cpu" and query.dim() == 4 and not options.get("enable_gqa")
    masked = mask is not None and mask.dtype == torch.bool
    if not plain or masked or torch.is_autocast_enabled("cpu"):
        return False
    choice: int = torch._fused_sdp_choice(
        query,
        key,
        value,
        mask,
        options["dropout_p"],
        options["is_causal"],
        scale=options["scale"],
    )
    return choice == _FLASH


def attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output ``(b, a, t, e)`` and log of each query's summed exponentials ``(b, a, t)``."""
    found: tuple[Tensor, Tensor] = getattr(torch.ops.aten, ON_CPU)(
        query,
        key,
        value,
        options["dropout_p"],
        options["is_causal"],
        attn_mask=mask,
        scale=options["scale"],
    )
    return found
