"""Refiners that score regions of the picture in place of pixels: any mask proposals."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from camkit.capture.record import NO_PATCH_TOKENS, Capture, WatchSpec
from camkit.errors import CaptureError, DataError
from camkit.ops.finite import check_finite
from camkit.ops.images import resize_cam
from camkit.ops.mask_runs import MaskRuns
from camkit.ops.region_scores import (
    claims,
    mask_areas,
    mask_sums,
    mean_over_masks,
    segment_means,
    shared_votes,
)
from camkit.ops.similarity import check_positive
from camkit.refiners.protocol import Once, clip_to_range, picture_bytes, picture_of
from camkit.tensors import RGB, Cam

Maps: TypeAlias = Float[Tensor, "1 k H W"]


@runtime_checkable
class PhotoProposals(Protocol):
    """Masks that were made before, found by the name of a photo."""

    def of_photo(self, key: str) -> Any:
        """Return the masks of a photo, in any form that `Regions` reads."""


Proposer: TypeAlias = Callable[[UInt8[np.ndarray, "H W 3"]], Any]
"""Makes masks of a picture with colours in 0..255, in any form that `Regions` reads."""

_SCALES = {"slic": (200.0,), "felzenszwalb": (50.0, 100.0, 200.0)}
_SIGMAS = {"slic": 0.0, "felzenszwalb": 0.8}


class UnusedRegionsWarning(UserWarning):
    """No region changed the maps of a photo."""


@dataclass(frozen=True)
class Segments:
    """Segments of similar colour as proposals, at one or several scales; made by scikit-image.

    SLIC (Achanta et al. 2012) cuts pieces of about equal size, Felzenszwalb and Huttenlocher (2004)
    merge pixels into pieces of any size. The defaults are ours.

    Attributes:
        method: ``"felzenszwalb"`` or ``"slic"``.
        scales: of each segmentation: Felzenszwalb's ``scale``, of which larger values merge more,
            or the average pixels of a segment for SLIC. Empty is the method's default.
        least: pixels that Felzenszwalb leaves in a segment; SLIC has no such setting.
        compactness: SLIC's weight of nearness against colour; Felzenszwalb has no such setting.
        sigma: width of the blur before the segmentation, in pixels; None is the method's default.
    """

    method: Literal["felzenszwalb", "slic"] = "felzenszwalb"
    scales: tuple[float | int, ...] = ()
    least: int = 50
    compactness: float = 20.0
    sigma: float | None = None

    def __post_init__(self) -> None:
        if self.method not in _SCALES:
            raise ValueError(f"`method` must be one of {', '.join(_SCALES)}, got {self.method!r}")
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        for scale in self.scales:
            check_positive("scales", scale)
        if self.least < 1:
            raise ValueError(f"`least` must be at least 1 pixel, got {self.least}")
        check_positive("compactness", self.compactness)
        if self.sigma is not None and not 0.0 <= self.sigma < math.inf:
            raise ValueError(f"`sigma` must be at least 0 and finite, got {self.sigma}")

    def __call__(self, picture: UInt8[np.ndarray, "H W 3"]) -> Int[np.ndarray, "s H W"]:
        """Return a label image for each scale, numbered from 0."""
        from skimage.segmentation import felzenszwalb, slic  # takes half a second

        sigma = _SIGMAS[self.method] if self.sigma is None else self.sigma
        rows, cols = picture.shape[:2]
        label_images = []
        for scale in self.scales or _SCALES[self.method]:
            if self.method == "slic":
                count = max(1, round(rows * cols / scale))
                labels = slic(
                    picture,
                    n_segments=count,
                    compactness=self.compactness,
                    sigma=sigma,
                    start_label=0,
                )
            else:
                labels = felzenszwalb(picture, scale=scale, sigma=sigma, min_size=self.least)
            label_images.append(labels.astype(np.int64))
        return np.stack(label_images)


@dataclass(frozen=True, repr=False)
class Regions:
    """Score regions in place of pixels: mask proposals of any kind decide the outlines.

    Proposals are masks that were made without looking at the maps: by segment-anything's automatic
    generator, by superpixels, or by your own function. Pixels under no mask keep their scores.

    The rule "sepl" is that of SEPL (Chen et al. 2023): a class takes a mask if its label fills more
    than half of the mask, or if the mask covers 85% of the label; the rest of the masks is
    background. There the first class in order takes a mask and later ones overwrite it. Ours: the
    class with the higher mean score gets a mask or pixel that two claim, so the order of classes
    never counts. Cutting masks into pieces is the way of FMA-WSSS. The rule "mean", which works on
    scores instead of labels, averaging over masks, and the defaults are ours.

    Attributes:
        proposals: ``"felzenszwalb"``, ``"slic"`` or `Segments` with settings; a function that gets
            the picture as uint8 ``(H, W, 3)`` and returns bool masks ``(n, H, W)`` or a list of
            them, label images of whole numbers (from 0; negative values are under no mask), or
            segment-anything's list of dicts; or an object with a method ``of_photo(name)`` that
            returns the same for the name of a photo, such as `camkit.data.ProposalFolder`.
        rule: what a region gets. "mean": the mean of each map. "vote": the share of each class
            among its pixels, of which each votes for its strongest class. "sepl": one class or the
            background.
        overlap: what a pixel under several masks gets. "mean": the mean over its masks. "cut":
            masks are first cut into pieces, each under the same masks. "rank": the scores of the
            mask whose best score is the highest, of equal ones the smaller mask. None is "rank" for
            "sepl", which then unites the masks of a class, and "mean" for the other rules.
        background_score: score that a class must exceed to label a pixel, for "vote" and "sepl".
        largest: share of the picture above which a mask is ignored, because it tells no outline.

    Returns, when called, maps of the picture's size. By "mean" they are differentiable in the maps;
    by "vote" and "sepl" they hold shares of labels, so use 0.5 as the background score of masks.

    Warns with `UnusedRegionsWarning`, once, if a photo has no usable mask or all maps are zero.

    Raises, when called, a CaptureError if proposals are found by names and the capture has none,
    and a DataError or ValueError if they are of another size than the photo or have no known form.
    """

    proposals: Literal["felzenszwalb", "slic"] | Proposer | PhotoProposals = "felzenszwalb"
    rule: Literal["mean", "vote", "sepl"] = "mean"
    overlap: Literal["mean", "cut", "rank"] | None = None
    background_score: float = 0.5
    largest: float = 0.95

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        if isinstance(self.proposals, str) and self.proposals not in _SCALES:
            raise ValueError(
                f"`proposals` must be one of {', '.join(_SCALES)}, got {self.proposals!r}; read "
                "files by camkit.data.ProposalFolder(folder)"
            )
        known = isinstance(self.proposals, str | PhotoProposals) or callable(self.proposals)
        if not known or isinstance(self.proposals, type):
            raise TypeError(
                "`proposals` must be a function of the picture, a name, or an object with the "
                f"method of_photo, got {self.proposals!r}"
            )
        if self.rule not in ("mean", "vote", "sepl"):
            raise ValueError(f"`rule` must be one of mean, vote, sepl, got {self.rule!r}")
        if self.overlap not in ("mean", "cut", "rank", None):
            raise ValueError(f"`overlap` must be mean, cut, rank or None, got {self.overlap!r}")
        if not 0.0 < self.background_score < 1.0:
            raise ValueError(f"`background_score` must lie in (0, 1), got {self.background_score}")
        if not 0.0 < self.largest <= 1.0:
            raise ValueError(f"`largest` must lie in (0, 1], got {self.largest}")

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{each.name}={_shown(getattr(self, each.name))}" for each in fields(self)
        )
        return f"Regions({shown})"

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        rgb = picture_of(capture, "Regions", cam)
        check_finite("cam", cam)
        size = (rgb.shape[-2], rgb.shape[-1])
        if cam.numel() == 0:
            return cam.new_zeros(*cam.shape[:2], *size)
        if not cam.detach().any() and self._warning.is_first():
            warnings.warn(_ALL_ZERO, UnusedRegionsWarning, stacklevel=2)
        dtype = torch.promote_types(cam.dtype, torch.float32)  # sums of many pixels
        maps = cam.to(dtype)
        refined = []
        for image, scores in enumerate(maps.split(1)):
            masks = self.masks(capture, image)
            usable = self._usable(masks)
            if not usable.count and self._warning.is_first():
                reason = _NO_REGION.format(largest=self.largest)
                warnings.warn(reason, UnusedRegionsWarning, stacklevel=2)
            refined.append(self._refined(scores, usable, masks.size if masks.count else size, size))
        return torch.cat(refined).to(cam.dtype)

    @cached_property
    def _warning(self) -> Once:
        return Once()

    def _usable(self, masks: MaskRuns) -> MaskRuns:
        """Return the masks that cover a pixel, but not nearly the whole picture."""
        small = masks.areas <= self.largest * masks.size[0] * masks.size[1]
        return masks.kept(small & (masks.areas > 0))

    def masks(self, capture: Capture, image: int = 0) -> MaskRuns:
        """Return the masks of an image, those that are ignored included.

        Args:
            capture: with the picture, and the names of the photos if proposals are found by them.
            image: its place in the batch.
        """
        rgb = picture_of(capture, "Regions")
        size = (rgb.shape[-2], rgb.shape[-1])
        if isinstance(self.proposals, PhotoProposals):
            if image >= len(capture.keys) or not capture.keys[image]:
                raise CaptureError(
                    f"{type(self.proposals).__name__} finds the proposals of a photo by its name, "
                    "but this one has no name; set it by dataclasses.replace(capture, keys=("
                    '"2007_000032",)), or let camkit.wrap, camkit run or camkit refine read the '
                    "photos from files"
                )
            key = capture.keys[image]
            size = capture.sizes[image] if image < len(capture.sizes) else size
            masks, owner = MaskRuns.of(self.proposals.of_photo(key), size), f" of {key}"
        else:
            picture = picture_bytes(rgb[image : image + 1])[0].cpu().numpy()
            propose = self.proposals
            with torch.no_grad():
                function = Segments(propose) if isinstance(propose, str) else propose
                masks, owner = MaskRuns.of(function(picture), size), ""
        if masks.count and masks.size != size:
            kind = DataError if owner else ValueError
            raise kind(_wrong_size(masks.size, size, owner))
        return masks

    def _refined(
        self,
        cam: Float[Tensor, "1 k h w"],
        masks: MaskRuns,
        raster: tuple[int, int],
        size: tuple[int, int],
    ) -> Maps:
        """Score the regions of one image, at the size of the proposals, and return to ``size``."""
        scores = resize_cam(cam, raster)
        marks = scores if self.rule == "mean" else shared_votes(scores, self.background_score)
        if masks.count:
            marks = self._scored(scores, marks, masks)
        return marks if raster == size else _sampled(marks, size)

    def _scored(self, scores: Maps, marks: Maps, masks: MaskRuns) -> Maps:
        """Bring the scores of masks, none of them empty, to the pixels under them."""
        overlap = self.overlap or ("rank" if self.rule == "sepl" else "mean")
        if overlap == "cut":
            pieces = masks.pieces()
            if self.rule != "sepl":
                return segment_means(marks, pieces[None].to(marks.device))
            masks = MaskRuns.of_labels(pieces.numpy())
        areas = mask_areas(masks, marks.device)
        region_scores = mask_sums(marks[0], masks) / areas
        ranks = region_scores.detach().amax(0)
        if self.rule == "sepl":
            means = mask_sums(scores[0], masks) / areas
            region_scores, ranks = claims(marks[0], means, masks)
        if overlap == "mean":
            pixels, covered = mean_over_masks(region_scores, masks, marks.dtype)
        else:
            # the highest last; of equal ranks, up to rounding, the smaller mask, then the first
            numbers, heights = np.arange(masks.count), ranks.cpu().numpy().round(9)
            order = np.lexsort((-numbers, -masks.areas, heights))
            owners = masks.top(order).to(marks.device)
            # cast before they become as many as pixels
            pixels = region_scores.to(marks.dtype)[:, owners.clamp_min(0)]
            covered = owners >= 0
        refined = torch.where(covered, pixels, marks)
        # sums may leave the range by rounding; the correction has no gradient
        clipped = clip_to_range(refined.detach(), marks)
        return refined + (clipped - refined.detach()) if refined.requires_grad else clipped


_ALL_ZERO = "every map is zero, so no region gets a class; check the seed"
_NO_REGION = (
    "a photo has no region that covers a pixel and at most {largest:.0%} of the picture, so its "
    "labels stay as they are; check its proposals"
)


def _shown(value: object) -> str:
    """Return the repr of a setting without an address, which would differ in every process."""
    name = getattr(value, "__qualname__", None)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)) if name is None else str(name)


def _wrong_size(found: tuple[int, int], expected: tuple[int, int], whose: str) -> str:
    turned = found == expected[::-1] and found != expected
    way_out = "make them of the upright photo, as its EXIF data say" if turned else ""
    return (
        f"the proposals{whose} are {found[0]}x{found[1]} (rows x columns), but the photo is "
        f"{expected[0]}x{expected[1]}; {way_out or 'make them of the photo at its own size'}"
    )


def _sampled(maps: Float[Tensor, "1 k R S"], size: tuple[int, int]) -> Maps:
    """Give each pixel of another size the scores of the pixel at its centre."""
    rows, cols = (
        ((torch.arange(side, device=maps.device) + 0.5) * length / side).long()
        for side, length in zip(size, maps.shape[-2:], strict=True)
    )
    return maps[:, :, rows][:, :, :, cols]


# size, coherence and sigma of each method of `Superpixels`
_DEFAULTS = {"slic": (200, 20.0, 0.0), "felzenszwalb": (50, 100.0, 0.8)}


@dataclass(frozen=True)
class Superpixels:
    """Average each map, or count votes, within segments of similar colour.

    `Regions` with the segments of one scale: every pixel of a segment gets the same scores, so
    masks take the edges of the segments. scikit-image computes these, one image at a time on the
    CPU: SLIC (Achanta et al. 2012) cuts pieces of about equal size, Felzenszwalb and Huttenlocher
    (2004) merge pixels into pieces of any size. Averaging, voting and the defaults are ours.

    Attributes:
        method: ``"slic"`` or ``"felzenszwalb"``.
        size: pixels of a segment: the average that SLIC aims at, or the minimum that Felzenszwalb
            leaves. None here and below is the method's default.
        coherence: SLIC's ``compactness``, weight of nearness against colour, or Felzenszwalb's
            ``scale``, of which larger values merge more.
        sigma: width of the blur before the segmentation, in pixels.
        vote: background score with which every pixel votes for its strongest class; the result is
            each class's share of the votes in a segment. None averages the scores.

    Returns, when called, maps of the picture's size; differentiable in the maps unless voted on.
    """

    method: Literal["slic", "felzenszwalb"] = "slic"
    size: int | None = None
    coherence: float | None = None
    sigma: float | None = None
    vote: float | None = None

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        if self.method not in _DEFAULTS:
            raise ValueError(f"`method` must be one of {', '.join(_DEFAULTS)}, got {self.method!r}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"`size` must be at least 1 pixel, got {self.size}")
        if self.coherence is not None:
            check_positive("coherence", self.coherence)
        if self.sigma is not None and not 0.0 <= self.sigma < math.inf:
            raise ValueError(f"`sigma` must be at least 0 and finite, got {self.sigma}")
        if self.vote is not None and not 0.0 < self.vote < 1.0:
            raise ValueError(f"`vote` must lie in (0, 1), got {self.vote}")

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        picture_of(capture, "Superpixels", cam)
        return self._regions(cam, capture)

    @cached_property
    def _regions(self) -> Regions:
        return Regions(
            self._proposals(),
            rule="mean" if self.vote is None else "vote",
            overlap="cut",
            background_score=0.5 if self.vote is None else self.vote,
            largest=1.0,  # a flat picture is one segment
        )

    def segments(self, rgb: RGB) -> Int[Tensor, "b H W"]:
        """Return the segment of every pixel, numbered from 0 in each image."""
        propose = self._proposals()
        segments = torch.zeros(len(rgb), *rgb.shape[-2:], dtype=torch.int64)
        for image, picture in enumerate(picture_bytes(rgb).cpu().numpy()):
            segments[image] = torch.from_numpy(propose(picture)[0])
        return segments

    def _proposals(self) -> Segments:
        settings = zip((self.size, self.coherence, self.sigma), _DEFAULTS[self.method], strict=True)
        size, coherence, sigma = (default if own is None else own for own, default in settings)
        if self.method == "slic":
            return Segments("slic", (size,), compactness=coherence, sigma=sigma)
        return Segments("felzenszwalb", (coherence,), least=int(size), sigma=sigma)
