"""Confident patches amplified, the others suppressed, after the forward."""

from dataclasses import dataclass, field

from camkit.capture.record import Capture
from camkit.ops.confidence import Confidence, TanhAroundMean, amplify
from camkit.tensors import Cam


@dataclass(frozen=True)
class Amplify:
    """Raise confident scores of each class map and lower the others; its sum is kept.

    What DOEI does to class-to-patch interactions (`camkit.PatchDecoupling`), for people who have
    maps. The order of scores within a map stays under the smooth rules, so it acts where classes
    compete or a background score is fixed.

    Attributes:
        strength: how far scores are raised and lowered, in [0, 1); 0 changes nothing.
        rule: what is confident.
    """

    strength: float = 0.5
    rule: Confidence = field(default_factory=TanhAroundMean)

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < 1.0:
            raise ValueError(f"`strength` must lie in [0, 1), got {self.strength}")

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        del capture
        return amplify(cam.flatten(2), self.rule, self.strength).view_as(cam).clamp(0, 1)
