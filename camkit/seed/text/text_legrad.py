"""Seed from how the likeness of each block's own tokens to texts answers to its attention."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import ExplicitAttention
from camkit.capture.record import Capture
from camkit.capture.scaled_weights import scaled_weights
from camkit.capture.tokens import TokenCall, TokenWatch
from camkit.errors import UnsupportedModelError
from camkit.seed.attention.legrad import block_maps, check_blocks, last_calls, score_maps
from camkit.seed.protocol import check_classes, keep_asked
from camkit.seed.text.text_classes import TextClasses
from camkit.tensors import Cam, Classes, Scores


@dataclass(frozen=True)
class TextLeGradSeed:
    """`camkit.LeGradSeed` for CLIP and its kin: a block's token is scored by its likeness to texts.

    Source: LeGrad (Bousselham et al. 2024). The token goes the way of the host's own pooled token:
    last norm, projection, and the host's scale of cosines, which the authors' code leaves at one.

    Attributes:
        text: the classes.
        blocks: so many of the last blocks; None is all.
        reading: which token is scored. "mean" and "class" are those of `camkit.LeGradSeed`. "pool"
            is for a host whose head pools by attention (SigLIP): the head is run on the tokens that
            leave a block, and the gradient is that at the head's own attention, as in the authors'
            code; there tokens do not pass the last norm, here they do, as in the host.
    """

    text: TextClasses
    blocks: int | None = None
    reading: Literal["mean", "class", "pool"] = "mean"

    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        if self.reading not in ("mean", "class", "pool"):
            raise ValueError(f'`reading` must be "mean", "class" or "pool", got {self.reading!r}')
        if (self.reading == "pool") != self.text.known_space().pools:
            fits = '"pool"' if self.text.known_space().pools else '"mean" or "class"'
            raise ValueError(
                f'`reading="pool"` is for hosts whose head pools by attention, and no other is for '
                f"them; with these texts use {fits}, got {self.reading!r}"
            )

    @property
    def tokens(self) -> TokenWatch:
        """What has to be watched for it, besides attention."""
        if self.reading == "pool":
            return TokenWatch(leaving=True)
        return TokenWatch(class_paths=self.reading == "class", within_blocks=self.reading == "mean")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, len(self.text))
        found = capture.class_paths if self.reading == "class" else capture.leaving
        maps = [self._maps(capture, call, classes) for call in last_calls(found, self.blocks)]
        mean = torch.stack([one[..., capture.patches] for one in maps]).mean(0)
        return keep_asked(capture.grid.fold(mean), classes)

    def _maps(self, capture: Capture, call: TokenCall, classes: Classes) -> Float[Tensor, "b k s"]:
        if self.reading != "pool":
            return block_maps(call, self._read, classes)
        leaves: list[Tensor] = []
        heads = capture.pooling[0].attention.shape[1] if capture.pooling else 1
        with torch.inference_mode(mode=False), scaled_weights(1.0, leaves, heads):
            tokens = call.tokens.detach().clone()
            embedded = self.text.known_space().pooled(tokens, gradients=True)
        if len(leaves) != 1 or leaves[0].shape[2:] != (1, tokens.shape[1]):
            raise UnsupportedModelError(
                "the head of this model does not pool its tokens by the attention of one query; "
                "use TextSimilaritySeed"
            )
        with torch.enable_grad():
            scores = self.text.logits(embedded)
        return score_maps(scores, ExplicitAttention(leaves[0]), classes)

    def _read(self, token: Float[Tensor, "b d"]) -> Scores:
        embedded = self.text.known_space().embed(token[:, None], gradients=True)
        return self.text.logits(embedded[:, 0])
