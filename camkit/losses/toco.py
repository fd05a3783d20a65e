"""Token contrast of ToCo: class tokens of crops, and patch tokens by pseudo labels."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from camkit.ops.finite import check_finite
from camkit.tensors import IGNORE, Cam, Labels, Pixels

_TINY = 1e-4  # ToCo's, wherever it divides


class Crops(NamedTuple):
    """Local views of each image.

    Attributes:
        pixels: cut out of the images.
        positive: whether a crop shows enough of an object.
    """

    pixels: Float[Tensor, "b v 3 s s"]
    positive: Bool[Tensor, "b v"]


def uncertain_crops(  # noqa: PLR0913 - each is a constant of the rule
    images: Pixels,
    cam: Cam,
    labels: Labels,
    *,
    count: int = 8,
    size: int = 96,
    high: float = 0.7,
    low: float = 0.25,
    least: float = 0.2,
    generator: torch.Generator | None = None,
) -> Crops:
    """Cut crops around pixels whose class is uncertain.

    The rule and the defaults are ToCo's (Ru et al. 2023). By the score of its strongest present
    class, a pixel counts 0 up to ``low``, 2 from ``high`` on and 1 between. Crops are centred on
    pixels below 2, drawn without repetition, or anywhere if there are fewer than ``count``. A crop
    is positive if the mean over its pixels exceeds ``least``.

    Args:
        images: normalised pixels.
        cam: maps of all classes in [0, 1], of the size of the images.
        labels: classes present in each image.
        count: number of crops per image.
        size: rows and columns of a crop.
        high: from this score on, a pixel certainly belongs to an object.
        low: up to this score, a pixel certainly belongs to the background.
        least: mean that a positive crop exceeds.
        generator: random number generator, on the CPU.

    Raises:
        ValueError: sizes of maps, images and crops do not match, or a map holds NaN or infinity.
    """
    check_finite("cam", cam, ("image", "class"))
    rows, cols = images.shape[-2:]
    if cam.shape[-2:] != images.shape[-2:]:
        raise ValueError(
            f"`cam` must have the size of the images, {rows}x{cols}, got "
            f"{cam.shape[-2]}x{cam.shape[-1]}; use camkit.resize_cam first"
        )
    margin = size // 2
    centres = (rows - 2 * margin, cols - 2 * margin)
    if size < 1 or count < 1 or min(centres) < 1 or math.prod(centres) < count:
        raise ValueError(
            f"`count` crops of `size` must fit the images, got {count} of {size} for {rows}x{cols}"
        )
    strongest = (cam.detach() * labels[:, :, None, None]).amax(1)
    regions = (strongest > low).long() + (strongest >= high).long()
    pixels = images.new_zeros(len(images), count, images.shape[1], size, size)
    positive = torch.zeros(len(images), count, dtype=torch.bool, device=images.device)
    for image, region in enumerate(regions.cpu()):
        inner = region[margin : rows - margin, margin : cols - margin]
        candidates = (inner <= 1).nonzero()
        if len(candidates) < count:
            candidates = (inner >= 0).nonzero()
        order = torch.randperm(len(candidates), generator=generator)[:count]
        for crop, (top, left) in enumerate(candidates[order].tolist()):
            window = (..., slice(top, top + size), slice(left, left + size))
            pixels[image, crop] = images[image][window]
            positive[image, crop] = bool(region[window].float().mean() > least)
    return Crops(pixels, positive)


def class_contrast_loss(
    student: Float[Tensor, "b v d"],
    teacher: Float[Tensor, "b g d"],
    positive: Bool[Tensor, "b v"],
    *,
    temperature: float = 0.5,
    extra_term: bool = True,
) -> Float[Tensor, ""]:
    """Pull positive views of an image to its teacher's global views, push the others away.

    ToCo's CTC (Ru et al. 2023): the InfoNCE of every positive view against the negative ones of its
    image, averaged over the teacher's views and the positives.

    Args:
        student: projected class tokens of the views, global ones (always positive) among them.
        teacher: projected class tokens of the global views; no gradient flows back.
        positive: whether each of the student's views shows an object.
        temperature: 0.5 is ToCo's.
        extra_term: add ``log(1 + sum of the negatives)`` for each image and teacher view, as ToCo's
            code does, probably by mistake; False is the paper's formula.

    Raises:
        ValueError: the temperature is not above 0, the views do not match, or a token holds NaN or
            infinity.
    """
    check_finite("student", student, ("image", "view"))
    check_finite("teacher", teacher, ("image", "view"))
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    if student.shape[:2] != positive.shape or len(student) != len(teacher):
        raise ValueError(
            "`student`, `teacher` and `positive` must be of the same images, and `positive` must "
            f"hold each view of the student; got {tuple(student.shape)}, {tuple(teacher.shape)} "
            f"and {tuple(positive.shape)}"
        )
    logits = teacher.detach() @ student.mT / temperature
    shown = positive[:, None]
    # in logarithms, as the exponentials themselves overflow: e is one positive, n all negatives
    log_n = logits.masked_fill(shown, -torch.inf).logsumexp(-1, keepdim=True)
    log_negatives = torch.logaddexp(log_n, torch.full_like(log_n, math.log(_TINY)))
    missed = F.softplus(log_negatives - logits)  # -log(e / (e + n + tiny))
    summed = (missed * shown).sum(-1)
    if extra_term:
        summed = summed + torch.logaddexp(log_n, torch.full_like(log_n, math.log1p(_TINY)))[..., 0]
    return (summed.mean(1) / (positive.sum(1) + _TINY)).mean()


def patch_labels(
    cam: Cam, labels: Labels, *, high: float = 0.7, low: float = 0.25
) -> Int[Tensor, "b n"]:
    """Label the patches whose map value is certain.

    The rule and both defaults are ToCo's (Ru et al. 2023) for VOC; on COCO it takes 0.65 for
    ``high``.

    Args:
        cam: one map for each class, in [0, 1], on the grid of the tokens; no gradient flows back.
        labels: classes present in each image; absent ones never win.
        high: a patch above it belongs to its strongest class.
        low: a patch at most this high is background.

    Returns:
        0 background, class + 1, 255 between the two scores; row by row.

    Raises:
        ValueError: the scores are out of order, or the maps do not match the labels or hold NaN or
            infinity.
    """
    check_finite("cam", cam, ("image", "class"))
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"`low` and `high` must satisfy 0 <= low <= high <= 1, got {low}, {high}")
    if cam.shape[:2] != labels.shape:
        raise ValueError(
            f"`cam` must hold one map for each of the {labels.shape[1]} classes of "
            f"{len(labels)} images, got {cam.shape[1]} maps of {len(cam)}"
        )
    if cam.shape[1] >= IGNORE:
        raise ValueError(f"at most {IGNORE - 1} classes fit below {IGNORE}, got {cam.shape[1]}")
    score, winner = (cam.detach().flatten(2) * labels[:, :, None]).max(1)
    return torch.where(score > high, winner + 1, IGNORE).masked_fill(score <= low, 0)


def patch_contrast_loss(
    tokens: Float[Tensor, "b n d"], labels: Int[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Pull patches of equal labels together, push patches of different labels apart.

    ToCo's PTC (Ru et al. 2023), exactly as its code computes it: half of one minus the mean
    absolute cosine over pairs of equal labels, plus half of that mean over pairs of unequal ones.
    Means are over all pairs within an image of the batch, without a patch and itself and without
    label 255. The absolute value, and adding one to both counts, are the code's, not the paper's.

    Args:
        tokens: final patch tokens.
        labels: from `patch_labels` of an inner layer.

    Raises:
        ValueError: there is not one label for each patch, or a token holds NaN or infinity.
    """
    check_finite("tokens", tokens, ("image", "patch"))
    if tokens.shape[:2] != labels.shape:
        raise ValueError(
            f"`labels` must hold one label for each of the {tokens.shape[1]} patches of "
            f"{len(tokens)} images, got {tuple(labels.shape)}"
        )
    unit = F.normalize(tokens, dim=-1, eps=1e-8)
    cosine = (unit @ unit.mT).abs()
    certain = labels != IGNORE
    same = labels[:, :, None] == labels[:, None]
    counted = certain[:, :, None] & certain[:, None]
    counted &= ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    alike, unlike = (
        (cosine * pairs).sum() / (pairs.sum() + 1) for pairs in (counted & same, counted & ~same)
    )
    return 0.5 * (1.0 - alike) + 0.5 * unlike
