"""Calibration without training: patches attend to their like, and outliers are suppressed.

The attention of image models lets patches look at a few places that hold the whole image's sense,
which is good for its class and bad for its map. Attention of queries to queries, keys to keys and
values to values stays among patches that are alike.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from camkit.capture.attention import Attention, FusedAttention
from camkit.edits.protocol import Attended, BlockContext
from camkit.errors import UnsupportedModelError
from camkit.ops.attention import head_mean
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

    def log_weights(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> Float[Tensor, "b s"]:
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


@dataclass(frozen=True)
class StaticCalibration:
    """A second stream of patches through the chosen blocks, by self-likeness and without MLP.

    It starts as the tokens that enter the first chosen block; every block adds its own projection
    of its own values, gathered by the mean of softmax(q q'), softmax(k k') and softmax(v v') at the
    block's scale; q, k and v come from the host's stream, which goes on as ever. Behind the last
    chosen block the patches are those of the second stream, all other tokens the host's. So where a
    class token makes the scores they do not change at all, but what a classifier or a text says of
    patches does.

    All three pairs and summed heads are static visual calibration of ExCEL (Yang et al. 2025);
    ``of="v", heads="own"`` is CLIP Surgery (Li et al. 2023). Position biases take no part
    (ours). Attach it to the last five blocks (ExCEL) with
    ``camkit.attach(model, edit, blocks=5)``; they must follow each other.

    Attributes:
        of: which of queries, keys and values attend to themselves: "qkv", "qk", "v" and so on.
        heads: "own" gathers each head's values by its own map; "mean" by the mean map of all heads;
            "sum" by their sum, as ExCEL's code, which weighs the attention of each block as many
            times as it has heads.
    """

    of: str = "qkv"
    heads: Literal["own", "mean", "sum"] = "sum"

    def __post_init__(self) -> None:
        if not self.of or len(set(self.of)) < len(self.of) or not set(self.of) <= set("qkv"):
            raise ValueError(f'`of` must name some of "qkv", none twice, got {self.of!r}')
        if self.heads not in ("own", "mean", "sum"):
            raise ValueError(f'`heads` must be "own", "mean" or "sum", got {self.heads!r}')

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        """The host's own stream is left as it is."""
        del tokens, attention, site
        return output

    def step(self, side: Tokens, attended: Attended) -> Tokens:
        """The second stream with this block's calibrated attention added."""
        return side + attended.project(self.gathered(attended.attention)).to(side.dtype)

    def merge(self, tokens: Tokens, side: Tokens, site: BlockContext) -> Tokens:
        """Patches of the second stream among the host's other tokens."""
        places = site.anatomy.patches(tokens.shape[1])
        patches = torch.tensor(places, device=tokens.device)
        return tokens.index_copy(1, patches, side[:, patches].to(tokens.dtype))

    def gathered(self, attention: FusedAttention) -> Tensor:
        """The values of each head, ``(b, a, t, e)``, gathered by likeness."""
        pairs = {"q": attention.q, "k": attention.k, "v": attention.v}
        values: Tensor = torch.as_tensor(attention.v)
        return torch.stack([self._by(pairs[name], values, attention) for name in self.of]).mean(0)

    def _by(self, like: Tensor | None, values: Tensor, attention: FusedAttention) -> Tensor:
        like = torch.as_tensor(like)
        if self.heads == "own":
            return F.scaled_dot_product_attention(like, like, values, scale=attention.scale)
        joined = head_mean(like, like, scale=attention.scale)[:, None].to(values.dtype) @ values
        return joined * like.shape[1] if self.heads == "sum" else joined
