"""What a benchmark says: rows, comparisons, report."""

from dataclasses import dataclass
from typing import Any

from camkit.bench.protocol import Entry, Variant
from camkit.bench.quality import MeanQuality
from camkit.score import Gain


@dataclass(frozen=True)
class Comparison:
    """A gain over a control.

    Attributes:
        name: of the control.
        gain: over it, with its interval.
    """

    name: str
    gain: Gain


@dataclass(frozen=True)
class Outlines:
    """Boundary IoU, the mean over classes, and the gain over the base."""

    mean_iou: float
    gain: Gain | None


@dataclass(frozen=True)
class Row:
    """What was measured of one line of the table; IoU in [0, 1].

    Attributes:
        entry: the line.
        variant: what was measured; of a choice the one picked, of repeats the first.
        background_score: picked on the tuning split.
        tuned_mean_iou: mean IoU there.
        mean_iou: mean IoU on the reported split; of repeats their mean.
        definitions: the same by each definition of the field.
        spread: lowest and highest mean IoU of repeats; None for others.
        class_iou: by class, background first; NaN where a class is absent.
        class_precision: pixel average precision of each class on the reported split, without the
            background; no background score is needed for it.
        confusion: of the reported split, rows are the truth; of repeats their sum.
        image_iou: mean IoU of each reported image by itself, in the order of `Report.names`; no
            figure is made of them, they only sort pictures.
        curve: mean IoU on the tuning split at each background score of `camkit.score.THRESHOLDS`.
        area: under that curve, the mean over background scores.
        gain: over the base, with its interval; None for a line without one.
        over_controls: gains over the controls.
        p_value: of the gain, corrected for all gains over bases in the report (Holm 1979).
        outlines: boundary IoU; None where it was not asked for.
        quality: what the classifier says of the maps; None where it was not asked for.
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

    @property
    def name(self) -> str:
        """That of the entry."""
        return self.entry.name


@dataclass(frozen=True)
class Report:
    """A finished benchmark, with all that is needed to make it again.

    Attributes:
        dataset: name of its folder.
        split: where the figures come from.
        tune_split: where background scores and choices were picked.
        names: the images the figures come from.
        tune_images: how many images were picked on.
        skipped: why each of the others could not be used.
        classes: in the order of mask values, the background first.
        labels: where image-level labels came from.
        photos: how photos were read.
        oracle: the splits share images.
        weights_sha256: of the model.
        environment: versions and machine.
        rows: one for each line of the table.
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

    @property
    def images(self) -> int:
        """How many images were measured."""
        return len(self.names)
