"""Patch token contrast of ToCo: final tokens agree where an inner layer's class maps agree."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from camkit.tensors import Cam, Labels

IGNORE = 255
"""The label of a patch that is neither clearly an object nor clearly background."""


def patch_labels(
    cam: Cam, labels: Labels, *, high: float = 0.7, low: float = 0.25
) -> Int[Tensor, "b n"]:
    """Name the patches that a map is sure of.

    The rule and both defaults are ToCo's (Ru et al. 2023) for VOC; it takes 0.65 on COCO for
    ``high``.

    Args:
        cam: one map for each class, in [0, 1], on the grid of the tokens; no gradient flows back.
        labels: classes present in each image; absent ones never win.
        high: a patch above it belongs to its strongest class.
        low: a patch at most this high is background.

    Returns:
        0 background, class + 1, 255 between the two scores; row by row.

    Raises:
        ValueError: the scores are out of order, or the maps are not those of the labels.
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"`low` and `high` must satisfy 0 <= low <= high <= 1, got {low}, {high}")
    if cam.shape[:2] != labels.shape:
        raise ValueError(
            f"`cam` must hold one map for each of the {labels.shape[1]} classes of "
            f"{len(labels)} images, got {cam.shape[1]} maps of {len(cam)}"
        )
    if cam.shape[1] >= IGNORE:
        raise ValueError(f"at most {IGNORE - 1} classes fit below {IGNORE}, got {cam.shape[1]}")
    present = cam.detach().flatten(2) * labels[:, :, None]
    score, winner = present.max(1)
    named = torch.where(score > high, winner + 1, IGNORE)
    return named.masked_fill(score <= low, 0)


def patch_contrast_loss(
    tokens: Float[Tensor, "b n d"], labels: Int[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Pull patches of one label together, push patches of two labels apart.

    ToCo's PTC (Ru et al. 2023), exactly as its code computes it: half of one minus the mean
    absolute cosine over pairs of equal labels, plus half of that mean over pairs of unequal ones.
    Pairs are counted over the whole batch, never across images; a patch with itself and patches of
    label 255 are left out; one is added to both counts. That it is the absolute cosine, so that
    opposite tokens count as alike, and the added one are the code's, not the paper's.

    Args:
        tokens: final patch tokens.
        labels: of `patch_labels`, read off an inner layer.

    Raises:
        ValueError: the labels are not one for each patch.
    """
    if tokens.shape[:2] != labels.shape:
        raise ValueError(
            f"`labels` must name each of the {tokens.shape[1]} patches of {len(tokens)} images, "
            f"got {tuple(labels.shape)}"
        )
    unit = F.normalize(tokens, dim=-1, eps=1e-8)
    cosine = (unit @ unit.mT).abs()
    sure = labels != IGNORE
    same = labels[:, :, None] == labels[:, None]
    counted = sure[:, :, None] & sure[:, None]
    counted &= ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    alike = _mean(cosine, counted & same)
    return 0.5 * (1.0 - alike) + 0.5 * _mean(cosine, counted & ~same)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / (where.sum() + 1)
