"""Controls: edits that use nothing of the classes, to compare a method with at equal strength."""

from dataclasses import dataclass

import torch

from camkit.capture.attention import Attention
from camkit.edits.protocol import BlockContext, Edit
from camkit.tensors import Tokens


@dataclass(frozen=True)
class ScaleOutput:
    """Multiply what the block adds to its tokens by ``factor``; 1 changes nothing."""

    factor: float = 2.0

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        del tokens, attention, site
        return output * self.factor


@dataclass(frozen=True)
class OneMoreHop:
    """Add the output again, averaged by the block's own attention, times ``strength``.

    0 changes nothing.
    """

    strength: float = 1.0

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        del tokens, site
        return output + self.strength * (attention.head_mean().to(output.dtype) @ output)


@dataclass(frozen=True)
class RandomGates:
    """Scale patches as strongly as another edit changes them, but in a random order.

    Attributes:
        edit: gives the strengths: the length of its change over that of the output.
        rng_seed: of the order; blocks and images get different orders.
    """

    edit: Edit
    rng_seed: int = 0

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        changed = self.edit(tokens, output, attention, site)
        wide = torch.promote_types(output.dtype, torch.float32)
        length = output.to(wide).norm(dim=-1).clamp_min(1e-12)
        strength = ((changed - output).to(wide).norm(dim=-1) / length).to(output.dtype)
        patches = torch.tensor(site.anatomy.patches(output.shape[1]), device=output.device)
        generator = torch.Generator().manual_seed(self.rng_seed * 1000 + site.index)
        order = torch.rand(len(output), len(patches), generator=generator).argsort(1)
        shuffled = strength[:, patches].gather(1, order.to(output.device))
        strength = strength.index_copy(1, patches, shuffled)
        return output * (1 + strength[..., None])
