"""Patches that hold no picture: tokens of outlying norm, kept from being looked at."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.edit.site import Site
from camkit.errors import UnsupportedModelError
from camkit.tensors import Tokens


@dataclass(frozen=True)
class SuppressOutliers:
    """Takes attention from patches whose norm stands out in the stream between blocks.

    Large models park global information in a few patches of high norm (Darcet et al. 2024), which
    then shine in every map. They are told by how far the norm of a patch lies above the median, in
    units of the median absolute deviation (scaled to that of a normal distribution), and all
    tokens' attention to them is multiplied by ``keep``. The finding is the paper's, whose remedy
    is training with registers; both steps are ours.

    Attributes:
        threshold: deviations from which a norm stands out, positive.
        keep: what is left of the attention, in (0, 1]; 1 changes nothing.
    """

    threshold: float = 6.0
    keep: float = 1e-3

    reads_stream: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < math.inf:
            raise ValueError(f"`threshold` must be positive, got {self.threshold}")
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"`keep` must lie in (0, 1], got {self.keep}")

    def log_weights(self, tokens: Tokens, attention: Attention, site: Site) -> Float[Tensor, "b s"]:
        """``log(keep)`` for patches that stand out, 0 for all other tokens."""
        del attention
        if site.stream is None:
            raise UnsupportedModelError(
                "the tokens between blocks were not seen, and those behind a norm all have the "
                "same length; this host's attention lies in no block that takes (b, t, d) tokens"
            )
        stream = site.stream.detach().float()
        patches = torch.tensor(site.anatomy.patches(stream.shape[1]), device=stream.device)
        stands_out = outlying(stream[:, patches].norm(dim=-1), self.threshold)
        weights = tokens.new_zeros(tokens.shape[:2])
        return weights.index_copy(1, patches, stands_out.to(weights) * math.log(self.keep))


def outlying(norms: Float[Tensor, "b n"], threshold: float) -> Bool[Tensor, "b n"]:
    """Which norms lie more than ``threshold`` robust deviations above the median of their image."""
    above = norms - norms.median(1, keepdim=True).values
    deviation = 1.4826 * above.abs().median(1, keepdim=True).values
    return above > threshold * deviation.clamp_min(1e-6 * norms.mean(1, keepdim=True))
