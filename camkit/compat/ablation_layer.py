"""Where the channels of a layer lie, in grad-cam's words."""

from dataclasses import dataclass
from typing import ClassVar

from camkit.compat.missing import stand_in


@dataclass(frozen=True)
class AblationLayer:
    """States that channels are the second axis of a layer's output, as in convolutions."""

    axis: ClassVar[int] = 1


@dataclass(frozen=True)
class AblationLayerVit(AblationLayer):
    """States that channels are the last axis of a layer's output, as in transformers."""

    axis: ClassVar[int] = -1


def __getattr__(name: str) -> type:
    return stand_in(__name__, name)
