"""Calibration of attention without training.

The attention of classifiers lets patches attend to a few places that hold the meaning of the whole
image, which is good for its class and bad for its map. Here such keys are weighted down, or patches
attend to similar patches by queries to queries, keys to keys and values to values.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from camkit.capture.attention import Attention, FusedAttention
from camkit.edits.protocol import Attended, BlockContext
from camkit.errors import UnsupportedModelError
from camkit.ops.attention import AttentionInputs, head_mean, run_of
from camkit.ops.scaling import rounding_of
from camkit.tensors import Tokens


@dataclass(frozen=True)
class SuppressOutliers:
    """Reduces attention to patches whose norm stands out in the stream between blocks.

    Large models store global information in a few patches of high norm (Darcet et al. 2024), which
    then are bright in every map. A patch stands out by how far its norm lies above the median, in
    units of the median absolute deviation (scaled to that of a normal distribution), and the
    attention of all tokens to it is multiplied by ``keep``. The finding is the paper's, whose
    remedy is training with registers; both steps are ours.

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

    def log_weights(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> Float[Tensor, "b s"]:
        """Return ``log(keep)`` for patches that stand out, 0 for all other tokens."""
        del attention
        if site.stream is None:
            raise UnsupportedModelError(
                "the tokens between blocks were not seen, and tokens behind a norm all have the "
                "same length; this host's attention lies in no block that takes (b, t, d) tokens"
            )
        stream = site.stream.detach().float()
        patches = torch.tensor(site.anatomy.patches(stream.shape[1]), device=stream.device)
        stands_out = outlying(stream[:, patches].norm(dim=-1), self.threshold)
        weights = tokens.new_zeros(tokens.shape[:2])
        return weights.index_copy(1, patches, stands_out.to(weights) * math.log(self.keep))


def outlying(norms: Float[Tensor, "b n"], threshold: float) -> Bool[Tensor, "b n"]:
    """Find norms more than ``threshold`` robust deviations above the median of their image."""
    above = norms - norms.median(1, keepdim=True).values
    deviation = 1.4826 * above.abs().median(1, keepdim=True).values
    return above > threshold * deviation.clamp_min(1e-6 * norms.mean(1, keepdim=True))


@dataclass(frozen=True)
class FuzzyKeyPruning:
    """Fades patches that get little attention out of the keys.

    After the fuzzy token pruning of Yun et al. 2023, without its formulas: a patch's importance is
    the attention it gets, averaged over heads and queries, and a membership function turns it into
    a weight, in place of a hard cut. Ours: the function, a ramp from 0 at one quantile of the
    image's importances to 1 at another; weights never fall below ``least``; each block judges
    afresh; class and register tokens always stay.

    Attributes:
        low: quantile at which a patch is out, in [0, 1).
        high: quantile from which it is fully in, above ``low``.
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

    def log_weights(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> Float[Tensor, "b s"]:
        """Return the log of the membership of each patch, 0 for all other tokens."""
        patches = torch.tensor(site.anatomy.patches(attention.shape[3]), device=tokens.device)
        importance = attention.head_mean().mean(1)[:, patches].detach().float()
        bounds = importance.new_tensor([self.low, self.high])
        low, high = importance.quantile(bounds, dim=1, keepdim=True)
        uneven = high - low > rounding_of(importance, (1,))
        span = torch.where(uneven, high - low, 1.0)
        member = ((importance - low) / span).clamp(self.least, 1.0)
        member = torch.where(uneven, member, 1.0)  # nothing is pruned if all are equal
        weights = tokens.new_zeros(len(tokens), attention.shape[3])
        return weights.index_copy(1, patches, member.log().to(weights))


@dataclass(frozen=True)
class StaticCalibration:
    """Runs a second stream of patches through the chosen blocks, by self-attention without MLP.

    It starts as the tokens that enter the first chosen block; every block adds its own projection
    of its own values, averaged by the mean of softmax(q q'), softmax(k k') and softmax(v v') at the
    block's scale; q, k and v come from the host's stream, which stays as it is. Behind the last
    chosen block the patches are those of the second stream, and all other tokens are the host's. So
    scores read from a class token do not change, but those of patches do, by a classifier or by
    texts.

    All three pairs and summed heads are static visual calibration of ExCEL (Yang et al. 2025);
    ``of="v", heads="own"`` is CLIP Surgery (Li et al. 2023). Ours: position biases are left out.
    Attach it to the last five blocks (ExCEL) with ``camkit.attach(model, edit, blocks=5)``; the
    blocks must follow each other.

    Attributes:
        of: which of queries, keys and values attend to themselves: "qkv", "qk", "v" and so on.
        heads: "own" averages each head's values by its own map; "mean" by the mean map of all
            heads; "sum" by their sum, as ExCEL's code, which weights the attention of each block by
            its number of heads.
    """

    of: str = "qkv"
    heads: Literal["own", "mean", "sum"] = "sum"

    replaces_patches: ClassVar[bool] = True  # nothing reads those of the host behind the last block

    def __post_init__(self) -> None:
        if not self.of or len(set(self.of)) < len(self.of) or not set(self.of) <= set("qkv"):
            raise ValueError(f'`of` must name some of "qkv", none twice, got {self.of!r}')
        if self.heads not in ("own", "mean", "sum"):
            raise ValueError(f'`heads` must be "own", "mean" or "sum", got {self.heads!r}')

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        """Leave the host's own stream as it is."""
        del tokens, attention, site
        return output

    def step(self, side: Tokens, attended: Attended) -> Tokens:
        """Add this block's calibrated attention to the second stream."""
        return side + attended.project(self.gathered(attended.attention)).to(side.dtype)

    def merge(self, tokens: Tokens, side: Tokens, site: BlockContext) -> Tokens:
        """Put the patches of the second stream among the host's other tokens."""
        places = site.anatomy.patches(tokens.shape[1])
        run = run_of(places, tokens.shape[1])
        if run is not None:  # three copies less
            parts = tokens[:, : run.start], side[:, run.start : run.stop], tokens[:, run.stop :]
            return torch.cat([part.to(tokens.dtype) for part in parts], 1)
        patches = torch.tensor(places, device=tokens.device)
        return tokens.index_copy(1, patches, side[:, patches].to(tokens.dtype))

    def gathered(self, attention: FusedAttention) -> Tensor:
        """Average the values of each head, ``(b, a, t, e)``, over similar tokens."""
        if attention.v is None:
            raise UnsupportedModelError("the values of this attention were not recorded")
        values, scale = attention.v, attention.scale
        parts: list[Tensor] = [getattr(attention, name) for name in self.of]
        if self.heads == "own":
            own = [F.scaled_dot_product_attention(x, x, values, scale=scale) for x in parts]
            return torch.stack(own).mean(0)
        # the maps are averaged before they meet the values: one product in place of three
        if len({part.shape for part in parts}) == 1:  # values may be wider than keys
            parts = [torch.cat(parts, 1)]
        average = reduce(torch.add, (head_mean(AttentionInputs(x, x, scale)) for x in parts)) / len(
            parts
        )
        joined = values.transpose(1, 2).flatten(2)  # one product for all heads
        gathered = (average.to(values.dtype) @ joined).unflatten(-1, values.shape[1::2])
        gathered = gathered.transpose(1, 2)
        return gathered * values.shape[1] if self.heads == "sum" else gathered
