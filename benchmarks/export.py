"""What exporting 100,000 annotations costs: seconds of one core, and memory.

    python benchmarks/export.py

Masks of 375x500 pixels with 20 drawn objects of 6 classes each, half of them with a hole, read from
PNG files and written in every format as connected components, without photos. Each export runs in
a process of its own with one thread. Seconds are CPU time of that process from the call of `export`
to its return. Memory is the growth of the peak resident size over the same call (`VmHWM`, Linux),
for the whole set and for its tenth: it is flat if both are alike.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from watching import RESULTS, _peak

from camkit.data import TARGETS, ExportOptions, export
from camkit.manifest import environment
from camkit.paint import save_mask

ROWS, COLUMNS = 375, 500
OBJECTS = 20
CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")


def draw(number: int) -> np.ndarray:
    """Draw ellipses in the cells of a grid, so that none touches another."""
    rng = np.random.default_rng(number)
    mask = np.zeros((ROWS, COLUMNS), np.uint8)
    for place in range(OBJECTS):
        centre = (50 + 100 * (place % 5), 46 + 93 * (place // 5))
        axes = rng.integers(12, 45, 2).tolist()
        value = int(rng.integers(1, len(CLASSES) + 1))
        cv2.ellipse(mask, centre, axes, int(rng.integers(0, 180)), 0, 360, value, -1)
        if place % 2:
            cv2.circle(mask, centre, 5, 0, -1)
    return mask


def measure(to: str, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        options = ExportOptions(photos="none", regions="component")
        # what is imported and allocated once
        export(folder / "few", to, Path(out) / "few", classes=CLASSES, options=options)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        before, start = _peak(), time.process_time()
        summary = export(folder / "masks", to, Path(out) / "all", classes=CLASSES, options=options)
        seconds = time.process_time() - start
        files = [path for path in (Path(out) / "all").rglob("*") if path.is_file()]
        return {
            "annotations": summary.annotations,
            "seconds": round(seconds, 1),
            "growth_MiB": round(_peak() - before, 1),
            "written_MB": round(sum(path.stat().st_size for path in files) / 1e6, 1),
            "lost_share": round((summary.missed + summary.added) / max(summary.area, 1), 5),
        }


def apart(to: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", to, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def write_masks(folder: Path, count: int) -> None:
    for name, number in (("few", 20), ("masks", count)):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            save_mask(draw(index), folder / name / f"{index:06d}.png")


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| format | CPU seconds | memory, MiB | memory for a tenth, MiB | written, MB | lost |",
        "|---|---|---|---|---|---|",
    ]
    for to, row in rows.items():
        whole, tenth = row["whole"], row["tenth"]
        cells = (
            *(f"`{to}`", f"{whole['seconds']:.1f}", f"{whole['growth_MiB']:.1f}"),
            *(f"{tenth['growth_MiB']:.1f}", f"{whole['written_MB']:.0f}"),
            f"{whole['lost_share']:.2%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(result: dict) -> str:
    images = result["images"]
    return (
        f"{images * OBJECTS:,} annotations in {images:,} masks of {ROWS}x{COLUMNS} pixels, one "
        f"thread, photos left out.\n\n{table(result['formats'])}\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", type=int, default=100_000)
    parser.add_argument("--formats", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        sys.exit()
    images = options.annotations // OBJECTS
    with tempfile.TemporaryDirectory() as place:
        sizes = {"whole": images, "tenth": images // 10}
        for name, number in sizes.items():
            write_masks(Path(place) / name, number)
        rows = {
            to: {name: apart(to, Path(place) / name) for name in sizes} for to in options.formats
        }
    result = {
        "environment": environment(),
        "images": images,
        "size": [ROWS, COLUMNS],
        "objects": OBJECTS,
        "formats": rows,
    }
    path = RESULTS / "export.json"
    if path.is_file():  # rows of formats that were not asked for, if they are of as many masks
        before = json.loads(path.read_text())
        if before["images"] == images:
            result["formats"] = {
                to: (before["formats"] | rows)[to]
                for to in TARGETS
                if to in before["formats"] or to in rows
            }
    path.write_text(json.dumps(result, indent=2) + "\n")
    text = page(result)
    (RESULTS / "export.md").write_text(text)
    print(text)
