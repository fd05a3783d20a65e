"""What a benchmark compares and what it says: variants, rows, report."""

from dataclasses import dataclass, field
from typing import Any

from camkit.edit.protocol import Edit, KeyEdit
from camkit.refine.protocol import Refiner
from camkit.score import Gain
from camkit.seed.protocol import Seed


@dataclass(frozen=True)
class PhotoSettings:
    """How photos are read for the model."""

    size: int | tuple[int, int] = 384
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    multiple: int = 16


@dataclass(frozen=True)
class Variant:
    """A seed and what refines it, in a forward that may be edited.

    Attributes:
        name: as it stands in the table.
        seed: where the maps come from.
        refine: refiners in order; none measures the seed alone.
        base: what the gain is measured against; none for a seed.
        edit: changes the forward the seed is read from.
        edit_blocks: how many of the last blocks it changes; None is all.
    """

    name: str
    seed: Seed
    refine: tuple[Refiner, ...] = ()
    base: "Variant | None" = field(default=None, compare=False)
    edit: Edit | KeyEdit | None = None
    edit_blocks: int | None = 3


@dataclass(frozen=True)
class Row:
    """What was measured of one variant; IoU in [0, 1].

    Attributes:
        variant: what was measured.
        background_score: picked on the tuning split.
        tuned_mean_iou: mean IoU there.
        mean_iou: mean IoU on the reported split.
        class_iou: the same by class, background first; NaN where a class is absent.
        gain: over the variant's base, with its interval; None for a seed.
    """

    variant: Variant
    background_score: float
    tuned_mean_iou: float
    mean_iou: float
    class_iou: tuple[float, ...]
    gain: Gain | None


@dataclass(frozen=True)
class Report:
    """A finished benchmark, with all that is needed to make it again."""

    dataset: str
    split: str
    tune_split: str
    images: int
    tune_images: int
    skipped: tuple[str, ...]
    classes: tuple[str, ...]
    photos: str
    oracle: bool
    weights_sha256: str
    environment: dict[str, Any]
    rows: tuple[Row, ...]
