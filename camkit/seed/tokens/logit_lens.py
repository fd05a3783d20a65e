"""Seed from what the classifier would say of patches half-way through the host."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.capture.token_scores import token_scores
from camkit.capture.tokens import TokenWatch
from camkit.errors import CaptureError
from camkit.seed.protocol import check_classes, keep_asked, pick
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class LogitLensSeed:
    """The classifier's scores of the patches that leave an inner block, through the last norm.

    Patches of inner blocks differ more than those of the last, which is why ToCo (Ru et al. 2023)
    trains an auxiliary classifier there. The logit lens (nostalgebraist 2020) needs no training;
    to use it in that place, and for class maps, is ours. Scores below the image's mean patch score
    hold no evidence and become zero, as in `camkit.ClassWeightSeed`, which this is at the last
    block of a host whose patches meet no other module on their way.

    Attributes:
        layer: the block whose patches are read, from 0, or negative from the last; -3 is where ToCo
            has its auxiliary classifier.
    """

    layer: int = -3

    gradients: ClassVar[bool] = False
    tokens: ClassVar[TokenWatch] = TokenWatch(leaving=True)

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
            "camkit.watch(model, **camkit.needs(seed)). If you did, the host has no module that "
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
