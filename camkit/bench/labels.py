"""Image-level labels by the classifier itself, for who has none."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from camkit.capture.record import scores_of
from camkit.errors import CamkitError
from camkit.photo import Photo
from camkit.seed.present import Activation, chances, check_chance
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True)
class PredictedLabels:
    """The classes a classifier sees in the image; the score is lower than with true labels.

    Attributes:
        threshold: probability from which a class counts as present.
        activation: see `camkit.seed.present.Activation`.
    """

    threshold: float = 0.1
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        check_chance(self.threshold, self.activation)

    def __call__(self, model: nn.Module, photo: Photo, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Classes of the vocabulary that are present, from 0."""
        with torch.no_grad():
            output: Any = model(photo.pixels.to(next(model.parameters())))
        scores = scores_of(output)
        if scores is None:
            raise CamkitError("labels cannot be predicted: the model returns no class scores")
        present = chances(vocabulary.score(scores.float()), scores.float(), self.activation)[0]
        found: list[int] = (present >= self.threshold).nonzero().flatten().tolist()
        return tuple(found)
