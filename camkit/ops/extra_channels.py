"""Numbers added to the logits of attention as extra channels of its queries and keys.

``scale * q k^T + log w`` is one product if ``log w`` is a channel of the keys and a constant its
counterpart in the queries. Features of pairs of tokens are such channels already. A fused kernel
without a mask then applies them, on any device, and its own backward has their gradients. A mask
excludes the fastest kernels on CUDA; on a CPU a mask of one row costs less than wider heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from camkit.native.kernels import switched_off

DEVICES = ("cuda",)  # where a mask costs more than wider heads
_ALIGNED = 8  # channels, else torch pads once more
# A kernel multiplies numbers of half precision, whose few digits are given to several channels.
_PARTS = {torch.float16: 3, torch.bfloat16: 3}
_SUPPRESSED = 1e30  # below every other logit, and no product of it overflows float32


def channels_preferred(q: Tensor) -> bool:
    """Whether channels are used where a mask would do: on CUDA, unless kernels are off."""
    return q.device.type in DEVICES and not switched_off()


def with_key_weights(
    q: Tensor, k: Tensor, log_weights: Tensor, scale: float, gated_rows: int
) -> tuple[Tensor, Tensor]:
    """Append log-weights to the keys, and their factor to the queries.

    The weight of a suppressed key is the lowest number instead of -inf, whose product with zero is
    NaN: its power is zero all the same. A row without any key has to be replaced by the caller. In
    float16 log-weights end at about -46,000, the lowest number over a factor of at most the root of
    2; further below, weights are equal to each other, and zero beside a key that takes part.

    Args:
        q: queries, ``(b, a, t, d)``.
        k: keys.
        log_weights: ``(b, t)`` or ``(b, a, t)``, in at least float32.
        scale: factor on the dot products.
        gated_rows: number of rows, from the first, that the weights apply to; -1 for all.
    """
    factor = math.copysign(2.0 ** round(-math.log2(abs(scale))), scale)  # a number without digits
    most = min(torch.finfo(q.dtype).max, _SUPPRESSED)
    left = (log_weights / (scale * factor)).clamp(-most, most)
    channels = [left.to(q.dtype)]
    with torch.no_grad():  # the first channel has the gradient of all
        for _ in range(_PARTS.get(q.dtype, 1) - 1):
            left = left - channels[-1].to(left.dtype)
            channels.append(left.to(q.dtype))
    of_keys = torch.stack(channels, -1)
    of_keys = of_keys[:, None] if of_keys.dim() == 3 else of_keys
    of_queries = q.new_full((*q.shape[:3], len(channels)), factor)
    if gated_rows >= 0:
        of_queries[:, :, gated_rows:] = 0.0
    joined = torch.cat([k, of_keys.expand(*k.shape[:3], -1)], -1)
    return torch.cat([q, of_queries], -1), joined


def aligned(*heads: Tensor) -> tuple[Tensor, ...]:
    """Pad all heads with zeros to the width of the widest, a multiple of 8."""
    width = -(-max(x.shape[-1] for x in heads) // _ALIGNED) * _ALIGNED
    return tuple(F.pad(x, (0, width - x.shape[-1])) for x in heads)
