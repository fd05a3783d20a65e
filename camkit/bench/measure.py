"""`run`: measure methods on held-out masks, tuned on one split, reported on another."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from camkit.bench.cache import ResultCache
from camkit.bench.evaluator import Counts, Evaluator, LabelSource
from camkit.bench.oracles import measure_oracles
from camkit.bench.protocol import Entry, Repeats, Variant, check_entries
from camkit.bench.quality import Quality, measure_quality
from camkit.bench.results import Comparison, Outlines, Report, Row
from camkit.data import DataSet, Sample, shared_images
from camkit.errors import DataError
from camkit.manifest import provenance
from camkit.photo import PhotoSettings
from camkit.printing import several, short_repr
from camkit.score import (
    FEW_IMAGES,
    THRESHOLDS,
    Best,
    Definition,
    Gain,
    average_precision,
    best_threshold,
    class_iou,
    few_images,
    holm,
    mean_iou,
    paired_gain,
    threshold_curve,
)
from camkit.score.confusion import NO_FOREGROUND
from camkit.seeds.views import ModelCall
from camkit.vocabulary import Vocabulary


@dataclass
class Truth:
    """What the true masks of a split show.

    Attributes:
        split: its name.
        classes: the measured classes.
        pixels: true pixels of each class, the background first.
        images: images counted.
        unseen: images whose labels name a measured class that their mask shows nowhere.
    """

    split: str
    classes: tuple[str, ...]
    pixels: Int[Tensor, "c"] = field(init=False)
    images: int = 0
    unseen: list[str] = field(default_factory=list)

    __repr__ = short_repr

    def __post_init__(self) -> None:
        self.pixels = torch.zeros(len(self.classes) + 1, dtype=torch.int64)

    def add(self, sample: Sample, labels: Sequence[int], counts: Counts) -> None:
        """Count an image; its true pixels are the same in the counts of any variant."""
        shown = counts.swept[0].sum(-1)
        self.pixels += shown
        self.images += 1
        if any(shown[index + 1] == 0 for index in labels):
            self.unseen.append(sample.name)

    def check(self) -> None:
        """Raise a DataError if no mask shows a measured class."""
        if not self.pixels[1:].any():
            raise DataError(
                f"nothing can be measured on the {self.images} masks of {self.split}, of "
                f"{', '.join(self.classes)}: {NO_FOREGROUND}"
            )

    def warnings(self) -> Iterator[str]:
        """Yield what the masks lack, a sentence each."""
        shown = zip(self.classes, self.pixels[1:].tolist(), strict=True)
        absent = [name for name, pixels in shown if not pixels]
        if absent:
            yield (
                f"no mask of {self.split} shows {', '.join(absent)}: left out of the mean over the "
                "classes present"
            )
        if self.unseen:
            yield (
                f"the labels of {len(self.unseen)} of {self.images} images of {self.split} name a "
                f"class that the mask shows nowhere, such as {self.unseen[0]}; check the labels, "
                "and whether masks mark objects with 255, which is ignored"
            )


@dataclass(frozen=True)
class Reported:
    """Confusion matrices of a variant on the reported split.

    Attributes:
        swept: summed over the images, one for each background score.
        images: one for each image, at the background score picked.
        outlines: the same of outlines, if requested.
    """

    swept: Int[Tensor, "s c c"]
    images: Int[Tensor, "n c c"]
    outlines: Int[Tensor, "n d d"] | None

    __repr__ = short_repr


def run(  # noqa: PLR0913 - each setting is a choice of its own
    model: nn.Module,
    dataset: DataSet,
    *,
    vocabulary: Vocabulary,
    variants: Sequence[Entry],
    split: str,
    tune_split: str,
    photos: PhotoSettings | None = None,
    labels: LabelSource = "dataset",
    call: ModelCall | None = None,
    limit: int | None = None,
    oracle_threshold: bool = False,
    cache: Path | None = None,
    quality: Quality | None = None,
    outlines: bool = False,
    oracles: bool = False,
) -> Report:
    """Measure variants: background scores and choices from ``tune_split``, figures from ``split``.

    Pixels of classes outside the vocabulary count as background. Variants of the same edit share
    one forward of each image.

    Args:
        model: a Vision Transformer with a classifier, in evaluation mode.
        dataset: images with masks.
        vocabulary: the measured classes, each a class of the data set.
        variants: rows of the table; `Choice` and `Repeats` hold several variants.
        split: the figures come from this split.
        tune_split: background scores and choices are picked on this split.
        photos: how photos are prepared.
        labels: "dataset", or `camkit.seeds.PredictedClasses` for the prediction of the classifier.
        call: calls a model that takes more than images, see `camkit.wrap`. Its measurements are
            not cached, because camkit cannot tell whether its code has changed.
        limit: use only the first images of each split.
        oracle_threshold: allow the splits to share images; the report is then marked ORACLE.
        cache: file of measurements by a hash of weights, image, settings and code, so that a killed
            run continues and only changed variants are measured again.
        quality: also measure how well the maps explain the classifier, by many forwards per image.
        outlines: also measure boundary IoU (`camkit.score.boundary_confusion`), at the same
            background scores.
        oracles: also analyse the errors of each row, by a further pass over the reported images:
            what oracles that read the masks would reach, and shares of wrong pixels
            (`ErrorAnalysis`). All other figures are the same with and without it.

    Raises:
        ValueError: the splits share images without ``oracle_threshold``, or a class is not in the
            data set.
        DataError: no image of a split can be used, or no mask of a split shows a measured class.
    """
    entries = tuple(variants)
    unknown = [name for name in vocabulary.names if name not in dataset.classes]
    if unknown:
        raise ValueError(f"no class of the data set is called {', '.join(unknown)}")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() before measuring it")
    check_entries(entries)
    tuning, held_out = dataset.split(tune_split)[:limit], dataset.split(split)[:limit]
    shared = shared_images(tuning, held_out)
    if shared and not oracle_threshold:
        raise ValueError(
            f"splits {tune_split!r} and {split!r} share {several(len(shared), 'image')} "
            f"({shared[0][0]}, ...): the same name or the same content; "
            "a background score picked on the images it is reported on is an oracle; name another "
            "split, or allow it with `oracle_threshold` (--oracle-threshold)"
        )
    skipped: list[str] = []
    with ExitStack() as stack:
        results = None if cache is None else stack.enter_context(ResultCache(cache))
        photos = photos or PhotoSettings()
        evaluator = Evaluator(model, dataset, vocabulary, photos, labels, results, call)
        tuned: dict[Variant, Tensor] = {}
        requests = dict.fromkeys(variant for entry in entries for variant in entry.variants)
        title = f"tuning on {tune_split}"
        tuning_truth, truth = (Truth(name, vocabulary.names) for name in (tune_split, split))
        for sample, by_variant in evaluator.measure_all(tuning, requests, title, skipped):
            tuning_truth.add(sample, evaluator.labelled(sample), next(iter(by_variant.values())))
            for variant, counts in by_variant.items():
                tuned[variant] = counts.swept + tuned.get(variant, 0)
        tuning_truth.check()
        tune_images = len(tuning) - len(skipped)
        best = {variant: best_threshold(counts, THRESHOLDS) for variant, counts in tuned.items()}
        chosen = {entry.name: entry.reported(best) for entry in entries}
        scores = {v: best[v].threshold for picked in chosen.values() for v in picked}
        names, reported = _report_on(evaluator, held_out, scores, truth, skipped, outlines)
        firsts = dict.fromkeys(v[0] for v in chosen.values())
        explained = () if quality is None else tuple(firsts)
        qualities = measure_quality(evaluator, held_out, explained, quality or Quality())
        analysed = {variant: scores[variant] for variant in firsts} if oracles else {}
        analyses = measure_oracles(evaluator, held_out, analysed) if oracles else {}
    rows = [_row(entry, chosen, tuned, best, reported) for entry in entries]
    p_values = iter(holm([row.gain.p_value for row in rows if row.gain is not None]))
    return Report(
        dataset=dataset.root.name,
        split=split,
        tune_split=tune_split,
        names=names,
        tune_images=tune_images,
        skipped=tuple(skipped),
        classes=("background", *vocabulary.names),
        labels="those of the data set" if labels == "dataset" else repr(labels),
        photos=repr(photos),
        oracle=bool(shared),
        **provenance(model),
        rows=tuple(
            replace(
                row,
                quality=qualities.get(row.variant),
                analysis=analyses.get(row.variant),
                p_value=None if row.gain is None else next(p_values),
            )
            for row in rows
        ),
        warnings=tuple(_warnings(rows, (tuning_truth, truth))),
    )


def _warnings(rows: Sequence[Row], truths: Sequence[Truth]) -> Iterator[str]:
    images = truths[-1].images
    if images < FEW_IMAGES and any(row.gain or row.over_controls for row in rows):
        yield few_images(images)
    for truth in truths:
        yield from truth.warnings()


def _report_on(
    evaluator: Evaluator,
    samples: Sequence[Sample],
    scores: Mapping[Variant, float],
    truth: Truth,
    skipped: list[str],
    outlines: bool,
) -> tuple[tuple[str, ...], dict[Variant, Reported]]:
    """Return the names of the usable images, and the counts on them; add to ``truth``."""
    title = f"measuring on {truth.split}"
    steps = {v: int((THRESHOLDS - score).abs().argmin()) for v, score in scores.items()}
    requests = {variant: score if outlines else None for variant, score in scores.items()}
    names = []
    swept: dict[Variant, Tensor] = {}
    images: dict[Variant, list[Tensor]] = {variant: [] for variant in scores}
    bands: dict[Variant, list[Tensor]] = {variant: [] for variant in scores}
    for sample, by_variant in evaluator.measure_all(samples, requests, title, skipped):
        truth.add(sample, evaluator.labelled(sample), next(iter(by_variant.values())))
        names.append(sample.name)
        for variant, counts in by_variant.items():
            swept[variant] = counts.swept + swept.get(variant, 0)
            images[variant].append(counts.swept[steps[variant]].clone())  # not the whole sweep
            bands[variant] += [] if counts.outline is None else [counts.outline]
    truth.check()
    return tuple(names), {
        v: Reported(swept[v], torch.stack(images[v]), torch.stack(bands[v]) if outlines else None)
        for v in scores
    }


def _row(
    entry: Entry,
    chosen: Mapping[str, tuple[Variant, ...]],
    tuned: Mapping[Variant, Int[Tensor, "s c c"]],
    best: Mapping[Variant, Best],
    reported: Mapping[Variant, Reported],
) -> Row:
    """Return the figures of one entry; `run` adds its p-value and quality."""

    def pooled(other: Entry, *, outlines: bool = False) -> Int[Tensor, "n c c"]:
        counts = [reported[variant] for variant in chosen[other.name]]
        parts = [each.outlines if outlines else each.images for each in counts]
        return torch.stack([part for part in parts if part is not None]).sum(0)

    def gain_over(base: Entry, *, outlines: bool = False) -> Gain:
        # each side is pooled over its repeats, and weighted by the number of the other side
        before = pooled(base, outlines=outlines) * len(chosen[entry.name])
        after = pooled(entry, outlines=outlines) * len(chosen[base.name])
        real = range(before.shape[-1] - 1)  # of outlines the last class stands for "no outline"
        return paired_gain(before, after, classes=real if outlines else None)

    picked = chosen[entry.name]
    first = picked[0]
    whole = pooled(entry).sum(0)
    means = [float(mean_iou(reported[variant].images.sum(0))) for variant in picked]
    swept = torch.stack([reported[variant].swept for variant in picked]).sum(0)
    curve = threshold_curve(tuned[first], THRESHOLDS)
    boundary = None
    if reported[first].outlines is not None:
        bands = pooled(entry, outlines=True).sum(0)
        boundary = Outlines(
            float(mean_iou(bands, classes=range(len(bands) - 1))),
            None if entry.base is None else gain_over(entry.base, outlines=True),
        )
    return Row(
        entry=entry,
        variant=first,
        background_score=best[first].threshold,
        tuned_mean_iou=sum(best[v].mean_iou for v in picked) / len(picked),
        mean_iou=sum(means) / len(means),
        definitions={
            name: float(mean_iou(whole, definition=name)) for name in get_args(Definition)
        },
        spread=(min(means), max(means)) if isinstance(entry, Repeats) else None,
        class_iou=tuple(class_iou(whole).tolist()),
        class_precision=tuple(average_precision(swept, THRESHOLDS).tolist()),
        confusion=tuple(tuple(line) for line in whole.tolist()),
        image_iou=tuple(mean_iou(reported[first].images).tolist()),
        curve=curve.mean_iou,
        area=curve.area,
        gain=None if entry.base is None else gain_over(entry.base),
        over_controls=tuple(
            Comparison(control.name, gain_over(control)) for control in entry.controls
        ),
        p_value=None,
        outlines=boundary,
    )
