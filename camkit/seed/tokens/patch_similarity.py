"""Seed from how alike patches are to those that another seed points at."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.capture.tokens import TokenWatch
from camkit.errors import CaptureError
from camkit.seed.attention.class_attention import ClassAttentionSeed
from camkit.seed.needs import needs
from camkit.seed.protocol import Seed, keep_asked
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
    def gradients(self) -> bool:
        """Whether the other seed needs them."""
        return self.seed.gradients

    @property
    def tokens(self) -> TokenWatch:
        """What must be kept of the forward for the other seed."""
        return needs(self.seed)["tokens"] or TokenWatch()

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
