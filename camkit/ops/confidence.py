"""Confidence rules, which decide how far to trust a score, and amplification by them.

The DOEI paper amplifies confident tokens and suppresses the others; its figure shows each row of an
attention matrix split into two groups around two stars and changed by unequal amounts (Zhu et al.
2025, https://arxiv.org/abs/2502.15885). Neither gives a rule; these are interpretations, and their
defaults are our choice.

A rule gives flat rows confidence 0, except `TopShare`, and no gradient flows through it.
"""

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.ops.scaling import rounding_of

Rows: TypeAlias = Float[Tensor, "*rows n"]
"""n scores in each of any number of rows."""


@runtime_checkable
class Confidence(Protocol):
    """Rates scores along the last axis."""

    def __call__(self, scores: Rows) -> Rows:
        """Return confidence in [-1, 1]: 1 amplifies a score fully, -1 suppresses it fully."""


def amplify(scores: Rows, rule: Confidence, strength: float) -> Rows:
    """Raise confident scores and lower the others, each row keeping its sum.

    A score is multiplied by ``1 + strength * rule(scores)``, then the row is scaled back. Keeping
    the sum is our choice: otherwise the strength would change the total attention.

    Args:
        scores: not negative, for example attention.
        rule: the confidence of each score; no gradient flows through it.
        strength: in [0, 1); 0 changes no bit.
    """
    if not 0.0 <= strength < 1.0:
        raise ValueError(f"`strength` must lie in [0, 1), got {strength}")
    if strength == 0.0:
        return scores
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    factors, scale = gain(wide, rule, strength)
    return (wide * factors * scale).to(scores.dtype)


def gain(scores: Rows, rule: Confidence, strength: float) -> tuple[Rows, Float[Tensor, "*rows 1"]]:
    """Return the factor of each score, and the one that brings its row back to its sum."""
    factors = 1.0 + strength * rule(scores.detach()).detach()
    before, after = scores.sum(-1, keepdim=True), (scores * factors).sum(-1, keepdim=True)
    empty = after == 0.0  # a row of zeros has no sum to be scaled to
    return factors, before.masked_fill(empty, 1.0) / after.masked_fill(empty, 1.0)


@dataclass(frozen=True)
class TanhAroundMean:
    """Soft: tanh of a score's distance from its row's mean, in standard deviations.

    As in the figure, amounts are unequal and low and high scores move apart; tanh and mean are our
    choice, and need no threshold.

    Attributes:
        shift: distance from the mean, in standard deviations, at which confidence is 0.
        temperature: small values split more sharply.
    """

    shift: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.shift):
            raise ValueError(f"`shift` must be finite, got {self.shift}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}")

    def __call__(self, scores: Rows) -> Rows:
        deviations, flat = _standardise(scores)
        confidence = ((deviations - self.shift) / self.temperature).tanh()
        return confidence.masked_fill(flat, 0.0).to(scores.dtype)


@dataclass(frozen=True)
class MeanSplit:
    """Hard: 1 at and above the mean of the row, -1 below it.

    The figure draws two groups; splitting them at the mean is our choice.
    """

    def __call__(self, scores: Rows) -> Rows:
        unit, flat = _unit_range(scores)
        return _split(unit >= unit.mean(-1, keepdim=True), flat, scores.dtype)


