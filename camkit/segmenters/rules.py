"""How a part of a class map becomes a prompt."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from camkit.segmenters.parts import Part, depth, highest
from camkit.segmenters.protocol import Prompt


@runtime_checkable
class PromptRule(Protocol):
    """Makes the prompt for a part of a class map; its repr is its settings."""

    @property
    def needs_features(self) -> bool:
        """Whether it reads the embedding of the picture."""

    def __call__(
        self,
        part: Part,
        scores: Float[np.ndarray, "H W"],
        features: Float[Tensor, "d h w"] | None,
    ) -> Prompt:
        """Return the prompt.

        Args:
            part: the coarse mask; in later rounds the mask that the segmenter gave.
            scores: the class map.
            features: the embedding of the picture, if needed.
        """


@dataclass(frozen=True)
class Peaks:
    """A point at the peak of each connected piece, and the box of all.

    The peak is the pixel deepest inside the top of the piece: where its scores are at least ``top``
    of its highest. A single highest pixel often lies on an edge, above all behind a refiner that
    follows edges. The edge of the picture counts as an edge here. The rule is ours.

    Attributes:
        top: share of the highest score, in (0, 1].
        box: whether the box is given too. Without it, parts of an object are drawn more often; with
            it, what lies beyond the map is drawn less often.
    """

    top: float = 0.9
    box: bool = True
    needs_features = False

    def __post_init__(self) -> None:
        if not 0.0 < self.top <= 1.0:
            raise ValueError(f"`top` must lie in (0, 1], got {self.top}")

    def __call__(
        self,
        part: Part,
        scores: Float[np.ndarray, "H W"],
        features: Float[Tensor, "d h w"] | None = None,  # noqa: ARG002 - the map alone decides
    ) -> Prompt:
        points = []
        for piece in part.pieces:
            top = piece & (scores >= self.top * scores[piece].max())
            points.append(highest(depth(np.pad(top, 1))[1:-1, 1:-1], among=top))
        positive = np.ones(len(points), bool)
        return Prompt(np.array(points, float), positive, part.box if self.box else None)


@dataclass(frozen=True)
class SamRefinerPrompts:
    """The prompts of SAMRefiner (Lin et al., ICLR 2025) for a coarse mask.

    - The box of the mask. With ``margin``, each side moves out by the smaller of 10 % of the box
      and 10 pixels, if more than that share of the strip looks like the object: the cosine between
      the embedding of a pixel and the mean embedding of the mask is above 0.5.
    - A positive point: the pixel deepest inside the mask.
    - A negative point: the pixel of the box furthest from the mask; none if the mask fills its box.
    - A mask of logits: ``strength * exp(-(d - d_max)^2 * gamma / area)`` inside, where d is the
      distance to the edge, and ``-strength`` outside. If the box was moved, strength is 1.

    Formulas and defaults are those of the authors' code. Ours: distances are exact (theirs are
    approximated by scans), cosines are computed on the grid of the embedding and then resized, the
    negative point may lie on the last row or column of the box, and the finished mask is resized to
    the grid of the segmenter (they resize sign and weight apart).

    Attributes:
        margin: see above; 0 never moves the box.
        gamma: how fast the logits fall towards the edge.
        strength: the highest logit.
    """

    margin: float = 0.0
    gamma: float = 4.0
    strength: float = 30.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.margin < 1.0:
            raise ValueError(f"`margin` must lie in [0, 1), got {self.margin}")
        for name in ("gamma", "strength"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}")

    @property
    def needs_features(self) -> bool:
        return self.margin > 0.0

    def __call__(
        self,
        part: Part,
        scores: Float[np.ndarray, "H W"],  # noqa: ARG002 - the mask alone decides
        features: Float[Tensor, "d h w"] | None = None,
    ) -> Prompt:
        mask, inside = part.mask, depth(part.mask)
        points, positive = [highest(inside, among=mask)], [True]
        x0, y0, x1, y1 = part.box
        in_box = np.zeros_like(mask)
        in_box[y0 : y1 + 1, x0 : x1 + 1] = True
        if not mask[in_box].all():
            points.append(highest(depth(~mask), among=in_box))
            positive.append(False)
        box = part.box
        if features is not None and self.needs_features:
            box = moved_box(part, _alike(mask, features), self.margin)
        strength = self.strength if box == part.box else 1.0
        spread = max(float(mask.sum()) / self.gamma, 1.0)
        logits = np.where(mask, np.exp(-((inside - inside.max()) ** 2) / spread), -1.0) * strength
        return Prompt(np.array(points, float), np.array(positive), box, logits.astype(np.float32))


RULES: dict[str, PromptRule] = {"peaks": Peaks(), "samrefiner": SamRefinerPrompts()}
"""Rules by name."""


def moved_box(
    part: Part, alike: Bool[np.ndarray, "H W"], margin: float
) -> tuple[int, int, int, int]:
    """Move sides of the box of a part outwards where the strip beside it looks like the object.

    Args:
        part: the coarse mask.
        alike: which pixels look like the object.
        margin: share of a strip that must do so.
    """
    rows, cols = alike.shape
    x0, y0, x1, y1 = part.box
    if x1 == x0 or y1 == y0:
        return part.box
    step_x, step_y = min(0.1 * (x1 - x0), 10.0), min(0.1 * (y1 - y0), 10.0)
    left, right = int(x0 - step_x), int(x1 + step_x)
    top, bottom = int(y0 - step_y), int(y1 + step_y)
    strips = {  # where a side would go, and what lies between
        "left": (left > 0, alike[y0:y1, left:x0] if left > 0 else alike[:0]),
        "right": (right < cols, alike[y0:y1, x1:right]),
        "top": (top > 0, alike[top:y0, x0:x1] if top > 0 else alike[:0]),
        "bottom": (bottom < rows, alike[y1:bottom, x0:x1]),
    }
    moves = {
        side: fits and strip.size > 0 and float(strip.mean()) > margin
        for side, (fits, strip) in strips.items()
    }
    return (
        left if moves["left"] else x0,
        top if moves["top"] else y0,
        right if moves["right"] else x1,
        bottom if moves["bottom"] else y1,
    )


def _alike(
    mask: Bool[np.ndarray, "H W"], features: Float[Tensor, "d h w"]
) -> Bool[np.ndarray, "H W"]:
    """Return the pixels whose embedding has a cosine above 0.5 with the mean of the mask."""
    size = (features.shape[1], features.shape[2])
    plane = torch.from_numpy(mask)[None, None].to(features)
    small = F.interpolate(plane, size, mode="nearest")[0, 0]
    mean = (features * small).sum((1, 2)) / small.sum()  # NaN, so no pixel, if it has no cell
    cosines = F.cosine_similarity(features, mean[:, None, None], dim=0)
    large = F.interpolate(cosines[None, None], mask.shape, mode="bilinear", align_corners=False)
    return (large[0, 0] > 0.5).cpu().numpy()
