"""Every private part of torch that camkit uses.

`torch.nn.functional.scaled_dot_product_attention` chooses among these kernels; each computes the
log of every row's summed exponentials, and some of them hand it out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"
ON_DEVICE = {  # by what torch answers when it chooses a kernel
    1: "_scaled_dot_product_flash_attention",
    2: "_scaled_dot_product_efficient_attention",
    3: "_scaled_dot_product_cudnn_attention",
}
KERNELS = (ON_CPU, *ON_DEVICE.values())
_FLASH = 1
_CHUNK = 1 << 23  # logits held at a time where no kernel tells


def kernel_of(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> str | None:
    """The kernel that scaled_dot_product_attention would run, if it can be asked for more.

    Running it by name then gives the same bits, and the normaliser beside them.
    """
    device = q.device.type
    plain = q.dim() == 4 and not options.get("enable_gqa") and device in ("cpu", "cuda")
    if not plain or torch.is_autocast_enabled(device) or not q.numel() or not k.shape[2]:
        return None
    if mask is not None and (device != "cpu" or mask.dtype == torch.bool):
        return None  # a device kernel wants a whole mask, padded in its own way
    choice: int = torch._fused_sdp_choice(
        q,
        k,
        v,
        mask,
        options["dropout_p"],
        options["is_causal"],
        scale=options["scale"],
    )
    if device == "cpu":
        return ON_CPU if choice == _FLASH else None
    # torch pads other widths before it runs one of these
    return ON_DEVICE.get(choice) if q.shape[-1] % 8 == 0 == v.shape[-1] % 8 else None


def run(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output ``(b, a, t, e)`` and normaliser ``(b, a, t)`` of a kernel that was chosen."""
    kernel = getattr(torch.ops.aten, name)
    dropout, causal, scale = options["dropout_p"], options["is_causal"], options["scale"]
    if name == ON_CPU:
        output, normaliser = kernel(q, k, v, dropout, causal, attn_mask=mask, scale=scale)
    elif name == ON_DEVICE[_FLASH]:
        output, normaliser, *_ = kernel(q, k, v, dropout, causal, scale=scale)
    else:
        output, normaliser, *_ = kernel(q, k, v, None, True, dropout, causal, scale=scale)  # noqa: FBT003
    return output, normaliser_of(normaliser, q)


def asked(
    name: str, rest: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor | None, bool, float | None]:
    """Mask, causality and scale of a call of a kernel, behind its first three arguments."""
    first = 0 if name in (ON_CPU, ON_DEVICE[_FLASH]) else 2  # others take a mask and a flag first
    given = dict(zip(("dropout_p", "is_causal"), rest[first:], strict=False)) | named
    mask = rest[0] if first and rest else named.get("attn_mask", named.get("attn_bias"))
    return mask, bool(given.get("is_causal")), named.get("scale")


def normaliser_of(found: Tensor, q: Tensor) -> Tensor:
    """A kernel's normaliser as ``(b, a, t)``: some give it an axis more or rows to spare."""
    return found.reshape(*q.shape[:2], -1)[..., : q.shape[2]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``(b, a, t, e)`` and normaliser ``(b, a, t)`` by the shortest way there is.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: added to the logits, one row for all queries, in at least float32.
        scale: factor on the dot products.
    """
    options = {"dropout_p": 0.0, "is_causal": False, "scale": scale}
    name = kernel_of(q, k, v, mask, options)
    if name is not None:
        return run(name, q, k, v, mask, options)
    dtype = torch.promote_types(q.dtype, torch.float32)
    own = None if mask is None else mask.to(q.dtype)  # cuDNN misreads any other
    output = F.scaled_dot_product_attention(q, k, v, own, scale=scale)
    return output, _normaliser(q.to(dtype), k.to(dtype), mask, scale)


def _normaliser(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    images, heads, tokens, _ = q.shape
    step = max(1, _CHUNK // max(1, images * heads * k.shape[2]))
    found = [q.new_empty(images, heads, 0)]
    for start in range(0, tokens, step):
        logits = q[:, :, start : start + step] * scale @ k.mT
        found.append((logits if mask is None else logits + mask.to(q.dtype)).logsumexp(-1))
    return torch.cat(found, 2)
