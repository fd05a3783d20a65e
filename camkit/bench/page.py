"""A report as one HTML file with tables, plots and pictures that needs no network."""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.resources import files

import torch

from camkit.bench.confusions import confusion_table
from camkit.bench.examples import Example
from camkit.bench.figures import classes_plot, curves_plot, legend
from camkit.bench.gallery import show_examples
from camkit.bench.markup import (
    INTERVAL,
    NO_CELL,
    Cell,
    Head,
    bullets,
    extra_tables,
    facts,
    gain_cells,
    html_table,
    percent,
    scrolled,
    section,
    select,
    text,
)
from camkit.bench.results import Report
from camkit.printing import several
from camkit.score import FEW_IMAGES, class_scores, few_images


def to_html(report: Report, examples: Iterable[Example] = ()) -> str:
    """Return a report as one HTML page that opens from disk.

    Args:
        report: of a finished benchmark.
        examples: images to show, see `collect_examples`; taken one at a time.

    Raises:
        CamkitError: matplotlib is not installed.
    """
    parts = [("summary", "Summary", _summary(report))]
    for table in extra_tables(report):
        note = f"<p>{text(table.note)}</p>" if table.note else ""
        figures = html_table(table.caption, table.heads, table.rows)
        parts.append((table.key, table.title, note + figures))
    parts.append(("curves", "Background scores", _curves(report)))
    parts.append(("classes", "Classes", _classes(report)))
    if shown := show_examples(report, examples):
        parts.append(("gallery", "Examples", shown))
    parts.append(("settings", "Settings", _settings(report)))
    sections = [section(*part) for part in parts]
    template = files("camkit.bench").joinpath("page.html").read_text(encoding="utf-8")
    # the hash allows the browser to run this script and no other
    script = template.partition("<script>")[2].partition("</script>")[0]
    texts = {
        "title": text(f"camkit benchmark: {report.dataset}, {report.split}"),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "content": "\n".join((_about(report, parts), *sections)),
    }
    # in one pass, so that braces within a name are not replaced
    return re.sub(r"\{\{(\w+)\}\}", lambda match: texts[match[1]], template)


