"""Ways to let colours into the likeness of tokens; the figure's product does not fit as drawn.

G is the row-softmax of the cosines between tokens over ``temperature``. Each function returns the
class rows and class columns of its own (t, t) matrix, whose rows sum to one, without holding it.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.edit.interaction import Interaction
from camkit.ops.places import take
from camkit.ops.similarity import (
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
