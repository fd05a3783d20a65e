"""Rates of the stages of a bulk run alone, and of the whole run; a part of bulk.py.

The rate of the slower side is measured twice. Alone: on one core, while the other core is idle.
Beside: a process on the other core does the work of the other side, at the rate it has in the run,
but nothing connects the two. Two busy cores may slow each other; whatever time the whole run takes
beyond that is the cost of the pipeline. If the speed of the machine drifts from minute to minute,
these rates say little, and the slower side may change; the share of the run in which the busier
side worked comes from a single run.
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
from bulk_setting import (
    bulk_recipe,
    count_masks,
    link_photos,
    scheduled,
    undisturbed,
    watched,
    workers_of,
)
from torch import Tensor

from camkit.bulk.items import Item
from camkit.bulk.recipe import Recipe
from camkit.bulk.running import run
from camkit.bulk.sources import PhotoFolder
from camkit.bulk.stages import Maps, OutFolder, ReadImage, batches, chunks, finish, forward, read
from camkit.capture import Capture
from camkit.refiners import Chain, Refiner

WORKER = ("read", "refine", "write")


class Timer:
    """Seconds by stage, on the clock of `undisturbed`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = undisturbed()
        result = call(*arguments)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + undisturbed() - start
        return result


@dataclass(frozen=True)
class Timed:
    """A refiner that is timed."""

    refiner: Refiner
    timer: Timer

    def __call__(self, cam: Tensor, capture: Capture) -> Tensor:
        refined: Tensor = self.timer.time("refine", self.refiner, cam, capture)
        return refined


def stages_alone(
    recipe: Recipe, source: PhotoFolder, folder: OutFolder
) -> tuple[dict[str, float], dict[str, float], list[list[int]]]:
    """Return seconds and bytes per image and stage, in this thread, and batch sizes by chunk."""
    pipeline = recipe.pipeline(recipe.model())
    timer, sizes, batch_sizes = Timer(), list[dict[str, int]](), list[list[int]]()
    refiners = Chain(recipe.writing.finish)
    writing = replace(recipe.writing, finish=(Timed(refiners, timer),))
    for number, chunk in enumerate(chunks(source, recipe.chunk)):
        if number == 1:
            timer.seconds.clear()  # the first chunk warms up
            sizes.clear()
        items = [entry for entry in chunk if isinstance(entry, Item)]
        images = [timer.time("read", read, item, recipe.loading) for item in items]
        formed = batches(images, recipe)
        batch_sizes.append([len(batch) for batch in formed])
        for batch in formed:
            maps = timer.time("model", forward, pipeline, recipe, batch)
            results = [timer.time("finish", finish, entry, writing, folder) for entry in maps]
            for image, entry, result in zip(batch, maps, results, strict=True):
                sizes.append(bytes_of(image, entry, result.row, folder))
    seconds = {stage: total / len(sizes) for stage, total in timer.seconds.items()}
    seconds["write"] = seconds.pop("finish") - seconds["refine"]
    return (
        seconds,
        {name: mean(entry[name] for entry in sizes) for name in sizes[0]},
        batch_sizes,
    )


def bytes_of(
    image: ReadImage, maps: Maps, row: dict[str, Any], folder: OutFolder
) -> dict[str, int]:
    rows, cols = image.size
    return {
        "file": Path(image.source).stat().st_size,
        "decoded": 3 * rows * cols,
        "to_the_model": image.rgb.nbytes,
        "on_the_device": 4 * image.rgb.size,
        "from_the_model": maps.image.rgb.nbytes + maps.cam.nbytes,
        "mask": (folder.root / row["mask"]).stat().st_size,
        "cams": (folder.root / row["cam"]).stat().st_size if "cam" in row else 0,
    }


def whole(recipe: Recipe, source: PhotoFolder, out: Path, images: int) -> dict[str, Any]:
    """Return seconds per image during the run, and what its two busiest threads did."""
    samples: list[tuple[float, int, list[dict[str, tuple[float, float]]]]] = []

    def sample() -> None:
        done, workers = count_masks(out), workers_of(os.getpid())
        if done and len(workers) == 1:
            threads = [scheduled(os.getpid()), scheduled(workers[0])]
            threads[0].pop(str(threading.get_native_id()), None)  # that of this watching
            samples.append((time.monotonic(), done, threads))

    with watched(0.5, sample):
        run(recipe, source, out, workers=1, threads=1)
    inner = [entry for entry in samples if images * 0.15 < entry[1] < images * 0.85]
    (began, first, before), (ended, last, after) = inner[0], inner[-1]
    sides = {}
    for name, early, late in zip(("model", "worker"), before, after, strict=True):
        changes = [
            [
                (now - then) / (last - first)
                for now, then in zip(late[entry], early[entry], strict=True)
            ]
            for entry in late.keys() & early.keys()
        ]
        ran, ready = max(changes)
        others = sum(entry[0] for entry in changes) - ran
        sides[name] = {"ran": ran, "ready_but_not_run": ready, "other_threads_ran": others}
    return {"wall": (ended - began) / (last - first), "busiest_thread": sides}


