"""Controls: edits that use nothing of the classes, to compare a method with at equal strength.

A gain that a control reaches is no gain of the method. Each says what it controls for; docs/doei.md
has them side by side. A strength that the handle ramps multiplies theirs.
"""

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from camkit.capture.attention import Attention, FusedAttention
from camkit.edits.protocol import BlockContext, Edit
from camkit.errors import UnsupportedModelError
from camkit.ops.paired import PairBias
from camkit.tensors import Tokens


@dataclass(frozen=True)
class ScaleOutput:
    """Multiply what the block adds to its tokens by ``factor``; 1 changes nothing.

    Controls for a gain of longer outputs.
    """

    factor: float = 2.0

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        del tokens, attention
        return output * (1.0 + (self.factor - 1.0) * site.strength)


@dataclass(frozen=True)
class OneMoreHop:
    """Add the output again, averaged by the block's own attention, times ``strength``.

    0 changes nothing. Controls for a gain of more mixing, along the attention that is there.
    """

    strength: float = 1.0

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        del tokens
        hop = attention.head_mean().to(output.dtype) @ output
        return output + self.strength * site.strength * hop


@dataclass(frozen=True)
class MeanInjection:
    """Add the mean patch of the output to every patch, times ``strength``; 0 changes nothing.

    Controls for a gain of what all patches share, the image as a whole: tokens rebuilt by flat
    confidences are this and nothing else. Other tokens are untouched.
    """

    strength: float = 1.0

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        del tokens, attention
        patches = torch.tensor(site.anatomy.patches(output.shape[1]), device=output.device)
        mean = output[:, patches].mean(1, keepdim=True).expand(-1, len(patches), -1)
        return output.index_add(1, patches, mean, alpha=self.strength * site.strength)


@dataclass(frozen=True)
class RandomGates:
    """Scale patches as strongly as another edit changes them, but in a random order.

    Controls for a gain of gates of any kind: only the order says which patches are confident. It is
    drawn from the tokens, so that a network in training, whose tokens change with every step,
    cannot learn it, while the same model gives the same image the same gates on one machine, and a
    block that is computed again for its gradient keeps them.

    Attributes:
        edit: gives the strengths: the length of its change over that of the output. What it adds to
            logits is left out.
        rng_seed: of the order; blocks and images get different orders.
    """

    edit: Edit
    rng_seed: int = 0

    def __post_init__(self) -> None:
        given: object = self.edit
        changes = isinstance(given, Edit) and getattr(given, "changes_output", True)
        if not changes:
            raise ValueError(
                "`edit` must change the outputs of blocks, or there is no strength to take from "
                f"it; give camkit.DOEI.as_drawn() or another edit of outputs, got {self.edit!r}"
            )

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        changed = self.edit(tokens, output, attention, site)
        wide = torch.promote_types(output.dtype, torch.float32)
        length = output.to(wide).norm(dim=-1).clamp_min(1e-12)
        strength = ((changed - output).to(wide).norm(dim=-1) / length).to(output.dtype)
        patches = torch.tensor(site.anatomy.patches(output.shape[1]), device=output.device)
        generator = torch.Generator().manual_seed(self._seed(tokens, site))
        order = torch.rand(len(output), len(patches), generator=generator).argsort(1)
        shuffled = strength[:, patches].gather(1, order.to(output.device))
        strength = strength.index_copy(1, patches, shuffled)
        return output * (1 + strength[..., None])

    def _seed(self, tokens: Tokens, site: BlockContext) -> int:
        """Return a number that other tokens, blocks and seeds change."""
        numbers = tokens.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return zlib.crc32(numbers.data, zlib.crc32(f"{self.rng_seed} {site.index}".encode()))


@dataclass(frozen=True)
class KeepToSelf:
    """Add ``weight`` to the logit of every token with itself; 0 changes nothing.

    Controls for a gain of tokens that keep more of themselves: a likeness of tokens in the logits
    is greatest for a token and itself, so it does this, too. The weight that equals a likeness
    times w is w. Attached without ``blocks``, it acts in the last three, as `camkit.DOEI` does. Its
    features are as wide as there are tokens, so its memory grows with the number of pairs.
    """

    weight: float = 3.0

    default_blocks: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"`weight` must be finite, got {self.weight}")

    def pair_bias(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> PairBias | None:
        """Return ``weight`` on the diagonal: every token has a feature of its own."""
        images, _, queries, keys = attention.shape
        if queries != keys:
            raise UnsupportedModelError(
                f"{queries} queries attend to {keys} keys in this block, so no token attends to "
                "itself; leave it out with `blocks=`"
            )
        weight = self.weight * site.strength
        if weight == 0:
            return None
        one_hot = torch.eye(keys, dtype=tokens.dtype, device=tokens.device)
        own, other = (x.expand(images, -1, -1) for x in (weight * one_hot, one_hot))
        return PairBias(own, other, bound=abs(weight))


@dataclass(frozen=True)
class SharpenLogits:
    """Multiply the logits of every head by ``factor``; 1 changes nothing.

    Controls for a gain of sharper attention: what is added to logits raises their spread. Position
    biases and masks of the host stay as they are. Attached without ``blocks``, it acts in the last
    three, as `camkit.DOEI` does.
    """

    factor: float = 1.5

    default_blocks: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 0.0 <= self.factor < math.inf:
            raise ValueError(f"`factor` must be at least 0, got {self.factor}")

    def pair_bias(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> PairBias | None:
        """Return ``factor - 1`` times the logits, from queries and keys.

        Raises:
            UnsupportedModelError: the host computes its map itself, so there are none.
        """
        del tokens
        more = (self.factor - 1.0) * site.strength
        if more == 0:
            return None
        if not isinstance(attention, FusedAttention):
            raise UnsupportedModelError(
                "this host writes its attention map out, so its logits are unknown and cannot be "
                "multiplied; compare with camkit.edits.KeepToSelf, or switch to its fused kernel"
            )
        return PairBias(more * attention.scale * attention.q, attention.k)
