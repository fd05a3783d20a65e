"""Seeds from patch tokens alone: their likeness, their own class scores, foreground."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.capture.tail import token_scores
from camkit.errors import CaptureError
from camkit.seeds.attention import ClassAttentionSeed
from camkit.seeds.protocol import Seed, check_classes, keep_asked, pick
from camkit.tensors import Cam, Classes

Features: TypeAlias = Literal["keys", "tokens"]


@dataclass(frozen=True)
class PrototypeSeed:
    """Likeness of every patch to the mean of the patches that another seed points at (ours).

    The mean embedding, each patch weighted by its value in the other map, is compared with all
    patches by cosine; what exceeds the image's mean likeness is evidence. For models without a
    classifier (DINO) the other seed is what their class token attends to.

    Attributes:
        seed: what points.
        features: what patches are compared by: the "keys" of the last block, as LOST and TokenCut
            take them, or their "tokens" behind the last norm.
    """

    seed: Seed = field(default_factory=ClassAttentionSeed)
    features: Features = "keys"

    def __post_init__(self) -> None:
        check_features(self.features)

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec() | required_by(self.seed)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        embedded = F.normalize(features_of(capture, self.features).float(), dim=-1)
        weights = capture.grid.flatten(self.seed(capture, classes)).to(embedded)
        prototypes = F.normalize(weights @ embedded, dim=-1)
        likeness = prototypes @ embedded.mT
        evidence = (likeness - likeness.mean(-1, keepdim=True)).clamp_min(0.0)
        return keep_asked(capture.grid.fold(evidence), classes)


def features_of(capture: Capture, features: Features) -> Float[Tensor, "b n d"]:
    """Embeddings of the patches, by the name of where they are taken.

    Raises:
        CaptureError: keys are asked for of attention that hides them.
    """
    if features == "tokens":
        return capture.patch_embeddings().detach()
    keys: Tensor | None = getattr(capture.blocks[-1], "k", None)
    if keys is None:
        raise CaptureError(
            "the host makes its attention map itself, so the keys of its last block are not seen; "
            'use `features="tokens"`'
        )
    where = torch.as_tensor(capture.patches, device=keys.device)
    return keys.detach().transpose(1, 2).flatten(2)[:, where]


def check_features(features: str) -> None:
    """Refuse another place than the two."""
    if features not in ("keys", "tokens"):
        raise ValueError(f'`features` must be "keys" or "tokens", got {features!r}')


@dataclass(frozen=True)
class LogitLensSeed:
    """The classifier's scores of the patches that leave an inner block, through the last norm.

    Patches of inner blocks differ more than those of the last, which is why ToCo (Ru et al. 2023)
    trains an auxiliary classifier there. The logit lens (nostalgebraist 2020) needs no training;
    to use it in that place, and for class maps, is ours. Scores below the image's mean patch score
    hold no evidence and become zero, as in `camkit.seeds.ClassWeightSeed`, which this is at
    the last
    block of a host whose patches meet no other module on their way.

    Attributes:
        layer: the block whose patches are read, from 0, or negative from the last; -3 is where ToCo
            has its auxiliary classifier.
    """

    layer: int = -3

    requires: ClassVar[WatchSpec] = WatchSpec(leaving=True)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        scores = lens_scores(capture, leaving_patches(capture, self.layer, self))
        check_classes(capture, classes, scores.shape[-1])
        maps = pick(scores, classes)
        evidence = (maps - maps.mean(-1, keepdim=True)).clamp_min(0.0)
        return keep_asked(capture.grid.fold(evidence), classes)


def leaving_patches(capture: Capture, layer: int, seed: object) -> Float[Tensor, "b n d"]:
    """The patches that leave a block.

    Raises:
        CaptureError: they were not watched.
        ValueError: there is no such block.
    """
    if not capture.leaving:
        raise CaptureError(
            f"this capture does not hold the tokens that leave each block, which "
            f"{type(seed).__name__} reads; watch the forward with "
            "camkit.watch(model, requires=seed.requires). If you did, the host has no module that "
            "holds a block with its attention; take another seed"
        )
    count = len(capture.leaving)
    if not -count <= layer < count:
        raise ValueError(f"`layer` must lie in {-count} to {count - 1}, got {layer}")
    return capture.leaving[layer].tokens.detach()[:, capture.patches]


def lens_scores(capture: Capture, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n C"]:
    """Class scores of tokens as if each were what the host's last block had made of its pool."""
    with torch.no_grad():
        flat = token_scores(capture.tail, capture.outputs, tokens.flatten(0, 1))
        scores = flat.unflatten(0, tokens.shape[:2])
        return scores if capture.vocabulary is None else capture.vocabulary.score(scores)


@dataclass(frozen=True)
class TokenCutSeed:
    """The normalised cut between like patches, after TokenCut (Wang et al. 2022).

    Two patches are joined with weight 1 where the cosine of their keys exceeds ``threshold``, and
    ``weak`` elsewhere. The map is the second smallest eigenvector of the normalised graph, less its
    mean, on the side of its largest entry. TokenCut makes a mask of it and keeps the piece
    that holds this entry; that the values are kept, and all pieces, is ours. Every class gets the
    same map, which says where something is, not what.

    Attributes:
        threshold: cosine from which patches are alike; 0.2 is the paper's.
        weak: weight between others, so that the graph hangs together; 1e-5 is the paper's.
        features: as in `camkit.seeds.PrototypeSeed`.
    """

    threshold: float = 0.2
    weak: float = 1e-5
    features: Features = "keys"

    requires: ClassVar[WatchSpec] = WatchSpec()

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
class LOSTSeed:
    """Patches like the one that is like the fewest, after LOST (Simeoni et al. 2021).

    The patch whose key has a positive product with the fewest others is taken to be of a thing;
    those of ``count`` patches with the fewest that are like it join it. The map is the sum of their
    products with each patch, negative ones as zero; LOST draws a box around it. Every class gets
    the same map.

    Attributes:
        count: how many patches may join; 100 is the paper's.
        features: as in `camkit.seeds.PrototypeSeed`.
    """

    count: int = 100
    features: Features = "keys"

    requires: ClassVar[WatchSpec] = WatchSpec()

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
