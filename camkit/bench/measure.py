"""Seeds and refiners measured on held-out masks: tuned on one split, reported on another."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from camkit.bench.meter import LabelSource, Meter
from camkit.bench.protocol import Entry, PhotoSettings, Variant, check_entries
from camkit.bench.quality import Quality, measure_quality
from camkit.bench.results import Report
from camkit.bench.rows import Reported, Tuned, make_rows
from camkit.bench.store import Store
from camkit.data import DataSet, Sample, shared_images
from camkit.manifest import environment, weights_hash
from camkit.score import THRESHOLDS, best_threshold, threshold_curve
from camkit.vocabulary import Vocabulary


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
    limit: int | None = None,
    oracle_threshold: bool = False,
    cache: Path | None = None,
    quality: Quality | None = None,
    outlines: bool = False,
) -> Report:
    """Measure variants: background scores and choices from ``tune_split``, figures from ``split``.

    Pixels of classes outside the vocabulary count as background. One forward of each image serves
    all variants of one edit.

    Args:
        model: a Vision Transformer with a classifier, in evaluation mode.
        dataset: images with masks.
        vocabulary: the classes measured, each a class of the data set.
        variants: lines of the table; `Choice` and `Repeats` hold several variants.
        split: where the figures come from.
        tune_split: where everything that is picked is picked.
        photos: how photos are read.
        labels: image-level labels of the data set, or `PredictedLabels` of the model.
        limit: use only the first images of each split.
        oracle_threshold: allow the splits to share images; the report is marked so.
        cache: a file that keeps what was measured, image by image, under a hash of weights, files,
            settings and code: a killed run goes on, a changed variant costs only itself.
        outlines: also measure boundary IoU (`camkit.score.boundary_overlap`), at the same
            background scores.
        quality: also measure how well the maps explain the classifier; many forwards an image.

    Raises:
        ValueError: the splits share images without ``oracle_threshold``, or a class is not in the
            data set.
        DataError: no image of a split can be used.
    """
    entries = tuple(variants)
    _check(model, dataset, vocabulary, entries)
    tuning, held_out = dataset.split(tune_split)[:limit], dataset.split(split)[:limit]
    shared = shared_images(tuning, held_out)
    if shared and not oracle_threshold:
        raise ValueError(
            f"splits {tune_split!r} and {split!r} share {len(shared)} images "
            f"({shared[0][0]}, ...): the same name or the same content; "
            "a background score picked on the images it is reported on is an oracle: name another "
            "split, or ask for it with --oracle-threshold"
        )
    skipped: list[str] = []
    with ExitStack() as stack:
        store = None if cache is None else stack.enter_context(Store(cache))
        meter = Meter(model, dataset, vocabulary, photos or PhotoSettings(), labels, store)
        tuned = _tune(meter, tuning, entries, f"tuning on {tune_split}", skipped)
        tune_images = len(tuning) - len(skipped)
        best = {variant: curve.best for variant, curve in tuned.items()}
        chosen = {entry.name: entry.reported(best) for entry in entries}
        scores = {v: best[v].threshold for picked in chosen.values() for v in picked}
        title = f"measuring on {split}"
        names, reported = _report_on(
            meter, held_out, scores, skipped, title=title, outlines=outlines
        )
        asked = () if quality is None else tuple({picked[0]: None for picked in chosen.values()})
        qualities = measure_quality(meter, held_out, asked, quality or Quality())
    return Report(
        dataset=dataset.root.name,
        split=split,
        tune_split=tune_split,
        names=names,
        tune_images=tune_images,
        skipped=tuple(skipped),
        classes=("background", *vocabulary.names),
        labels="those of the data set" if labels == "dataset" else repr(labels),
        photos=repr(meter.photos),
        oracle=bool(shared),
        weights_sha256=weights_hash(model),
        environment=environment(),
        rows=make_rows(entries, chosen, tuned, reported, qualities),
    )


def _check(
    model: nn.Module, dataset: DataSet, vocabulary: Vocabulary, entries: tuple[Entry, ...]
) -> None:
    unknown = [name for name in vocabulary.names if name not in dataset.classes]
    if unknown:
        raise ValueError(f"no class of the data set is called {', '.join(unknown)}")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() before measuring it")
    check_entries(entries)


def _tune(
    meter: Meter,
    samples: Sequence[Sample],
    entries: Sequence[Entry],
    title: str,
    skipped: list[str],
) -> dict[Variant, Tuned]:
    variants = tuple(dict.fromkeys(v for entry in entries for v in entry.variants))
    totals: dict[Variant, Tensor] = {}
    for _, counted in meter.each(samples, dict.fromkeys(variants), title, skipped):
        for variant, counts in counted.items():
            before = totals.get(variant)
            totals[variant] = counts.swept if before is None else before + counts.swept
    return {
        variant: Tuned(threshold_curve(total, THRESHOLDS), best_threshold(total, THRESHOLDS))
        for variant, total in totals.items()
    }


def _report_on(
    meter: Meter,
    samples: Sequence[Sample],
    scores: Mapping[Variant, float],
    skipped: list[str],
    *,
    title: str,
    outlines: bool,
) -> tuple[tuple[str, ...], dict[Variant, Reported]]:
    """Names of the images that could be used, and what was counted on them."""
    steps = {v: int((THRESHOLDS - score).abs().argmin()) for v, score in scores.items()}
    wanted = {variant: score if outlines else None for variant, score in scores.items()}
    names = []
    swept: dict[Variant, Tensor] = {}
    kept: dict[Variant, list[Tensor]] = {variant: [] for variant in scores}
    bands: dict[Variant, list[Tensor]] = {variant: [] for variant in scores}
    for name, counted in meter.each(samples, wanted, title, skipped):
        names.append(name)
        for variant, counts in counted.items():
            before = swept.get(variant)
            swept[variant] = counts.swept if before is None else before + counts.swept
            kept[variant].append(counts.swept[steps[variant]].clone())  # not its whole sweep
            bands[variant] += [] if counts.outline is None else [counts.outline]
    return tuple(names), {
        v: Reported(swept[v], torch.stack(kept[v]), torch.stack(bands[v]) if outlines else None)
        for v in scores
    }
