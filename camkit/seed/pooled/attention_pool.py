"""A pooling head run again, so that its score can be shared out among the patches."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.scaled_weights import scaled_weights
from camkit.capture.search import head_count, is_attention
from camkit.capture.tail import TailCall
from camkit.errors import UnsupportedModelError


def pooled_shares(
    call: TailCall,
    read: Callable[[Tensor], Tensor],
    *,
    patches: Sequence[int],
    nodes: int,
) -> Float[Tensor, "b n"]:
    """What each patch adds to a score of the pooled token.

    The score is followed while the attention weights grow from nothing to what they are, along a
    straight line, and each weight is credited with its gradient on the way (integrated gradients,
    Sundararajan et al. 2017). All shares, those of other tokens included, add up to the score less
    what it is without any patch; a head that is linear behind its attention has the same shares at
    every point, and one node is enough.

    Args:
        call: the pooling head's call.
        read: makes one score an image of what the head returns.
        patches: positions of the patches among its tokens.
        nodes: points on the line, at the places of Gauss and Legendre.
    """
    attention = next((m for m in call.module.modules() if is_attention(m)), call.module)
    shares = []
    with torch.inference_mode(mode=False), torch.enable_grad():
        tokens = call.input.clone()
        for place, weight in _gauss(nodes):
            leaves: list[Tensor] = []
            with scaled_weights(place, leaves, head_count(attention)):
                score = read(call.module.forward(tokens)).sum()
            if len(leaves) != 1 or leaves[0].shape[2] != 1:
                raise UnsupportedModelError(
                    f"{type(call.module).__name__} does not pool by the attention of one query, so "
                    "its score cannot be shared out; use ClassWeightSeed or GradientSeed"
                )
            (gradient,) = torch.autograd.grad(score, leaves)
            on_the_way = (leaves[0] * gradient)[:, :, 0].sum(1).detach()
            shares.append(weight / place * on_the_way)
    return torch.stack(shares).sum(0)[:, list(patches)]


def _gauss(nodes: int) -> list[tuple[float, float]]:
    """Places in [0, 1] and weights of Gauss-Legendre quadrature (Golub and Welsch 1969)."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    places, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return list(zip(((places + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))
