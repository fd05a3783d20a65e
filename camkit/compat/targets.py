"""What is differentiated: callables on the outputs of one image, named as in grad-cam."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Target: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClassifierOutputTarget:
    """The score of a class."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return output[..., self.category]


@dataclass(frozen=True)
class ClassifierOutputSoftmaxTarget:
    """The probability of a class."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return output.softmax(-1)[..., self.category]


@dataclass(frozen=True)
class BinaryClassifierOutputTarget:
    """The single score of a classifier of two classes, or its negative."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return output if self.category == 1 else -output


@dataclass(frozen=True)
class FinerWeightedTarget:
    """The score of a class less those of others, each weighted by its probability (Finer-CAM)."""

    main_category: int
    comparison_categories: Sequence[int]
    alpha: float = 1.0

    def __call__(self, output: Tensor) -> Tensor:
        others = list(self.comparison_categories)
        weights = output.softmax(-1)[..., others]
        own = output[..., self.main_category, None]
        return (weights * (own - self.alpha * output[..., others])).sum(-1) / (
            weights.sum(-1) + 1e-9
        )


def likeliest(outputs: Tensor) -> list[Target]:
    """The first guess of each image."""
    return [ClassifierOutputTarget(int(index)) for index in outputs.argmax(-1)]


def total(targets: Sequence[Target], outputs: Tensor) -> Tensor:
    """Sum of each image's own target.

    Raises:
        ValueError: there are not as many targets as images, or one asks for a class that the model
            does not have, or makes several numbers.
    """
    if len(targets) != len(outputs):
        raise ValueError(
            f"`targets` must hold one target for each of {len(outputs)} images, got {len(targets)}"
        )
    values = []
    for target, output in zip(targets, outputs, strict=True):
        try:
            value = target(output)
        except IndexError as error:
            raise ValueError(
                f"{target!r} asks for what outputs of shape {tuple(output.shape)} do not hold"
            ) from error
        if value.numel() != 1:
            raise ValueError(
                f"{target!r} must make one number of the outputs of an image, got shape "
                f"{tuple(value.shape)}"
            )
        values.append(value.reshape(()))
    return torch.stack(values).sum()
