"""Maps of variants, and their confusion matrices image by image at every background score."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from camkit.bench.cache import ResultCache, code_fingerprint, fingerprint
from camkit.bench.protocol import Variant
from camkit.capture.modes import borrowed
from camkit.capture.parameters import to_input
from camkit.capture.record import WatchSpec, required_by
from camkit.data import DataSet, Sample, read_mask
from camkit.errors import DataError
from camkit.manifest import UNKNOWN, weights_hash
from camkit.mask import to_mask
from camkit.ops.images import resize_cam
from camkit.photo import Photo, PhotoSettings, keys_of
from camkit.printing import short_repr
from camkit.refiners.normalize import scale_seed
from camkit.score import boundary_confusion, sweep_confusions
from camkit.screen import progress
from camkit.seeds.targets import PredictedClasses
from camkit.seeds.views import ModelCall, ModelRunner, MultiViewReader, Views
from camkit.tensors import Cam
from camkit.vocabulary import Vocabulary

LabelSource = Literal["dataset"] | PredictedClasses
"""Where image-level labels come from: the data set, or the classifier's own prediction."""

Requests = Mapping[Variant, float | None]
"""Variants to measure, and the background score to measure outlines at, if any."""


def variant_maps(
    model: nn.Module,
    photo: Photo,
    classes: Int[Tensor, "1 k"],
    variants: Sequence[Variant],
    vocabulary: Vocabulary,
    call: ModelCall | None = None,
) -> dict[Variant, Cam]:
    """Return the maps of every variant, in the sizes that their last refiners return.

    Variants of the same edit and noise share one forward of each view, and variants that begin with
    the same seed, views and refiners compute these once.

    Args:
        model: borrowed, in evaluation mode.
        photo: the photo to make maps of.
        classes: classes of the vocabulary.
        variants: the methods to apply.
        vocabulary: class names, and the classifier outputs behind each.
        call: as in `camkit.wrap`.
    """
    groups: dict[Any, list[Variant]] = {}
    for variant in variants:
        method = variant.method
        blocks = None if method.edit is None else method.edit_blocks
        noise = required_by(method.seed).noise
        groups.setdefault((method.edit, blocks, noise), []).append(variant)
    pixels = to_input(model, photo.pixels)
    rgb = photo.rgb.to(pixels.device)
    maps: dict[Variant, Cam] = {}
    for (edit, blocks, _), group in groups.items():
        requires = WatchSpec() | required_by(*(variant.method.seed for variant in group))
        runner = ModelRunner(
            model,
            requires=requires,
            edit=edit,
            edit_blocks=blocks,
            vocabulary=vocabulary,
            call=call,
        )
        with torch.no_grad():
            capture = runner(pixels, rgb)  # the forward that all refiners of the group see
            capture = replace(capture, keys=keys_of([photo]), sizes=(photo.size,))
            requests = [(v.method.seed, v.method.views or Views()) for v in group]
            reader = MultiViewReader(runner, pixels, rgb, capture)
            first = reader.seeds(classes.to(pixels.device), requests)
            refined: dict[Any, Cam] = {(r, ()): scale_seed(r[0], cam) for r, cam in first.items()}
            for variant, request in zip(group, requests, strict=True):
                chain = variant.method.refine
                for count, refiner in enumerate(chain, start=1):
                    if (request, chain[:count]) not in refined:
                        before = refined[request, chain[: count - 1]]
                        refined[request, chain[:count]] = refiner(before, capture)
                maps[variant] = refined[request, chain]
    return maps


class Counts(NamedTuple):
    """Pixels of one image by true and predicted class.

    Attributes:
        swept: one matrix for each of `camkit.score.THRESHOLDS`.
        outline: `camkit.score.boundary_confusion` at one background score, if requested.
    """

    swept: Int[Tensor, "s c c"]
    outline: Int[Tensor, "d d"] | None


@dataclass(frozen=True)
class LabelledPhoto:
    """A photo, its true mask in the measured classes, and the classes to make maps of."""

    photo: Photo
    truth: Int[Tensor, "H W"]
    classes: tuple[int, ...]

    __repr__ = short_repr

    @property
    def slots(self) -> Int[Tensor, "1 k"]:
        """The classes as a tensor; one empty slot without classes."""
        return torch.tensor([self.classes or (-1,)], dtype=torch.int64)


