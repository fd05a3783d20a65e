"""Values carried along attention, as one fused attention call."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.ops.class_attention import Bias, Heads, key_weights, known_normaliser
from camkit.ops.normaliser import rows_of
from camkit.ops.places import run_of, take
from camkit.ops.reweight import compiled_for, propagate_mean


def propagate(  # noqa: PLR0913 - all of one attention call
    q: Heads,
    k: Heads,
    values: Float[Tensor, "b k n"],
    patches: Sequence[int],
    *,
    scale: float,
    bias: Bias | None = None,
    normaliser: Float[Tensor, "b a t"] | None = None,
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
        normaliser: of the kernel that ran; with it, a compiled kernel averages the heads as it
            goes, where one is at hand.
    """
    ones = torch.ones_like(values[:, :1])
    carried = torch.cat([values, ones], 1)
    skip, tilt = q.shape[2] - len(patches), key_weights(bias, q)
    behind = run_of(patches, q.shape[2]) == range(skip, q.shape[2])
    known = normaliser is not None and behind and (bias is None or tilt is not None)
    if known and normaliser is not None and compiled_for(q, k):
        level = known_normaliser(q, k, scale, bias, normaliser)
        carried = propagate_mean(q, k, level, carried, tilt, skip=skip, scale=scale)
    else:
        carried = _ride(q, k, carried, patches, scale, bias)
    return (carried[:, :-1] / carried[:, -1:]).to(values.dtype)


def _ride(
    q: Tensor, k: Tensor, maps: Tensor, patches: Sequence[int], scale: float, bias: Tensor | None
) -> Tensor:
    """Maps in place of the values of torch's own fused attention, heads averaged."""
    count = maps.shape[1]
    width = max(q.shape[-1], count)  # a value as wide as the keys takes the fast kernels
    rider = F.pad(maps.mT.to(q.dtype), (0, width - count))
    skip = k.shape[2] - len(patches)
    if run_of(patches, k.shape[2]) == range(skip, k.shape[2]):
        rider = F.pad(rider, (0, 0, skip, 0))
    else:
        where = torch.tensor(list(patches), device=q.device)
        everywhere = rider.new_zeros(len(q), k.shape[2], width)
        rider = everywhere.index_copy(1, where, rider)
    carried = F.scaled_dot_product_attention(
        take(q, patches, 2),
        k,
        rider[:, None].expand(-1, q.shape[1], -1, -1),
        attn_mask=rows_of(bias, list(patches)),
        scale=scale,
    )
    return carried.mean(1)[..., :count].mT
