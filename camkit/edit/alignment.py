"""Hybrid feature alignment (HFA): attention joined by likeness of embeddings and of colours."""

import math
from dataclasses import dataclass, replace

from camkit.edit.colour_cues import COLOUR_READINGS, ColourReading, Cues, likeness
from camkit.edit.interaction import Interaction
from camkit.edit.site import Site
from camkit.ops.similarity import check_positive, colour_smooth
from camkit.tensors import Tokens


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
            that tokens gather from the patches they are like (`camkit.edit.colour_cues`).
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

    def __call__(self, interaction: Interaction, tokens: Tokens, site: Site) -> Interaction:
        """The interaction with the other cues in it.

        Args:
            interaction: of the class tokens.
            tokens: the block's tokens.
            site: roles of the tokens, and the picture.
        """
        if self.weight == 0:
            return interaction
        return interaction.blend(self.cues(tokens, site), self.weight)

    def cues(self, tokens: Tokens, site: Site) -> Interaction:
        """What is joined with the attention: likeness of tokens, and of colours."""
        classes = list(site.anatomy.class_tokens)
        patches = site.anatomy.patches(tokens.shape[1])
        if self.colour_width is None:
            return likeness(tokens, classes, patches, self.temperature)
        colours = site.picture.colours(len(patches)).to(tokens.device)
        read = COLOUR_READINGS[self.reading]
        return read(Cues(tokens, colours, classes, patches, self.temperature, self.colour_width))

    def colours_only(self, interaction: Interaction, site: Site) -> Interaction:
        """The colour cue alone, for classes that were compared with the embeddings already."""
        if self.weight == 0 or self.colour_width is None:
            return interaction
        columns = interaction.patch_to_class
        colours = site.picture.colours(columns.shape[1]).to(columns.device)
        smooth = colour_smooth(colours, columns, width=self.colour_width)
        return interaction.blend(replace(interaction, patch_to_class=smooth), self.weight)
