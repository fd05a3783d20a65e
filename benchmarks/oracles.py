"""Where the default loses its points: what oracles that read the masks reach, and kinds of errors.

    CAMKIT_DATA=folder python benchmarks/oracles.py

ViT-Ti with its ImageNet classifier. Background scores are picked on the first images of `train` of
voc12_animals, figures come from the next ones; `val` is not read, and photos with drawn boxes are
left out. Each row is analysed as by `camkit bench --oracles`. `oracle_ladder.md` is an excerpt for
docs/benchmark.md.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tables import BEFORE, CRF, RESULTS, measure_halves, write

from camkit.bench import Variant, to_json
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.method import CALIBRATED, DEFAULT_REFINE, WITHOUT_EDGES

KINDS = {
    "background as class": "false",
    "class as background": "missed",
    "class as another": "wrong_class",
    "within 10 pixels of an outline": "near_outline",
}


def variants() -> list[Variant]:
    seed = Variant("seed", replace(CALIBRATED.method, refine=()))
    spread = Variant("propagated", replace(seed.method, refine=WITHOUT_EDGES), base=seed)
    sharp = replace(spread.method, refine=(*WITHOUT_EDGES, *CRF))
    return [
        seed,
        spread,
        Variant("default", replace(seed.method, refine=DEFAULT_REFINE), base=spread),
        Variant("propagated + DenseCRF, half size", sharp, base=spread),
        Variant("gradients, propagated", BEFORE, base=spread),
    ]


def ladder(found: dict[str, Any]) -> str:
    """The oracles of all rows side by side, then the shares of all wrong pixels of each row."""
    rows = found["rows"]
    by_row = [{o["name"]: o["mean_iou"] for o in row["analysis"]["oracles"]} for row in rows]
    names = max(by_row, key=len)  # rows without refiners have fewer
    cells = [["mIoU", *(row["name"] for row in rows)], ["measured", *_percent(rows)]]
    for name in names:
        title = name.replace("mean of the ", "").partition(" in each")[0]
        reached = [oracles.get(name) for oracles in by_row]
        cells.append([title, *("-" if iou is None else f"{100 * iou:.1f}" for iou in reached)])
    kinds = [["wrong pixels", *KINDS]]
    for row in rows:
        errors = row["analysis"]["errors"][0]
        kinds.append([row["name"], *(f"{100 * errors[kind]:.0f} %" for kind in KINDS.values())])
    return f"{_markdown(cells)}\n\n{_markdown(kinds)}\n"


def _percent(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{100 * row['mean_iou']:.1f}" for row in rows]


def _markdown(cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|" + len(cells[0]) * "---|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=120, help="in each part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    opened = open_model(DEFAULT_MODEL)
    report = measure_halves(opened, variants(), options.images, oracles=True)
    write(report, options, "oracles")
    (options.out / "oracle_ladder.md").write_text(ladder(json.loads(to_json(report))))


if __name__ == "__main__":
    main()
