"""Classes that the classifier itself sees, for who has no labels."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from camkit.capture.record import Capture
from camkit.tensors import Classes, Scores

Activation: TypeAlias = Literal["sigmoid", "softmax"]
"""How scores become probabilities: "sigmoid" of each class for a classifier trained with several an
image; "softmax" over all of its outputs, those of a class added up, for one class an image."""


def chances(scores: Scores, outputs: Tensor, activation: Activation) -> Scores:
    """Probability of every class.

    Args:
        scores: of the classes.
        outputs: of the classifier, all of them; classes may stand for several.
        activation: see `Activation`.
    """
    if activation == "sigmoid":
        return scores.sigmoid()
    return (scores - outputs.logsumexp(1, keepdim=True)).exp()


def check_chance(threshold: float, activation: str) -> None:
    """Refuse settings of a choice by probability."""
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"`threshold` must lie in (0, 1), got {threshold}")
    if activation not in get_args(Activation):
        raise ValueError(f'`activation` must be "sigmoid" or "softmax", got {activation}')


@dataclass(frozen=True)
class Present:
    """The classes that the classifier itself sees in each image.

    Attributes:
        threshold: probability from which a class counts as present.
        activation: see `Activation`.
        least: so many of the likeliest count as present whatever their probability, so that no
            image goes without a map; 0 lets it.
    """

    threshold: float = 0.5
    activation: Activation = "sigmoid"
    least: int = 1

    def __post_init__(self) -> None:
        check_chance(self.threshold, self.activation)
        if self.least < 0:
            raise ValueError(f"`least` must be at least 0, got {self.least}")

    def __call__(self, capture: Capture) -> Classes:
        """Classes of each image, the likeliest first, padded with -1."""
        scores = capture.scores.detach().float()
        outputs = scores if capture.outputs is None else capture.outputs.detach().float()
        chance = chances(scores, outputs, self.activation)
        ordered, order = chance.sort(dim=1, descending=True, stable=True)
        first = torch.arange(order.shape[1], device=order.device) < self.least
        kept = (ordered >= self.threshold) | first
        return order.masked_fill(~kept, -1)[:, : max(1, int(kept.sum(1).max()))]
