"""What `peers.py` measured, as JSON and as a Markdown table."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from peer_maps import METHODS, PEERS
from torch import nn

from camkit.manifest import environment, weights_hash
from camkit.score import Gain, class_iou, mean_iou

GOALS = {"alone": 8.0, "crf": 2.0}  # mIoU that camkit's best should gain over the best peer
RIVALS = {"alone": "the best peer alone", "crf": "the best peer with pydensecrf"}
HEAD = """mIoU in % over {classes} on val ({val} images) of voc12_animals.
Background scores and finalists picked on train ({train} images), recipe and background score of the
dense CRF, and who is best, on its first {crf_train}. {model}; image-level labels are those of the
data set. ms: CPU time for all maps of an image, one thread, mean. MiB: growth of the peak.
Gains: mIoU over the best peer, with the 95% interval of a paired bootstrap over images.
{versions}.

"""
COLUMNS = ("maps", "background score", "on tuning split", "mIoU", "ms", "MiB")
COLUMNS += ("over best peer", "over best peer + pydensecrf")


def to_json(
    model: nn.Module, facts: dict[str, Any], rows: Sequence[Any], lead: dict[str, Any]
) -> str:
    data = {
        "environment": environment(),
        "packages": packages(),
        "weights_sha256": weights_hash(model),
        "facts": facts,
        "best_by_tuning_split": {group: row.name for group, row in lead.items()},
        "rows": [
            {
                "name": row.name,
                "package": METHODS[row.key[0]].package,
                "settings": METHODS[row.key[0]].settings,
                "crf": row.key[1],
                "background_score": row.best.threshold,
                "tuned_mean_iou": row.best.mean_iou,
                "mean_iou": float(mean_iou(row.confusions.sum(0))),
                "class_iou": [
                    None if value != value else value
                    for value in class_iou(row.confusions.sum(0)).tolist()
                ],
                "ms": milliseconds(row),
                "peak_MiB": row.peak,
                "gains": {rival: asdict(gain) for rival, gain in row.gains.items()},
            }
            for row in rows
        ],
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def to_markdown(facts: dict[str, Any], rows: Sequence[Any], lead: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in packages().items())
    named = {**facts, "classes": ", ".join(facts["classes"]), "versions": versions}
    best = lead["camkit"]
    verdicts = []
    for rival, words in RIVALS.items():
        gain = best.gains[rival]
        reached = "reached" if gain.gain * 100 >= GOALS[rival] else "not reached"
        verdicts.append(
            f"- {best.name} over {words} ({lead[rival].name}): {interval(gain)}; the goal of "
            f"+{GOALS[rival]:.0f} is {reached}."
        )
    settings = [f"- {name}: {METHODS[name].settings}" for name in METHODS]
    return "\n".join(
        (
            HEAD.format(**named) + table_line(COLUMNS),
            table_line(("---",) * len(COLUMNS)),
            *map(line, rows),
            "\nBest by the tuning split:\n",
            *verdicts,
            "\nSettings:\n",
            *settings,
            "",
        )
    )


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
    return statistics.mean(row.seconds) * 1000


def packages() -> dict[str, str]:
    names = {method.package for method in METHODS.values()} - {"camkit"}
    return {name: version(name) for name in sorted(names | {"pydensecrf2", "timm", "torch"})}
