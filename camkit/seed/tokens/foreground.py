"""Seeds that tell things from background by patches alone, for models without a classifier."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.seed.protocol import check_classes, keep_asked
from camkit.seed.tokens.patch_similarity import Features, check_features, features_of
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class FiedlerSeed:
    """The normalised cut between like patches, after TokenCut (Wang et al. 2022).

    Two patches are joined with weight 1 where the cosine of their keys exceeds ``threshold``, and
    ``weak`` elsewhere. The map is the second smallest eigenvector of the normalised graph, less its
    mean, on the side of its largest entry. TokenCut makes a mask of it and keeps the piece
    that holds this entry; that the values are kept, and all pieces, is ours. Every class gets the
    same map, which says where something is, not what.

    Attributes:
        threshold: cosine from which patches are alike; 0.2 is the paper's.
        weak: weight between others, so that the graph hangs together; 1e-5 is the paper's.
        features: as in `camkit.PrototypeSeed`.
    """

    threshold: float = 0.2
    weak: float = 1e-5
    features: Features = "keys"

    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_features(self.features)
        if not -1.0 <= self.threshold < 1.0:
            raise ValueError(f"`threshold` must lie in [-1, 1), got {self.threshold}")
        if not 0.0 < self.weak < 1.0:
            raise ValueError(f"`weak` must lie in (0, 1), got {self.weak}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        embedded = F.normalize(features_of(capture, self.features).float(), dim=-1)
        alike = embedded @ embedded.mT > self.threshold
        vector = _fiedler(alike.to(torch.float64).clamp_min(self.weak))
        return _for_all(capture, classes, _outstanding(vector).to(embedded))


@dataclass(frozen=True)
class LonelySeed:
    """Patches like the one that is like the fewest, after LOST (Simeoni et al. 2021).

    The patch whose key has a positive product with the fewest others is taken to be of a thing;
    those of ``count`` patches with the fewest that are like it join it. The map is the sum of their
    products with each patch, negative ones as zero; LOST draws a box around it. Every class gets
    the same map.

    Attributes:
        count: how many patches may join; 100 is the paper's.
        features: as in `camkit.PrototypeSeed`.
    """

    count: int = 100
    features: Features = "keys"

    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_features(self.features)
        if self.count < 1:
            raise ValueError(f"`count` must be at least 1, got {self.count}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        keys = features_of(capture, self.features).float()
        products = keys @ keys.mT
        fewest = (products >= 0).sum(-1).argsort(dim=-1, stable=True)
        first = products.take_along_dim(fewest[:, :1, None], 1)  # (b, 1, n)
        joined = torch.zeros_like(products[:, :1])
        few = fewest[:, None, : self.count]
        joined.scatter_(2, few, (first.gather(2, few) >= 0).to(joined))
        return _for_all(capture, classes, (joined @ products)[:, 0].clamp_min(0.0))


def _fiedler(weights: Float[Tensor, "b n n"]) -> Float[Tensor, "b n"]:
    """The second smallest solution of ``(D - W) y = l D y``, D the sums of rows."""
    root = weights.sum(-1).rsqrt()
    normalised = weights * root[:, :, None] * root[:, None]
    _, vectors = torch.linalg.eigh(normalised)  # rising: the largest but one
    return vectors[..., -2] * root


def _outstanding(vector: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """What stands out from the mean, on the side of the largest entry."""
    largest = vector.gather(1, vector.abs().argmax(1, keepdim=True))
    return ((vector - vector.mean(1, keepdim=True)) * largest.sign()).clamp_min(0.0)


def _for_all(capture: Capture, classes: Classes, found: Float[Tensor, "b n"]) -> Cam:
    """One map for every class that is asked for."""
    check_classes(capture, classes, None)
    maps = found[:, None].expand(-1, classes.shape[1], -1)
    return keep_asked(capture.grid.fold(maps), classes)
