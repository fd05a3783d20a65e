"""What a benchmark says: rows, comparisons, report; as Markdown for people, JSON for programs."""

import json
from dataclasses import asdict, astuple, dataclass
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


def to_markdown(report: Report) -> str:
    """A table of the rows and what they mean."""
    splits = f"{report.split} ({report.images} images)"
    tuned = f"{report.tune_split} ({report.tune_images} images)"
    lines = [
        f"mIoU in % over {', '.join(report.classes)}",
        f"on {splits} of {report.dataset}. Definition: mean over the classes present in the ground",
        "truth, one confusion matrix over all images; other objects count as background.",
        f"Image-level labels: {report.labels}, for every image.",
        f"Background scores and choices picked on {tuned}. Gains: 95% intervals of a paired",
        "bootstrap over images; p is two-sided, corrected for all gains of the table (Holm).",
    ]
    if report.oracle:
        lines += ["", "ORACLE: background scores were picked on images that are reported."]
    lines += [
        "",
        "| variant | background score | on tuning split | mIoU | gain (95% interval) | p "
        "| by class |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in report.rows),
    ]
    lines += _against_controls(report) + _other_definitions(report)
    lines += _outlines(report) + _qualities(report)
    if report.skipped:
        lines += ["", f"{len(report.skipped)} images could not be used:"]
        lines += [f"- {reason}" for reason in report.skipped]
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    """All of the report; stages as their settings."""
    data = {name: getattr(report, name) for name in Report.__dataclass_fields__}
    data["images"] = report.images
    data["rows"] = [_row(row) for row in report.rows]
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    data = {name: getattr(row, name) for name in Row.__dataclass_fields__ if name != "entry"}
    data["name"], data["kind"] = row.name, type(row.entry).__name__
    data["variant"] = _variant(row.variant)
    data["variants"] = [_variant(variant) for variant in row.entry.variants]
    data["gain"] = None if row.gain is None else vars(row.gain)
    data["over_controls"] = [{"name": c.name, **vars(c.gain)} for c in row.over_controls]
    data["outlines"] = None if row.outlines is None else asdict(row.outlines)
    data["quality"] = None if row.quality is None else asdict(row.quality)
    return {name: _without_nan(value) for name, value in data.items()}


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what has no figure is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "seed": repr(variant.seed),
        "edit": repr(variant.edit),
        "edit_blocks": variant.edit_blocks,
        "views": repr(variant.views),
        "refine": [repr(refiner) for refiner in variant.refine],
    }


def _line(row: Row) -> str:
    picked = "" if row.name == row.variant.name or row.spread else f": {row.variant.name}"
    spread = "" if row.spread is None else " ({:.1f} to {:.1f})".format(*_percent(*row.spread))
    gain = "" if row.gain is None else _gain(row.gain)
    chance = "" if row.p_value is None else f"{row.p_value:.2g}"
    by_class = " ".join("-" if value != value else f"{value * 100:.0f}" for value in row.class_iou)
    return (
        f"| {row.name}{picked} | {row.background_score:.2f} | {row.tuned_mean_iou * 100:.1f} "
        f"| {row.mean_iou * 100:.1f}{spread} | {gain} | {chance} | {by_class} |"
    )


def _gain(gain: Gain) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*_percent(gain.gain, gain.low, gain.high))


def _against_controls(report: Report) -> list[str]:
    found = [(row, other) for row in report.rows for other in row.over_controls]
    if not found:
        return []
    lines = ["", "| against its controls | control | gain (95% interval) |", "|---|---|---|"]
    return lines + [f"| {row.name} | {o.name} | {_gain(o.gain)} |" for row, o in found]


def _other_definitions(report: Report) -> list[str]:
    """The other definitions of mean IoU, where they say something else."""
    differing = [
        row
        for row in report.rows
        if len({round(value, 6) for value in row.definitions.values()}) > 1
    ]
    if not differing:
        return []
    names = list(differing[0].definitions)
    lines = ["", f"| by definition | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in differing:
        values = " | ".join(f"{row.definitions[name] * 100:.1f}" for name in names)
        lines.append(f"| {row.name} | {values} |")
    return lines


def _outlines(report: Report) -> list[str]:
    """Boundary IoU, where it was asked for."""
    found = [(row, row.outlines) for row in report.rows if row.outlines is not None]
    if not found:
        return []
    lines = ["", "| outlines | boundary IoU | gain (95% interval) |", "|---|---|---|"]
    for row, outlines in found:
        gain = "" if outlines.gain is None else _gain(outlines.gain)
        lines.append(f"| {row.name} | {outlines.mean_iou * 100:.1f} | {gain} |")
    return lines


def _qualities(report: Report) -> list[str]:
    """What the classifier says of the maps."""
    found = [(row, row.quality) for row in report.rows if row.quality is not None]
    if not found:
        return []
    lines = [
        "",
        f"By the classifier, over {found[0][1].maps} maps, with standard errors: insertion (higher",
        "is better), deletion and what is left behind (lower is better).",
        "",
        "| variant | insertion | deletion | left behind |",
        "|---|---|---|---|",
    ]
    for row, quality in found:
        pairs = zip(astuple(quality.means), astuple(quality.errors), strict=True)
        lines.append(f"| {row.name} | {' | '.join(f'{m:.3f} ± {e:.3f}' for m, e in pairs)} |")
    return lines


def _percent(*values: float) -> list[float]:
    return [value * 100 for value in values]
