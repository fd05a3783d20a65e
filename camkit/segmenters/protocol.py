"""What a promptable segmenter is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from camkit.printing import short_repr

Answers: TypeAlias = tuple[Bool[np.ndarray, "p m H W"], Float[np.ndarray, "p m"]]
"""For each of p prompts m masks of the picture's size, and the IoU that the segmenter predicts."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Where an object is, in pixels of the picture: column first, from 0.

    A mask alone changes next to nothing in the models of the SAM family, so it must come with a
    point or a box.

    Attributes:
        points: columns and rows of pixels.
        positive: whether each of these lies on the object, or on what it is not.
        box: first column, first row, last column, last row.
        mask: logits of a coarse mask, of the picture's size; segmenters resize and pad it as their
            pictures.
    """

    points: Float[np.ndarray, "n 2"]
    positive: Bool[np.ndarray, " n"]
    box: tuple[int, int, int, int] | None = None
    mask: Float[np.ndarray, "H W"] | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if len(self.points) != len(self.positive):
            raise ValueError(
                f"`positive` must have an entry for each of {len(self.points)} points, got "
                f"{len(self.positive)}"
            )
        if not len(self.points) and self.box is None:
            raise ValueError(
                "a prompt needs a point or a box, got neither; a mask alone changes next to "
                "nothing in models of the SAM family"
            )


@runtime_checkable
class Segmenter(Protocol):
    """Draws masks of what prompts point at. An object of your own may stand here.

    Two more methods are used if an object has them. ``features(embedding)`` returns an embedding
    ``(d, h, w)`` that covers exactly the picture, for `camkit.segmenters.SamRefinerPrompts` with a
    margin. ``identity()`` returns a text that changes with the weights; bulk runs record it and
    refuse to go on with another one.
    """

    def embed(self, picture: UInt8[np.ndarray, "H W 3"]) -> Any:
        """Return whatever `masks` needs of a picture; it is computed once and cached."""

    def masks(self, embedding: Any, prompts: Sequence[Prompt]) -> Answers:
        """Return masks at the picture's size, and their predicted IoU, for each prompt."""
