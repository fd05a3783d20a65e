"""What is differentiated in place of a class score, so that look-alikes are told apart."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.tensors import Scores


@dataclass(frozen=True)
class Contrast:
    """A class's score less those of the classes that score most like it.

    Source: Finer-CAM (Zhang et al. 2025). Each of them is weighted by its probability, as grad-cam
    does it and in the graph as there.

    Attributes:
        classes: how many look-alikes; fewer where there are no more.
        strength: of what is taken off; 0 leaves the class score.
    """

    classes: int = 3
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"`classes` must be at least 1, got {self.classes}")

    def __call__(self, scores: Scores, column: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The contrast of one class per image; any value will do for -1."""
        asked = column.clamp_min(0)[:, None]
        own = scores.gather(1, asked)
        distance = (scores - own).abs().detach().scatter(1, asked, torch.inf)
        alike = distance.topk(min(self.classes, scores.shape[1] - 1), largest=False).indices
        weights = scores.softmax(-1).gather(1, alike)
        differences = own - self.strength * scores.gather(1, alike)
        return (weights * differences).sum(1) / (weights.sum(1) + 1e-9)
