"""Bulk runs measured: rates of the stages and of the whole, fifty kills, memory over many images.

    python benchmarks/bulk.py kills memory rates [--data VOC_FOLDER]

Each part replaces its own entry in benchmarks/results/bulk.json, and bulk.md is made of all. Rates:
each stage is run alone on one core; then the whole, the model on one core and a worker on the
other, with a dense CRF (the worker is slower) and without (the model is). Where the machine is busy
with other things, the seconds in which a thread stood ready to run, but the system ran something
else, are counted (/proc/PID/task/TID/schedstat) and left out, alone and in the whole alike.
"""

import argparse
import json
import os
import platform
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bulk_report import report
from torch import Tensor, nn

from camkit.bulk.finishing import OutFolder, finish
from camkit.bulk.items import Item
from camkit.bulk.recipe import Reading, Recipe, Writing
from camkit.bulk.running import run
from camkit.bulk.sources import PhotoFolder
from camkit.bulk.stages import Maps, Prepared, batches, chunks, forward, read
from camkit.capture import Capture
from camkit.cli.models import open_model
from camkit.cli.run import TimmModel
from camkit.data import write_shapes
from camkit.refine import Chain, DenseCRF, Normalize, Propagate, Refiner

RESULTS = Path(__file__).parent / "results"
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def recipe(size: int, *, crf: bool = True) -> Recipe:
    """Two classes for each image; with a dense CRF, class maps are written too."""
    opened = open_model(MODEL, size=size)
    finishing = (Normalize("minmax"), DenseCRF()) if crf else (Normalize("minmax"),)
    cams = "npz" if crf else "none"
    return Recipe(
        TimmModel(MODEL, size),
        reading=Reading(size, opened.photos.mean, opened.photos.std),
        writing=Writing(finishing, background_score=0.5, cams=cams),
        refine=(Propagate(steps=2, blocks=6, balance=3),),
        vocabulary=opened.vocabulary,
        labels=(281, 207),
        chunk=16,
    )


def link_photos(folder: Path, photos: list[Path], count: int) -> PhotoFolder:
    """So many real photos by links, repeated where there are fewer."""
    folder.mkdir(parents=True)
    for index in range(count):
        source = photos[index % len(photos)]
        (folder / f"{index:05}{source.suffix}").symlink_to(source)
    return PhotoFolder(folder)


def made_in(out: Path) -> int:
    return sum(1 for _ in (out / "masks").glob("*.png"))


# Processes


def parents() -> dict[int, int]:
    """Who began whom, of all processes that live."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if told[0] != "Z":
            found[int(path.parent.name)] = int(told[1])
    return found


def workers_of(process: int) -> list[int]:
    """The processes that the server of a process has forked."""
    known = parents()
    return [one for one, parent in known.items() if known.get(parent) == process]


def below(process: int) -> list[int]:
    """All processes that came of one: the server, its workers, the tracker of resources."""
    known = parents()
    children = [one for one, parent in known.items() if parent == process]
    return children + [one for child in children for one in below(child)]


def resident(process: int) -> int:
    """MiB in memory, pages that processes share counted in each."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in text.splitlines() if "VmRSS" in line), 0)


def scheduled(process: int) -> dict[str, tuple[float, float]]:
    """For each thread the seconds that it ran, and stood ready but did not."""
    found = {}
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        try:
            told = path.read_text().split()
        except OSError:
            continue
        found[path.parent.name] = int(told[0]) / 1e9, int(told[1]) / 1e9
    return found


def undisturbed() -> float:
    """A clock that stands while this thread is ready to run but something else is run."""
    waited = Path("/proc/thread-self/schedstat").read_text().split()[1]
    return time.monotonic() - int(waited) / 1e9


@contextmanager
def watched(seconds: float, look: Callable[[], None]) -> Iterator[None]:
    """Look again and again, in a thread of its own, until the block ends."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


# Rates


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
        prepared = [spent.time("read", read, item, made.reading) for item in items]
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
    prepared: Prepared, maps: Maps, row: dict[str, Any], folder: OutFolder
) -> dict[str, int]:
    rows, cols = prepared.size
    return {
        "file": Path(prepared.source).stat().st_size,
        "decoded": 3 * rows * cols,
        "to_the_model": prepared.rgb.nbytes,
        "on_the_device": 4 * prepared.rgb.size,
        "from_the_model": maps.rgb.nbytes + maps.cam.nbytes,
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


def rates(photos: list[Path], work: Path, images: int = 240, size: int = 224) -> dict[str, Any]:
    """Stages alone, then the whole, in both settings."""
    found: dict[str, Any] = {"images": images, "size": size}
    for name, crf in (("crf", True), ("plain", False)):
        made = recipe(size, crf=crf)
        source = link_photos(work / name / "in", photos, images)
        alone, sizes, formed = stages_alone(made, source, OutFolder(work / name / "alone"))
        ran = whole(made, source, work / name / "whole", images)
        worker = alone["read"] + alone["refine"] + alone["write"]
        side, slower = max(("model", alone["model"]), ("worker", worker), key=lambda one: one[1])
        seconds = ran["wall"] - ran["busiest_thread"][side]["ready_but_not_run"]
        found[name] = {
            "alone_seconds": alone,
            "alone_bytes": sizes,
            "chunks": formed,
            "slower_side": side,
            "slower_side_alone": slower,
            "whole": ran,
            "whole_without_others": seconds,
            "share_of_slower_side": slower / seconds,
            "share_by_wall_clock": slower / ran["wall"],
        }
    return found


# Kills


@cache
def opened(model: TimmModel) -> nn.Module:
    return model()


@dataclass(frozen=True)
class Kept:
    """A model that processes find opened when they are forked, so that kills hit the work."""

    model: TimmModel

    def __call__(self) -> nn.Module:
        return opened(self.model)


def tree(out: Path) -> dict[str, bytes]:
    """The bytes of all that must not depend on how it came to be."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "journal.sqlite" and ".locks" not in path.parts
    }


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
    made = replace(made, model=Kept(TimmModel(MODEL, 64)), refine=(), writing=writing)
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
    made = replace(recipe(size, crf=False), refine=())  # the less time an image takes, the better
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


def cpu() -> str:
    """The name that the system gives its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
