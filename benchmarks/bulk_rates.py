"""How fast the stages of a bulk run are alone, and how fast the whole is; a part of bulk.py.

The slower side's own rate is measured twice. Alone: on a core of its own, the other core idle.
Beside: a process on the other core does the other side's work meanwhile, at the rate it has in the
run, but nothing connects the two. Two busy cores may slow each other; what the whole run takes
longer than that is what the pipeline costs. Where the machine's speed drifts from minute to minute
neither says much, and which side is the slower one may change; the share of the whole run in which
the busier side was at work, and waited for nothing, is of one and the same run.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from bulk_setting import link_photos, made_in, recipe, scheduled, undisturbed, watched, workers_of
from torch import Tensor

from camkit.bulk.finishing import OutFolder, finish
from camkit.bulk.items import Item
from camkit.bulk.recipe import Recipe
from camkit.bulk.running import run
from camkit.bulk.sources import PhotoFolder
from camkit.bulk.stages import Maps, ReadImage, batches, chunks, forward, read
from camkit.capture import Capture
from camkit.refiners import Chain, Refiner

WORKER = ("read", "refine", "write")


class Spent:
    """Seconds by stage, on the clock that leaves others out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = undisturbed()
        found = call(*arguments)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + undisturbed() - start
        return found


@dataclass(frozen=True)
class Timed:
    """A refiner whose seconds are counted."""

    refiner: Refiner
    spent: Spent

    def __call__(self, cam: Tensor, capture: Capture) -> Tensor:
        found: Tensor = self.spent.time("refine", self.refiner, cam, capture)
        return found


def stages_alone(
    made: Recipe, source: PhotoFolder, folder: OutFolder
) -> tuple[dict[str, float], dict[str, float], list[list[int]]]:
    """Seconds and bytes an image, stage by stage, in this thread; sizes of the batches by chunk."""
    pipeline = made.pipeline(made.model())
    spent, sizes, formed = Spent(), list[dict[str, int]](), list[list[int]]()
    refiners = Chain(made.writing.finish)
    writing = replace(made.writing, finish=(Timed(refiners, spent),))
    for number, chunk in enumerate(chunks(source, made.chunk)):
        if number == 1:
            spent.seconds.clear()  # the first chunk warms up
            sizes.clear()
        items = [one for one in chunk if isinstance(one, Item)]
        prepared = [spent.time("read", read, item, made.loading) for item in items]
        found = batches(prepared, made)
        formed.append([len(batch) for batch in found])
        for batch in found:
            maps = spent.time("model", forward, pipeline, made, batch)
            results = [spent.time("finish", finish, one, writing, folder) for one in maps]
            for before, one, after in zip(batch, maps, results, strict=True):
                sizes.append(bytes_of(before, one, after.row, folder))
    seconds = {stage: total / len(sizes) for stage, total in spent.seconds.items()}
    seconds["write"] = seconds.pop("finish") - seconds["refine"]
    return seconds, {name: mean(one[name] for one in sizes) for name in sizes[0]}, formed


def bytes_of(
    prepared: ReadImage, maps: Maps, row: dict[str, Any], folder: OutFolder
) -> dict[str, int]:
    rows, cols = prepared.size
    return {
        "file": Path(prepared.source).stat().st_size,
        "decoded": 3 * rows * cols,
        "to_the_model": prepared.rgb.nbytes,
        "on_the_device": 4 * prepared.rgb.size,
        "from_the_model": maps.image.rgb.nbytes + maps.cam.nbytes,
        "mask": (folder.root / row["mask"]).stat().st_size,
        "cams": (folder.root / row["cam"]).stat().st_size if "cam" in row else 0,
    }


def whole(made: Recipe, source: PhotoFolder, out: Path, images: int) -> dict[str, Any]:
    """Seconds an image while the run is under way, and what its two busiest threads did."""
    samples: list[tuple[float, int, list[dict[str, tuple[float, float]]]]] = []

    def look() -> None:
        done, found = made_in(out), workers_of(os.getpid())
        if done and len(found) == 1:
            threads = [scheduled(os.getpid()), scheduled(found[0])]
            threads[0].pop(str(threading.get_native_id()), None)  # that of this watching
            samples.append((time.monotonic(), done, threads))

    with watched(0.5, look):
        run(made, source, out, workers=1, threads=1)
    inner = [one for one in samples if images * 0.15 < one[1] < images * 0.85]
    (began, first, before), (ended, last, after) = inner[0], inner[-1]
    sides = {}
    for name, early, late in zip(("model", "worker"), before, after, strict=True):
        changes = [
            [(now - then) / (last - first) for now, then in zip(late[one], early[one], strict=True)]
            for one in late.keys() & early.keys()
        ]
        ran, ready = max(changes)
        others = sum(one[0] for one in changes) - ran
        sides[name] = {"ran": ran, "ready_but_not_run": ready, "other_threads_ran": others}
    return {"wall": (ended - began) / (last - first), "busiest_thread": sides}