@dataclass(frozen=True)
class TwoMeans:
    """Hard: 1 for scores nearer to the higher of two centres, -1 for the others.

    Two-centre k-means along the row (Lloyd 1982), which takes the figure's two stars as the centres
    of its two groups. This is closest to the drawing, but the paper does not say so. The centres
    start at the least and the greatest score.

    Attributes:
        steps: how many times the centres move to the means of their groups.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"`steps` must be at least 0, got {self.steps}")

    def __call__(self, scores: Rows) -> Rows:
        unit, flat = _unit_range(scores)
        low, high = torch.zeros_like(unit[..., :1]), torch.ones_like(unit[..., :1])
        total = unit.sum(-1, keepdim=True)
        for _ in range(self.steps):
            upper = unit >= (low + high) / 2
            count = upper.sum(-1, keepdim=True)
            mass = (unit * upper).sum(-1, keepdim=True)
            # the least score is always in the low group, the greatest in the high one
            high = mass / count.clamp_min(1)
            low = (total - mass) / (unit.shape[-1] - count).clamp_min(1)
        return _split(unit >= (low + high) / 2, flat, scores.dtype)


@dataclass(frozen=True)
class TopShare:
    """Hard: 1 for a fixed share of the scores, the highest, and -1 for the others.

    Of equal scores the earlier one counts as higher, so that the count is exact, also in flat rows.
    Neither the paper nor its figure fixes a share; the rule is our choice.

    Attributes:
        share: of n scores, ``round(share * n)`` get 1, but at least one score.
    """

    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"`share` must lie in (0, 1], got {self.share}")

    def __call__(self, scores: Rows) -> Rows:
        count = max(1, round(self.share * scores.shape[-1]))
        order = scores.detach().argsort(stable=True, dim=-1, descending=True)
        return torch.full_like(scores, -1.0).scatter(-1, order[..., :count], 1.0)


@dataclass(frozen=True)
class Otsu:
    """Hard: 1 above the threshold that best splits a row's histogram (Otsu 1979), -1 below it.

    The threshold is the upper edge of the last bin of the low group; scikit-image returns the
    middle of that bin, which would cut through the group. Neither the paper nor its figure mentions
    a histogram; the rule is our choice.

    Attributes:
        bins: equal bins between the least and the greatest score of the row; the default suits rows
            of a few hundred patches.
    """

    bins: int = 64

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"`bins` must be at least 2, got {self.bins}")

    def __call__(self, scores: Rows) -> Rows:
        unit, flat = _unit_range(scores)
        bins = (unit * self.bins).long().clamp(0, self.bins - 1)
        counts = unit.new_zeros(*unit.shape[:-1], self.bins)
        counts = counts.scatter_add(-1, bins, torch.ones_like(unit))
        middles = torch.arange(self.bins, device=unit.device, dtype=unit.dtype)
        below, mass = counts.cumsum(-1), (counts * middles).cumsum(-1)
        above, rest = below[..., -1:] - below, mass[..., -1:] - mass
        distance = mass / below.clamp_min(1) - rest / above.clamp_min(1)
        last = (below * above * distance.square()).argmax(-1, keepdim=True)
        return _split(bins > last, flat, scores.dtype)


@dataclass(frozen=True)
class FuzzyMembership:
    """Soft: a straight ramp from -1 at ``low`` to 1 at ``high``, flat outside.

    Fuzzy membership instead of a hard cut is the idea of Yun et al. 2023 ("Focus on the Core").
    Their membership function is not published; the linear ramp is our choice.

    Attributes:
        low: where confidence begins to rise, in standard deviations from the mean of the row.
        high: where confidence reaches 1.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"`low` must lie below `high`, both finite, got {self.low} and {self.high}"
            )

    def __call__(self, scores: Rows) -> Rows:
        deviations, flat = _standardise(scores)
        ramp = (deviations - self.low) / (self.high - self.low)
        return (2.0 * ramp - 1.0).clamp(-1.0, 1.0).masked_fill(flat, 0.0).to(scores.dtype)


def _unit_range(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale each row to [0, 1], flat rows to 0; also return which rows are flat."""
    wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    least = wide.amin(-1, keepdim=True)
    span = wide.amax(-1, keepdim=True) - least
    flat = span <= rounding_of(scores, (-1,))
    return (wide - least) / span.masked_fill(flat, 1.0), flat


def _standardise(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances from the row's mean in standard deviations, and which rows are flat."""
    unit, flat = _unit_range(scores)  # squares of it neither over- nor underflow
    distance = unit - unit.mean(-1, keepdim=True)
    spread = distance.square().mean(-1, keepdim=True).sqrt()
    return distance / spread.masked_fill(spread == 0.0, 1.0), flat


def _split(upper: Tensor, flat: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(upper, 1.0, -1.0).masked_fill(flat, 0.0).to(dtype)
