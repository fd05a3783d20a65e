"""Which scores to trust: rules that tell confident from unconfident, and what to do about it.

The DOEI paper amplifies confident tokens and suppresses the others; its figure shows each row of an
attention matrix split into two groups around two stars and changed by unequal amounts (Zhu et al.
2025, https://arxiv.org/abs/2502.15885). Neither gives a rule. These are readings of it.
"""

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Rows: TypeAlias = Float[Tensor, "*rows n"]
"""Scores of n things, in each of any number of rows."""


@runtime_checkable
class Confidence(Protocol):
    """Splits scores along the last axis."""

    def __call__(self, scores: Rows) -> Rows:
        """Confidence in [-1, 1]: 1 amplifies a score wholly, -1 suppresses it wholly."""


def amplify(scores: Rows, rule: Confidence, strength: float) -> Rows:
    """Raise confident scores and lower the others, each row keeping its sum.

    A score is multiplied by ``1 + strength * rule(scores)``, then the row is scaled back. That the
    sum is kept is our choice: otherwise the strength would change how much is attended to in all.

    Args:
        scores: not negative, for example attention.
        rule: what is confident; no gradient flows through it.
        strength: in [0, 1); 0 changes no bit.
    """
    if not 0.0 <= strength < 1.0:
        raise ValueError(f"`strength` must lie in [0, 1), got {strength}")
    if strength == 0.0:
        return scores
    wide = _widen(scores)
    changed = wide * (1.0 + strength * rule(wide.detach()).detach())
    before, after = (x.sum(-1, keepdim=True) for x in (wide, changed))
    empty = after == 0.0  # a row of zeros has no sum to be scaled to
    scale = before.masked_fill(empty, 1.0) / after.masked_fill(empty, 1.0)
    return (changed * scale).to(scores.dtype)


@dataclass(frozen=True)
class TanhAroundMean:
    """Soft: tanh of a score's distance from its row's mean, in standard deviations.

    Amounts are unequal and low and high fall apart, as the figure draws it; tanh, mean and both
    defaults are our choice, with no threshold to invent. A flat row is trusted 0.

    Attributes:
        shift: distance from the mean, in standard deviations, at which confidence is 0.
        temperature: small values split harder.
    """

    shift: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.shift):
            raise ValueError(f"`shift` must be finite, got {self.shift}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}")

    def __call__(self, scores: Rows) -> Rows:
        place, flat = _unit_range(scores)
        soft = ((_standardise(place) - self.shift) / self.temperature).tanh()
        return soft.masked_fill(flat, 0.0).to(scores.dtype)


@dataclass(frozen=True)
class MeanSplit:
    """Hard: 1 at and above the mean of the row, -1 below it; a flat row is trusted 0.

    Two groups, as the figure draws them; that the mean parts them is our choice.
    """

    def __call__(self, scores: Rows) -> Rows:
        place, flat = _unit_range(scores)
        return _split(place >= place.mean(-1, keepdim=True), flat, scores.dtype)


@dataclass(frozen=True)
class TwoMeans:
    """Hard: 1 for scores nearer to the higher of two centres, -1 for the others.

    Two-centre k-means along the row (Lloyd 1982): our reading of the figure's two stars as the
    centres of its two groups, and the reading closest to the drawing. The paper does not say so.
    The centres start at the least and the greatest score. A flat row is trusted 0.

    Attributes:
        steps: how often the centres move to the means of their groups; our choice.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"`steps` must be at least 0, got {self.steps}")

    def __call__(self, scores: Rows) -> Rows:
        place, flat = _unit_range(scores)
        low, high = torch.zeros_like(place[..., :1]), torch.ones_like(place[..., :1])
        total = place.sum(-1, keepdim=True)
        for _ in range(self.steps):
            upper = place >= (low + high) / 2
            count = upper.sum(-1, keepdim=True)
            mass = (place * upper).sum(-1, keepdim=True)
            # the least score is always in the low group, the greatest in the high one
            high = mass / count.clamp_min(1)
            low = (total - mass) / (place.shape[-1] - count).clamp_min(1)
        return _split(place >= (low + high) / 2, flat, scores.dtype)


@dataclass(frozen=True)
class TopShare:
    """Hard: 1 for a fixed share of the scores, the highest, and -1 for the others.

    Of equal scores the earlier one is taken, so that the count is exact, in flat rows too. Neither
    the paper nor its figure fixes a share; rule and default are our choice.

    Attributes:
        share: of n scores, ``round(share * n)`` are taken, but at least one.
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
    """Hard: 1 above the threshold that parts a row's histogram best (Otsu 1979), -1 below it.

    The threshold is the upper edge of the last bin of the low group; scikit-image names the middle
    of that bin, which would cut through the group. Neither the paper nor its figure mentions a
    histogram; the rule is our choice. A flat row is trusted 0.

    Attributes:
        bins: equal bins between the least and the greatest score of the row; our choice, for rows
            of some hundred patches.
    """

    bins: int = 64

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"`bins` must be at least 2, got {self.bins}")

    def __call__(self, scores: Rows) -> Rows:
        place, flat = _unit_range(scores)
        bins = (place * self.bins).long().clamp(0, self.bins - 1)
        counts = place.new_zeros(*place.shape[:-1], self.bins)
        counts = counts.scatter_add(-1, bins, torch.ones_like(place))
        middles = torch.arange(self.bins, device=place.device, dtype=place.dtype)
        below, mass = counts.cumsum(-1), (counts * middles).cumsum(-1)
        above, rest = below[..., -1:] - below, mass[..., -1:] - mass
        distance = mass / below.clamp_min(1) - rest / above.clamp_min(1)
        last = (below * above * distance.square()).argmax(-1, keepdim=True)
        return _split(bins > last, flat, scores.dtype)


@dataclass(frozen=True)
class FuzzyMembership:
    """Soft: a straight ramp from -1 at ``low`` to 1 at ``high``, flat outside.

    Fuzzy membership instead of a hard cut is the idea of Yun et al. 2023 ("Focus on the Core"),
    whose membership function was not to be found; the piecewise linear ramp and its ends are our
    choice. A flat row is trusted 0.

    Attributes:
        low: where trust begins to rise, in standard deviations from the mean of the row.
        high: where it is complete.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"`low` must lie below `high`, both finite, got {self.low} and {self.high}"
            )

    def __call__(self, scores: Rows) -> Rows:
        place, flat = _unit_range(scores)
        risen = (_standardise(place) - self.low) / (self.high - self.low)
        return (2.0 * risen - 1.0).clamp(-1.0, 1.0).masked_fill(flat, 0.0).to(scores.dtype)


def _widen(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _unit_range(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores moved and stretched to [0, 1] by row, so that no scale over- or underflows.

    Also says which rows are flat; those become zeros.
    """
    wide = _widen(scores.detach())
    least = wide.amin(-1, keepdim=True)
    span = wide.amax(-1, keepdim=True) - least
    flat = span == 0.0
    return (wide - least) / span.masked_fill(flat, 1.0), flat


def _standardise(place: Tensor) -> Tensor:
    """Distances from the mean in standard deviations of the row, as a population."""
    distance = place - place.mean(-1, keepdim=True)
    spread = distance.square().mean(-1, keepdim=True).sqrt()
    return distance / spread.masked_fill(spread == 0.0, 1.0)


def _split(upper: Tensor, flat: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(upper, 1.0, -1.0).masked_fill(flat, 0.0).to(dtype)
