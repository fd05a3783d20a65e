"""Images of a finished benchmark to look at: the best, the worst and a random draw."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor, nn

from camkit.bench.evaluator import Evaluator, LabelSource
from camkit.bench.protocol import PhotoSettings, Variant, stages
from camkit.bench.results import Report, Row
from camkit.data import DataSet, Sample
from camkit.manifest import weights_hash
from camkit.mask import to_mask
from camkit.photo import read_picture
from camkit.tensors import IGNORE, Cam
from camkit.vocabulary import Vocabulary

Group: TypeAlias = Literal["random", "best", "worst"]
"""Why an image was chosen."""

HIT, MISSED, FALSE, WRONG = 1, 2, 3, 4
"""Values of an error map: object found, object taken for background, background taken for an
object, object of another class; 0 is background found, 255 is ignored."""


@dataclass(frozen=True, eq=False)
class Stage:
    """The class maps after one step of a row, at photo size, in [0, 1]."""

    name: str
    cam: Float[Tensor, "k H W"]


@dataclass(frozen=True, eq=False)
class Example:
    """One image as a row of the report sees it.

    Attributes:
        name: of the image.
        line: the row it was chosen for.
        base: the row that the gain is over; None where the row has none.
        groups: why it was chosen; an image may be drawn that is among the best too.
        iou: mean IoU of this image alone, by the row.
        base_iou: the same by the base.
        classes: present in the ground truth, as mask values from 1.
        photo: at its own size.
        truth: 0 background, class + 1, 255 ignored.
        stages: the row's maps, from its seed to its last refiner.
        mask: of the last stage, at the row's background score.
        base_mask: of the base, at the base's background score.
        errors: see `error_map`.
    """

    name: str
    line: str
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

    @property
    def gain(self) -> float:
        """Over the base; without one the mean IoU itself."""
        return self.iou - (self.base_iou or 0.0)


def collect_examples(  # noqa: PLR0913 - each setting is a choice of its own
    model: nn.Module,
    dataset: DataSet,
    report: Report,
    *,
    vocabulary: Vocabulary,
    photos: PhotoSettings | None = None,
    labels: LabelSource = "dataset",
    line: str | None = None,
    count: int = 12,
    rng_seed: int = 0,
) -> Iterator[Example]:
    """Run the model again on a few images of a finished benchmark.

    Images are ordered by how much their own mean IoU gains over the base of a row. Best and worst
    ones never overlap; the random ones are drawn from all, so they show what is usual. Give what
    `run` was given.

    Args:
        model: the one that was measured.
        dataset: the one it was measured on.
        report: of the benchmark.
        vocabulary: the classes measured.
        photos: how photos were read.
        labels: where image-level labels came from.
        line: name of the row to show; None takes the one that was best on the tuning split, of
            those with a base if there are any.
        count: of the best, of the worst and of the random images; fewer where there are not as
            many.
        rng_seed: fixes the random draw.

    Returns:
        Examples in the order of the report, made one at a time: they are as large as the photos.

    Raises:
        ValueError: the report has no such row, or is of another model, data set or setting.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    meter = Evaluator(model, dataset, vocabulary, photos or PhotoSettings(), labels)
    _check_same(meter, report)
    row = _find(report, line)
    base = None if row.entry.base is None else _find(report, row.entry.base.name)
    groups = _choose(row, base, count, rng_seed)
    found = (entry for entry in dataset.entries(report.split) if isinstance(entry, Sample))
    samples = {sample.name: sample for sample in found}
    lost = [report.names[index] for index in groups if report.names[index] not in samples]
    if lost:
        raise ValueError(
            f"split {report.split!r} no longer holds {', '.join(lost[:3])}; the report was made of "
            "other files: measure again"
        )

    def each() -> Iterator[Example]:
        for index, reasons in sorted(groups.items()):
            yield _example(meter, samples[report.names[index]], row, base, (index, reasons))

    return each()


def error_map(truth: Integer[Tensor, "H W"], mask: Integer[Tensor, "H W"]) -> UInt8[Tensor, "H W"]:
    """Tell how each pixel of a mask is right or wrong.

    Args:
        truth: 0 background, class + 1, 255 ignored.
        mask: the same; 255 counts as background, as in every score.

    Returns:
        0 background found, 1 hit, 2 missed, 3 false, 4 wrong class, 255 ignored.
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


def _check_same(meter: Evaluator, report: Report) -> None:
    labels = "those of the data set" if meter.labels == "dataset" else repr(meter.labels)
    facts = {
        "data set": (report.dataset, meter.dataset.root.name),
        "classes": (report.classes, ("background", *meter.vocabulary.names)),
        "photos": (report.photos, repr(meter.photos)),
        "labels": (report.labels, labels),
        "weights": (report.weights_sha256, weights_hash(meter.model)),
    }
    for name, (measured, given) in facts.items():
        if measured != given:
            raise ValueError(
                f"the report was made with other {name}: {measured}, got {given}; "
                "give what the benchmark was given"
            )


def _find(report: Report, line: str | None) -> Row:
    if line is None:
        compared = [row for row in report.rows if row.entry.base is not None]
        return max(compared or report.rows, key=lambda row: row.tuned_mean_iou)
    for row in report.rows:
        if row.name == line:
            return row
    raise ValueError(
        f"the report has no row {line!r}; it has {', '.join(row.name for row in report.rows)}"
    )


def _choose(row: Row, base: Row | None, count: int, rng_seed: int) -> dict[int, tuple[Group, ...]]:
    """Places in the report, with the reasons to show each."""
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
    meter: Evaluator,
    sample: Sample,
    row: Row,
    base: Row | None,
    chosen: tuple[int, tuple[Group, ...]],
) -> Example:
    index, groups = chosen
    picture = meter.load(sample)
    steps = stages(row.variant)
    asked = steps if base is None else (*steps, base.variant)
    maps = meter.maps(picture, tuple(dict.fromkeys(asked)))
    mask = _mask(maps[steps[-1]], picture.asked, row)
    present = [value for value in picture.truth.unique().tolist() if value not in (0, IGNORE)]
    return Example(
        name=sample.name,
        line=row.name,
        base=None if base is None else base.name,
        groups=groups,
        iou=row.image_iou[index],
        base_iou=None if base is None else base.image_iou[index],
        classes=tuple(present),
        photo=read_picture(sample.photo),
        truth=picture.truth,
        stages=tuple(Stage(_step_name(step), maps[step][0]) for step in steps),
        mask=mask,
        base_mask=None if base is None else _mask(maps[base.variant], picture.asked, base),
        errors=error_map(picture.truth, mask),
    )


def _mask(cam: Cam, asked: tuple[int, ...], row: Row) -> UInt8[Tensor, "H W"]:
    classes = torch.tensor([asked or (-1,)], dtype=torch.int64)
    return to_mask(cam, classes, background_score=row.background_score)[0]


def _step_name(step: Variant) -> str:
    """The seed, or the refiner that was applied last."""
    if not step.refine:
        return "seed"
    last = step.refine[-1]
    return getattr(last, "__name__", type(last).__name__)
