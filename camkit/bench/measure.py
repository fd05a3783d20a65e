"""Seeds and refiners measured on held-out masks: tuned on one split, reported on another."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from camkit.bench.meter import LabelSource, Meter
from camkit.bench.protocol import Entry, PhotoSettings, Repeats, Variant, check_entries
from camkit.bench.quality import Quality, measure_quality
from camkit.bench.results import Comparison, Report, Row
from camkit.bench.store import Store
from camkit.data import DataSet, Sample
from camkit.manifest import environment, weights_hash
from camkit.score import (
    THRESHOLDS,
    Best,
    Definition,
    Gain,
    best_threshold,
    class_iou,
    holm,
    mean_iou,
    paired_gain,
)
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
        quality: also measure how well the maps explain the classifier; many forwards an image.

    Raises:
        ValueError: the splits share images without ``oracle_threshold``, or a class is not in the
            data set.
        DataError: no image of a split can be used.
    """
    entries = tuple(variants)
    _check(model, dataset, vocabulary, entries)
    tuning, held_out = dataset.split(tune_split)[:limit], dataset.split(split)[:limit]
    shared = _shared(tuning, held_out)
    if shared and not oracle_threshold:
        raise ValueError(
            f"splits {tune_split!r} and {split!r} share {len(shared)} images ({min(shared)}, ...); "
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
        names, images = _report_on(meter, held_out, chosen, best, f"measuring on {split}", skipped)
        asked = () if quality is None else tuple({picked[0]: None for picked in chosen.values()})
        qualities = measure_quality(meter, held_out, asked, quality or Quality())
    rows = [_row(entry, chosen, images, tuned) for entry in entries]
    rows = [replace(row, quality=qualities.get(row.variant)) for row in rows]
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
        rows=tuple(_corrected(rows)),
    )


@dataclass(frozen=True)
class _Tuned:
    """What the tuning split says of a variant."""

    curve: tuple[float, ...]
    best: Best

    @property
    def step(self) -> int:
        return int((THRESHOLDS - self.best.threshold).abs().argmin())


def _check(
    model: nn.Module, dataset: DataSet, vocabulary: Vocabulary, entries: tuple[Entry, ...]
) -> None:
    unknown = [name for name in vocabulary.names if name not in dataset.classes]
    if unknown:
        raise ValueError(f"no class of the data set is called {', '.join(unknown)}")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() before measuring it")
    check_entries(entries)


def _shared(tuning: Sequence[Sample], held_out: Sequence[Sample]) -> set[str]:
    return {sample.name for sample in tuning} & {sample.name for sample in held_out}


def _tune(
    meter: Meter,
    samples: Sequence[Sample],
    entries: Sequence[Entry],
    title: str,
    skipped: list[str],
) -> dict[Variant, _Tuned]:
    variants = tuple(dict.fromkeys(v for entry in entries for v in entry.variants))
    totals: dict[Variant, Tensor] = {}
    for _, swept in meter.each(samples, variants, title, skipped):
        totals = {v: totals[v] + one if v in totals else one for v, one in swept.items()}
    return {
        variant: _Tuned(tuple(mean_iou(total).tolist()), best_threshold(total, THRESHOLDS))
        for variant, total in totals.items()
    }


def _report_on(
    meter: Meter,
    samples: Sequence[Sample],
    chosen: Mapping[str, tuple[Variant, ...]],
    best: Mapping[Variant, Best],
    title: str,
    skipped: list[str],
) -> tuple[tuple[str, ...], dict[Variant, Int[Tensor, "n c c"]]]:
    """Matrices of each image, every variant at the background score picked for it."""
    variants = tuple(dict.fromkeys(v for picked in chosen.values() for v in picked))
    steps = {v: int((THRESHOLDS - best[v].threshold).abs().argmin()) for v in variants}
    kept: dict[Variant, list[Tensor]] = {variant: [] for variant in variants}
    names = []
    for name, swept in meter.each(samples, variants, title, skipped):
        names.append(name)
        for variant, one in swept.items():
            kept[variant].append(one[steps[variant]].clone())  # not the whole sweep it is part of
    return tuple(names), {variant: torch.stack(found) for variant, found in kept.items()}


def _row(
    entry: Entry,
    chosen: Mapping[str, tuple[Variant, ...]],
    images: Mapping[Variant, Int[Tensor, "n c c"]],
    tuned: Mapping[Variant, _Tuned],
) -> Row:
    picked = chosen[entry.name]
    total = sum(images[variant] for variant in picked)
    assert isinstance(total, Tensor)  # noqa: S101 - for the type checker: no line is empty
    whole = total.sum(0)
    means = [float(mean_iou(images[variant].sum(0))) for variant in picked]
    return Row(
        entry=entry,
        variant=picked[0],
        background_score=tuned[picked[0]].best.threshold,
        tuned_mean_iou=sum(tuned[v].best.mean_iou for v in picked) / len(picked),
        mean_iou=sum(means) / len(means),
        definitions={
            name: float(mean_iou(whole, definition=name)) for name in get_args(Definition)
        },
        spread=(min(means), max(means)) if isinstance(entry, Repeats) else None,
        class_iou=tuple(class_iou(whole).tolist()),
        confusion=tuple(tuple(line) for line in whole.tolist()),
        image_iou=tuple(mean_iou(images[picked[0]]).tolist()),
        curve=tuned[picked[0]].curve,
        gain=None if entry.base is None else _gain(entry.base, entry, chosen, images),
        over_controls=tuple(
            Comparison(control.name, _gain(control, entry, chosen, images))
            for control in entry.controls
        ),
        p_value=None,
    )


def _gain(
    base: Entry,
    other: Entry,
    chosen: Mapping[str, tuple[Variant, ...]],
    images: Mapping[Variant, Int[Tensor, "n c c"]],
) -> Gain:
    """Repeats are pooled, and the other side counts as often."""
    first, second = chosen[base.name], chosen[other.name]
    before = torch.stack([images[variant] for variant in first]).sum(0) * len(second)
    after = torch.stack([images[variant] for variant in second]).sum(0) * len(first)
    return paired_gain(before, after)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    gained = [(index, row.gain) for index, row in enumerate(rows) if row.gain is not None]
    corrected = holm([gain.p_value for _, gain in gained])
    found = dict(zip((index for index, _ in gained), corrected, strict=True))
    return [replace(row, p_value=found.get(index)) for index, row in enumerate(rows)]
