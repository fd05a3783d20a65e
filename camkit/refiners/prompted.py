"""A promptable segmenter behind the class maps: what the maps point at, it draws."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, get_args

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from camkit.capture.record import NO_PATCH_TOKENS, Capture, WatchSpec
from camkit.ops.finite import check_finite
from camkit.ops.images import resize_cam
from camkit.ops.scaling import flat_maps
from camkit.printing import short_repr
from camkit.refiners.protocol import Once, picture_bytes, picture_of
from camkit.segmenters.adapters import as_segmenter, ask, errors_of, identity_of
from camkit.segmenters.embeddings import EmbeddingCache
from camkit.segmenters.parts import Part, parts_of
from camkit.segmenters.rules import RULES, PromptRule, SamRefinerPrompts
from camkit.tensors import Cam

Choice = Literal["both", "predicted", "agreement"]
Contested = Literal["region", "pixel"]


_TOGETHER = 8  # parts asked for at once: three masks of each are in memory


class SegmenterWarning(UserWarning):
    """A segmenter drew nothing that can be used."""


@dataclass(frozen=True, eq=False)
class _Drawing:
    """What a segmenter drew of one picture.

    Attributes:
        masks: of each class; no pixel belongs to two of them, unless their maps are equal there.
        kept: pixels that keep their scores: of components that were not asked for or got no usable
            mask, and the whole maps of classes that got none.
        asked: number of parts asked for.
        drawn: number of these that got a usable mask.
    """

    masks: Bool[np.ndarray, "k H W"]
    kept: Bool[np.ndarray, "k H W"]
    asked: int = 0
    drawn: int = 0

    __repr__ = short_repr


@dataclass(frozen=True, eq=False)
class _Request:
    """A part of the map of a class."""

    slot: int
    part: Part


@dataclass(frozen=True)
class PromptedRefine:
    """Let a promptable segmenter, such as SAM, draw what each class map points at.

    For each picture:

    1. The coarse mask of a class is where its map is the highest of all and above
       ``background_score``. It is split into connected components; those whose boxes overlap are
       merged. Maps that are flat, or win no pixel, are returned as they are.
    2. The rule makes a prompt of each part, and the segmenter draws masks, all from one embedding
       of the picture. Masks that are empty, cover nearly the whole picture or hardly meet the part
       are left out; of the others the best one is taken. Further rounds start from this mask.
    3. The masks of a class are joined. Pixels that several classes claim go to the class whose map
       is higher there. Order never decides: permuted classes give permuted maps, to the bit.
    4. A map s with mask m (0 or 1) becomes ``(1 - mix) * s + mix * m``: at least ``mix`` inside, at
       most ``1 - mix`` outside, still ordered by the map on each side. A part without a usable
       answer keeps its scores.

    The segmenter is borrowed: it runs on its own device without gradients, and is left as it was.
    Splitting, merging and the ``"samrefiner"`` rule are SAMRefiner's (Lin et al., ICLR 2025); the
    other steps and all defaults are ours.

    Attributes:
        segmenter: a model of transformers, or ``(model, processor)``, a ``SamPredictor`` or
            ``SAM2ImagePredictor``, a function ``(picture, prompts) -> (masks, ious)``, or any
            `camkit.segmenters.Segmenter`; see `camkit.segmenters.as_segmenter`.
        rule: how a part becomes a prompt: ``"peaks"``, ``"samrefiner"``, or a rule such as
            `camkit.segmenters.SamRefinerPrompts` with settings of its own.
        background_score: score above which a map takes part in coarse masks, in [0, 1).
        rounds: how often the segmenter is asked for each part.
        choose: how the best mask is found: by the predicted IoU, by the agreement (IoU with the
            part of the map, that of the first round), or by both, multiplied.
        contested: who gets pixels that masks of several classes cover. ``"region"`` gives each
            connected region to the class with the higher mean map there; ``"pixel"`` compares maps
            pixel by pixel, which divides a mask that covers two objects.
        mix: see step 4, in [0, 1]; 0 changes nothing, 1 returns masks.
        min_area: share of the picture below which a component is not prompted.
        max_area: share of the picture above which a mask counts as the whole picture.
        min_agreement: agreement below which a mask is not used: a part of the object, what lies
            around it, or another object. Chosen on 60 images of `voc12_animals/train` (`python
            benchmarks/prompted.py --choose`): lower values gain more by true segments, and lose
            much more by those of another photo. Lower it for a good segmenter behind maps that show
            only a small part of their objects.
        cache: photos whose embeddings are kept for the next call. One of SAM takes 4 MB, of SAM 2
            17 MB, on the device of the segmenter.

    Returns, when called, maps of the picture's size, without gradients.
    """

    segmenter: Any
    rule: str | PromptRule = "peaks"
    background_score: float = 0.5
    rounds: int = 1
    choose: Choice = "both"
    contested: Contested = "region"
    mix: float = 0.8
    min_area: float = 0.001
    max_area: float = 0.95
    min_agreement: float = 0.5
    cache: int = 8
    _embeddings: EmbeddingCache = field(init=False, repr=False, compare=False)
    _warning: Once = field(init=False, repr=False, compare=False)

    requires: ClassVar[WatchSpec] = NO_PATCH_TOKENS

    def __post_init__(self) -> None:
        object.__setattr__(self, "segmenter", as_segmenter(self.segmenter))
        self._check_choices()
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}")
        if not 0.0 <= self.background_score < 1.0:
            raise ValueError(f"`background_score` must lie in [0, 1), got {self.background_score}")
        for name in ("mix", "min_area", "max_area", "min_agreement"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1], got {value}")
        if self.cache < 0:
            raise ValueError(f"`cache` must be at least 0 photos, got {self.cache}")
        object.__setattr__(self, "_embeddings", EmbeddingCache(self.cache))
        object.__setattr__(self, "_warning", Once())

    def _check_choices(self) -> None:
        for name, kind in (("choose", Choice), ("contested", Contested)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}")
        if isinstance(self.rule, str) and self.rule not in RULES:
            raise ValueError(f"`rule` must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not isinstance(self.rule, str) and (
            isinstance(self.rule, type) or not callable(self.rule)
        ):
            raise TypeError(f"`rule` must be a name or a rule such as Peaks(), got {self.rule!r}")
        if not hasattr(self._rule, "needs_features"):
            raise TypeError(
                f"`rule` must say whether it reads the embedding, but {self.rule!r} has no "
                "attribute `needs_features`; set it to False, or to True"
            )
        if self._rule.needs_features and not hasattr(self.segmenter, "features"):
            raise ValueError(
                f"{self.rule!r} compares embeddings, but {self.segmenter!r} has no method "
                "`features`; use margin=0, or add the method"
            )

    @classmethod
    def samrefiner(cls, segmenter: Any, **settings: Any) -> "PromptedRefine":
        """Return the refiner with the rounds and the choice of SAMRefiner's code.

        Args:
            segmenter: see the class.
            settings: other attributes.
        """
        paper: dict[str, Any] = {"rule": SamRefinerPrompts(), "rounds": 5, "choose": "predicted"}
        return cls(segmenter, **(paper | settings))

    @property
    def _rule(self) -> PromptRule:
        return RULES[self.rule] if isinstance(self.rule, str) else self.rule

    def __call__(self, cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
        maps = _at_picture_size(cam, capture)
        drawings = self._drawings(maps, cam, capture)
        if any(each.asked and not each.drawn for each in drawings) and self._warning.is_first():
            warnings.warn(_UNUSABLE, SegmenterWarning, stacklevel=2)
        for scores, drawing in zip(maps, drawings, strict=True):
            for score, mask, kept in zip(scores, drawing.masks, drawing.kept, strict=True):
                inside, same = (torch.from_numpy(each).to(score.device) for each in (mask, kept))
                mixed = (1.0 - self.mix) * score + self.mix * inside
                score.copy_(torch.where(same, score, mixed))
        return maps.to(cam.dtype)

    def _drawings(
        self, maps: Float[Tensor, "b k H W"], cam: Cam, capture: Capture
    ) -> list[_Drawing]:
        if not maps.numel():
            nothing = np.zeros(maps.shape[1:], bool)
            return [_Drawing(nothing, ~nothing) for _ in maps]
        pictures = picture_bytes(picture_of(capture, "PromptedRefine", cam)).cpu().numpy()
        flat = flat_maps(cam).cpu().numpy()
        return [self._draw(*each) for each in zip(maps.cpu().numpy(), flat, pictures, strict=True)]

    def _draw(
        self,
        scores: Float[np.ndarray, "k H W"],
        flat: Bool[np.ndarray, " k"],
        picture: UInt8[np.ndarray, "H W 3"],
    ) -> _Drawing:
        coarse = _coarse_masks(scores, flat, self.background_score)
        masks, kept = np.zeros_like(coarse), np.ones_like(coarse)
        least = self.min_area * coarse[0].size
        requests = [
            _Request(slot, part)
            for slot, mask in enumerate(coarse)
            if mask.any()
            for part in parts_of(mask, least)
        ]
        # in the order of their places, so that the order of classes does not change batches
        requests.sort(key=lambda request: (request.part.box, request.part.mask.tobytes()))
        drawn = self._masks_of(requests, scores, picture) if requests else []
        answered = [pair for pair in zip(requests, drawn, strict=True) if pair[1] is not None]
        for slot in {request.slot for request, _ in answered}:
            kept[slot] = coarse[slot]
        for request, mask in answered:
            masks[request.slot] |= mask
            kept[request.slot] &= ~request.part.mask
        _settle(masks, scores, by_region=self.contested == "region")
        kept &= ~masks
        return _Drawing(masks, kept, len(requests), len(answered))

    def _masks_of(
        self,
        requests: Sequence[_Request],
        scores: Float[np.ndarray, "k H W"],
        picture: UInt8[np.ndarray, "H W 3"],
    ) -> list[Bool[np.ndarray, "H W"] | None]:
        """Return the mask of each part; None if no usable one was drawn."""
        version: object = getattr(self.segmenter, "version", tuple)()
        with errors_of(self.segmenter):
            embedding = self._embeddings.get(picture, version, self.segmenter.embed)
            features = self.segmenter.features(embedding) if self._rule.needs_features else None
        masks: list[Bool[np.ndarray, "H W"] | None] = [None] * len(requests)
        for start in range(0, len(requests), _TOGETHER):
            part = range(start, min(start + _TOGETHER, len(requests)))
            places, current = list(part), {place: requests[place].part for place in part}
            for _ in range(self.rounds):
                prompts = [
                    self._rule(current[place], scores[requests[place].slot], features)
                    for place in places
                ]
                answers = ask(self.segmenter, embedding, prompts, picture.shape[:2])
                changed = []
                for place, candidates, ious in zip(places, *answers, strict=True):
                    best = self._best(candidates, ious, requests[place].part.mask)
                    if best is not None and not np.array_equal(best, current[place].mask):
                        changed.append(place)  # else the next answer would be the same
                        current[place] = Part((best,))
                    masks[place] = masks[place] if best is None else best
                places = changed
                if not places:
                    break
        return masks

    def _best(
        self,
        candidates: Bool[np.ndarray, "m H W"],
        ious: Float[np.ndarray, " m"],
        part: Bool[np.ndarray, "H W"],
    ) -> Bool[np.ndarray, "H W"] | None:
        """Return the best mask that can be used, if any; the first of equally good ones."""
        areas, area = candidates.sum((1, 2)), part.sum()
        shared = (candidates & part).sum((1, 2))
        agreement = shared / (areas + area - shared)
        usable = (areas <= self.max_area * part.size) & (shared > 0) & ~np.isnan(ious)
        usable &= agreement >= self.min_agreement
        if not usable.any():
            return None
        values = {
            "both": ious.clip(0.0, 1.0) * agreement,
            "predicted": ious,
            "agreement": agreement,
        }[self.choose]
        return candidates[np.where(usable, values, -np.inf).argmax()]


_UNUSABLE = (
    "the segmenter drew nothing that can be used of a picture, so its maps are unchanged: masks "
    "are empty, cover the whole picture, or lie elsewhere than the map. Check that the segmenter "
    "has trained weights, and that masks it draws for a point of your own are right"
)


def _at_picture_size(cam: Cam, capture: Capture) -> Float[Tensor, "b k H W"]:
    """Return a copy of the maps at the size of the picture, in float32 or wider."""
    rgb = picture_of(capture, "PromptedRefine", cam)
    check_finite("cam", cam)
    dtype = torch.promote_types(cam.dtype, torch.float32)  # rounded once, at the end
    size = (rgb.shape[-2], rgb.shape[-1])
    if not cam.numel():
        return cam.new_zeros(*cam.shape[:2], *size, dtype=dtype)
    return resize_cam(cam.detach().to(dtype), size).clone()


def _coarse_masks(
    scores: Float[np.ndarray, "k H W"], flat: Bool[np.ndarray, " k"], background_score: float
) -> Bool[np.ndarray, "k H W"]:
    """Return where each map is the highest and above the background; equal maps share pixels."""
    if flat.all():
        return np.zeros(scores.shape, bool)
    top = scores[~flat].max(0)  # a flat map locates nothing, so it takes nothing from others
    return (scores == top) & (top > background_score) & ~flat[:, None, None]


def _settle(
    masks: Bool[np.ndarray, "k H W"], scores: Float[np.ndarray, "k H W"], *, by_region: bool
) -> None:
    """Leave each pixel of several masks to the class with the higher map, in place."""
    contested = masks.sum(0) > 1
    if not contested.any():
        return
    if not by_region:
        top = np.where(masks, scores, -np.inf).max(0)
        masks &= ~contested | (scores == top)
        return
    claims, which = np.unique(masks[:, contested], axis=1, return_inverse=True)
    sets = np.full(contested.shape, -1)
    sets[contested] = which.reshape(-1)
    for number, claim in enumerate(claims.T):
        slots = np.flatnonzero(claim)
        count, regions = cv2.connectedComponents((sets == number).astype(np.uint8), connectivity=8)
        for label in range(1, count):
            region = regions == label
            means = np.array([scores[slot][region].mean(dtype=np.float64) for slot in slots])
            for slot in slots[means < means.max()]:
                masks[slot] &= ~region


def prompted_in(stages: Sequence[Any]) -> tuple[PromptedRefine, ...]:
    """Return the refiners with a segmenter among seeds and refiners.

    Those inside of other stages, such as a chain or a `camkit.seeds.RefinedSeed`, are found by the
    fields of their dataclasses.
    """
    found: list[PromptedRefine] = []
    for each in stages:
        if isinstance(each, PromptedRefine):
            found.append(each)
        elif isinstance(each, tuple | list):
            found += prompted_in(each)
        elif is_dataclass(each) and not isinstance(each, type):
            found += prompted_in([getattr(each, held.name) for held in fields(each)])
    return tuple(found)


def segmenters_in(stages: Sequence[Any]) -> tuple[str, ...]:
    """Return the identity of each segmenter among seeds and refiners, see `prompted_in`.

    Opens the segmenters that are opened by name.
    """
    return tuple(identity_of(each.segmenter) for each in prompted_in(stages))
