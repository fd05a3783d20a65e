"""Values carried along attention, as one fused attention call."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.ops.class_attention import Bias, Heads


def propagate(
    q: Heads,
    k: Heads,
    values: Float[Tensor, "b k n"],
    patches: Sequence[int],
    *,
    scale: float,
    bias: Bias | None = None,
) -> Float[Tensor, "b k n"]:
    """Average ``values`` over the patches each patch attends to, heads averaged.

    Equals ``A[patches, patches] @ values`` with A the head-mean attention and its patch-to-patch
    rows scaled to sum to one, so results stay within the range of ``values``. The map itself is
    never built: the values ride through the host's own kind of kernel in place of v, and a column
    of ones rides along to learn each row's share.

    Args:
        q: queries of all tokens.
        k: keys of all tokens.
        values: one value per patch, for each of k maps.
        patches: positions of the patches among the tokens.
        scale: factor on the dot products, as the host used it.
        bias: added to the logits.
    """
    where = torch.as_tensor(patches, device=q.device)
    maps = values.shape[1]
    rider = q.new_zeros(q.shape[0], k.shape[2], maps + 1)
    rider[:, where, :maps] = values.mT.to(q.dtype)
    rider[:, where, maps] = 1.0
    width = max(q.shape[-1], maps + 1)  # a value as wide as the keys takes the fast kernels
    rider = F.pad(rider, (0, width - maps - 1))
    carried = F.scaled_dot_product_attention(
        q[:, :, where],
        k,
        rider[:, None].expand(-1, q.shape[1], -1, -1),
        attn_mask=bias if bias is None or bias.shape[-2] == 1 else bias[..., where, :],
        scale=scale,
    ).mean(1)
    share = carried[..., maps : maps + 1]
    return (carried[..., :maps] / share).mT.to(values.dtype)
