"""Seeds and refiners measured on held-out masks: tuned on one split, reported on another."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from camkit.bench.protocol import PhotoSettings, Report, Row, Variant
from camkit.capture.record import Capture
from camkit.capture.watcher import watch
from camkit.data import DataSet, Sample, read_mask
from camkit.edit.handle import attach
from camkit.errors import DataError
from camkit.manifest import environment, weights_hash
from camkit.ops.resampling import resize_cam
from camkit.photo import Photo, load_photo
from camkit.refine.normalize import normalize_cam
from camkit.refine.protocol import Refiner
from camkit.score import THRESHOLDS, best_threshold, class_iou, paired_gain, sweep_confusions
from camkit.seed.protocol import Seed
from camkit.tensors import Cam
from camkit.vocabulary import Vocabulary

IGNORE = 255


def run(  # noqa: PLR0913 - each setting is a choice of its own
    model: nn.Module,
    dataset: DataSet,
    *,
    vocabulary: Vocabulary,
    variants: Sequence[Variant],
    split: str,
    tune_split: str,
    photos: PhotoSettings | None = None,
    limit: int | None = None,
    oracle_threshold: bool = False,
) -> Report:
    """Measure variants: background scores picked on ``tune_split``, figures from ``split``.

    Image-level labels are those of the data set. Pixels of classes outside the vocabulary count as
    background. One forward of each image serves all variants.

    Args:
        model: a Vision Transformer with a classifier, in evaluation mode.
        dataset: images with masks.
        vocabulary: the classes measured, each a class of the data set.
        variants: what to measure.
        split: where the figures come from.
        tune_split: where background scores are picked.
        photos: how photos are read.
        limit: use only the first images of each split.
        oracle_threshold: allow both splits to be the same; the report is marked so.

    Raises:
        ValueError: the splits share images without ``oracle_threshold``, or a class is not in the
            data set.
    """
    unknown = [name for name in vocabulary.names if name not in dataset.classes]
    if unknown:
        raise ValueError(f"no class of the data set is called {', '.join(unknown)}")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() before measuring it")
    lost_bases = [v.name for v in variants if v.base is not None and v.base not in variants]
    if lost_bases or not variants:
        raise ValueError(
            "`variants` must hold at least one variant and the `base` of each, "
            f"got {len(variants)} without the base of {', '.join(lost_bases) or 'any'}"
        )
    tuning, held_out = dataset.split(tune_split)[:limit], dataset.split(split)[:limit]
    shared = {sample.name for sample in tuning} & {sample.name for sample in held_out}
    if shared and not oracle_threshold:
        raise ValueError(
            f"splits {tune_split!r} and {split!r} share {len(shared)} images ({min(shared)}, ...); "
            "a background score picked on the images it is reported on is an oracle: name another "
            "split, or ask for it with --oracle-threshold"
        )
    meter = _Meter(model, dataset, vocabulary, tuple(variants), photos or PhotoSettings())
    curves, tuned_on, skipped = meter.curves(tuning, f"tuning on {tune_split}")
    best = [best_threshold(curve, THRESHOLDS) for curve in curves]
    steps = [int((THRESHOLDS - choice.threshold).abs().argmin()) for choice in best]
    images, reported_on, lost = meter.images(held_out, steps, f"measuring on {split}")
    rows = []
    for index, variant in enumerate(variants):
        base = index if variant.base is None else variants.index(variant.base)
        gain = paired_gain(images[base], images[index])
        rows.append(
            Row(
                variant=variant,
                background_score=best[index].threshold,
                tuned_mean_iou=best[index].mean_iou,
                mean_iou=gain.mean_iou_other,
                class_iou=tuple(class_iou(images[index].sum(0)).tolist()),
                gain=None if base == index else gain,
            )
        )
    return Report(
        dataset=dataset.root.name,
        split=split,
        tune_split=tune_split,
        images=reported_on,
        tune_images=tuned_on,
        skipped=(*skipped, *lost),
        classes=("background", *vocabulary.names),
        photos=repr(meter.photos),
        oracle=bool(shared),
        weights_sha256=weights_hash(model),
        environment=environment(),
        rows=tuple(rows),
    )


@dataclass(frozen=True)
class _Meter:
    """Confusion matrices of every variant, image by image, at every background score."""

    model: nn.Module
    dataset: DataSet
    vocabulary: Vocabulary
    variants: tuple[Variant, ...]
    photos: PhotoSettings

    def curves(
        self, samples: Sequence[Sample], title: str
    ) -> tuple[list[Int[Tensor, "s c c"]], int, list[str]]:
        """Matrices summed over images, how many images, and which were skipped."""
        totals: list[Tensor] = []
        skipped: list[str] = []
        for swept in self._each(samples, title, skipped):
            totals = [a + b for a, b in zip(totals, swept, strict=True)] if totals else swept
        if not totals:
            raise DataError(f"no usable image among {len(samples)} ({'; '.join(skipped[:3])})")
        return totals, len(samples) - len(skipped), skipped

    def images(
        self, samples: Sequence[Sample], steps: Sequence[int], title: str
    ) -> tuple[list[Int[Tensor, "n c c"]], int, list[str]]:
        """Matrices of each image at one background score per variant."""
        skipped: list[str] = []
        kept = [
            [confusions[step] for confusions, step in zip(swept, steps, strict=True)]
            for swept in self._each(samples, title, skipped)
        ]
        if not kept:
            raise DataError(f"no usable image among {len(samples)} ({'; '.join(skipped[:3])})")
        return [torch.stack(column) for column in zip(*kept, strict=True)], len(kept), skipped

    def _each(
        self, samples: Sequence[Sample], title: str, skipped: list[str]
    ) -> Iterable[list[Tensor]]:
        for sample in tqdm(samples, desc=title, unit="image", delay=2, mininterval=0.5):
            try:
                photo, truth = self._load(sample)
            except DataError as error:  # that image is lost and listed; the others are not
                skipped.append(str(error))
                continue
            yield self._sweep(sample, photo, truth)

    def _load(self, sample: Sample) -> tuple[Photo, Tensor]:
        if sample.mask is None:
            raise DataError(f"{sample.photo} has no mask; a benchmark needs one")
        settings = self.photos
        photo = load_photo(
            sample.photo,
            size=settings.size,
            mean=settings.mean,
            std=settings.std,
            multiple=settings.multiple,
        )
        ids = read_mask(sample.mask, size=photo.size, num_classes=len(self.dataset.classes))
        truth = torch.where(ids == IGNORE, IGNORE, torch.zeros_like(ids))
        for index, name in enumerate(self.vocabulary.names):
            truth[ids == self.dataset.classes.index(name) + 1] = index + 1
        return photo, truth

    def _sweep(self, sample: Sample, photo: Photo, truth: Tensor) -> list[Tensor]:
        present = [self.dataset.classes[index] for index in sample.classes]
        asked = [i for i, name in enumerate(self.vocabulary.names) if name in present]
        classes = torch.tensor([asked or [-1]], dtype=torch.int64)
        maps = self._maps(photo, classes) if asked else {}
        nothing = torch.zeros(1, 1, *photo.size)
        return [
            sweep_confusions(
                resize_cam(maps[variant], photo.size)[0].clamp(0, 1).cpu() if asked else nothing[0],
                classes[0],
                truth,
                num_classes=len(self.vocabulary) + 1,
            )
            for variant in self.variants
        ]

    def _maps(self, photo: Photo, classes: Tensor) -> dict[Variant, Cam]:
        """Maps of all variants; one forward for each edit."""
        maps: dict[Variant, Cam] = {}
        forwards: dict[Any, list[Variant]] = {}
        for variant in self.variants:
            edited = variant.edit is not None
            key = (variant.edit, variant.edit_blocks if edited else None)
            forwards.setdefault(key, []).append(variant)
        for variants in forwards.values():
            capture = self._capture(photo, variants)
            known: dict[tuple[Seed, tuple[Refiner, ...]], Cam] = {}
            with torch.no_grad():
                for variant in variants:
                    maps[variant] = self._stage(
                        variant.seed,
                        variant.refine,
                        capture,
                        classes.to(capture.scores.device),
                        known,
                    )
        return maps

    def _capture(self, photo: Photo, variants: Sequence[Variant]) -> Capture:
        weight = next(self.model.parameters())
        pixels, rgb = photo.pixels.to(weight), photo.rgb.to(weight.device)
        edit, blocks = variants[0].edit, variants[0].edit_blocks
        gradients = any(variant.seed.gradients for variant in variants)
        seen = watch(self.model, gradients=gradients, rgb=rgb, vocabulary=self.vocabulary)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if edit is not None:
                stack.enter_context(attach(self.model, edit, blocks=blocks)).rgb = rgb
            stack.enter_context(seen)
            self.model(pixels)
        return seen.capture

    def _stage(
        self,
        seed: Seed,
        refine: tuple[Refiner, ...],
        capture: Capture,
        classes: Tensor,
        known: dict[tuple[Seed, tuple[Refiner, ...]], Cam],
    ) -> Cam:
        """Maps after some refiners; what variants share is computed once."""
        if (seed, refine) not in known:
            if refine:
                before = self._stage(seed, refine[:-1], capture, classes, known)
                known[seed, refine] = refine[-1](before, capture)
            else:
                known[seed, refine] = normalize_cam(seed(capture, classes).float())
        return known[seed, refine]