def _about(report: Report, parts: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<li><a href="#{key}">{text(title)}</a></li>' for key, title, _ in parts)
    about = (
        f"<header><h1>{text(report.dataset)}</h1>"
        f"<p>{several(len(report.rows), 'variant')} measured on "
        f"{several(report.images, 'image')}.</p>"
        f'{_lead(report)}</header><nav aria-label="Sections"><ul>{links}</ul></nav>'
    )
    if report.oracle:
        about += (
            '<p class="warning"><strong>ORACLE</strong> Background scores were picked on images '
            "that are also reported, so these figures are too high for new images.</p>"
        )
    if few := _few_images(report):
        about += f'<p class="warning"><strong>FEW IMAGES</strong> {text(few)}</p>'
    for warning in report.warnings:
        if warning != few_images(report.images):  # said above, with the tuning split
            about += f'<p class="warning"><strong>WARNING</strong> {text(warning)}.</p>'
    tuned = f"{report.tune_split} ({several(report.tune_images, 'image')})"
    about += facts(
        {
            "Figures from": f"{report.split} ({several(report.images, 'image')})",
            "Background scores and choices from": tuned,
            "Classes": ", ".join(report.classes),
            "Image-level labels": f"{report.labels}, for every image",
            "mIoU": "mean over the classes present in the ground truth, one confusion matrix over "
            "all images; other objects count as background, in %",
            "Gains": "over the base of each row, in points of mIoU, with 95% intervals of a paired "
            "bootstrap over images; p is two-sided, corrected for all gains (Holm)",
        }
    )
    if report.skipped:
        summary = f"{several(len(report.skipped), 'image')} could not be used"
        about += f"<details open><summary>{summary}</summary>{bullets(report.skipped)}</details>"
    return about


def _few_images(report: Report) -> str:
    """Return a warning if a split of the report has fewer than `FEW_IMAGES` images, else ""."""
    few = []
    if report.images < FEW_IMAGES:
        few.append(
            f"figures, intervals and p come from {several(report.images, 'image')} of "
            f"{report.split}, and other images may give quite different ones"
        )
    if report.tune_images < FEW_IMAGES:
        few.append(
            f"background scores and choices come from {several(report.tune_images, 'image')} of "
            f"{report.tune_split}, and may be far from the best"
        )
    if not few:
        return ""
    warning = "; ".join(few)
    return f"{warning[0].upper()}{warning[1:]}. Use at least {FEW_IMAGES} images."


def _lead(report: Report) -> str:
    """Return the figure of the row that the tuning split chooses."""
    row = max(report.rows, key=lambda row: row.tuned_mean_iou)
    lead = f"<strong>{row.mean_iou * 100:.1f}</strong> mIoU by <b>{text(row.name)}</b>"
    if row.gain is not None and row.entry.base is not None:
        difference, interval = gain_cells(row.gain)
        lead += f", {difference.shown} ({interval.shown}) over {text(row.entry.base.name)}"
    return f'<p class="lead">{lead}; the best variant on {text(report.tune_split)}.</p>'


def _summary(report: Report) -> str:
    repeated = any(row.spread is not None for row in report.rows)
    mean: str | Head = Head("mIoU", ("mean", "lowest", "highest")) if repeated else "mIoU"
    heads = ["variant", mean, "gain", INTERVAL, "p", "chance of a loss"]
    heads += ["background score", f"mIoU on {report.tune_split}", "mean over all scores"]
    lines = []
    for row in report.rows:
        notes = []
        if row.spread is not None:
            notes.append("{:.1f} to {:.1f}".format(*(100 * share for share in row.spread)))
        elif row.name != row.variant.name:
            notes.append(f"picked: {row.variant.name}")
        if row.entry.base is not None:
            notes.append(f"over {row.entry.base.name}")
        lines.append(
            [
                Cell(row.name, note=", ".join(notes)),
                replace(percent(row.mean_iou), more=row.spread or ()),
                *gain_cells(row.gain),
                NO_CELL if row.p_value is None else Cell(f"{row.p_value:.2g}", row.p_value),
                percent(None if row.gain is None else row.gain.chance_below_zero),
                Cell(f"{row.background_score:.2f}", row.background_score),
                percent(row.tuned_mean_iou),
                percent(row.area),
            ]
        )
    return html_table("mIoU and gains", heads, lines)


def _curves(report: Report) -> str:
    return (
        f"<p>mIoU on {text(report.tune_split)}; a dot marks the score that was picked.</p>"
        f"{scrolled('Plot over background scores', curves_plot(report))}"
        f"{legend(report, report.rows)}"
    )


def _classes(report: Report) -> str:
    by_name = {row.name: row for row in report.rows}
    heads = ["class", "IoU", "precision", "recall", "FP", "FN", "pixel AP", "true pixels"]
    blocks = []
    for index, row in enumerate(report.rows):
        base = None if row.entry.base is None else by_name[row.entry.base.name]
        plot = classes_plot(report, row, base) + legend(report, [row, base] if base else [row])
        lines = []
        pixel_ap = (math.nan, *row.class_precision)  # the background has no map to rank
        scores = class_scores(torch.tensor(row.confusion), report.classes)
        for score, ap in zip(scores, pixel_ap, strict=True):
            errors = (score.false_positives, score.false_negatives)
            shares = map(percent, (score.iou, score.precision, score.recall, *errors, ap))
            pixels = Cell(f"{score.pixels:,}", score.pixels)
            lines.append([Cell(score.name), *shares, pixels])
        figures = html_table(f"By class: {row.name}", heads, lines)
        blocks.append(
            f'<div class="row" data-row="{index}"><h3>{text(row.name)}</h3><div class="pair">'
            f"<div>{plot}</div>{figures}</div>{confusion_table(report, row)}</div>"
        )
    first = max(report.rows, key=lambda row: row.tuned_mean_iou)
    names = {str(index): row.name for index, row in enumerate(report.rows)}
    picker = select("row", names, str(report.rows.index(first)))
    return f'<form class="controls"><label>Variant {picker}</label></form>{"".join(blocks)}'


def _settings(report: Report) -> str:
    content = facts(
        {"photos": report.photos, "weights, SHA-256": report.weights_sha256} | report.environment
    )
    for row in report.rows:
        lines = []
        for variant in row.entry.variants:
            method = variant.method
            steps = " → ".join(repr(stage) for stage in (method.seed, *method.refine))
            if method.views:
                steps = f"{method.views!r}, {steps}"
            if method.edit is not None:
                steps = f"{method.edit!r} (blocks: {method.edit_blocks}), {steps}"
            lines.append(f"{variant.name}: {steps}")
        content += f"<details><summary>{text(row.name)}</summary>{bullets(lines)}</details>"
    return content
