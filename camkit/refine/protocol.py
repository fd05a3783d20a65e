"""What a refiner is, and how refiners are put in a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.tensors import Cam

Refiner: TypeAlias = Callable[[Cam, Capture], Cam]
"""``(cam, capture) -> cam``: a frozen dataclass, its repr the settings, or a plain function."""


@dataclass(frozen=True)
class Chain:
    """Refiners one after the other; itself a refiner."""

    refiners: tuple[Refiner, ...]

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        refined = cam
        for refiner in self.refiners:
            refined = refiner(refined, capture)
        return refined


def chain(*refiners: Refiner) -> Chain:
    """Put refiners in a row.

    >>> chain().refiners
    ()
    """
    return Chain(refiners)
