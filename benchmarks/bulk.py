"""Bulk runs measured: rates of the stages and of the whole, fifty kills, memory over many images.

    python benchmarks/bulk.py kills memory rates [--data VOC_FOLDER]

Each part replaces its own entry in benchmarks/results/bulk.json, and bulk.md is made of all. Rates:
each stage is run alone on one core, and again while the other core does the other side's work; then
the whole, the model on one core and a worker on the other, with a dense CRF and without. Where the
machine is busy with other things, the seconds in which a thread stood ready to run, but the system
ran something else, are counted (/proc/PID/task/TID/schedstat) and left out, in all alike.
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
    cpu,
    link_photos,
    made_in,
    recipe,
    resident,
    tree,
    watched,
    workers_of,
)
from torch import nn

from camkit.bulk.recipe import Recipe
from camkit.bulk.running import run
from camkit.bulk.sources import PhotoFolder
from camkit.cli.run import TimmModel
from camkit.data import write_shapes
from camkit.method import Method

# Kills


@cache
def opened(model: TimmModel) -> nn.Module:
    return model()


@dataclass(frozen=True)
class CachedModel:
    """Opens a model once, so that forked processes share it and kills hit the work."""

    model: TimmModel

    def __call__(self) -> nn.Module:
        return opened(self.model)


def kill_parents(
    made: Recipe, source: PhotoFolder, out: Path, count: int, seconds: float, luck: random.Random
) -> int:
    """Begin a run and kill it, so many times: one in five while it begins, the others at work."""
    for number in range(count):
        done = made_in(out)
        child = os.fork()
        if not child:
            try:
                run(made, source, out, workers=int(number % 5 == 4), threads=1)
            finally:  # nothing of this function is the child's to tidy up
                os._exit(0)
        if number % 5:
            until = time.monotonic() + 120
            while made_in(out) <= done and time.monotonic() < until:
                time.sleep(0.02)
        time.sleep(luck.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            raise SystemExit(f"the run was done after {number} kills; take more --images")
    return count


def kills(photos: list[Path], work: Path, images: int = 500, count: int = 50) -> dict[str, Any]:
    """Half the kills are of the parent, half of a worker; compared with a run undisturbed.

    One kill in five comes while a process may still begin, the others when it has done something.
    """
    del photos  # drawn ones take less time
    made = recipe(64, crf=False)
    writing = replace(made.writing, cams="npz")
    model, method = CachedModel(TimmModel(MODEL, 64)), Method(refine=())
    made = replace(made, model=model, method=method, writing=writing)
    write_shapes(work / "in", images)
    source = PhotoFolder(work / "in" / "JPEGImages")
    start = time.monotonic()
    run(made, source, work / "whole", workers=0, threads=1)
    alone = time.monotonic() - start
    luck, out = random.Random(9), work / "killed"
    parents = kill_parents(made, source, out, count // 2, alone / count, luck)
    done_then, workers = made_in(out), 0
    seen = done_then

    def kill() -> None:
        nonlocal workers, seen
        if workers % 5 and made_in(out) == seen:
            return
        time.sleep(luck.uniform(0, 1))
        if parents + workers < count and (living := workers_of(os.getpid())):
            seen = made_in(out)
            os.kill(luck.choice(living), signal.SIGKILL)
            workers += 1

    with watched(0.2, kill):
        ran = run(made, source, out, workers=2, threads=1)
    same = tree(out) == tree(work / "whole")
    lines = [json.loads(line)["key"] for line in (out / "manifest.jsonl").open()]
    return {
        "images": images,
        "parents_killed": parents,
        "workers_killed": workers,
        "done_before_the_last_start": done_then,
        "written_by_the_last_start": ran.written,
        "failed": ran.failed,
        "files_identical": same,
        "lines": len(lines),
        "keys": len(set(lines)),
    }


# Memory


def memory(photos: list[Path], work: Path, images: int = 5000, size: int = 64) -> dict[str, Any]:
    """Resident memory of all processes, from the first images to the last."""
    method = Method(refine=())  # the less time an image takes, the better
    made = replace(recipe(size, crf=False), method=method)
    source = link_photos(work / "in", photos, images)
    series: list[tuple[int, int, int]] = []
    model = made.model()
    weights = sum(one.numel() * one.element_size() for one in model.parameters()) / 2**20
    loaded = resident(os.getpid())

    def look() -> None:
        others = sum(map(resident, below(os.getpid())))
        series.append((made_in(work / "out"), resident(os.getpid()), others))

    with watched(2, look):
        run(made, source, work / "out", workers=1, threads=1)
    steps = [next(one for one in series if one[0] >= images * part / 20) for part in range(1, 20)]
    early = [sum(one[1:]) for one in series if images * 0.1 <= one[0] < images * 0.3]
    late = [sum(one[1:]) for one in series if images * 0.8 <= one[0]]
    return {
        "images": images,
        "size": size,
        "weights_mib": weights,
        "parent_with_model_before_mib": loaded,
        "done_parent_others_mib": steps,
        "mean_mib_from_10_to_30_percent": mean(early),
        "mean_mib_from_80_percent": mean(late),
        "peak_mib": max(one[1] + one[2] for one in series),
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
            found = parts[name](photos, Path(work), **settings)
        kept = json.loads(path.read_text()) if path.exists() else {}
        machine = {"torch": torch.__version__, "python": platform.python_version()}
        machine |= {"cpu": cpu(), "cores": os.cpu_count()}
        fewer = "" if options.images is None else f" --images {options.images}"
        command = f"python benchmarks/bulk.py {name}{fewer}"
        kept[name] = found | {"command": command, "machine": machine}
        path.write_text(json.dumps(kept, indent=1) + "\n")
        (options.out / "bulk.md").write_text(report(kept))


if __name__ == "__main__":
    main()