def work_beside(crf: bool, folder: Path, size: int, side: str, pace: float, ready: Path) -> None:
    """One side's work on the same photos again and again, an image each `pace` seconds."""
    torch.set_num_threads(1)
    made = recipe(size, crf=crf)
    pipeline = made.pipeline(made.model())
    chunk = next(iter(chunks(PhotoFolder(folder), made.chunk)))
    items = [one for one in chunk if isinstance(one, Item)]
    formed = batches([read(item, made.loading) for item in items], made)
    maps = {str(one): one for batch in formed for one in forward(pipeline, made, batch)}
    ready.touch()
    while True:
        for batch in formed:
            began = time.monotonic()
            if side == "model":
                forward(pipeline, made, batch)
            else:
                for item in items[: len(batch)]:
                    read(item, made.loading)
                    finish(maps[item.key], made.writing, OutFolder(ready.parent / "beside"))
            time.sleep(max(0.0, pace * len(batch) - (time.monotonic() - began)))


@contextmanager
def busy(arguments: tuple[Any, ...], ready: Path) -> Iterator[None]:
    """Keep another process at `work_beside`."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work_beside, args=(*arguments, ready), daemon=True)
    process.start()
    while not ready.exists():
        if not process.is_alive():
            raise SystemExit("the process that was to work beside ended")
        time.sleep(0.1)
    try:
        yield
    finally:
        process.kill()
        process.join()
        ready.unlink()


def sides(seconds: dict[str, float]) -> dict[str, float]:
    return {"model": seconds["model"], "worker": sum(seconds[stage] for stage in WORKER)}


def one_round(
    made: Recipe, source: PhotoFolder, work: Path, beside: tuple[Any, ...], side: str | None
) -> dict[str, Any]:
    """Stages alone, stages beside the other side's work, and the whole, one after the other."""
    alone, sizes, formed = stages_alone(made, source, OutFolder(work / "alone"))
    side = side or max(sides(alone).items(), key=lambda one: one[1])[0]
    slower = sides(alone)[side]
    other = "worker" if side == "model" else "model"
    with busy((*beside, other, slower), work / "ready"):
        held, _, _ = stages_alone(made, source, OutFolder(work / "held"))
    ran = whole(made, source, work / "whole", sum(map(sum, formed)))
    seconds = ran["wall"] - ran["busiest_thread"][side]["ready_but_not_run"]
    return {
        "alone_seconds": alone,
        "beside_seconds": held,
        "alone_bytes": sizes,
        "chunks": formed,
        "slower_side": side,
        "slower_side_alone": slower,
        "slower_side_beside": sides(held)[side],
        "whole": ran,
        "whole_without_others": seconds,
        "share_of_slower_side": slower / seconds,
        "share_of_slower_side_beside": sides(held)[side] / seconds,
        "share_by_wall_clock": slower / ran["wall"],
    }


def rates(
    photos: list[Path], work: Path, images: int = 128, size: int = 224, rounds: int = 3
) -> dict[str, Any]:
    """In both settings, round by round; medians, and all rounds of the shares."""
    found: dict[str, Any] = {"images": images, "size": size, "rounds": rounds}
    for name, crf in (("crf", True), ("plain", False)):
        source = link_photos(work / name / "in", photos, images)
        made, beside = recipe(size, crf=crf), (crf, source.root, size)
        each: list[dict[str, Any]] = []
        for number in range(rounds):
            folder = work / name / str(number)
            folder.mkdir()
            side = each[0]["slower_side"] if each else None
            each.append(one_round(made, source, folder, beside, side))
            shares = {key: each[-1][key] for key in each[-1] if key.startswith("share")}
            print(name, number, shares, flush=True)
        shares = {key: [one[key] for one in each] for key in each[0] if key.startswith("share")}
        runs = [one["whole"] | {"without_others": one["whole_without_others"]} for one in each]
        found[name] = middle(each) | {"shares_by_round": shares, "runs": runs}
    return found


def middle(each: list[Any]) -> Any:
    """The median of every number; of anything else, what the last round has."""
    first = each[-1]
    if isinstance(first, dict):
        return {key: middle([one[key] for one in each]) for key in first}
    return median(each) if isinstance(first, float) else first
