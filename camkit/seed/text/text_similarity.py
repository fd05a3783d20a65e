"""Seed from the likeness of patches and texts."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture
from camkit.seed.protocol import check_classes, keep_asked, pick
from camkit.seed.text.text_classes import TextClasses
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class TextSimilaritySeed:
    """How alike the embeddings of patches are to those of class texts, for CLIP and its kin.

    A patch goes the way of the class token: last norm and projection; where a head pools (SigLIP),
    it is run on the patch alone. Attach `camkit.StaticCalibration` for maps of good quality: CLIP's
    patches look like their opposite without (Li et al. 2023).

    Attributes:
        text: the classes.
        reading: "similarity" is the cosine. "softmax" is each class's share among all classes and
            background texts at the host's scale, as CLIP-ES (Lin et al. 2023) scores images; for
            patches it is ours. "surgery" removes what a patch has in common with all texts, after
            CLIP Surgery (Li et al. 2023): every class's cosine is weighted by how sure the image
            embedding is of it (softmax of twice the cosine, over its mean), and the mean over all
            texts is taken away; background texts count among them, which is ours.

    What exceeds the image's mean patch is evidence, except for "softmax", whose zero is natural;
    that is ours.
    """

    text: TextClasses
    reading: Literal["similarity", "softmax", "surgery"] = "surgery"

    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.reading not in ("similarity", "softmax", "surgery"):
            raise ValueError(
                '`reading` must be "similarity", "softmax" or "surgery", got ' + repr(self.reading)
            )
        if self.reading == "surgery" and len(self.text) == 1 and self.text.background is None:
            raise ValueError(
                '`reading="surgery"` compares texts and needs at least two; add background texts, '
                'or use "similarity"'
            )

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, len(self.text))
        maps = pick(self.scores(capture), classes)
        if self.reading != "softmax":
            maps = (maps - maps.mean(-1, keepdim=True)).clamp_min(0.0)
        return keep_asked(capture.grid.fold(maps), classes)

    def scores(self, capture: Capture) -> Float[Tensor, "b n C"]:
        """What every patch has to do with every class, signed."""
        space = self.text.known_space()
        likeness = self.text.similarity(space.patches(capture), background=True)
        if self.reading == "softmax":
            likeness = (self.text.scale * likeness).softmax(-1)
        if self.reading == "surgery":
            whole = self.text.similarity(space.images(capture), background=True)
            sure = (2.0 * whole).softmax(-1)
            likeness = likeness * (sure / sure.mean(-1, keepdim=True))[:, None]
            likeness = likeness - likeness.mean(-1, keepdim=True)
        return likeness[..., : len(self.text)]
