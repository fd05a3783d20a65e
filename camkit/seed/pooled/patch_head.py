"""Seed from a head of the host's own that scores patches, and the product of seeds."""

from dataclasses import dataclass
from typing import ClassVar

from camkit.capture.record import Capture
from camkit.capture.tokens import TokenWatch
from camkit.errors import UnsupportedModelError
from camkit.seed.needs import needs
from camkit.seed.protocol import Seed, check_classes, keep_asked, pick
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class PatchHeadSeed:
    """The class maps that a head of the host makes of its patches (MCTformer-V2's patch CAM).

    It has as many channels as the host has class scores. Negative ones count as zero, as there.
    """

    gradients: ClassVar[bool] = False

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        rows, cols = capture.grid.rows, capture.grid.cols
        maps = [
            call.output
            for call in capture.tail
            if call.output.dim() == 4 and call.output.shape[2:] == (rows, cols)
        ]
        if not maps:
            raise UnsupportedModelError(
                f"no layer behind the last block returns maps of {rows}x{cols} patches, so the "
                "host has no head for patches; use ClassWeightSeed"
            )
        known = maps[-1].shape[1] if capture.outputs is None else capture.outputs.shape[-1]
        fitting = [scored for scored in maps if scored.shape[1] == known]
        if not fitting:
            raise UnsupportedModelError(
                f"layers behind the last block return maps of {maps[-1].shape[1]} channels (a "
                f"decoder's, it seems), but the host scores {known} classes, so none of them is a "
                "head for patches; use ClassWeightSeed"
            )
        scores = fitting[-1].flatten(2).mT
        scores = scores if capture.vocabulary is None else capture.vocabulary.score(scores)
        check_classes(capture, classes, scores.shape[-1])
        return keep_asked(capture.grid.fold(pick(scores, classes).clamp_min(0.0)), classes)


@dataclass(frozen=True)
class ProductSeed:
    """The product of two seeds' maps: what both see.

    Class attention times patch head is MCTformer-V2's map; with ``root``, MCTformer+'s.

    Attributes:
        first: a seed.
        second: another one.
        root: take the square root, so that maps keep their scale.
    """

    first: Seed
    second: Seed
    root: bool = False

    @property
    def gradients(self) -> bool:
        """Whether one of the two needs them."""
        return self.first.gradients or self.second.gradients

    @property
    def tokens(self) -> TokenWatch:
        """What must be kept of the forward for the two."""
        return needs(self.first, self.second)["tokens"] or TokenWatch()

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        first = self.first(capture, classes)
        product = first * self.second(capture, classes).to(first)
        return product.sqrt() if self.root else product
