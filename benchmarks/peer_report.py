"""What `peers.py` measured, as JSON and as a Markdown table."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from peer_maps import METHODS, PEERS
from torch import nn

from camkit.manifest import environment, weights_hash
from camkit.score import Gain, class_iou, mean_iou

GOALS = {"alone": 8.0, "crf": 2.0}  # mIoU that camkit's best should gain over the best peer
RIVALS = {"alone": "the best peer alone", "crf": "the best peer with pydensecrf"}
HEAD = """mIoU in % over {classes}. Background scores and finalists picked on {train} images of
train of voc12_animals, recipe and background score of the CRF, and who is best, on {crf_train}
of them. {model}; image-level labels are those of the data set. ms: CPU time for all maps of an
image, one thread, mean. MiB: growth of the peak. Gains: mIoU over the best peer, with the 95%
interval of a paired bootstrap over images. {versions}.
"""
COLUMNS = ("maps", "background score", "on tuning split", "mIoU", "ms", "MiB")
COLUMNS += ("over best peer", "over best peer + pydensecrf")


def to_json(
    model: nn.Module,
    facts: dict[str, Any],
    tables: Mapping[str, Sequence[Any]],
    lead: dict[str, Any],
) -> str:
    data = {
        "environment": environment(),
        "packages": packages(),
        "weights_sha256": weights_hash(model),
        "facts": facts,
        "best_by_tuning_split": {group: name_of(key) for group, key in lead.items()},
        "settings": {name: METHODS[name].settings for name in METHODS},
        "tables": {place: [entry(row) for row in rows] for place, rows in tables.items()},
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def entry(row: Any) -> dict[str, Any]:
    total = row.confusions.sum(0)
    ious = class_iou(total).tolist()
    return {
        "name": row.name,
        "package": METHODS[row.key[0]].package,
        "crf": row.key[1],
        "background_score": row.best.threshold,
        "tuned_mean_iou": row.best.mean_iou,
        "mean_iou": float(mean_iou(total)),
        "class_iou": [None if value != value else value for value in ious],
        "ms": milliseconds(row),
        "peak_MiB": row.peak,
        "gains": {rival: asdict(gain) for rival, gain in row.gains.items()},
    }


def to_markdown(
    facts: dict[str, Any], tables: Mapping[str, Sequence[Any]], lead: dict[str, Any]
) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in packages().items())
    named = {**facts, "classes": ", ".join(facts["classes"]), "versions": versions}
    parts = [HEAD.format(**named)]
    for place, rows in tables.items():
        parts += [f"## {place}, {facts['images'][place]} images\n", table_line(COLUMNS)]
        parts += [table_line(("---",) * len(COLUMNS)), *map(line, rows)]
        parts += ["\nBest by the tuning split:\n", *verdicts(rows, lead), ""]
    settings = [f"- {name}: {METHODS[name].settings}" for name in METHODS]
    return "\n".join((*parts, "## Settings\n", *settings, ""))


def verdicts(rows: Sequence[Any], lead: dict[str, Any]) -> list[str]:
    best = next(row for row in rows if row.key == lead["camkit"])
    found = []
    for rival, words in RIVALS.items():
        gain = best.gains[rival]
        found.append(
            f"- {best.name} over {words} ({name_of(lead[rival])}): {interval(gain)}; the goal of "
            f"+{GOALS[rival]:.0f} is {reached(gain, GOALS[rival])}."
        )
    return found


def reached(gain: Gain, goal: float) -> str:
    if gain.low * 100 >= goal:
        return "reached by the whole interval"
    return "reached, but not by the whole interval" if gain.gain * 100 >= goal else "not reached"


def name_of(key: tuple[str, str | None]) -> str:
    return " + ".join(filter(None, key))


def line(row: Any) -> str:
    cells = (
        row.name,
        f"{row.best.threshold:.4g}",
        f"{row.best.mean_iou * 100:.1f}",
        f"{float(mean_iou(row.confusions.sum(0))) * 100:.1f}",
        f"{milliseconds(row):.0f}",
        f"{row.peak:.0f}",
        *("" if row.key[0] in PEERS else interval(row.gains[rival]) for rival in RIVALS),
    )
    return table_line(cells)


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def interval(gain: Gain) -> str:
    return f"{gain.gain * 100:+.1f} ({gain.low * 100:+.1f} to {gain.high * 100:+.1f})"


def milliseconds(row: Any) -> float:
    """Mean over the images that show a class asked for; 0 where none does."""
    return statistics.mean(row.seconds or [0.0]) * 1000


def packages() -> dict[str, str]:
    names = {method.package for method in METHODS.values()} - {"camkit"}
    return {name: version(name) for name in sorted(names | {"pydensecrf2", "timm", "torch"})}
