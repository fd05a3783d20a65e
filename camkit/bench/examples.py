"""Example images of a finished benchmark: the best, the worst and a random draw."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor, nn

from camkit.bench.evaluator import Evaluator, LabelSource
from camkit.bench.protocol import Variant, stages
from camkit.bench.results import Report, Row
from camkit.data import DataSet, Sample
from camkit.manifest import weights_hash
from camkit.mask import to_mask
from camkit.photo import PhotoSettings, read_picture
from camkit.printing import short_repr
from camkit.seeds.views import ModelCall
from camkit.tensors import IGNORE
from camkit.vocabulary import Vocabulary

Group: TypeAlias = Literal["random", "best", "worst"]
"""Why an image was chosen."""

HIT, MISSED, FALSE, WRONG = 1, 2, 3, 4
"""Values of an error map: object found, object taken for background, background taken for an
object, wrong class; 0 is background found, 255 is ignored."""


@dataclass(frozen=True, eq=False)
class Stage:
    """The class maps after one step of a row, at photo size, in [0, 1]."""

    name: str
    cam: Float[Tensor, "k H W"]

    __repr__ = short_repr


@dataclass(frozen=True, eq=False)
class Example:
    """One image, by the method of one row of the report.

    Attributes:
        name: name of the image.
        row: name of the row.
        base: name of the row that the gain is over, if any.
        groups: why the image was chosen; a random image may also be one of the best.
        iou: mean IoU of this image alone, by the row.
        base_iou: the same by the base.
        classes: classes in the ground truth, as mask values from 1.
        photo: at its own size.
        truth: 0 background, class + 1, 255 ignored.
        stages: the row's maps, from its seed to its last refiner.
        mask: of the last stage, at the row's background score.
        base_mask: of the base, at the base's background score.
        errors: see `error_map`.
    """

    name: str
    row: str
    base: str | None
    groups: tuple[Group, ...]
    iou: float
    base_iou: float | None
    classes: tuple[int, ...]
    photo: UInt8[np.ndarray, "H W 3"]
    truth: Int[Tensor, "H W"]
    stages: tuple[Stage, ...]
    mask: UInt8[Tensor, "H W"]
    base_mask: UInt8[Tensor, "H W"] | None
    errors: UInt8[Tensor, "H W"]

    __repr__ = short_repr

    @property
    def gain(self) -> float:
        """Gain over the base; without a base, the mean IoU itself."""
        return self.iou - (self.base_iou or 0.0)


def collect_examples(  # noqa: PLR0913 - each setting is a choice of its own
    model: nn.Module,
    dataset: DataSet,
    report: Report,
    *,
    vocabulary: Vocabulary,
    photos: PhotoSettings | None = None,
    labels: LabelSource = "dataset",
    call: ModelCall | None = None,
    row: str | None = None,
    count: int = 12,
    rng_seed: int = 0,
) -> Iterator[Example]:
    """Run the model again on a few images of a finished benchmark.

    Images are ranked by the gain of their own mean IoU over the base of a row. The best and the
    worst never overlap; the random images are drawn from all, so they are typical. The arguments
    must be those given to `run`.

    Args:
        model: the measured model.
        dataset: the data set it was measured on.
        report: the report of the benchmark.
        vocabulary: as given to `run`, like `photos` and `labels`.
        photos: how photos were prepared.
        labels: where image-level labels came from.
        call: as given to `run`.
        row: name of the row to show; None takes the best row on the tuning split, among the rows
            with a base if there are any.
        count: at most this many best, worst and random images each.
        rng_seed: seed of the random draw.

    Returns:
        Examples in the order of the report, made one at a time to save memory.

    Raises:
        ValueError: the report has no such row, or was made with another model, data set or setting.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    evaluator = Evaluator(model, dataset, vocabulary, photos or PhotoSettings(), labels, call=call)
    _check_same(evaluator, report)
    shown = _find(report, row)
    base = None if shown.entry.base is None else _find(report, shown.entry.base.name)
    groups = _choose(shown, base, count, rng_seed)
    entries = (entry for entry in dataset.entries(report.split) if isinstance(entry, Sample))
    samples = {sample.name: sample for sample in entries}
    missing = [report.names[index] for index in groups if report.names[index] not in samples]
    if missing:
        raise ValueError(
            f"split {report.split!r} no longer holds {', '.join(missing[:3])}; the files have "
            "changed since the report was made: measure again"
        )
    return (
        _example(evaluator, samples[report.names[index]], index, reasons, shown, base)
        for index, reasons in groups.items()
    )


