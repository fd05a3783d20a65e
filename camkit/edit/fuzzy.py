"""Keys pruned softly by how much attention they get."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.edit.site import Site
from camkit.tensors import Tokens


@dataclass(frozen=True)
class FuzzyKeyPruning:
    """Patches that little attention goes to are taken from the keys, by degrees.

    After the fuzzy token pruning of Yun et al. 2023, of which no formulas were at hand: a patch's
    importance is the attention it gets, averaged over heads and queries; a membership function
    makes a weight of it, in place of a hard cut. Ours are the function, a ramp from 0 at one
    quantile of the image's importances to 1 at another; that weights never fall below ``least``;
    that each block judges afresh; that class and register tokens always stay.

    Attributes:
        low: quantile at which a patch is out, in [0, 1).
        high: quantile from which it is wholly in, above ``low``.
        least: what is left of the attention to a patch that is out, in (0, 1].
    """

    low: float = 0.1
    high: float = 0.3
    least: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(
                f"`low` and `high` must be quantiles, 0 <= low < high <= 1, got {self.low} and "
                f"{self.high}"
            )
        if not 0.0 < self.least <= 1.0:
            raise ValueError(f"`least` must lie in (0, 1], got {self.least}")

    def log_weights(self, tokens: Tokens, attention: Attention, site: Site) -> Float[Tensor, "b s"]:
        """Log of the membership of each patch, 0 for all other tokens."""
        patches = torch.tensor(site.anatomy.patches(attention.shape[3]), device=tokens.device)
        importance = attention.head_mean().mean(1)[:, patches].detach().float()
        bounds = importance.new_tensor([self.low, self.high])
        low, high = importance.quantile(bounds, dim=1, keepdim=True)
        member = ((importance - low) / (high - low).clamp_min(1e-12)).clamp(self.least, 1.0)
        member = torch.where(high > low, member, 1.0)  # all alike: nobody is pruned
        weights = tokens.new_zeros(len(tokens), attention.shape[3])
        return weights.index_copy(1, patches, member.log().to(weights))