@dataclass(eq=False)
class Evaluator:
    """Measures variants on images.

    Attributes:
        model: borrowed, in evaluation mode.
        dataset: images with masks.
        vocabulary: the measured classes.
        photos: how photos are prepared.
        labels: where image-level labels come from.
        cache: keeps measurements; None measures everything again.
        call: as in `camkit.wrap`; with it nothing is cached, as its code cannot be compared.
    """

    model: nn.Module
    dataset: DataSet
    vocabulary: Vocabulary
    photos: PhotoSettings
    labels: LabelSource = "dataset"
    cache: ResultCache | None = None
    call: ModelCall | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        self._fingerprints: dict[Variant, str | None] = {}
        self._setup = None  # without a fingerprint nothing is cached
        if self.cache is not None and self.call is None:
            weights = weights_hash(self.model)
            if weights.startswith(UNKNOWN):  # other weights would get the same results
                return
            code = code_fingerprint(), weights, repr(self.model)
            inputs = to_input(self.model, torch.zeros(1, 3, 1, 1))
            machine = str(inputs.dtype), inputs.device.type, torch.__version__
            data = self.vocabulary, self.photos, self.labels, self.dataset.classes
            self._setup = fingerprint((*code, *machine, *data))

    def measure_all(
        self, samples: Sequence[Sample], requests: Requests, title: str, skipped: list[str]
    ) -> Iterator[tuple[Sample, dict[Variant, Counts]]]:
        """Yield the counts of each image; append the errors of unusable images to ``skipped``."""
        usable = 0
        for sample in progress(samples, desc=title, unit="image", mininterval=0.5):
            try:
                counts = self.measure(sample, requests)
            except DataError as error:
                skipped.append(str(error))
                continue
            usable += 1
            yield sample, counts
        if not usable:
            raise DataError(f"no usable image among {len(samples)} ({'; '.join(skipped[:3])})")

    def measure(self, sample: Sample, requests: Requests) -> dict[Variant, Counts]:
        """Return the counts of one image by each variant.

        Raises:
            DataError: the photo or its mask cannot be used.
        """
        keys = {variant: self._key(sample, variant) for variant in requests}
        cached = {v: self._read_cache(keys[v], score) for v, score in requests.items()}
        counts = {variant: known for variant, known in cached.items() if known is not None}
        missing = [variant for variant in requests if variant not in counts]
        if missing:
            labelled = self.load(sample)
            for variant, cam in self.maps(labelled, missing).items():
                counts[variant] = self._count(labelled, cam, requests[variant])
                self._write_cache(keys[variant], requests[variant], counts[variant])
        return {variant: counts[variant] for variant in requests}

    def load(self, sample: Sample) -> LabelledPhoto:
        """Read one image, its mask and its labels; raises the errors of `measure`."""
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
            classes = self.labelled(sample)
        else:
            spec, vocabulary = WatchSpec(), self.vocabulary
            runner = ModelRunner(self.model, spec, vocabulary=vocabulary, call=self.call)
            with borrowed(self.model), torch.no_grad():
                predicted = self.labels(runner(to_input(self.model, photo.pixels)))
            classes = tuple(sorted(index for index in predicted[0].tolist() if index >= 0))
        return LabelledPhoto(photo, truth, classes)

    def labelled(self, sample: Sample) -> tuple[int, ...]:
        """Return the measured classes that the labels of the data set name for an image."""
        present = [self.dataset.classes[index] for index in sample.classes]
        return tuple(i for i, name in enumerate(self.vocabulary.names) if name in present)

    def maps(self, labelled: LabelledPhoto, variants: Sequence[Variant]) -> dict[Variant, Cam]:
        """Return maps at the size of the photo, in [0, 1]; one empty map without classes."""
        size = labelled.photo.size
        if not labelled.classes:
            return dict.fromkeys(variants, torch.zeros(1, 1, *size))
        photo, slots = labelled.photo, labelled.slots
        maps = variant_maps(self.model, photo, slots, variants, self.vocabulary, self.call)
        return {variant: resize_cam(cam, size).clamp(0, 1).cpu() for variant, cam in maps.items()}

    def _count(self, labelled: LabelledPhoto, cam: Cam, score: float | None) -> Counts:
        slots, values = labelled.slots, len(self.vocabulary) + 1
        swept = sweep_confusions(cam[0], slots[0], labelled.truth, num_classes=values)
        if score is None:
            return Counts(swept, None)
        mask = to_mask(cam, slots, background_score=score)[0]
        return Counts(swept, boundary_confusion(labelled.truth, mask, num_classes=values))

    def _key(self, sample: Sample, variant: Variant) -> str | None:
        """Return the cache key of a measurement; None if it cannot be cached."""
        if self._setup is None or sample.mask is None:
            return None
        if variant not in self._fingerprints:
            m = variant.method
            edit = None if m.edit is None else (m.edit, m.edit_blocks)
            self._fingerprints[variant] = fingerprint((m.seed, m.views, m.refine, edit))
        settings = self._fingerprints[variant]
        if settings is None:
            return None
        try:
            photo = hashlib.sha256(sample.photo.read_bytes()).hexdigest()
            mask = sample.form.digest(sample.mask)
        except OSError:
            return None  # the measurement will raise the error
        parts = (self._setup, settings, photo, mask, sample.classes)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _read_cache(self, key: str | None, score: float | None) -> Counts | None:
        if key is None or self.cache is None:
            return None
        values = len(self.vocabulary) + 1
        swept = self.cache.get_counts(key, values)
        if swept is None or score is None:
            return None if swept is None else Counts(swept, None)
        outline = self.cache.get_counts(f"{key} outline {score}", values + 1)
        return None if outline is None else Counts(swept, outline[0])

    def _write_cache(self, key: str | None, score: float | None, counts: Counts) -> None:
        if key is None or self.cache is None:
            return
        self.cache.put_counts(key, counts.swept)
        if counts.outline is not None:
            self.cache.put_counts(f"{key} outline {score}", counts.outline)
