"""Tables of the page that are there when a report holds their figures, and the one of classes."""

from dataclasses import astuple
from typing import get_args

import torch

from camkit.bench.markup import NO_CELL, Cell, percent, points, section, table
from camkit.bench.results import Report, Row
from camkit.score import Definition, Gain, class_scores


def gain_cells(gain: Gain | None) -> tuple[Cell, Cell]:
    """A gain and its interval; dashes where there is none."""
    if gain is None:
        return NO_CELL, NO_CELL
    interval = f"{points(gain.low)} to {points(gain.high)}"
    return Cell(points(gain.gain), gain.gain), Cell(interval, gain.low)


def controls(report: Report) -> str:
    """Gains over controls."""
    lines = [
        (Cell(row.name), Cell(other.name), *gain_cells(other.gain))
        for row in report.rows
        for other in row.over_controls
    ]
    if not lines:
        return ""
    heads = ["variant", "control", "gain", "95% interval"]
    return section("controls", "Against controls", table("Gains over controls", heads, lines))


def definitions(report: Report) -> str:
    """Mean IoU by each definition, where they do not agree."""
    names = get_args(Definition)
    lines = [
        [Cell(row.name), *(percent(row.definitions[name]) for name in names)]
        for row in report.rows
        if len({round(value, 6) for value in row.definitions.values()}) > 1
    ]
    if not lines:
        return ""
    shown = table("mIoU by definition", ["variant", *names], lines)
    return section("definitions", "Definitions of mIoU", shown)


def quality(report: Report) -> str:
    """What the classifier says of the maps."""
    found = [(row, row.quality) for row in report.rows if row.quality is not None]
    if not found:
        return ""
    lines = []
    for row, quality in found:
        pairs = zip(astuple(quality.means), astuple(quality.errors), strict=True)
        cells = [Cell(f"{mean:.3f} ± {error:.3f}", mean) for mean, error in pairs]
        lines.append([Cell(row.name), *cells])
    heads = ["variant", "insertion", "deletion", "left behind"]
    told = (
        f"<p>What the classifier says of {found[0][1].maps} maps, with standard errors. Insertion: "
        "higher is better; deletion and what is left behind: lower is better.</p>"
    )
    return section("quality", "By the classifier", told + table("Without masks", heads, lines))


def outlines(report: Report) -> str:
    """Boundary IoU, where it was asked for."""
    lines = [
        [Cell(row.name), percent(row.outlines.mean_iou), *gain_cells(row.outlines.gain)]
        for row in report.rows
        if row.outlines is not None
    ]
    if not lines:
        return ""
    heads = ["variant", "boundary IoU", "gain", "95% interval"]
    return section("outlines", "Outlines", table("Boundary IoU and gains", heads, lines))


def by_class(report: Report, row: Row) -> str:
    """Every class of one row."""
    pixel_ap = (float("nan"), *row.class_precision)  # the background has no map to rank
    lines = [
        [
            Cell(score.name),
            percent(score.iou),
            percent(score.precision),
            percent(score.recall),
            percent(score.false_positives),
            percent(score.false_negatives),
            percent(ap),
            Cell(f"{score.pixels:,}", score.pixels),
        ]
        for score, ap in zip(
            class_scores(torch.tensor(row.confusion), report.classes), pixel_ap, strict=True
        )
    ]
    heads = ["class", "IoU", "precision", "recall", "FP", "FN", "pixel AP", "true pixels"]
    return table(f"By class: {row.name}", heads, lines)