def error_map(truth: Integer[Tensor, "H W"], mask: Integer[Tensor, "H W"]) -> UInt8[Tensor, "H W"]:
    """Return how each pixel of a mask is right or wrong.

    Args:
        truth: 0 background, class + 1, 255 ignored.
        mask: the same; 255 counts as background, as in every score.

    Returns:
        0 correct background, 1 hit, 2 missed, 3 false, 4 wrong class, 255 ignored.
    """
    claimed = (mask != 0) & (mask != IGNORE)
    true = truth != 0
    errors = torch.zeros(truth.shape, dtype=torch.uint8)
    errors[true & (mask == truth)] = HIT
    errors[true & ~claimed] = MISSED
    errors[~true & claimed] = FALSE
    errors[true & claimed & (mask != truth)] = WRONG
    errors[truth == IGNORE] = IGNORE
    return errors


def _check_same(evaluator: Evaluator, report: Report) -> None:
    labels = "those of the data set" if evaluator.labels == "dataset" else repr(evaluator.labels)
    facts = {
        "data set": (report.dataset, evaluator.dataset.root.name),
        "classes": (report.classes, ("background", *evaluator.vocabulary.names)),
        "photos": (report.photos, repr(evaluator.photos)),
        "labels": (report.labels, labels),
        "weights": (report.weights_sha256, weights_hash(evaluator.model)),
    }
    for name, (measured, given) in facts.items():
        if measured != given:
            raise ValueError(
                f"the report was made with other {name}: {measured}, got {given}; "
                "pass the arguments of the benchmark"
            )


def _find(report: Report, name: str | None) -> Row:
    if name is None:
        compared = [row for row in report.rows if row.entry.base is not None]
        return max(compared or report.rows, key=lambda row: row.tuned_mean_iou)
    by_name = {row.name: row for row in report.rows}
    if name not in by_name:
        raise ValueError(f"the report has no row {name!r}; it has {', '.join(by_name)}")
    return by_name[name]


def _choose(row: Row, base: Row | None, count: int, rng_seed: int) -> dict[int, tuple[Group, ...]]:
    """Return the index of each chosen image in the report, and why it was chosen."""
    gains = np.array(row.image_iou) - (0.0 if base is None else np.array(base.image_iou))
    ranked = np.argsort(-gains, kind="stable").tolist()  # images without a counted pixel come last
    ranked = [index for index in ranked if not np.isnan(gains[index])]
    half = (len(ranked) + 1) // 2
    best, worst = ranked[: min(count, half)], ranked[max(half, len(ranked) - count) :]
    rng = np.random.default_rng(rng_seed)
    drawn = rng.permutation(sorted(ranked))[:count].tolist()
    chosen: dict[Group, Sequence[int]] = {"random": drawn, "best": best, "worst": worst}
    return {
        index: tuple(group for group in get_args(Group) if index in chosen[group])
        for index in sorted({*drawn, *best, *worst})
    }


def _example(
    evaluator: Evaluator,
    sample: Sample,
    index: int,
    groups: tuple[Group, ...],
    row: Row,
    base: Row | None,
) -> Example:
    labelled = evaluator.load(sample)
    steps = stages(row.variant)
    refiners = row.variant.method.refine
    step_names = ("seed", *(getattr(r, "__name__", type(r).__name__) for r in refiners))
    variants = steps if base is None else (*steps, base.variant)
    maps = evaluator.maps(labelled, tuple(dict.fromkeys(variants)))

    def mask_of(variant: Variant, score: float) -> UInt8[Tensor, "H W"]:
        return to_mask(maps[variant], labelled.slots, background_score=score)[0]

    mask = mask_of(steps[-1], row.background_score)
    present = [value for value in labelled.truth.unique().tolist() if value not in (0, IGNORE)]
    return Example(
        name=sample.name,
        row=row.name,
        base=None if base is None else base.name,
        groups=groups,
        iou=row.image_iou[index],
        base_iou=None if base is None else base.image_iou[index],
        classes=tuple(present),
        photo=read_picture(sample.photo),
        truth=labelled.truth,
        stages=tuple(
            Stage(name, maps[step][0]) for name, step in zip(step_names, steps, strict=True)
        ),
        mask=mask,
        base_mask=None if base is None else mask_of(base.variant, base.background_score),
        errors=error_map(labelled.truth, mask),
    )
