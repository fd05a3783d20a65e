"""Ways to pool patches into one vector, and the exact part that each patch has in it."""

from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Values: TypeAlias = Float[Tensor, "b n d"]
Pooled: TypeAlias = Float[Tensor, "b d"]


@runtime_checkable
class Pooling(Protocol):
    """A pooling whose result is a sum over patches."""

    def pool(self, values: Values) -> Pooled:
        """One vector an image."""

    def parts(self, values: Values) -> Values:
        """What each patch adds to it; the parts add up to the pooled vector."""


@dataclass(frozen=True)
class MeanPooling:
    """The mean over patches: every patch adds its share."""

    def pool(self, values: Values) -> Pooled:
        return values.mean(1)

    def parts(self, values: Values) -> Values:
        return values / values.shape[1]


@dataclass(frozen=True)
class MaxPooling:
    """The maximum of each channel (ToCo), which belongs to the first patch that reaches it."""

    def pool(self, values: Values) -> Pooled:
        return values.amax(1)

    def parts(self, values: Values) -> Values:
        winner = F.one_hot(values.argmax(1), values.shape[1]).mT
        return values * winner.to(values.dtype)


@dataclass(frozen=True)
class GroupedGeM:
    """Generalised mean with one power for each group of channels (GGeM, Ko et al. 2022).

    ``(mean over patches of x^p)^(1/p)``, where ``x^p / (n pooled^(p - 1))`` is the part of a patch.
    The formula is read from the abstract and one unofficial implementation; the decomposition is
    ours. Values below ``floor`` count as ``floor``, so half of the channels behind a layer norm are
    flat. A power of 1 is the mean, large ones approach the maximum.

    Attributes:
        powers: one for each group; channels are split evenly, in order.
        floor: least value, positive.
    """

    powers: tuple[float, ...] = (3.0,)
    floor: float = 1e-6

    def __post_init__(self) -> None:
        if not self.powers or min(self.powers) <= 0.0:
            raise ValueError(f"`powers` must hold positive numbers, got {self.powers}")
        if self.floor <= 0.0:
            raise ValueError(f"`floor` must be positive, got {self.floor}")

    def pool(self, values: Values) -> Pooled:
        power = self._power(values)
        return values.clamp_min(self.floor).pow(power).mean(1).pow(1 / power)

    def parts(self, values: Values) -> Values:
        power = self._power(values)
        pooled = self.pool(values)[:, None]
        # (x / pooled)^p, not x^p / pooled^p: powers of small values vanish
        relative = (values.clamp_min(self.floor) / pooled).pow(power)
        return relative * pooled / values.shape[1]

    def _power(self, values: Values) -> Float[Tensor, " d"]:
        groups, channels = len(self.powers), values.shape[-1]
        if channels % groups:
            raise ValueError(
                f"`powers` must be as many as divide {channels} channels evenly, got {groups}"
            )
        return values.new_tensor(self.powers).repeat_interleave(channels // groups)


@dataclass(frozen=True)
class RankPooling:
    """Weighted mean in order of size (MCTformer+, Xu et al. 2024): each rank weighs ``decay`` less.

    Attributes:
        decay: 1 is the mean, small values approach the maximum; 0.996 is MCTformer+'s.
    """

    decay: float = 0.996

    def __post_init__(self) -> None:
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"`decay` must lie in (0, 1], got {self.decay}")

    def pool(self, values: Values) -> Pooled:
        return self.parts(values).sum(1)

    def parts(self, values: Values) -> Values:
        ranks = values.argsort(1, descending=True).argsort(1)
        weights = torch.pow(self.decay, torch.arange(values.shape[1], device=values.device))
        return values * (weights / weights.sum()).to(values.dtype)[ranks]
