"""Seeds that weigh attention by what it does to the class score."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from camkit.capture.record import Capture
from camkit.errors import CaptureError
from camkit.seed.protocol import check_classes, class_gradients, keep_asked
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class GradientSeed:
    """Class-to-patch attention times its gradient, averaged over heads and watched blocks.

    Negative products count as zero. The gradient of the attention map is computed from the gradient
    of the attention output, so no map exists and no parameter gradient is touched. Source:
    grad-weighted attention of Chefer et al. 2021; the mean over blocks is our choice.
    """

    gradients: ClassVar[bool] = True

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, capture.scores.shape[-1])
        tokens = _class_tokens(capture)
        rows = [block.rows(tokens).detach() for block in capture.blocks]
        maps = []
        for column in classes.unbind(1):
            gradients = class_gradients(capture, column)
            weighted = [
                (row * block.gradient_rows(gradient, tokens)).clamp_min(0.0).mean((1, 2))
                for row, block, gradient in zip(rows, capture.blocks, gradients, strict=True)
            ]
            maps.append(torch.stack(weighted).mean(0)[:, capture.patches])
        return keep_asked(capture.grid.fold(torch.stack(maps, 1).detach()), classes)


@dataclass(frozen=True)
class RolloutSeed:
    """Class relevance carried from the class token down through all watched blocks.

    Each block adds ``relevance @ mean over heads of relu(A * dA)`` to the relevance above it, where
    dA is the gradient of the class score (Chefer et al. 2021). A host without class token starts
    from the mean of its patches, which is our extension. Watch all blocks for the published method.
    """

    gradients: ClassVar[bool] = True

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, capture.scores.shape[-1])
        length = capture.blocks[0].shape[2]
        start = capture.scores.new_zeros(capture.images, length).detach()
        origin = list(capture.anatomy.class_tokens) or capture.patches
        start[:, origin] = 1.0 / len(origin)
        maps = []
        for column in classes.unbind(1):
            gradients = class_gradients(capture, column)
            relevance = start
            for block, gradient in zip(reversed(capture.blocks), reversed(gradients), strict=True):
                relevance = relevance + block.hop(relevance, gradient)
            maps.append((relevance - start)[:, capture.patches])
        return keep_asked(capture.grid.fold(torch.stack(maps, 1)), classes)


def _class_tokens(capture: Capture) -> tuple[int, ...]:
    if not capture.anatomy.class_tokens:
        raise CaptureError("this model has no class token; use RolloutSeed or ClassWeightSeed")
    return capture.anatomy.class_tokens
