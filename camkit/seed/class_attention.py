"""Seed from what the class tokens attend to."""

from dataclasses import dataclass
from typing import ClassVar

from camkit.capture.record import Capture
from camkit.seed.protocol import check_classes, keep_asked
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class ClassAttentionSeed:
    """Class-to-patch attention, averaged over heads and watched blocks.

    A host with one class token per class (MCTformer) gives each class its own row; a host with a
    single one gives every class the same map, which then says where something is, not what.
    """

    gradients: ClassVar[bool] = False

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        rows = capture.class_to_patch().detach()
        tokens = rows.shape[1]
        check_classes(capture, classes, tokens if tokens > 1 else None)
        index = classes.clamp_min(0) if tokens > 1 else classes * 0
        maps = rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))
        return keep_asked(capture.grid.fold(maps), classes)
