"""Progressive decoupling (CPDO, PPDO): confident scores amplified, the others suppressed."""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from camkit.ops.confidence import Confidence, TanhAroundMean, amplify


@dataclass(frozen=True)
class ClassDecoupling:
    """Class-wise: among the classes that each class token interacts with (CPDO).

    Two groups by confidence, the high one raised and the low one lowered by unequal amounts, are
    the figure's, in each row; rule, strength and the kept sum are ours.

    Attributes:
        strength: how far scores are raised and lowered at the last block, in [0, 1).
        rule: what is confident.
    """

    strength: float = 0.5
    rule: Confidence = field(default_factory=TanhAroundMean)

    def __post_init__(self) -> None:
        _check(self.strength)

    def __call__(
        self, weights: Float[Tensor, "b c c"], depth: float = 1.0
    ) -> Float[Tensor, "b c c"]:
        return amplify(weights, self.rule, self.strength * depth)


@dataclass(frozen=True)
class PatchDecoupling:
    """Patch-wise: among the patches that interact with each class (PPDO).

    Attributes:
        strength: how far scores are raised and lowered at the last block, in [0, 1).
        rule: what is confident.
        axis: "patches" compares patches for each class, because the paper amplifies tokens;
            "classes" compares classes for each patch, a row of the figure's N x C matrix, and
            does nothing where there is one class.
    """

    strength: float = 0.5
    rule: Confidence = field(default_factory=TanhAroundMean)
    axis: Literal["patches", "classes"] = "patches"

    def __post_init__(self) -> None:
        _check(self.strength)
        if self.axis not in ("patches", "classes"):
            raise ValueError(f'`axis` must be "patches" or "classes", got {self.axis!r}')

    def __call__(
        self, weights: Float[Tensor, "b n c"], depth: float = 1.0
    ) -> Float[Tensor, "b n c"]:
        strength = self.strength * depth
        if self.axis == "classes":
            return amplify(weights, self.rule, strength)
        return amplify(weights.mT, self.rule, strength).mT


def _check(strength: float) -> None:
    if not 0.0 <= strength < 1.0:
        raise ValueError(f"`strength` must lie in [0, 1), got {strength}")
