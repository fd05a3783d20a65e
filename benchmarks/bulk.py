"""Measurements of bulk runs: rates of the stages and of the whole, fifty kills, memory.

    python benchmarks/bulk.py kills memory rates [--data VOC_FOLDER]

Each part replaces its entry in benchmarks/results/bulk.json; bulk.md shows all entries. Rates: each
stage runs alone on one core, and again while the other core does the work of the other side; then
the whole run, the model on one core and a worker on the other, with a dense CRF and without. If the
machine is busy, the seconds in which a thread waited for a core (/proc/PID/task/TID/schedstat) are
left out of all figures.
"""

import argparse
import json
import os
import platform
import random
import signal
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bulk_rates import rates
from bulk_report import report
from bulk_setting import (
    MODEL,
    RESULTS,
    below,
    bulk_recipe,
    count_masks,
    cpu,
    link_photos,
    resident,
    tree,
    watched,
    workers_of,
)
from torch import nn

from camkit.bulk.recipe import Recipe
from camkit.bulk.running import run
from camkit.bulk.sources import PhotoFolder
from camkit.cli.models import ModelSource
from camkit.data import write_shapes
from camkit.method import Method

# Kills


@cache
def opened(model: ModelSource) -> nn.Module:
    return model()


@dataclass(frozen=True)
class CachedModel:
    """Opens a model once, so that forked processes share it and kills hit the work."""

    model: ModelSource

    def __call__(self) -> nn.Module:
        return opened(self.model)


def kill_parents(
    recipe: Recipe, source: PhotoFolder, out: Path, count: int, seconds: float, rng: random.Random
) -> int:
    """Start a run and kill it ``count`` times: one in five at its start, the others at work."""
    for number in range(count):
        done = count_masks(out)
        child = os.fork()
        if not child:
            try:
                run(recipe, source, out, workers=int(number % 5 == 4), threads=1)
            finally:  # the child must not clean up for this process
                os._exit(0)
        if number % 5:
            until = time.monotonic() + 120
            while count_masks(out) <= done and time.monotonic() < until:
                time.sleep(0.02)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            raise SystemExit(f"the run was done after {number} kills; take more --images")
    return count


def kills(photos: list[Path], work: Path, images: int = 500, count: int = 50) -> dict[str, Any]:
    """Kill the parent and the workers, half each, and compare with an undisturbed run.

    One kill in five comes while a process may still be starting, the others after a result.
    """
    del photos  # drawn ones take less time
    recipe = bulk_recipe(64, crf=False)
    writing = replace(recipe.writing, cams="npz")
    model, method = CachedModel(ModelSource(MODEL)), Method(refine=())
    recipe = replace(recipe, model=model, method=method, writing=writing)
    write_shapes(work / "in", images)
    source = PhotoFolder(work / "in" / "JPEGImages")
    start = time.monotonic()
    run(recipe, source, work / "whole", workers=0, threads=1)
    alone = time.monotonic() - start
    rng, out = random.Random(9), work / "killed"
    parents = kill_parents(recipe, source, out, count // 2, alone / count, rng)
    done_before, workers = count_masks(out), 0
    seen = done_before

    def kill() -> None:
        nonlocal workers, seen
        if workers % 5 and count_masks(out) == seen:
            return
        time.sleep(rng.uniform(0, 1))
        if parents + workers < count and (living := workers_of(os.getpid())):
            seen = count_masks(out)
            os.kill(rng.choice(living), signal.SIGKILL)
            workers += 1

    with watched(0.2, kill):
        summary = run(recipe, source, out, workers=2, threads=1)
    same = tree(out) == tree(work / "whole")
    lines = [json.loads(line)["key"] for line in (out / "manifest.jsonl").open()]
    return {
        "images": images,
        "parents_killed": parents,
        "workers_killed": workers,
        "done_before_the_last_start": done_before,
        "written_by_the_last_start": summary.written,
        "failed": summary.failed,
        "files_identical": same,
        "lines": len(lines),
        "keys": len(set(lines)),
    }


# Memory


def memory(photos: list[Path], work: Path, images: int = 5000, size: int = 64) -> dict[str, Any]:
    """Return resident memory of all processes, from the first images to the last."""
    method = Method(refine=())  # the less time an image takes, the better
    recipe = replace(bulk_recipe(size, crf=False), method=method)
    source = link_photos(work / "in", photos, images)
    series: list[tuple[int, int, int]] = []
    model = recipe.model()
    weights = sum(weight.nbytes for weight in model.parameters()) / 2**20
    loaded = resident(os.getpid())

    def measure() -> None:
        others = sum(map(resident, below(os.getpid())))
        series.append((count_masks(work / "out"), resident(os.getpid()), others))

    with watched(2, measure):
        run(recipe, source, work / "out", workers=1, threads=1)
    steps = [
        next(entry for entry in series if entry[0] >= images * part / 20) for part in range(1, 20)
    ]
    early = [sum(entry[1:]) for entry in series if images * 0.1 <= entry[0] < images * 0.3]
    late = [sum(entry[1:]) for entry in series if images * 0.8 <= entry[0]]
    return {
        "images": images,
        "size": size,
        "weights_mib": weights,
        "parent_with_model_before_mib": loaded,
        "done_parent_others_mib": steps,
        "mean_mib_from_10_to_30_percent": mean(early),
        "mean_mib_from_80_percent": mean(late),
        "peak_mib": max(entry[1] + entry[2] for entry in series),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"kills": kills, "memory": memory, "rates": rates}
    parser.add_argument("parts", nargs="+", choices=parts)
    default = Path(os.environ.get("CAMKIT_DATA", ".")) / "voc12_animals"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--images", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = sorted((options.data / "JPEGImages").glob("*.jpg"))
    path = options.out / "bulk.json"
    for name in options.parts:
        with tempfile.TemporaryDirectory() as work:
            settings = {} if options.images is None else {"images": options.images}
            results = parts[name](photos, Path(work), **settings)
        report_parts = json.loads(path.read_text()) if path.exists() else {}
        machine = {"torch": torch.__version__, "python": platform.python_version()}
        machine |= {"cpu": cpu(), "cores": os.cpu_count()}
        fewer = "" if options.images is None else f" --images {options.images}"
        command = f"python benchmarks/bulk.py {name}{fewer}"
        report_parts[name] = results | {"command": command, "machine": machine}
        path.write_text(json.dumps(report_parts, indent=1) + "\n")
        (options.out / "bulk.md").write_text(report(report_parts))


if __name__ == "__main__":
    main()
