"""The report of a benchmark, and its JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from camkit.bench.oracles import ErrorAnalysis
from camkit.bench.protocol import Entry, Variant
from camkit.bench.quality import MeanQuality
from camkit.score import Gain


@dataclass(frozen=True)
class Comparison:
    """The gain over the control of this name."""

    name: str
    gain: Gain


@dataclass(frozen=True)
class Outlines:
    """Boundary IoU, mean over classes, and the gain over the base."""

    mean_iou: float
    gain: Gain | None


@dataclass(frozen=True)
class Row:
    """One row of the table; IoU in [0, 1].

    Attributes:
        entry: the entry measured.
        variant: the variant measured; of a choice the one picked, of repeats the first.
        background_score: picked on the tuning split.
        tuned_mean_iou: mean IoU on the tuning split.
        mean_iou: mean IoU on the reported split; of repeats their mean.
        definitions: the same by each definition used in the field.
        spread: lowest and highest mean IoU of repeats; None for other entries.
        class_iou: IoU of each class, background first; NaN for absent classes.
        class_precision: pixel average precision of each class, without the background; it needs no
            background score.
        confusion: confusion matrix, rows are the truth; of repeats the sum.
        image_iou: mean IoU of each image alone, in the order of `Report.names`; it only ranks the
            example pictures.
        curve: mean IoU on the tuning split at each of `camkit.score.THRESHOLDS`.
        area: mean of the curve.
        gain: gain over the base, with its interval; None without a base.
        over_controls: gains over the controls.
        p_value: of the gain, corrected for all gains over bases in the report (Holm 1979).
        outlines: boundary IoU, if requested.
        quality: insertion and deletion, if requested.
        analysis: oracles and error shares, if requested; of repeats those of the first.
    """

    entry: Entry
    variant: Variant
    background_score: float
    tuned_mean_iou: float
    mean_iou: float
    definitions: dict[str, float]
    spread: tuple[float, float] | None
    class_iou: tuple[float, ...]
    class_precision: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]
    image_iou: tuple[float, ...]
    curve: tuple[float, ...]
    area: float
    gain: Gain | None
    over_controls: tuple[Comparison, ...]
    p_value: float | None
    outlines: Outlines | None = None
    quality: MeanQuality | None = None
    analysis: ErrorAnalysis | None = None

    @property
    def name(self) -> str:
        """Name of the entry."""
        return self.entry.name


@dataclass(frozen=True)
class Report:
    """A finished benchmark, with everything needed to reproduce it.

    Attributes:
        dataset: name of the data set's folder.
        split: split that the figures come from.
        tune_split: split that background scores and choices were picked on.
        names: images that the figures come from.
        tune_images: number of images of the tuning split.
        skipped: the error of each unusable image.
        classes: in the order of mask values, the background first.
        labels: where image-level labels came from.
        photos: how photos were prepared.
        oracle: whether the splits share images.
        weights_sha256: hash of the model's weights.
        environment: versions and machine.
        rows: one for each entry.
        warnings: what makes figures unreliable, a sentence each: few images, classes without a true
            pixel, labels that the masks contradict.
    """

    dataset: str
    split: str
    tune_split: str
    names: tuple[str, ...]
    tune_images: int
    skipped: tuple[str, ...]
    classes: tuple[str, ...]
    labels: str
    photos: str
    oracle: bool
    weights_sha256: str
    environment: dict[str, Any]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Number of reported images."""
        return len(self.names)


def to_json(report: Report) -> str:
    """Return the whole report as JSON; stages as their settings."""
    data = vars(report) | {"images": report.images, "rows": [_row(row) for row in report.rows]}
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    data = vars(row) | {
        "name": row.name,
        "kind": type(row.entry).__name__,
        "variant": _variant(row.variant),
        "variants": [_variant(variant) for variant in row.entry.variants],
        "gain": None if row.gain is None else vars(row.gain),
        "over_controls": [{"name": c.name, **vars(c.gain)} for c in row.over_controls],
        "outlines": None if row.outlines is None else asdict(row.outlines),
        "quality": None if row.quality is None else asdict(row.quality),
        "analysis": None if row.analysis is None else asdict(row.analysis),
    }
    del data["entry"]
    return {name: _without_nan(value) for name, value in data.items()}


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def _variant(variant: Variant) -> dict[str, Any]:
    settings = variant.method.settings()
    del settings["background_score"]  # the row has the one that was picked
    return {"name": variant.name} | settings
