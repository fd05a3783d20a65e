"""What a refiner is, and how refiners are put in a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from camkit.capture.record import Capture
from camkit.tensors import Cam

Refiner: TypeAlias = Callable[[Cam, Capture], Cam]
"""``(cam, capture) -> cam``: a frozen dataclass, its repr the settings, or a plain function."""


@dataclass(frozen=True)
class Chain:
    """Refiners one after the other; itself a refiner."""

    refiners: tuple[Refiner, ...]

    def __call__(self, cam: Cam, capture: Capture) -> Cam:
        for refiner in self.refiners:
            cam = refiner(cam, capture)
        return cam


def chain(*refiners: Refiner) -> Chain:
    """Put refiners in a row.

    >>> chain().refiners
    ()
    """
    return Chain(refiners)
