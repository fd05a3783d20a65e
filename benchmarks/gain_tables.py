"""The tables of gains in README and docs/gains.md, made from results/gains*.json.

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


TABLES: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("README.md", "gains in short", "gains", short),
    ("docs/index.md", "gains in short", "gains", short),
    ("docs/gains.md", "gains", "gains", full),
    ("docs/gains.md", "gains on COCO", "gains_coco", full),
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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))
