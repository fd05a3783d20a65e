"""Embedding reconstruction: confident interactions turned back into tokens.

The figure multiplies an N x C matrix with N patch tokens, which is impossible as drawn. Each
function here resolves it in another way.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

Reading: TypeAlias = Literal["proto", "class", "affinity", "gate"]

Patches = Float[Tensor, "b n d"]
ClassTokens = Float[Tensor, "b k d"]
Weights = Float[Tensor, "b n c"]


def prototypes(weights: Weights, patches: Patches, classes: ClassTokens) -> Patches:
    """Each patch from prototypes of its classes, each prototype from the patches sure of it."""
    del classes
    return _stochastic(weights, -1) @ (_stochastic(weights, 1).mT @ patches)


def from_classes(weights: Weights, patches: Patches, classes: ClassTokens) -> Patches:
    """Each patch from the class tokens it belongs to."""
    del patches
    return _stochastic(weights, -1) @ classes


def affinity(weights: Weights, patches: Patches, classes: ClassTokens) -> Patches:
    """Each patch from patches that belong to the same classes; the map of pairs is never held."""
    del classes
    total = weights.sum(1, keepdim=True)
    mass = (weights * total).sum(-1, keepdim=True)
    return weights @ (weights.mT @ patches) / mass.clamp_min(1e-12)


def gate(weights: Weights, patches: Patches, classes: ClassTokens) -> Patches:
    """Each patch itself, more of it where it is sure of a class."""
    del classes
    sure = weights.amax(-1, keepdim=True)
    return patches * (sure / sure.mean(1, keepdim=True).clamp_min(1e-12))


def reconstruct_classes(weights: Float[Tensor, "b c c"], classes: ClassTokens) -> ClassTokens:
    """Each class token from those it interacts with."""
    return _stochastic(weights, -1) @ classes


READINGS: dict[Reading, Callable[[Weights, Patches, ClassTokens], Patches]] = {
    "proto": prototypes,
    "class": from_classes,
    "affinity": affinity,
    "gate": gate,
}


def _stochastic(weights: Tensor, dim: int) -> Tensor:
    """Scaled to sum to one; where all is zero (absent classes) zero stays."""
    return weights / weights.sum(dim, keepdim=True).clamp_min(1e-12)
