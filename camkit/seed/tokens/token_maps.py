"""How tokens and their gradients become one map: a line of mathematics for each method."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Method: TypeAlias = Literal[
    "gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "elementwise", "eigengradcam"
]
Tokens: TypeAlias = Float[Tensor, "b n d"]
Powers: TypeAlias = tuple[Tokens, Tokens, Tokens]
"""First, second and third power of the gradient; means over samples where there are several."""


def token_map(method: Method, tokens: Tokens, powers: Powers) -> Float[Tensor, "b n"]:
    """One map for each image, positive and negative evidence alike."""
    if method == "eigengradcam":
        return principal_component(hirescam(tokens, powers))
    return WEIGHTED[method](tokens, powers).sum(-1)


def gradcam(tokens: Tokens, powers: Powers) -> Tokens:
    """Channels weighted by their mean gradient (Selvaraju et al. 2017)."""
    return tokens * powers[0].mean(1, keepdim=True)


def gradcam_plus_plus(tokens: Tokens, powers: Powers) -> Tokens:
    """Channels weighted by their positive gradients, places by equation 19 of the paper.

    Chattopadhay et al. 2018. The small number in the divisor is grad-cam's.
    """
    first, second, third = powers
    alpha = second / (2 * second + tokens.sum(1, keepdim=True) * third + 1e-6)
    alpha = alpha.masked_fill(first == 0, 0.0)
    return tokens * (first.clamp_min(0.0) * alpha).sum(1, keepdim=True)


def hirescam(tokens: Tokens, powers: Powers) -> Tokens:
    """Gradient times token (Draelos and Carin 2020)."""
    return tokens * powers[0]


def xgradcam(tokens: Tokens, powers: Powers) -> Tokens:
    """Channels weighted by gradient times their share at each place (Fu et al. 2020)."""
    share = tokens / (tokens.sum(1, keepdim=True) + 1e-7)
    return tokens * (powers[0] * share).sum(1, keepdim=True)


def layercam(tokens: Tokens, powers: Powers) -> Tokens:
    """Positive gradient times token (Jiang et al. 2021)."""
    return tokens * powers[0].clamp_min(0.0)


def elementwise(tokens: Tokens, powers: Powers) -> Tokens:
    """What is positive of gradient times token; of grad-cam's making."""
    return (tokens * powers[0]).clamp_min(0.0)


WEIGHTED: dict[str, Callable[[Tensor, tuple[Tensor, Tensor, Tensor]], Tensor]] = {
    "gradcam": gradcam,
    "gradcam++": gradcam_plus_plus,
    "hirescam": hirescam,
    "xgradcam": xgradcam,
    "layercam": layercam,
    "elementwise": elementwise,
}


def principal_component(tokens: Tokens) -> Float[Tensor, "b n"]:
    """Each token along the direction in which the tokens of its image differ most.

    A direction has no sign. As in SegEigenCAM (equation 13), the larger extreme is made positive.
    """
    centred = (tokens - tokens.mean(1, keepdim=True)).double()
    if centred.shape[1] <= centred.shape[2]:
        values, vectors = torch.linalg.eigh(centred @ centred.mT)
        along = vectors[..., -1] * values[..., -1:].clamp_min(0.0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(centred.mT @ centred)
        along = torch.einsum("bnd,bd->bn", centred, vectors[..., -1])
    turned = along.amin(1, keepdim=True).abs() > along.amax(1, keepdim=True).abs()
    return torch.where(turned, -along, along).to(tokens.dtype)
