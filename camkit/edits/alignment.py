"""Hybrid feature alignment (HFA): attention joined by likeness of embeddings and of colours.

G is the row-softmax of the cosines between tokens over ``temperature``. Each function returns the
class rows and class columns of its own (t, t) matrix, whose rows sum to one, without holding it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.edits.interaction import Interaction
from camkit.edits.protocol import BlockContext
from camkit.ops.attention import take
from camkit.ops.similarity import (
    check_positive,
    colour_mass,
    colour_smooth,
    cosine_rows_and_columns,
    cosine_smooth,
)
from camkit.tensors import Tokens

ColourReading: TypeAlias = Literal["one_sided", "two_sided", "descriptor"]


class Cues(NamedTuple):
    """What the cues beside attention are made of."""

    tokens: Tokens
    colours: Float[Tensor, "b n 3"]
    classes: list[int]
    patches: list[int]
    temperature: float
    width: float


def likeness(
    tokens: Tokens, classes: list[int], patches: list[int], temperature: float
) -> Interaction:
    """G itself, which knows no colours."""
    rows, columns = cosine_rows_and_columns(tokens, classes, temperature=temperature)
    return Interaction(take(rows, classes, 2), take(rows, patches, 2), take(columns, patches, 1))


def one_sided(cues: Cues) -> Interaction:
    """K G: what patches take from classes is averaged over patches of like colour."""
    found = likeness(cues.tokens, cues.classes, cues.patches, cues.temperature)
    smooth = colour_smooth(cues.colours, found.patch_to_class, width=cues.width)
    return Interaction(found.class_to_class, found.class_to_patch, smooth)


def two_sided(cues: Cues) -> Interaction:
    """K G K', rows made to sum to one again: what classes take from patches is averaged as well."""
    found = one_sided(cues)
    rows = colour_smooth(cues.colours, found.class_to_patch.mT, width=cues.width).mT
    # what is drawn to each token: one for all but the patches, and to these by colour
    mass = colour_mass(cues.colours, width=cues.width)[..., None]
    drawn = cues.tokens.new_ones(*cues.tokens.shape[:2], 1)
    by_colour = mass * colour_smooth(cues.colours, 1 / mass, width=cues.width)
    index = torch.tensor(cues.patches, device=drawn.device)
    drawn = drawn.index_copy(1, index, by_colour.to(drawn.dtype))
    total = cosine_smooth(cues.tokens, drawn, temperature=cues.temperature)
    of_patches = colour_smooth(cues.colours, total[:, cues.patches], width=cues.width)
    # the row sums of G K' over classes, K' leaving other special tokens where they are
    of_classes = total[:, cues.classes]
    return Interaction(
        found.class_to_class / of_classes, rows / of_classes, found.patch_to_class / of_patches
    )


def descriptor(cues: Cues) -> Interaction:
    """Every token gets the mean colour of the patches it is like, and these are compared.

    So class tokens have a colour, too. The second comparison is ours, and gets no gradient.
    """
    with torch.no_grad():
        everywhere = cues.tokens.new_zeros(*cues.tokens.shape[:2], 4)
        index = torch.tensor(cues.patches, device=everywhere.device)
        known = torch.cat([cues.colours, torch.ones_like(cues.colours[..., :1])], -1)
        everywhere = everywhere.index_copy(1, index, known.to(everywhere.dtype))
        gathered = cosine_smooth(cues.tokens, everywhere, temperature=cues.temperature)
        colours = gathered[..., :3] / gathered[..., 3:].clamp_min(1e-12)
        of_classes = colours[:, cues.classes]
        distance = (of_classes[:, :, None] - colours[:, None]).square().sum(-1)
        near = (distance / (-2 * cues.width**2)).exp()
        mass = colour_mass(colours, width=cues.width)
        rows = near / near.sum(-1, keepdim=True)
        columns = near[..., cues.patches].mT / mass[:, cues.patches, None]
    return Interaction(rows[..., cues.classes], rows[..., cues.patches], columns)


COLOUR_READINGS: dict[ColourReading, Callable[[Cues], Interaction]] = {
    "one_sided": one_sided,
    "two_sided": two_sided,
    "descriptor": descriptor,
}


@dataclass(frozen=True)
class HybridAlignment:
    """Joins self-attention A with the likeness of tokens and of patch colours.

    ``A' = (A + weight * K G) / (1 + weight)``, where G is the row-softmax of the cosines between
    tokens over ``temperature``, and K, over the patches alone, the row-softmax of
    ``-|r_i - r_j|^2 / (2 colour_width^2)`` for mean patch colours r.

    That RGB, embedding likeness and self-attention are joined is the paper's; that colours multiply
    the cosines and the product is added to the attention is read off its figure, where the shapes
    do not fit as drawn. That both are made row-stochastic first is ours: raw cosines are hundreds
    of times larger than attention and would erase it. So are the two kernels, all three numbers,
    and that the tokens compared are those the attention module was given, behind its norm.

    Attributes:
        weight: of the cues beside attention, at least 0; 0 leaves attention as it is.
        temperature: divides the cosines; small values trust only the most alike.
        colour_width: distance in RGB, in [0, 1], at which likeness fades; None leaves colours out.
        reading: how colours enter, as the shapes of the figure do not fit. "one_sided" is K G;
            "two_sided" is K G K', rows made to sum to one again; "descriptor" compares the colours
            that tokens gather from the patches they are like (`camkit.edits.alignment`).
    """

    weight: float = 0.5
    temperature: float = 0.1
    colour_width: float | None = 0.15
    reading: ColourReading = "one_sided"

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"`weight` must be at least 0, got {self.weight}")
        check_positive("temperature", self.temperature)
        if self.colour_width is not None:
            check_positive("colour_width", self.colour_width)
        if self.reading not in COLOUR_READINGS:
            known = ", ".join(COLOUR_READINGS)
            raise ValueError(f"`reading` must be one of {known}, got {self.reading!r}")

    def __call__(self, interaction: Interaction, tokens: Tokens, site: BlockContext) -> Interaction:
        """The interaction with the other cues in it.

        Args:
            interaction: of the class tokens.
            tokens: the block's tokens.
            site: roles of the tokens, and the picture.
        """
        if self.weight == 0:
            return interaction
        return interaction.blend(self.cues(tokens, site), self.weight)

    def cues(self, tokens: Tokens, site: BlockContext) -> Interaction:
        """What is joined with the attention: likeness of tokens, and of colours."""
        classes = list(site.anatomy.class_tokens)
        patches = site.anatomy.patches(tokens.shape[1])
        if self.colour_width is None:
            return likeness(tokens, classes, patches, self.temperature)
        colours = site.picture.colours(len(patches)).to(tokens.device)
        read = COLOUR_READINGS[self.reading]
        return read(Cues(tokens, colours, classes, patches, self.temperature, self.colour_width))

    def colours_only(self, interaction: Interaction, site: BlockContext) -> Interaction:
        """The colour cue alone, for classes that were compared with the embeddings already."""
        if self.weight == 0 or self.colour_width is None:
            return interaction
        columns = interaction.patch_to_class
        colours = site.picture.colours(columns.shape[1]).to(columns.device)
        smooth = colour_smooth(colours, columns, width=self.colour_width)
        return interaction.blend(replace(interaction, patch_to_class=smooth), self.weight)
