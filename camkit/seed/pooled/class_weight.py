"""Seed from the classifier applied to every patch."""

from dataclasses import dataclass
from typing import ClassVar

from camkit.capture.record import Capture
from camkit.seed.protocol import check_classes, keep_asked, pick
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class ClassWeightSeed:
    """The classifier's score of each patch token, as in CAM (Zhou et al. 2016).

    Scores below the image's mean patch score of the class hold no evidence and become zero; the
    mean, instead of CAM's zero, is our choice, because a softmax classifier's scores have no
    natural zero.
    """

    gradients: ClassVar[bool] = False

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        scores = capture.patch_scores()
        check_classes(capture, classes, scores.shape[-1])
        maps = pick(scores, classes)
        evidence = (maps - maps.mean(-1, keepdim=True)).clamp_min(0.0)
        return keep_asked(capture.grid.fold(evidence), classes)
