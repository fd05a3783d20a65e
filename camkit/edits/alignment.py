"""Hybrid feature alignment (HFA): attention joined with similarity of embeddings and colours."""

import math
from dataclasses import dataclass, replace

from camkit.edits.interaction import Interaction
from camkit.edits.protocol import BlockContext
from camkit.ops.attention import take
from camkit.ops.similarity import check_positive, colour_smooth, cosine_rows_and_columns
from camkit.tensors import Tokens


@dataclass(frozen=True)
class HybridAlignment:
    """Joins self-attention A with the similarity of tokens and of patch colours.

    ``A' = (A + weight * K G) / (1 + weight)``, where G is the row-softmax of the cosines between
    tokens over ``temperature``, and K, over the patches alone, the row-softmax of
    ``-|r_i - r_j|^2 / (2 colour_width^2)`` for mean patch colours r. So what patches take from
    classes is averaged over patches of similar colour. Only class rows and class columns of the
    (t, t) matrices are computed.

    From the paper: RGB, embedding similarity and self-attention are joined. From its figure, whose
    shapes do not fit as drawn: colours multiply the cosines, and the product is added to the
    attention. Ours: both sides are made row-stochastic first, because raw cosines are hundreds of
    times larger than attention and would erase it; the two kernels and all three numbers; and the
    tokens compared are those given to the attention module, behind its norm. Other ways for colours
    to enter are in `camkit.contrib`.

    Attributes:
        weight: of the cues beside attention, at least 0; 0 leaves attention as it is.
        temperature: divides the cosines; small values count only the most similar tokens.
        colour_width: distance in RGB, in [0, 1], at which similarity fades; None leaves colours
            out.
    """

    weight: float = 0.5
    temperature: float = 0.1
    colour_width: float | None = 0.15

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(f"`weight` must be at least 0, got {self.weight}")
        check_positive("temperature", self.temperature)
        if self.colour_width is not None:
            check_positive("colour_width", self.colour_width)

    def __call__(self, interaction: Interaction, tokens: Tokens, site: BlockContext) -> Interaction:
        """Return the interaction with the other cues blended in.

        Args:
            interaction: of the class tokens.
            tokens: the block's tokens.
            site: roles of the tokens, and the images.
        """
        if self.weight == 0:
            return interaction
        return interaction.blend(self.cues(tokens, site), self.weight)

    def cues(self, tokens: Tokens, site: BlockContext) -> Interaction:
        """Return K G, or G without colours, between classes and patches."""
        classes = list(site.anatomy.class_tokens)
        patches = site.anatomy.patches(tokens.shape[1])
        rows, columns = cosine_rows_and_columns(tokens, classes, temperature=self.temperature)
        parts = (take(rows, classes, 2), take(rows, patches, 2), take(columns, patches, 1))
        return self._with_colours(Interaction(*parts), site)

    def colours_only(self, interaction: Interaction, site: BlockContext) -> Interaction:
        """Blend in the colours alone, for classes compared with the embeddings already."""
        if self.weight == 0 or self.colour_width is None:
            return interaction
        return interaction.blend(self._with_colours(interaction, site), self.weight)

    def _with_colours(self, interaction: Interaction, site: BlockContext) -> Interaction:
        columns = interaction.patch_to_class
        if self.colour_width is None or not site.picture.shows_colours(type(self).__name__):
            return interaction
        colours = site.picture.colours(columns.shape[1]).to(columns.device)
        smooth = colour_smooth(colours, columns, width=self.colour_width)
        return replace(interaction, patch_to_class=smooth)
