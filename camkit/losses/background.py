"""Background activation suppression: a map is whole when nothing is left to see without it."""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from camkit.tensors import Scores


class Suppression(NamedTuple):
    """The three terms of BAS, each a mean over the images.

    Attributes:
        background: what is left of the class's score outside the map.
        area: how much of the image the map covers.
        foreground: cross-entropy of the class inside the map.
    """

    background: Float[Tensor, ""]
    area: Float[Tensor, ""]
    foreground: Float[Tensor, ""]

    def total(
        self, *, background: float = 1.0, area: float = 1.2, foreground: float = 0.2
    ) -> Tensor:
        """The weighted sum; the defaults are those of the code for VOC segmentation."""
        parts = (background * self.background, area * self.area, foreground * self.foreground)
        return parts[0] + parts[1] + parts[2]


def background_suppression_loss(
    maps: Float[Tensor, "b h w"],
    whole: Scores,
    outside: Scores,
    inside: Scores,
    classes: Int[Tensor, " b"],
) -> Suppression:
    """BAS for one class of each image (Wu et al. 2022), as its segmentation code computes it.

    The host makes the scores: ``outside`` from detached features times one minus the map, through
    a copy of its tail that takes no gradient; ``inside`` from detached features times the map. The
    ratio is set to 1, without gradient, where the score outside exceeds that of the whole; the
    classification code of the same authors sets 0 there.

    Args:
        maps: of the chosen class, in [0, 1].
        whole: class scores of the image; no gradient flows back.
        outside: class scores without what the map covers.
        inside: class scores of what the map covers.
        classes: one present class an image; the code draws it at random.

    Raises:
        ValueError: maps, scores and classes are not of the same images.
    """
    if not len(maps) == len(whole) == len(outside) == len(inside) == len(classes):
        raise ValueError("maps, scores and classes must be of the same images")
    rows = classes[:, None]
    kept = whole.detach().gather(1, rows)[:, 0].relu()
    left = outside.gather(1, rows)[:, 0].relu()
    ratio = (left / (kept + 1e-8)).masked_fill(left > kept, 1.0)
    return Suppression(ratio.mean(), maps.mean(), F.cross_entropy(inside, classes))