def work_beside(crf: bool, folder: Path, size: int, side: str, pace: float, ready: Path) -> None:
    """Repeat the work of one side on the same photos, one image per `pace` seconds."""
    torch.set_num_threads(1)
    recipe = bulk_recipe(size, crf=crf)
    pipeline = recipe.pipeline(recipe.model())
    chunk = next(iter(chunks(PhotoFolder(folder), recipe.chunk)))
    items = [entry for entry in chunk if isinstance(entry, Item)]
    formed_batches = batches([read(item, recipe.loading) for item in items], recipe)
    maps = {
        str(entry): entry for batch in formed_batches for entry in forward(pipeline, recipe, batch)
    }
    ready.touch()
    while True:
        for batch in formed_batches:
            began = time.monotonic()
            if side == "model":
                forward(pipeline, recipe, batch)
            else:
                for item in items[: len(batch)]:
                    read(item, recipe.loading)
                    finish(maps[item.key], recipe.writing, OutFolder(ready.parent / "beside"))
            time.sleep(max(0.0, pace * len(batch) - (time.monotonic() - began)))


@contextmanager
def busy(arguments: tuple[Any, ...], ready: Path) -> Iterator[None]:
    """Run `work_beside` in another process during the block."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work_beside, args=(*arguments, ready), daemon=True)
    process.start()
    while not ready.exists():
        if not process.is_alive():
            raise SystemExit("the process that works beside ended")
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
    recipe: Recipe, source: PhotoFolder, work: Path, beside: tuple[Any, ...], side: str | None
) -> dict[str, Any]:
    """Measure the stages alone, then beside the other side's work, then the whole run."""
    alone, sizes, batch_sizes = stages_alone(recipe, source, OutFolder(work / "alone"))
    side = side or max(sides(alone).items(), key=lambda entry: entry[1])[0]
    slower = sides(alone)[side]
    other = "worker" if side == "model" else "model"
    with busy((*beside, other, slower), work / "ready"):
        beside_seconds, _, _ = stages_alone(recipe, source, OutFolder(work / "held"))
    ran = whole(recipe, source, work / "whole", sum(map(sum, batch_sizes)))
    seconds = ran["wall"] - ran["busiest_thread"][side]["ready_but_not_run"]
    return {
        "alone_seconds": alone,
        "beside_seconds": beside_seconds,
        "alone_bytes": sizes,
        "chunks": batch_sizes,
        "slower_side": side,
        "slower_side_alone": slower,
        "slower_side_beside": sides(beside_seconds)[side],
        "whole": ran,
        "whole_without_others": seconds,
        "share_of_slower_side": slower / seconds,
        "share_of_slower_side_beside": sides(beside_seconds)[side] / seconds,
        "share_by_wall_clock": slower / ran["wall"],
    }


def rates(
    photos: list[Path], work: Path, images: int = 128, size: int = 224, rounds: int = 3
) -> dict[str, Any]:
    """Measure both settings; return medians over the rounds, and the shares of every round."""
    results: dict[str, Any] = {"images": images, "size": size, "rounds": rounds}
    for name, crf in (("crf", True), ("plain", False)):
        source = link_photos(work / name / "in", photos, images)
        recipe, beside = bulk_recipe(size, crf=crf), (crf, source.root, size)
        each: list[dict[str, Any]] = []
        for number in range(rounds):
            folder = work / name / str(number)
            folder.mkdir()
            side = each[0]["slower_side"] if each else None
            each.append(one_round(recipe, source, folder, beside, side))
            shares = {key: each[-1][key] for key in each[-1] if key.startswith("share")}
            print(name, number, shares, flush=True)
        shares = {key: [entry[key] for entry in each] for key in each[0] if key.startswith("share")}
        runs = [
            entry["whole"] | {"without_others": entry["whole_without_others"]} for entry in each
        ]
        results[name] = middle(each) | {"shares_by_round": shares, "runs": runs}
    return results


def middle(each: list[Any]) -> Any:
    """Return the median of every number, and any other value of the last round."""
    first = each[-1]
    if isinstance(first, dict):
        return {key: middle([entry[key] for entry in each]) for key in first}
    return median(each) if isinstance(first, float) else first
