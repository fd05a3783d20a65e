"""Seed from what the class tokens attend to."""

from dataclasses import dataclass
from typing import ClassVar

import torch

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
        check_classes(capture, classes, _known(capture, rows.shape[1]))
        shares = [capture.class_token_shares(column).to(rows) for column in classes.unbind(1)]
        maps = torch.einsum("bkc,bcn->bkn", torch.stack(shares, 1), rows)
        return keep_asked(capture.grid.fold(maps), classes)


def _known(capture: Capture, tokens: int) -> int | None:
    """How many classes there are; any number will do for a host whose one token serves them all."""
    if tokens == 1:
        return None
    return tokens if capture.vocabulary is None else len(capture.vocabulary)
