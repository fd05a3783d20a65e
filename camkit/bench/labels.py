"""Image-level labels by the classifier itself, for who has none."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from camkit.capture.record import scores_of
from camkit.errors import CamkitError
from camkit.photo import Photo
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True)
class PredictedLabels:
    """The classes a classifier sees in the image; the score is lower than with true labels.

    Attributes:
        threshold: probability from which a class counts as present.
        activation: "softmax" over all outputs of a classifier of one class an image, those of a
            class added up; "sigmoid" of each class for one trained with several.
    """

    threshold: float = 0.1
    activation: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"`threshold` must lie in (0, 1), got {self.threshold}")
        if self.activation not in ("softmax", "sigmoid"):
            raise ValueError(f'`activation` must be "softmax" or "sigmoid", got {self.activation}')

    def __call__(self, model: nn.Module, photo: Photo, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Classes of the vocabulary that are present, from 0."""
        with torch.no_grad():
            output: Any = model(photo.pixels.to(next(model.parameters())))
        scores = scores_of(output)
        if scores is None:
            raise CamkitError("labels cannot be predicted: the model returns no class scores")
        grouped = vocabulary.score(scores.float())[0]
        if self.activation == "sigmoid":
            present = grouped.sigmoid()
        else:
            present = (grouped - scores.float()[0].logsumexp(-1)).exp()
        found: list[int] = (present >= self.threshold).nonzero().flatten().tolist()
        return tuple(found)
