"""Which seed, layer, view and threshold suit one photo: told by the classifier, not by masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.bench.maps import variant_maps
from camkit.bench.protocol import Variant
from camkit.bench.quality import Quality, left_behind
from camkit.ops.resampling import resize_cam
from camkit.photo import Photo
from camkit.tensors import Cam
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Picked:
    """The best candidate for one class of one photo.

    Attributes:
        variant: it made the map.
        threshold: from where on a pixel belongs to the class.
        left: share of the class's score that is left without those pixels.
        area: their share of the picture.
        cam: the map, at the size the model sees, bent so that the threshold lies at 0.5: one
            background score then suits all classes and photos.
    """

    variant: Variant
    threshold: float
    left: float
    area: float
    cam: Float[Tensor, "H W"]


@dataclass(frozen=True)
class SuppressionChoice:
    """Takes the candidate that leaves least of the class's score outside a small area.

    After BAS (Wu et al. 2022), which trains with the sum of both; to choose by it, among binary
    maps and on faded pixels instead of features, is ours.

    Attributes:
        thresholds: tried on each map, in (0, 1).
        area_weight: how much area counts beside what is left; 1.2 is what BAS trains with.
        batch: pictures per forward.
    """

    thresholds: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    area_weight: float = 1.2
    batch: int = 16

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0.0 < t < 1.0 for t in self.thresholds):
            raise ValueError(f"`thresholds` must lie in (0, 1), got {self.thresholds}")
        if not self.area_weight >= 0.0:
            raise ValueError(f"`area_weight` must be at least 0, got {self.area_weight}")
        if self.batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {self.batch}")

    def __call__(
        self,
        model: nn.Module,
        photo: Photo,
        classes: Sequence[int],
        variants: Sequence[Variant],
        vocabulary: Vocabulary,
    ) -> list[Picked]:
        """Choose for each class.

        Args:
            model: borrowed, in evaluation mode.
            photo: what the maps are made of.
            classes: of the vocabulary, present in the photo.
            variants: candidates: seeds, layers, views, refiners.
            vocabulary: joins classifier outputs.
        """
        if not variants or not classes:
            raise ValueError("name at least one variant and one class to choose for")
        asked = torch.tensor([list(classes)], dtype=torch.int64)
        size = (photo.pixels.shape[-2], photo.pixels.shape[-1])
        found = variant_maps(model, photo, asked, variants, vocabulary)
        maps = [resize_cam(found[v], size).clamp(0, 1).cpu().float() for v in variants]
        return [
            self._pick(model, photo, index, [cam[0, slot] for cam in maps], variants, vocabulary)
            for slot, index in enumerate(classes)
        ]

    def _pick(
        self,
        model: nn.Module,
        photo: Photo,
        index: int,
        maps: Sequence[Tensor],
        variants: Sequence[Variant],
        vocabulary: Vocabulary,
    ) -> Picked:
        pairs = [(v, t) for v in range(len(variants)) for t in self.thresholds]
        shown = torch.stack([(maps[v] > t).float() for v, t in pairs])[:, None]
        pictures = torch.cat([photo.pixels, photo.pixels * (1 - shown)])
        scores, _ = Quality(batch=self.batch).ask(model, pictures, index, vocabulary)
        left, area = left_behind(scores[1:], scores[0]), shown.mean((1, 2, 3))
        best = int((left + self.area_weight * area).argmin())
        variant, threshold = pairs[best]
        return Picked(
            variants[variant],
            threshold,
            float(left[best]),
            float(area[best]),
            bent(maps[variant], threshold),
        )


def bent(cam: Cam | Float[Tensor, "H W"], threshold: float) -> Tensor:
    """A map in [0, 1] to the power that takes the threshold to 0.5.

    >>> bent(torch.tensor([[0.0, 0.25, 1.0]]), 0.25)
    tensor([[0.0000, 0.5000, 1.0000]])
    """
    return cam.pow(math.log(0.5) / math.log(threshold))
