"""Significance of a gain in mean IoU: a paired bootstrap over images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from camkit.printing import several
from camkit.score.confusion import Definition, Overlap, check_foreground

FEW_IMAGES = 40
"""Below this number of images, intervals and p values are not reliable (benchmarks/coverage.py)."""

_CHUNK_BYTES = 100 * 2**20  # of working memory, whatever the size of the set


@dataclass(frozen=True)
class Gain:
    """The gain of ``other`` over ``base`` in mean IoU, which lies in [0, 1].

    ``low`` to ``high`` is the percentile interval of the gain; ``chance_below_zero`` and
    ``chance_above_zero`` are the shares of resampled sets on which ``other`` is strictly worse or
    better. With fewer than `FEW_IMAGES` ``images``, ``few_images`` is true, and neither the
    interval nor the p value keeps what it promises.
    """

    mean_iou_base: float
    mean_iou_other: float
    gain: float
    low: float
    high: float
    chance_below_zero: float
    chance_above_zero: float
    resamples: int
    images: int

    @property
    def few_images(self) -> bool:
        """Whether the interval and the p value are not reliable: see `FEW_IMAGES`."""
        return self.images < FEW_IMAGES

    @property
    def p_value(self) -> float:
        """Two-sided: twice the share of sets, at least one, without a gain of this sign."""
        lost = min(1.0 - self.chance_below_zero, 1.0 - self.chance_above_zero)
        return min(1.0, 2.0 * max(lost, 1.0 / (self.resamples + 1)))


def paired_gain(  # noqa: PLR0913 - each of the five settings is a choice of its own
    base: Int[Tensor, "n c c"],
    other: Int[Tensor, "n c c"],
    *,
    definition: Definition = "present",
    classes: Sequence[int] | None = None,
    resamples: int = 10_000,
    rng_seed: int = 0,
    level: float = 0.95,
) -> Gain:
    """Compare two methods on the same images, with the interval due to the choice of images.

    Images are drawn with replacement, the same images for both methods, and the mean IoU of each
    drawn set is taken from its summed confusion. Sets without any of ``classes`` are left out.
    With fewer than `FEW_IMAGES` images the result says ``few_images``.

    Args:
        base: one confusion matrix per image.
        other: the same images, in the same order.
        definition: which classes count, see `mean_iou`.
        classes: mask values to average over, 0 being the background; None takes all.
        resamples: number of drawn sets; 10 000 fix a 95 % interval to about its second digit.
        rng_seed: seed of the draw.
        level: share of the resampled gains that the interval holds.

    Raises:
        ValueError: the matrices are not of the same images, no class but the background has a
            true pixel, or a setting is out of range.
    """
    _check_pairs(base, other)
    if resamples < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"`resamples` must be at least 1 and `level` lie in (0, 1), got {resamples} and {level}"
        )

    def mean(overlap: Overlap) -> Tensor:
        return overlap.mean_iou(definition=definition, classes=classes)

    check_foreground(base.sum(0), classes)
    mean_base, mean_other = (mean(Overlap.of(side.sum(0))) for side in (base, other))
    if mean_base.isnan() or mean_other.isnan():
        raise ValueError("the images hold no pixel of the chosen classes, so no mean IoU exists")
    drawn = _resampled(base, other, resamples, rng_seed)
    gains = torch.cat([mean(other_set) - mean(base_set) for base_set, other_set in drawn])
    gains = gains[~gains.isnan()]
    if not len(gains):
        raise ValueError("no resampled set holds a pixel of the chosen classes; draw more sets")
    edges = gains.new_tensor([(1.0 - level) / 2, (1.0 + level) / 2])
    low, high = torch.quantile(gains, edges).tolist()
    return Gain(
        mean_iou_base=float(mean_base),
        mean_iou_other=float(mean_other),
        gain=float(mean_other - mean_base),
        low=low,
        high=high,
        chance_below_zero=float((gains < 0).double().mean()),
        chance_above_zero=float((gains > 0).double().mean()),
        resamples=len(gains),
        images=len(base),
    )


def few_images(images: int) -> str:
    """Say that so few images make an interval unreliable.

    >>> few_images(9)
    '9 images: the interval and p are not reliable; use 40 or more'
    """
    return (
        f"{several(images, 'image')}: the interval and p are not reliable; use {FEW_IMAGES} or more"
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for the number of comparisons (Holm 1979), in the given order.

    The chance that any of them falsely stays below a level is at most that level.

    Raises:
        ValueError: a p value is NaN or outside [0, 1].

    >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    wrong = [p for p in p_values if not 0.0 <= p <= 1.0]  # NaN too
    if wrong:
        raise ValueError(f"`p_values` must lie in [0, 1], got {wrong[0]}")
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def _resampled(
    base: Tensor, other: Tensor, resamples: int, rng_seed: int
) -> Iterator[tuple[Overlap, Overlap]]:
    """Yield the overlaps of both methods on drawn sets, in chunks of sets."""
    sides = [Overlap.of(side.cpu()) for side in (base, other)]
    parts = [part for side in sides for part in (side.hit, side.true, side.predicted)]
    # float64 sums are exact up to 2**53 pixels, and a matrix product is far faster than int64
    per_image = torch.stack(parts, dim=1).double()
    images, _, num_classes = per_image.shape
    generator = torch.Generator().manual_seed(rng_seed)
    chunk = max(1, _CHUNK_BYTES // (8 * (4 * images + 24 * num_classes)))
    for start in range(0, resamples, chunk):
        sets = min(chunk, resamples - start)
        drawn = torch.randint(images, (sets, images), generator=generator)
        drawn += images * torch.arange(sets)[:, None]
        times = torch.bincount(drawn.flatten(), minlength=sets * images).view(sets, images)
        sums = times.double() @ per_image.flatten(1)
        counts = sums.long().view(-1, 6, num_classes).unbind(1)
        yield Overlap(*counts[:3]), Overlap(*counts[3:])


def _check_pairs(base: Tensor, other: Tensor) -> None:
    if base.shape != other.shape:
        raise ValueError(
            f"`base` and `other` must hold the same images and classes, got {tuple(base.shape)} "
            f"and {tuple(other.shape)}"
        )
    if len(base) < 2:
        raise ValueError(f"a bootstrap needs at least 2 images, got {len(base)}")
    differs = (base.sum(-1) != other.sum(-1)).any(-1)
    if differs.any():
        raise ValueError(
            "`base` and `other` must be scored on the same truth, image by image; "
            f"image {int(differs.nonzero()[0])} differs: score both in the same order"
        )
