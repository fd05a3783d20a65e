"""Token contrast of ToCo: class tokens of crops, and patch tokens by pseudo labels."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from camkit.tensors import Cam, Labels, Pixels

TINY = 1e-4  # ToCo's, in both places where it divides


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
    """Cut crops around pixels that no class is sure of.

    The rule and the defaults are ToCo's (Ru et al. 2023): each pixel counts 0 up to ``low``, 2 from
    ``high`` on and 1 between, by its strongest present class; crops are centred on pixels below 2,
    drawn without repetition, or anywhere where these are fewer than ``count``; a crop is positive
    where its pixels' mean exceeds ``least``.

    Args:
        images: normalised pixels.
        cam: maps of all classes in [0, 1], of the size of the images.
        labels: classes present in each image.
        count: crops of each image.
        size: rows and columns of a crop.
        high: from where on a pixel is sure to be an object's.
        low: up to where it is sure to be background.
        least: see above.
        generator: source of chance, on the CPU.

    Raises:
        ValueError: sizes of maps, images and crops do not fit each other.
    """
    rows, cols = images.shape[-2:]
    if cam.shape[-2:] != images.shape[-2:]:
        raise ValueError(
            f"`cam` must be of the size of the images, {rows}x{cols}, got "
            f"{cam.shape[-2]}x{cam.shape[-1]}; use camkit.resize_cam first"
        )
    centres = (rows - 2 * (size // 2), cols - 2 * (size // 2))
    if size < 1 or count < 1 or min(centres) < 1 or math.prod(centres) < count:
        raise ValueError(
            f"`count` crops of `size` must fit the images, got {count} of {size} for {rows}x{cols}"
        )
    strongest = (cam.detach() * labels[:, :, None, None]).amax(1)
    regions = (strongest > low).long() + (strongest >= high).long()
    pixels = images.new_zeros(len(images), count, images.shape[1], size, size)
    positive = torch.zeros(len(images), count, dtype=torch.bool, device=images.device)
    for image, region in enumerate(regions.cpu()):
        margin = size // 2
        inner = region[margin : rows - margin, margin : cols - margin]
        found = (inner <= 1).nonzero()
        found = (inner >= 0).nonzero() if len(found) < count else found
        order = torch.randperm(len(found), generator=generator)[:count]
        for crop, (top, left) in enumerate(found[order].tolist()):
            window = (slice(top, top + size), slice(left, left + size))
            pixels[image, crop] = images[image][:, window[0], window[1]]
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
    """Pull views of an image to what its teacher says of the whole, background views away.

    ToCo's CTC (Ru et al. 2023): the InfoNCE of every positive view against the negative ones of
    its image, averaged over the teacher's views and the positives. By a slip of its code one term
    more, ``log(1 + sum of the negatives)``, is added for each image and teacher view;
    ``extra_term=False`` gives the paper's formula.

    Args:
        student: projected class tokens of the views, global ones (always positive) among them.
        teacher: projected class tokens of the global views; no gradient flows back.
        positive: whether each of the student's views shows an object.
        temperature: 0.5 is ToCo's.
        extra_term: see above.

    Raises:
        ValueError: the temperature is not above 0, or the views are not named one by one.
    """
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}")
    if student.shape[:2] != positive.shape or len(student) != len(teacher):
        raise ValueError(
            "`student`, `teacher` and `positive` must be of the same images, and `positive` must "
            f"name each view of the student; got {tuple(student.shape)}, {tuple(teacher.shape)} "
            f"and {tuple(positive.shape)}"
        )
    alike = teacher.detach() @ student.mT / temperature
    shown = positive[:, None]
    # in logarithms, as the exponentials themselves overflow: e is one positive, n all negatives
    log_n = alike.masked_fill(shown, -torch.inf).logsumexp(-1, keepdim=True)
    against = torch.logaddexp(log_n, torch.full_like(log_n, math.log(TINY)))
    missed = F.softplus(against - alike)  # -log(e / (e + n + tiny))
    summed = (missed * shown).sum(-1)
    if extra_term:
        summed = summed + torch.logaddexp(log_n, torch.full_like(log_n, math.log1p(TINY)))[..., 0]
    return (summed.mean(1) / (positive.sum(1) + TINY)).mean()


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
