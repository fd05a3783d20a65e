"""Classes that the classifier itself sees, for who has no labels."""

from dataclasses import dataclass
from typing import Literal

import torch

from camkit.capture.record import Capture
from camkit.tensors import Classes


@dataclass(frozen=True)
class Present:
    """The classes that the classifier itself sees in each image.

    Attributes:
        threshold: probability from which a class counts as present.
        activation: "sigmoid" of each class for a classifier trained with several an image;
            "softmax" over all of its outputs, those of a class added up, for one class an image.
        least: so many of the likeliest count as present whatever their probability, so that no
            image goes without a map; 0 lets it.
    """

    threshold: float = 0.5
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    least: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"`threshold` must lie in (0, 1), got {self.threshold}")
        if self.activation not in ("sigmoid", "softmax"):
            raise ValueError(f'`activation` must be "sigmoid" or "softmax", got {self.activation}')
        if self.least < 0:
            raise ValueError(f"`least` must be at least 0, got {self.least}")

    def __call__(self, capture: Capture) -> Classes:
        """Classes of each image, the likeliest first, padded with -1."""
        scores = capture.scores.detach().float()
        if self.activation == "sigmoid" or capture.outputs is None:
            chance = scores.sigmoid()
        else:
            chance = (scores - capture.outputs.detach().float().logsumexp(1, keepdim=True)).exp()
        ordered, order = chance.sort(dim=1, descending=True, stable=True)
        first = torch.arange(order.shape[1], device=order.device) < self.least
        kept = (ordered >= self.threshold) | first
        return order.masked_fill(~kept, -1)[:, : max(1, int(kept.sum(1).max()))]
