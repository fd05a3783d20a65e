"""The tables of gains in README, docs/gains.md and docs/fitting.md, made from their results.

`python benchmarks/gains.py --tables` writes them again, each between two comments.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PROPAGATED = "hybrid + balanced propagation"
SHORT = {
    "class attention": "attention of the class token",
    "gradient": "gradient of the class score in attention",
    "hybrid": "camkit's default seed, without gradients",
    PROPAGATED: "this seed, propagated along the model's attention",
    "default": "**default of `camkit.wrap`**: and a guided filter",
    f"{PROPAGATED} + DenseCRF, half size": "a dense CRF in place of the guided filter",
}
"""Rows of README's table: names in the results, and what a reader of README is told."""


def short(report: dict[str, Any]) -> str:
    """Return README's table: a few rows in plain words, with the IoU of each class."""
    rows = {row["name"]: row for row in report["rows"]}
    lines = [
        (words, _percent(rows[name]["mean_iou"]), _gain(rows[name])[0], *_classes(rows[name]))
        for name, words in SHORT.items()
    ]
    return _table(("class maps", "mIoU", "gain (95% interval)", *report["classes"]), lines)


def full(report: dict[str, Any]) -> str:
    """Return every row with its background score, gain, p and the IoU of each class."""
    columns = ("variant", "score", "tuning", "mIoU", "gain (95% interval)", "p")
    lines = [
        (
            row["name"],
            f"{row['background_score']:.2f}",
            _percent(row["tuned_mean_iou"]),
            _percent(row["mean_iou"]),
            *_gain(row),
            *_classes(row),
        )
        for row in report["rows"]
    ]
    return _table((*columns, *report["classes"]), lines)


FITS = {
    "without edges": ("without edges", "fitted, without edges"),
    "default of `camkit.wrap`": ("default", "fitted"),
    "a half-size CRF for its edges": (
        "default, a CRF for its edges",
        "fitted, a CRF for its edges",
    ),
}
"""Rows of the tables of fits: the words, the row without a fit and the row with it."""

LESS = {
    "50 photos, 10 draws": "on 50 photos, mean of ten draws (range)",
    "20 photos, 10 draws": "on 20 photos",
    "10 photos, 10 draws": "on 10 photos",
    "one column": "one column for all objects",
    "wrong labels": "with 30 % of the labels dropped and 30 % wrong ones added",
    "no labels": "without labels",
    "control: fitted on COCO": "on the 100 photos of COCO",
    "control: margins shuffled": (
        "control: each patch gets the margin of another patch of its photo"
    ),
}
"""Fits that are given less, and controls."""

OTHERS = {
    "gradients, without edges": "default of earlier versions, with gradients",
    "without edges": "without edges",
    "default": "default of `camkit.wrap`",
    "without edges, fitted on train of voc12_animals": (
        "without edges, fitted on VOC, six classes"
    ),
    "without edges, the same, one column, without the guard": (
        "the same, one column, classes unknown to the fit read all the same"
    ),
    "without edges, fitted on these photos": "without edges, fitted on these photos",
    "without edges, fitted on both": "without edges, fitted on both",
    "default, fitted on both": "default, fitted on both",
}
"""Rows on photos of COCO."""


def fits(report: dict[str, Any]) -> str:
    """Return maps without and with a fit."""
    rows = {row["name"]: row for row in report["rows"]}
    lines = [
        (words, *(_percent(rows[name]["mean_iou"]) for name in pair), _gain(rows[pair[1]])[0])
        for words, pair in FITS.items()
    ]
    return _table(("maps", "without", "fitted", "gain (95% interval)"), lines)


def fits_of_less(report: dict[str, Any]) -> str:
    """Return fits that are given less, or something wrong."""
    rows = {row["name"].removeprefix("fitted, without edges: "): row for row in report["rows"]}
    lines = [(words, _spread(rows[name]), _gain(rows[name])[0]) for name, words in LESS.items()]
    return _table(("fitted", "mIoU", "gain (95% interval)"), lines)


def fits_without_a_class(report: dict[str, Any]) -> str:
    """Return the IoU of each class without a fit, fitted without its photos, and fitted."""
    rows = {row["name"]: row for row in report["rows"]}
    columns = report["classes"][1:]
    without, whole = rows["without edges"], rows["fitted, without edges"]
    left_out = [rows[f"fitted, without edges: without {name}"] for name in columns]
    lines = [
        ("without a fit", *_classes(without)[1:]),
        (
            "fitted without its photos",
            *(_classes(row)[place + 1] for place, row in enumerate(left_out)),
        ),
        ("fitted", *_classes(whole)[1:]),
    ]
    return _table(("IoU", *columns), lines)


def fits_of_others(report: dict[str, Any]) -> str:
    """Return maps of other photos, with and without a fit."""
    rows = {row["name"]: row for row in report["rows"]}
    lines = [
        (words, _percent(rows[name]["mean_iou"]), _gain(rows[name])[0])
        for name, words in OTHERS.items()
    ]
    former = "gain over the default of earlier versions (95% interval)"
    return _table(("maps", "mIoU", former), lines)


TABLES: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("README.md", "gains in short", "gains", short),
    ("docs/index.md", "gains in short", "gains", short),
    ("docs/gains.md", "gains", "gains", full),
    ("docs/gains.md", "gains on COCO", "gains_coco", full),
    ("docs/fitting.md", "fits", "fitted", fits),
    ("docs/fitting.md", "fits of the VOC model", "fitted_voc", fits),
    ("docs/fitting.md", "fits of less", "fitted", fits_of_less),
    ("docs/fitting.md", "fits without a class", "fitted", fits_without_a_class),
    ("docs/fitting.md", "fits on COCO", "fitted_coco", fits_of_others),
)
"""The page, the name of the table, the file of results, and what makes the table."""

PAGES = tuple(dict.fromkeys(page for page, *_ in TABLES))


def with_tables(page: str, text: str) -> str:
    """Return the text of a page with its tables made anew."""
    for place, name, results, make in TABLES:
        if place == page:
            report = json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))
            text = _replaced(text, name, make(report))
    return text


def write_tables() -> None:
    """Write the tables of every page again."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


def _replaced(text: str, name: str, table: str) -> str:
    start, end = f"<!-- {name}: python benchmarks/gains.py --tables -->", f"<!-- end of {name} -->"
    found = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(found.findall(text)) != 1:
        raise ValueError(f"expected {start!r} and {end!r} once each, in this order")
    return found.sub(lambda _: f"{start}\n\n{table}\n\n{end}", text)


def _classes(row: dict[str, Any]) -> list[str]:
    return ["-" if iou is None else f"{100 * iou:.0f}" for iou in row["class_iou"]]


def _gain(row: dict[str, Any]) -> tuple[str, str]:
    gain = row["gain"]
    if gain is None:
        return "", ""
    low, high = (f"{100 * gain[end]:+.1f}" for end in ("low", "high"))
    return f"{100 * gain['gain']:+.1f} ({low} to {high})", f"{row['p_value']:.2g}"


def _spread(row: dict[str, Any]) -> str:
    """Return the mIoU, of repeats with their range."""
    if row["spread"] is None:
        return _percent(row["mean_iou"])
    low, high = (_percent(end) for end in row["spread"])
    return f"{_percent(row['mean_iou'])} ({low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))
