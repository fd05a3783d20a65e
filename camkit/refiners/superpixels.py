"""Class maps made constant within segments of the picture."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.record import NO_MODEL, Capture, WatchSpec
from camkit.ops.images import resize_cam
from camkit.ops.similarity import check_positive
from camkit.refiners.protocol import check_finite, picture_bytes, picture_of
from camkit.tensors import RGB, Cam

Method = Literal["slic", "felzenszwalb"]
Segments = Int[Tensor, "b H W"]


class Defaults(NamedTuple):
    """Settings of a method that nobody set."""

    size: int
    coherence: float
    sigma: float


DEFAULTS: dict[str, Defaults] = {
    "slic": Defaults(200, 20.0, 0.0),
    "felzenszwalb": Defaults(50, 100.0, 0.8),
}


@dataclass(frozen=True)
class Superpixels:
    """Average each map, or count votes, within segments of like colour.

    Every pixel of a segment gets the same scores, so masks take the edges of the segments. They
    come from scikit-image, one image at a time on the CPU: SLIC (Achanta et al. 2012) cuts pieces
    of about equal size, Felzenszwalb and Huttenlocher (2004) merges pixels into pieces of any size.
    Averaging, voting and the defaults are ours.

    Attributes:
        method: ``"slic"`` or ``"felzenszwalb"``.
        size: pixels of a segment: what SLIC aims at, or the least that Felzenszwalb leaves. None is
            the default of the method.
        coherence: SLIC: ``compactness``, weight of nearness against colour. Felzenszwalb:
            ``scale``, larger values merging more. None is the default of the method.
        sigma: width of the blur before the picture is cut up, in pixels. None is the default of the
            method.
        vote: score of the background with which every pixel votes for its strongest class, the
            result being the share of votes of each class in a segment. None averages the scores.

    Returns, when called, maps of the picture's size; differentiable in the maps unless voted on.
    """

    method: Method = "slic"
    size: int | None = None
    coherence: float | None = None
    sigma: float | None = None
    vote: float | None = None

    requires: ClassVar[WatchSpec] = NO_MODEL

    def __post_init__(self) -> None:
        if self.method not in DEFAULTS:
            raise ValueError(f"`method` must be one of {', '.join(DEFAULTS)}, got {self.method!r}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"`size` must be at least 1 pixel, got {self.size}")
        if self.coherence is not None:
            check_positive("coherence", self.coherence)
        if self.sigma is not None and not 0.0 <= self.sigma < float("inf"):
            raise ValueError(f"`sigma` must be at least 0 and finite, got {self.sigma}")
        if self.vote is not None and not 0.0 < self.vote < 1.0:
            raise ValueError(f"`vote` must lie in (0, 1), got {self.vote}")

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        rgb = picture_of(capture, "Superpixels")
        check_finite(cam)
        dtype = torch.promote_types(cam.dtype, torch.float32)  # sums of many pixels
        maps = resize_cam(cam.to(dtype), (rgb.shape[-2], rgb.shape[-1]))
        if self.vote is not None:
            maps = votes(maps, self.vote)
        return segment_means(maps, self.segments(rgb).to(maps.device)).to(cam.dtype)

    def segments(self, rgb: RGB) -> Segments:
        """The segment of every pixel, numbered from 0 in each image."""
        found = [torch.from_numpy(self._cut(picture)) for picture in picture_bytes(rgb)]
        return torch.stack(found) if found else torch.zeros(0, *rgb.shape[-2:], dtype=torch.int64)

    def _cut(self, picture: np.ndarray) -> np.ndarray:
        from skimage.segmentation import felzenszwalb, slic  # half a second, for who needs it

        known = DEFAULTS[self.method]
        size = known.size if self.size is None else self.size
        coherence = known.coherence if self.coherence is None else self.coherence
        sigma = known.sigma if self.sigma is None else self.sigma
        if self.method == "slic":
            wanted = max(1, round(picture.shape[0] * picture.shape[1] / size))
            found = slic(
                picture, n_segments=wanted, compactness=coherence, sigma=sigma, start_label=0
            )
        else:
            found = felzenszwalb(picture, scale=coherence, sigma=sigma, min_size=size)
        return found.astype(np.int64)


def segment_means(maps: Float[Tensor, "b k H W"], segments: Segments) -> Float[Tensor, "b k H W"]:
    """Replace every value by the mean of its segment.

    Args:
        maps: values of any range.
        segments: the segment of every pixel, from 0.
    """
    if maps.numel() == 0:
        return maps.clone()
    where = segments.flatten(1)[:, None]
    count = int(where.max()) + 1
    pixels = torch.zeros(len(maps), 1, count, dtype=maps.dtype, device=maps.device)
    pixels.scatter_add_(2, where, torch.ones_like(where, dtype=maps.dtype))
    where = where.expand(-1, maps.shape[1], -1)
    sums = torch.zeros(*maps.shape[:2], count, dtype=maps.dtype, device=maps.device)
    sums = sums.scatter_add(2, where, maps.flatten(2))
    return (sums / pixels.clamp_min(1)).gather(2, where).view_as(maps)


def votes(maps: Float[Tensor, "b k H W"], background_score: float) -> Float[Tensor, "b k H W"]:
    """1 where a map is the strongest and beats the background, else 0."""
    background = torch.full_like(maps[:, :1], background_score)
    winner = torch.cat([background, maps], 1).argmax(1)
    return F.one_hot(winner, maps.shape[1] + 1).movedim(-1, 1)[:, 1:].to(maps.dtype)
