"""Pseudo masks from class maps, and the palette that masks are drawn in."""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.ops.finite import finite_range
from camkit.ops.images import resize_cam
from camkit.tensors import IGNORE, IGNORE_16, Cam, Classes, Mask

_FEW = 8  # classes of an image that are compared one by one
_AT_ONCE = 2**25  # values of resized maps, 128 MB
_TOLERANCE = 1e-4  # resizing and half precision may move a normalised map out of [0, 1] by this


def voc_palette() -> list[int]:
    """Return the VOC colour map for PIL: red, green, blue of 256 colours in one list.

    >>> voc_palette()[12 * 3 : 13 * 3]  # dog
    [64, 0, 128]
    """
    return [level for value in range(256) for level in voc_colour(value)]


def voc_colour(value: int) -> tuple[int, int, int]:
    """Return red, green and blue of a mask value in the VOC colour map.

    The bits of the value are assigned in turn to red, green and blue, highest colour bit first, so
    that all values of 16 bits have colours of their own.
    """
    red, green, blue = (
        sum((value >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for channel in range(3)
    )
    return red, green, blue


def to_mask(
    cam: Cam,
    classes: Classes | None = None,
    *,
    background_score: float = 0.45,
    background: Literal["constant", "power"] = "constant",
    ignore_below: float | None = None,
    bits: Literal[8, 16] = 8,
) -> Mask:
    """Give each pixel its strongest class, or the background.

    With a constant background a class must beat ``background_score``; a tie goes to the
    background, a tie between classes to the first of them. With a power background it must beat
    ``(1 - max) ** background_score``, the background plane of PSA and its followers, which for a
    mask is a constant too (`power_threshold`).

    Args:
        cam: maps of the requested classes in [0, 1], already at image size.
        classes: the classes of the maps, 0 to 253 (to 65533 with 16 bits); -1 is padding and never
            wins. None numbers the mask by slot.
        background_score: score to beat, in [0, 1]; the exponent (above 0) of a power background.
            0.45 is the fixed value of several published evaluations; `sweep_confusions` finds
            the best one on a split of its own.
        background: a constant score, or a power of one minus the highest score.
        ignore_below: pixels that lose to the background, yet score more than this, are ignored;
            None ignores nothing.
        bits: 8 returns uint8, where ignored pixels are 255; 16 returns int32, where they are 65535,
            for more than 254 classes.

    Returns:
        0 for background, class + 1 (slot + 1 without ``classes``) elsewhere.

    Raises:
        ValueError: a score or a class is out of range or NaN, or maps and classes do not match.
    """
    threshold = background_score
    if background == "power":
        threshold = power_threshold(background_score)
    elif background != "constant":
        raise ValueError(f'`background` must be "constant" or "power", got "{background}"')
    elif not 0.0 <= background_score <= 1.0:
        raise ValueError(
            f"a constant `background_score` must lie in [0, 1], got {background_score}; "
            'use background="power" for an exponent'
        )
    if ignore_below is not None and not 0.0 <= ignore_below < threshold:
        raise ValueError(
            f"`ignore_below` must lie in [0, {threshold:.4g}), below the score a class must beat, "
            f"got {ignore_below}"
        )
    highest = cam.shape[1] - 1
    if classes is not None:
        highest = int(classes.max()) if classes.numel() else -1
    ignore, dtype = (IGNORE, torch.uint8) if bits == 8 else (IGNORE_16, torch.int32)
    if highest >= ignore - 1:
        raise ValueError(
            f"a mask of {bits} bits holds classes 0 to {ignore - 2}, got class {highest}; use "
            "bits=16, or classes=None, which numbers by slot, and keep the class list as the legend"
        )
    score, mask = _over_threshold(cam, classes, threshold)
    if ignore_below is not None:
        mask = mask.masked_fill((score > ignore_below) & (score <= threshold), ignore)
    return mask.to(dtype)


def mask_at(cam: Cam, size: tuple[int, int], classes: Classes, **settings: Any) -> Mask:
    """Return `to_mask` of maps resized to the size of the photo, in bounded memory.

    Large photos are drawn class by class, with the same result, so that memory does not grow with
    the number of classes: about 20 bytes for each pixel.

    Args:
        cam: maps of any size.
        size: rows and columns of the photo.
        classes: of the maps, without padding.
        settings: of `to_mask`.
    """
    count = cam.shape[1]
    if count * size[0] * size[1] <= _AT_ONCE or count < 2:
        return to_mask(resize_cam(cam, size).clamp(0, 1), classes, **settings)
    to_mask(cam.new_zeros(len(cam), count, 1, 1), classes, **settings)  # refuses wrong classes
    score = resize_cam(cam[:, :1], size).clamp_(0, 1)
    winner = torch.zeros(score.shape, dtype=torch.int16)
    for slot in range(1, count):
        plane = resize_cam(cam[:, slot : slot + 1], size).clamp_(0, 1)
        winner.masked_fill_(plane > score, slot)
        torch.maximum(score, plane, out=score)
    mask = to_mask(score, **settings)  # 1 where any class wins
    for slot in reversed(range(count)):
        here = (winner[:, 0] == slot) & (mask == 1)
        values = classes[:, slot, None, None] + 1
        mask = torch.where(here, values.to(mask.dtype), mask)
    return mask


def _over_threshold(
    cam: Cam, classes: Classes | None, threshold: float
) -> tuple[Float[Tensor, "b h w"], Int[Tensor, "b h w"]]:
    """Return each pixel's highest score and its mask value; the first of equal classes wins.

    A few classes are compared one by one, because indices of 64 bits for each pixel are slow, and
    chosen by products with truth values, which take a tenth of the time of `torch.where`.
    """
    if cam.shape[1] > _FEW:
        score, winner = strongest(cam, classes)
        if classes is not None:
            winner = classes.long().gather(1, winner.flatten(1)).view_as(winner)
        return score, torch.where(score > threshold, winner + 1, 0)
    cam = _checked(cam, classes)
    slots = torch.arange(cam.shape[1], device=cam.device)[None] if classes is None else classes
    values = (slots + 1).int()[:, :, None, None]
    score = cam[:, 0]
    mask = (score > threshold) * values[:, 0]
    for slot in range(1, cam.shape[1]):
        plane = cam[:, slot]
        mask += ((plane > score) & (plane > threshold)) * (values[:, slot] - mask)
        score = torch.maximum(score, plane)
    return score, mask


def power_threshold(alpha: float) -> float:
    """Return the constant score that draws the same mask as the background ``(1 - max) ** alpha``.

    The strongest class m beats that background exactly where it beats the root of
    ``m = (1 - m) ** alpha``; ``alpha`` must be above 0.

    >>> power_threshold(1.0)
    0.5
    """
    if not alpha > 0.0:
        raise ValueError(f"the exponent of a power background must be above 0, got {alpha}")
    low, high = 0.0, 1.0
    for _ in range(64):  # each halving gains a bit, and a float has 53
        middle = (low + high) / 2
        if middle < (1.0 - middle) ** alpha:
            low = middle
        else:
            high = middle
    return high


def gate(cam: Cam, classes: Classes) -> Cam:
    """Zero the maps of padded slots, where ``classes`` is -1, so that they never win."""
    if classes.shape != cam.shape[:2]:
        raise ValueError(
            f"`classes` must name the {cam.shape[1]} maps of each of {cam.shape[0]} images, "
            f"got shape {tuple(classes.shape)}; pad shorter lists with -1"
        )
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise TypeError(f"`classes` must hold indices of an integer dtype, got {classes.dtype}")
    if classes.numel() and int(classes.min()) < -1:
        raise ValueError(
            f"`classes` must hold indices from 0, or -1 for padding, got {int(classes.min())}"
        )
    padding = classes < 0
    # most images of a data set fill their slots, and copying all maps takes longer than this test
    return cam.masked_fill(padding[:, :, None, None], 0.0) if padding.any() else cam


def strongest(
    cam: Cam, classes: Classes | None = None
) -> tuple[Float[Tensor, "b h w"], Int[Tensor, "b h w"]]:
    """Return the score and the slot, from 0, of each pixel's strongest class.

    Args:
        cam: maps of the requested classes in [0, 1].
        classes: the classes of the maps, -1 where a slot is padding; None if no slot is.
    """
    score, slot = _checked(cam, classes).max(dim=1)
    return score, slot


def _checked(cam: Cam, classes: Classes | None) -> Cam:
    """Return maps in [0, 1], those of padded slots zero."""
    if cam.shape[1] == 0:
        raise ValueError("`cam` must hold at least one class map, got none; pad with class -1")
    low, high = finite_range("cam", cam) or (0.0, 0.0)
    if low < -_TOLERANCE or high > 1.0 + _TOLERANCE:
        raise ValueError(
            f"`cam` must lie in [0, 1], got values from {low:.4g} to {high:.4g}; normalise each "
            "map first"
        )
    return cam if classes is None else gate(cam, classes)
