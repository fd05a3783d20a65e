"""Confusion matrices of variants, image by image, at every background score."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from camkit.bench.cache import ResultCache, code_fingerprint, fingerprint
from camkit.bench.protocol import PhotoSettings, PredictedLabels, Variant
from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.data import DataSet, Sample, read_mask
from camkit.errors import DataError
from camkit.manifest import weights_hash
from camkit.mask import to_mask
from camkit.ops.images import resize_cam
from camkit.photo import Photo
from camkit.refiners.normalize import normalize_cam
from camkit.refiners.protocol import Refiner
from camkit.score import boundary_confusion, sweep_confusions
from camkit.seeds.protocol import Seed
from camkit.seeds.views import ModelRunner, MultiViewReader, Views
from camkit.tensors import RGB, Cam, Pixels
from camkit.vocabulary import Vocabulary

Start: TypeAlias = tuple[Seed, Views]
Stages: TypeAlias = dict[tuple[Start, tuple[Refiner, ...]], Cam]


def variant_maps(
    model: nn.Module,
    photo: Photo,
    classes: Int[Tensor, "1 k"],
    variants: Sequence[Variant],
    vocabulary: Vocabulary,
) -> dict[Variant, Cam]:
    """Maps of the asked classes by every variant, in the sizes their last refiners return."""
    forwards: dict[Any, list[Variant]] = {}
    for variant in variants:
        blocks = None if variant.edit is None else variant.edit_blocks
        noise = required_by(variant.seed).noise
        forwards.setdefault((variant.edit, blocks, noise), []).append(variant)
    maps: dict[Variant, Cam] = {}
    with torch.no_grad():
        for group in forwards.values():
            maps |= _group_maps(model, photo, classes, group, vocabulary)
    return maps


def _group_maps(
    model: nn.Module,
    photo: Photo,
    classes: Int[Tensor, "1 k"],
    variants: Sequence[Variant],
    vocabulary: Vocabulary,
) -> dict[Variant, Cam]:
    """Maps of variants that share an edit and noise: one forward for each of their views."""
    weight = next(model.parameters())
    pixels, rgb = photo.pixels.to(weight), photo.rgb.to(weight.device)
    look = ModelRunner(
        model,
        requires=WatchSpec() | required_by(*(variant.seed for variant in variants)),
        edit=variants[0].edit,
        edit_blocks=variants[0].edit_blocks,
        vocabulary=vocabulary,
    )
    capture = _capture(look, pixels, rgb)
    starts = {variant: (variant.seed, variant.views or Views()) for variant in variants}
    looked = MultiViewReader(look, pixels, rgb, capture)
    seeds = looked.seeds(classes.to(weight.device), list(starts.values()))
    known: Stages = {(start, ()): normalize_cam(cam) for start, cam in seeds.items()}
    return {
        variant: _stage(starts[variant], variant.refine, capture, known) for variant in variants
    }


def _capture(look: ModelRunner, pixels: Pixels, rgb: RGB) -> Capture:
    """The forward that all refiners of a group see."""
    return look(pixels, rgb)


def _stage(start: Start, refine: tuple[Refiner, ...], capture: Capture, known: Stages) -> Cam:
    """Maps after some refiners; what variants share is computed once."""
    if (start, refine) not in known:
        before = _stage(start, refine[:-1], capture, known)
        known[start, refine] = refine[-1](before, capture)
    return known[start, refine]


LabelSource = Literal["dataset"] | PredictedLabels


class Counts(NamedTuple):
    """Pixels of one image by true and predicted class.

    Attributes:
        swept: one matrix for each of `camkit.score.THRESHOLDS`.
        outline: `camkit.score.boundary_confusion` at one background score, where it is wanted.
    """

    swept: Int[Tensor, "s c c"]
    outline: Int[Tensor, "d d"] | None


Wanted = Mapping[Variant, float | None]
"""Variants to measure, and the background score at which outlines are wanted, if they are."""


@dataclass(frozen=True)
class Picture:
    """A photo, its truth in the classes measured, and the classes its maps are made of."""

    photo: Photo
    truth: Int[Tensor, "H W"]
    asked: tuple[int, ...]


@dataclass(frozen=True)
class Evaluator:
    """Measures variants on images.

    Attributes:
        model: borrowed, in evaluation mode.
        dataset: where the images come from.
        vocabulary: the classes measured.
        photos: how photos are read.
        labels: where image-level labels come from.
        store: keeps what was measured; None measures anew.
    """

    model: nn.Module
    dataset: DataSet
    vocabulary: Vocabulary
    photos: PhotoSettings
    labels: LabelSource = "dataset"
    store: ResultCache | None = None
    _known: dict[Variant | Literal["setup"], str | None] = field(default_factory=dict)

    def each(
        self, samples: Sequence[Sample], wanted: Wanted, title: str, skipped: list[str]
    ) -> Iterator[tuple[str, dict[Variant, Counts]]]:
        """Name and counts of each image; those that cannot be used are listed instead."""
        done = 0
        for sample in tqdm(samples, desc=title, unit="image", delay=2, mininterval=0.5):
            try:
                found = self.measure(sample, wanted)
            except DataError as error:  # that image is lost and listed; the others are not
                skipped.append(str(error))
                continue
            done += 1
            yield sample.name, found
        if not done:
            raise DataError(f"no usable image among {len(samples)} ({'; '.join(skipped[:3])})")

    def measure(self, sample: Sample, wanted: Wanted) -> dict[Variant, Counts]:
        """Counts of one image by each variant.

        Raises:
            DataError: the photo or its mask cannot be used.
        """
        keys = {variant: self._key(sample, variant) for variant in wanted}
        found = {variant: self._recall(keys[variant], wanted[variant]) for variant in wanted}
        missing = [variant for variant, known in found.items() if known is None]
        if missing:
            picture = self.load(sample)
            for variant, cam in self.maps(picture, missing).items():
                found[variant] = counts = self._count(picture, cam, wanted[variant])
                self._remember(keys[variant], wanted[variant], counts)
        return {variant: counts for variant, counts in found.items() if counts is not None}

    def load(self, sample: Sample) -> Picture:
        """Read one image.

        Raises:
            DataError: the photo or its mask cannot be used.
        """
        if sample.mask is None:
            raise DataError(f"{sample.photo} has no mask; a benchmark needs one")
        photo = self.photos.load(sample.photo)
        truth = read_mask(
            sample.mask,
            size=photo.size,
            num_classes=len(self.dataset.classes),
            form=sample.form,
            classes=[self.dataset.classes.index(name) for name in self.vocabulary.names],
        )
        if self.labels == "dataset":
            present = [self.dataset.classes[index] for index in sample.classes]
            names = self.vocabulary.names
            asked = tuple(index for index, name in enumerate(names) if name in present)
        else:
            asked = self.labels(self.model, photo, self.vocabulary)
        return Picture(photo, truth, asked)

    def maps(self, picture: Picture, variants: Sequence[Variant]) -> dict[Variant, Cam]:
        """Maps at the size of the truth, in [0, 1]; one empty map where no class is asked."""
        if not picture.asked:
            return dict.fromkeys(variants, torch.zeros(1, 1, *picture.photo.size))
        classes = torch.tensor([picture.asked], dtype=torch.int64)
        found = variant_maps(self.model, picture.photo, classes, variants, self.vocabulary)
        size = picture.photo.size
        return {variant: resize_cam(found[variant], size).clamp(0, 1).cpu() for variant in variants}

    def _count(self, picture: Picture, cam: Cam, score: float | None) -> Counts:
        classes = torch.tensor([picture.asked or (-1,)], dtype=torch.int64)
        values = len(self.vocabulary) + 1
        swept = sweep_confusions(cam[0], classes[0], picture.truth, num_classes=values)
        if score is None:
            return Counts(swept, None)
        mask = to_mask(cam, classes, background_score=score)[0]
        return Counts(swept, boundary_confusion(picture.truth, mask, num_classes=values))

    def _key(self, sample: Sample, variant: Variant) -> str | None:
        """Names all that a measurement depends on; None where that cannot be told."""
        if self.store is None or sample.mask is None:
            return None
        if "setup" not in self._known:
            self._known["setup"] = self._setup()
        if variant not in self._known:
            edit = None if variant.edit is None else (variant.edit, variant.edit_blocks)
            self._known[variant] = fingerprint((variant.seed, variant.views, variant.refine, edit))
        setup, settings = self._known["setup"], self._known[variant]
        if setup is None or settings is None:
            return None
        try:
            photo = hashlib.sha256(sample.photo.read_bytes()).hexdigest()
            mask = hashlib.sha256(sample.mask.read_bytes()).hexdigest()
        except OSError:
            return None  # reading it for the measurement will say what is wrong
        parts = (setup, settings, photo, mask, sample.form, sample.classes)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _setup(self) -> str | None:
        weight = next(self.model.parameters())
        return fingerprint(
            (
                *(code_fingerprint(), torch.__version__, weights_hash(self.model)),
                *(repr(self.model), str(weight.dtype), weight.device.type),
                *(self.vocabulary, self.photos, self.labels, self.dataset.classes),
            )
        )

    def _recall(self, key: str | None, score: float | None) -> Counts | None:
        if key is None or self.store is None:
            return None
        values = len(self.vocabulary) + 1
        swept = self.store.get_counts(key, values)
        outline = None
        if score is not None:
            outline = self.store.get_counts(f"{key} outline {score}", values + 1)
        if swept is None or (score is not None and outline is None):
            return None
        return Counts(swept, None if outline is None else outline[0])

    def _remember(self, key: str | None, score: float | None, counts: Counts) -> None:
        if key is None or self.store is None:
            return
        self.store.put_counts(key, counts.swept)
        if counts.outline is not None:
            self.store.put_counts(f"{key} outline {score}", counts.outline)
