"""A report as text: a Markdown table for people, JSON for programs."""

import json
from dataclasses import asdict

from camkit.bench.protocol import Report, Row


def to_markdown(report: Report) -> str:
    """A table of the rows and what they mean."""
    splits = f"{report.split} ({report.images} images)"
    tuned = f"{report.tune_split} ({report.tune_images} images)"
    lines = [
        f"mIoU in % over {', '.join(report.classes)}",
        f"on {splits} of {report.dataset}. Definition: mean over the classes present in the ground",
        "truth, one confusion matrix over all images; other objects count as background.",
        "Image-level labels: those of the data set, for every image.",
        f"Background scores picked on {tuned}.",
    ]
    if report.oracle:
        lines += ["", "ORACLE: background scores were picked on images that are reported."]
    lines += [
        "",
        "| variant | background score | on tuning split | mIoU | gain (95% interval) | by class |",
        "|---|---|---|---|---|---|",
        *(_line(row) for row in report.rows),
    ]
    if report.skipped:
        lines += ["", f"{len(report.skipped)} images could not be used:"]
        lines += [f"- {reason}" for reason in report.skipped]
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> str:
    """All of the report; stages as their settings."""
    data = asdict(report)
    for row, source in zip(data["rows"], report.rows, strict=True):
        row["variant"] = {
            "name": source.variant.name,
            "seed": repr(source.variant.seed),
            "edit": repr(source.variant.edit),
            "edit_blocks": source.variant.edit_blocks,
            "refine": [repr(refiner) for refiner in source.variant.refine],
        }
        row["class_iou"] = [None if value != value else value for value in source.class_iou]
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _line(row: Row) -> str:
    gain = ""
    if row.gain is not None:
        low, high = row.gain.low * 100, row.gain.high * 100
        gain = f"{row.gain.gain * 100:+.1f} ({low:+.1f} to {high:+.1f})"
    by_class = " ".join("-" if value != value else f"{value * 100:.0f}" for value in row.class_iou)
    return (
        f"| {row.variant.name} | {row.background_score:.2f} | {row.tuned_mean_iou * 100:.1f} "
        f"| {row.mean_iou * 100:.1f} | {gain} | {by_class} |"
    )
