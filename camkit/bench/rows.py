"""Counts turned into the rows of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor

from camkit.bench.protocol import Entry, Repeats, Variant
from camkit.bench.quality import MeanQuality
from camkit.bench.results import Comparison, Outlines, Row
from camkit.score import (
    THRESHOLDS,
    Best,
    Curve,
    Definition,
    Gain,
    average_precision,
    class_iou,
    holm,
    mean_iou,
    paired_gain,
)

Chosen = Mapping[str, tuple[Variant, ...]]
"""The variants reported for each line of the table."""


@dataclass(frozen=True)
class Tuned:
    """What the tuning split says of a variant."""

    curve: Curve
    best: Best


@dataclass(frozen=True)
class Reported:
    """What was counted of a variant on the reported split.

    Attributes:
        swept: all images at each background score.
        images: each image at the score picked.
        outlines: the same of their outlines, where asked for.
    """

    swept: Int[Tensor, "s c c"]
    images: Int[Tensor, "n c c"]
    outlines: Int[Tensor, "n d d"] | None


def make_rows(
    entries: Sequence[Entry],
    chosen: Chosen,
    tuned: Mapping[Variant, Tuned],
    reported: Mapping[Variant, Reported],
    qualities: Mapping[Variant, MeanQuality],
) -> tuple[Row, ...]:
    """A row for each line, p-values corrected for all their gains."""
    rows = [_row(entry, chosen, tuned, reported) for entry in entries]
    rows = [replace(row, quality=qualities.get(row.variant)) for row in rows]
    gained = [(index, row.gain) for index, row in enumerate(rows) if row.gain is not None]
    corrected = holm([gain.p_value for _, gain in gained])
    found = dict(zip((index for index, _ in gained), corrected, strict=True))
    return tuple(replace(row, p_value=found.get(index)) for index, row in enumerate(rows))


def _row(
    entry: Entry,
    chosen: Chosen,
    tuned: Mapping[Variant, Tuned],
    reported: Mapping[Variant, Reported],
) -> Row:
    picked = chosen[entry.name]
    images = {variant: found.images for variant, found in reported.items()}
    whole = _pooled(picked, images).sum(0)
    means = [float(mean_iou(images[variant].sum(0))) for variant in picked]
    first = tuned[picked[0]]
    swept = torch.stack([reported[variant].swept for variant in picked]).sum(0)
    return Row(
        entry=entry,
        variant=picked[0],
        background_score=first.best.threshold,
        tuned_mean_iou=sum(tuned[v].best.mean_iou for v in picked) / len(picked),
        mean_iou=sum(means) / len(means),
        definitions={
            name: float(mean_iou(whole, definition=name)) for name in get_args(Definition)
        },
        spread=(min(means), max(means)) if isinstance(entry, Repeats) else None,
        class_iou=tuple(class_iou(whole).tolist()),
        class_precision=tuple(average_precision(swept, THRESHOLDS).tolist()),
        confusion=tuple(tuple(line) for line in whole.tolist()),
        image_iou=tuple(mean_iou(images[picked[0]]).tolist()),
        curve=first.curve.mean_iou,
        area=first.curve.area,
        gain=None if entry.base is None else _gain(entry.base, entry, chosen, images),
        over_controls=tuple(
            Comparison(control.name, _gain(control, entry, chosen, images))
            for control in entry.controls
        ),
        p_value=None,
        outlines=_outlines(entry, chosen, reported),
    )


def _outlines(
    entry: Entry, chosen: Chosen, reported: Mapping[Variant, Reported]
) -> Outlines | None:
    bands = {v: found.outlines for v, found in reported.items() if found.outlines is not None}
    if not bands:
        return None
    whole = _pooled(chosen[entry.name], bands).sum(0)
    real = range(len(whole) - 1)  # the last class stands for "no outline"
    gain = None if entry.base is None else _gain(entry.base, entry, chosen, bands, classes=real)
    return Outlines(float(mean_iou(whole, classes=real)), gain)


def _gain(
    base: Entry,
    other: Entry,
    chosen: Chosen,
    images: Mapping[Variant, Int[Tensor, "n c c"]],
    classes: Sequence[int] | None = None,
) -> Gain:
    """Repeats are pooled, and the other side counts as often."""
    first, second = chosen[base.name], chosen[other.name]
    before = _pooled(first, images) * len(second)
    after = _pooled(second, images) * len(first)
    return paired_gain(before, after, classes=classes)


def _pooled(
    picked: Sequence[Variant], images: Mapping[Variant, Int[Tensor, "n c c"]]
) -> Int[Tensor, "n c c"]:
    return torch.stack([images[variant] for variant in picked]).sum(0)
