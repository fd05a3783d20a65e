"""Hybrid feature alignment (HFA): attention joined with similarity of embeddings and colours."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.edits.interaction import Interaction, VirtualClassTokens
from camkit.edits.protocol import BlockContext
from camkit.errors import UnsupportedModelError
from camkit.ops.attention import take
from camkit.ops.paired import PairBias
from camkit.ops.similarity import (
    check_positive,
    colour_smooth,
    cosine_rows_and_columns,
    unit_length,
)
from camkit.tensors import Tokens

_WEIGHTS = {"product": 3.0, "mean": 0.5}


@dataclass(frozen=True)
class HybridAlignment:
    """Joins self-attention with the similarity of tokens, of classes and of patch colours.

    ``join="product"``, the default, adds the likenesses to the logits of the host's own attention::

        A' = softmax(scale * q k^T + weight * cos(x_i, x_j)
                     + class_weight * cos(e_i, x_j) + colour_weight * colours(i, j))

    for the tokens x given to the attention module, behind its norm. So A' is proportional to A
    times the exponential of the likeness: sharp where both agree, and never diluted by one of them.
    The block attends by A', and everything that is read from a capture reads A'.

    ``join="mean"`` is the older reading, for the reconstruction of `camkit.DOEI` alone: ``(A +
    weight * K G) / (1 + weight)``, where G is the row-softmax of the cosines over ``temperature``,
    and K, over the patches, that of ``-|r_i - r_j|^2 / (2 colour_width^2)`` for mean patch colours
    r. The attention that the block and a capture use stays as it is.

    From the paper: RGB, embedding similarity and self-attention are joined. From its figure:
    colours multiply the cosines, and the product is added to the attention; its shapes do not fit
    as drawn. Ours: the product in the logits, because likeness that is added behind the softmax was
    measured to change nothing; all kernels and numbers.

    Attributes:
        join: "product" or "mean".
        weight: of the cosines of tokens, at least 0; None is 3 for "product", 0.5 for "mean".
        class_embeddings: e, classifier rows or texts, in place of the class tokens' own embeddings
            (product). One row for each class token; several rows for a single class token count by
            the labels of `camkit.edits.Handle.labels`, without labels by their cosine with it.
        class_weight: of the cosines of class embeddings with patches, in the rows of class tokens.
        colour_weight: of the likeness of colours between patches (product): how much the colour
            histograms of their pixels overlap, from 0 to 1 (Bhattacharyya coefficient).
        gradient: whether a gradient flows through the cosines of tokens (product).
        temperature: divides the cosines (mean).
        colour_width: distance in RGB, in [0, 1], at which similarity fades; None leaves colours
            out (mean).
    """

    join: Literal["product", "mean"] = "product"
    weight: float | None = None
    class_embeddings: VirtualClassTokens | Tensor | None = None
    class_weight: float = 4.0
    colour_weight: float = 0.0
    gradient: bool = True
    temperature: float = 0.1
    colour_width: float | None = 0.15

    def __post_init__(self) -> None:
        if self.join not in _WEIGHTS:
            raise ValueError(f'`join` must be "product" or "mean", got {self.join!r}')
        weights = {"weight": self.token_weight}
        weights |= {"class_weight": self.class_weight, "colour_weight": self.colour_weight}
        for name, weight in weights.items():
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"`{name}` must be at least 0, got {weight}")
        check_positive("temperature", self.temperature)
        if isinstance(self.class_embeddings, Tensor):
            object.__setattr__(self, "class_embeddings", VirtualClassTokens(self.class_embeddings))
        if self.colour_width is not None:
            check_positive("colour_width", self.colour_width)

    @property
    def token_weight(self) -> float:
        """The weight of the cosines of tokens."""
        return _WEIGHTS[self.join] if self.weight is None else self.weight

    # -- The product: features whose products are added to the logits

    def pair_bias(self, tokens: Tokens, site: BlockContext) -> PairBias | None:
        """Return the likeness as features of the tokens; None if nothing is added.

        Args:
            tokens: the block's tokens.
            site: roles of the tokens, and the images.
        """
        if self.join != "product":
            return None
        with torch.autocast(tokens.device.type, enabled=False):
            unit = unit_length(tokens if self.gradient else tokens.detach())
            parts = [
                self._of_tokens(unit, site.strength * self.token_weight),
                self._of_classes(unit, site, site.strength * self.class_weight),
                self._of_colours(unit, site, site.strength * self.colour_weight),
            ]
        found = [part for part in parts if part is not None]
        return sum(found[1:], start=found[0]) if found else None

    def _of_tokens(self, unit: Tensor, weight: float) -> PairBias | None:
        return PairBias(weight * unit, unit, bound=weight) if weight else None

    def _of_classes(self, unit: Tensor, site: BlockContext, weight: float) -> PairBias | None:
        """Compare class embeddings with the patches, in the rows of the class tokens."""
        own = list(site.anatomy.class_tokens)
        given = self.class_embeddings
        if not isinstance(given, VirtualClassTokens) or not weight:
            return None
        if not own:
            raise UnsupportedModelError(
                "`class_embeddings` act in the rows of class tokens, and this model has none; "
                "leave them out, or name the tokens with `class_tokens=`"
            )
        embedded = unit_length(given.rows_for(unit))
        if len(own) == 1:
            rows = self._mixed(embedded, unit[:, own[0]], site)[:, None]
        elif len(own) == len(embedded):
            rows = embedded.expand(len(unit), -1, -1)
        else:
            raise ValueError(
                f"`class_embeddings` must have a row for each of the {len(own)} class tokens, got "
                f"{len(embedded)}"
            )
        queries, keys = torch.zeros_like(unit), torch.zeros_like(unit)
        patches = site.anatomy.patches(unit.shape[1])
        queries = queries.index_copy(1, _places(own, unit), weight * rows)
        keys = keys.index_copy(1, _places(patches, unit), take(unit, patches, 1))
        return PairBias(queries, keys, bound=weight)

    def _mixed(self, embedded: Tensor, token: Tensor, site: BlockContext) -> Float[Tensor, "b d"]:
        """Return the embedding that a single class token stands for in each image."""
        labels = site.labels
        if labels is None:
            shares = (token @ embedded.T / self.temperature).softmax(-1)
        elif labels.shape[1] != len(embedded):
            raise ValueError(
                f"`handle.labels` must have a column for each of the {len(embedded)} class "
                f"embeddings, got {labels.shape[1]}"
            )
        else:
            present = labels.to(token)
            shares = present / present.sum(-1, keepdim=True).clamp_min(1.0)
        return F.normalize(shares @ embedded, dim=-1)

    def _of_colours(self, unit: Tensor, site: BlockContext, weight: float) -> PairBias | None:
        if not weight or not site.picture.shows_colours(type(self).__name__):
            return None
        patches = site.anatomy.patches(unit.shape[1])
        colours = site.picture.histograms(len(patches)).to(unit).sqrt()
        features = unit.new_zeros(*unit.shape[:2], colours.shape[2])
        features = features.index_copy(1, _places(patches, unit), colours)
        return PairBias(weight * features, features, bound=weight)

    # -- The mean: interactions of class tokens, blended

    def __call__(self, interaction: Interaction, tokens: Tokens, site: BlockContext) -> Interaction:
        """Return the interaction with the other cues blended in, if they join by their mean.

        Args:
            interaction: of the class tokens.
            tokens: the block's tokens.
            site: roles of the tokens, and the images.
        """
        if not self.blends:
            return interaction
        return interaction.blend(self.cues(tokens, site), self.token_weight)

    @property
    def blends(self) -> bool:
        """Whether cues are blended into interactions."""
        return self.join == "mean" and self.token_weight > 0

    def cues(self, tokens: Tokens, site: BlockContext) -> Interaction:
        """Return K G, or G without colours, between classes and patches."""
        classes = list(site.anatomy.class_tokens)
        patches = site.anatomy.patches(tokens.shape[1])
        rows, columns = cosine_rows_and_columns(tokens, classes, temperature=self.temperature)
        parts = (take(rows, classes, 2), take(rows, patches, 2), take(columns, patches, 1))
        return self._with_colours(Interaction(*parts), site)

    def colours_only(self, interaction: Interaction, site: BlockContext) -> Interaction:
        """Blend in the colours alone, for classes compared with the embeddings already."""
        if not self.blends or self.colour_width is None:
            return interaction
        return interaction.blend(self._with_colours(interaction, site), self.token_weight)

    def _with_colours(self, interaction: Interaction, site: BlockContext) -> Interaction:
        columns = interaction.patch_to_class
        if self.colour_width is None or not site.picture.shows_colours(type(self).__name__):
            return interaction
        colours = site.picture.colours(columns.shape[1]).to(columns.device)
        smooth = colour_smooth(colours, columns, width=self.colour_width)
        return replace(interaction, patch_to_class=smooth)


def _places(places: list[int], tokens: Tensor) -> Tensor:
    """Return positions, negative from the end, as an index on the device of the tokens."""
    return torch.tensor([place % tokens.shape[1] for place in places], device=tokens.device)
