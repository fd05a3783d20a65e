"""Targets: what a map explains, as a function of the model's output for one image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camkit.compat.missing import stand_in
from camkit.printing import short_repr

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
class ClassifierOutputReST:
    """The score of a class plus the logarithm of its probability (Shapley-CAM)."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return (output + output.log_softmax(-1))[..., self.category]


@dataclass(frozen=True)
class RawScoresOutputTarget:
    """The output itself, of a model with one score."""

    def __call__(self, output: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class SoftmaxOutputTarget:
    """The probabilities; a map needs one number, see `ClassifierOutputSoftmaxTarget`."""

    def __call__(self, output: Tensor) -> Tensor:
        return output.softmax(-1)


@dataclass(frozen=True, eq=False)
class SemanticSegmentationTarget:
    """The sum of the scores of a class over the pixels of a mask.

    Attributes:
        category: the class.
        mask: ``(H, W)`` at the size of the output, from 0 to 1.
    """

    category: int
    mask: np.ndarray | Tensor

    __repr__ = short_repr

    def __call__(self, output: Tensor) -> Tensor:
        mask = torch.as_tensor(self.mask, device=output.device)
        if output.dim() != 3 or output.shape[1:] != mask.shape:
            raise ValueError(
                f"a mask of {tuple(mask.shape)} needs an output of (classes, H, W) of that size, "
                f"got {tuple(output.shape)}"
            )
        return (output[self.category] * mask).sum()


@dataclass(frozen=True)
class FinerWeightedTarget:
    """The score of a class less the scores of others, weighted by probability (Finer-CAM)."""

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


def check_targets(targets: Sequence[Target], images: int) -> Sequence[Target]:
    """Check that there is a function for each image."""
    several: object = targets
    if not isinstance(several, Sequence) or not all(callable(target) for target in several):
        raise TypeError(
            "`targets` must be a list of functions of one image's output, such as "
            f"[ClassifierOutputTarget(281)], got {several!r}"
        )
    if len(targets) != images:
        raise ValueError(
            f"`targets` must hold one target for each of {images} images, got {len(targets)}"
        )
    return targets


def apply_target(target: Target, output: Tensor) -> Float[Tensor, ""]:
    """Return the number that a target reads from the output for an image.

    Raises:
        ValueError: it returns none, or several.
    """
    try:
        value = target(output)
    except IndexError as error:
        raise ValueError(
            f"{target!r} asks for a class that outputs of shape {tuple(output.shape)} lack"
        ) from error
    if value.numel() != 1:
        raise ValueError(
            f"{target!r} must return one number for the outputs of an image, got shape "
            f"{tuple(value.shape)}"
        )
    return value.reshape(())


def __getattr__(name: str) -> type:
    return stand_in(__name__, name)
