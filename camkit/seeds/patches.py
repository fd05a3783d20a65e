"""Seeds from similarities between patches: prototypes, TokenCut, LOST."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.errors import CaptureError
from camkit.seeds.attention import ClassAttentionSeed
from camkit.seeds.protocol import Seed, above_mean, check_classes, fold_maps
from camkit.tensors import Cam, Classes

Features: TypeAlias = Literal["keys", "tokens"]


def _features(capture: Capture, features: Features) -> Float[Tensor, "b n d"]:
    if features == "tokens":
        return capture.patch_embeddings().detach().float()
    keys: Tensor | None = getattr(capture.blocks[-1], "k", None)
    if keys is None:
        raise CaptureError(
            "the model computes its attention map itself, so the keys of its last block are not "
            'recorded; use `features="tokens"`'
        )
    patches = torch.as_tensor(capture.patches, device=keys.device)
    return keys.detach().transpose(1, 2).flatten(2)[:, patches].float()


def _check_features(features: str) -> None:
    if features not in ("keys", "tokens"):
        raise ValueError(f'`features` must be "keys" or "tokens", got {features!r}')


def _same_for_all(capture: Capture, classes: Classes, scores: Float[Tensor, "b n"]) -> Cam:
    check_classes(classes, len(scores), None)
    return fold_maps(capture, scores[:, None].expand(*classes.shape, -1), classes)


@dataclass(frozen=True)
class PrototypeSeed:
    """Similarity of every patch to the mean of the patches that another seed highlights (ours).

    The embeddings, weighted by the other seed's map, are averaged to a prototype. A patch's score
    is its cosine with the prototype, less the image's mean cosine. The default works for models
    without a classifier (DINO).

    Attributes:
        seed: returns the map that weights the patches.
        features: the embeddings to compare: "keys" of the last block, as in LOST and TokenCut, or
            "tokens" behind the last norm.
    """

    seed: Seed = field(default_factory=ClassAttentionSeed)
    features: Features = "keys"

    def __post_init__(self) -> None:
        _check_features(self.features)

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec() | required_by(self.seed)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        return fold_maps(capture, above_mean(self.cosines(capture, classes)), classes)

    def cosines(self, capture: Capture, classes: Classes) -> Float[Tensor, "b k n"]:
        """Return the cosine of every patch with the prototype of each class."""
        embedded = F.normalize(_features(capture, self.features), dim=-1)
        weights = capture.grid.flatten(self.seed(capture, classes).clamp_min(0.0)).to(embedded)
        return F.normalize(weights @ embedded, dim=-1) @ embedded.mT


@dataclass(frozen=True)
class TokenCutSeed:
    """The normalised cut of the patch graph, after TokenCut (Wang et al. 2022).

    Two patches are joined with weight 1 where the cosine of their keys exceeds ``threshold``, else
    with weight ``weak``. The map is the second smallest eigenvector of the normalised graph, less
    its mean, on the side of its largest entry. TokenCut thresholds the eigenvector and keeps the
    connected component with that entry; keeping the values, and all components, is ours. Every
    class gets the same map.

    Attributes:
        threshold: cosine above which patches are similar; 0.2 is the paper's.
        weak: weight of all other pairs, which keeps the graph connected; 1e-5 is the paper's.
        features: as in `camkit.seeds.PrototypeSeed`.
    """

    threshold: float = 0.2
    weak: float = 1e-5
    features: Features = "keys"

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        _check_features(self.features)
        if not -1.0 <= self.threshold < 1.0:
            raise ValueError(f"`threshold` must lie in [-1, 1), got {self.threshold}")
        if not 0.0 < self.weak < 1.0:
            raise ValueError(f"`weak` must lie in (0, 1), got {self.weak}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        embedded = F.normalize(_features(capture, self.features), dim=-1)
        similar = embedded @ embedded.mT > self.threshold
        weights = similar.to(torch.float64).clamp_min(self.weak)
        # (D - W) y = l D y, where D holds the sums of rows
        root = weights.sum(-1).rsqrt()
        _, vectors = torch.linalg.eigh(weights * root[:, :, None] * root[:, None])
        vector = vectors[..., -2] * root  # ascending: the last but one of W is the second of D - W
        largest = vector.gather(1, vector.abs().argmax(1, keepdim=True))
        above = ((vector - vector.mean(1, keepdim=True)) * largest.sign()).clamp_min(0.0)
        return _same_for_all(capture, classes, above.to(embedded))


@dataclass(frozen=True)
class LOSTSeed:
    """Similarity to the patch with the fewest similar patches, after LOST (Simeoni et al. 2021).

    The first patch is the one whose key has a non-negative product with the fewest other keys. Of
    the ``count`` patches with the fewest similar patches, those similar to the first join it. A
    patch's score is the sum of its products with the joined patches, clamped at zero. LOST draws a
    box around the map. Every class gets the same map.

    Attributes:
        count: how many patches may join; 100 is the paper's.
        features: as in `camkit.seeds.PrototypeSeed`.
    """

    count: int = 100
    features: Features = "keys"

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        _check_features(self.features)
        if self.count < 1:
            raise ValueError(f"`count` must be at least 1, got {self.count}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        keys = _features(capture, self.features)
        products = keys @ keys.mT
        fewest = (products >= 0).sum(-1).argsort(dim=-1, stable=True)
        first = products.take_along_dim(fewest[:, :1, None], 1)  # (b, 1, n)
        joined = torch.zeros_like(products[:, :1])
        few = fewest[:, None, : self.count]
        joined.scatter_(2, few, (first.gather(2, few) >= 0).to(joined))
        return _same_for_all(capture, classes, (joined @ products)[:, 0].clamp_min(0.0))
