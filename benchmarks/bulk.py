"""Bulk runs measured: rates of the stages and of the whole, fifty kills, memory over many images.

    python benchmarks/bulk.py kills rates memory [--data VOC_FOLDER]

Each part replaces its own entry in benchmarks/results/bulk.json. Rates: each stage is run alone on
one core, by CPU time; then the whole, the model on one core and a worker on the other. The machine
may be busy with other things: the seconds in which the slower side stood ready to run, but the
system ran something else, are counted (/proc/PID/schedstat) and left out.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from camkit.bulk.finishing import OutFolder, finish
from camkit.bulk.recipe import Reading, Recipe, Writing
from camkit.bulk.running import run
from camkit.bulk.sources import PhotoFolder
from camkit.bulk.stages import batches, chunks, forward, read
from camkit.cli.models import open_model
from camkit.cli.run import TimmModel
from camkit.data import write_shapes
from camkit.refine import DenseCRF, Normalize, Propagate

RESULTS = Path(__file__).parent / "results" / "bulk.json"
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def recipe(size: int, *, crf: bool = True) -> Recipe:
    opened = open_model(MODEL, size=size)
    finishing = (Normalize("minmax"), DenseCRF()) if crf else (Normalize("minmax"),)
    return Recipe(
        TimmModel(MODEL, size),
        reading=Reading(size, opened.photos.mean, opened.photos.std),
        writing=Writing(finishing, background_score=0.5, cams="npz"),
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


def workers_of(process: int) -> list[int]:
    """The processes that the server of a process has forked."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if told[0] != "Z":
            parents[int(path.parent.name)] = int(told[1])
    return [one for one, parent in parents.items() if parents.get(parent) == process]


def scheduled(process: int) -> tuple[float, float]:
    """Seconds that the threads of a process ran, and stood ready but did not."""
    ran = waited = 0
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        try:
            told = path.read_text().split()
        except OSError:
            continue
        ran, waited = ran + int(told[0]) / 1e9, waited + int(told[1]) / 1e9
    return ran, waited


def stages_alone(made: Recipe, source: PhotoFolder, folder: OutFolder) -> dict[str, float]:
    """Seconds of CPU an image, stage by stage, in this thread."""
    pipeline = made.pipeline(made.model())
    spent: dict[str, float] = {}
    images = 0

    def timed(stage: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.thread_time()
        found = call(*arguments)
        spent[stage] = spent.get(stage, 0.0) + time.thread_time() - start
        return found

    for number, chunk in enumerate(chunks(source, made.chunk)):
        if number == 1:
            spent.clear()  # the first chunk warms up
            images = 0
        images += len(chunk)
        prepared = [timed("read", read, item, made.reading) for item in chunk]
        for batch in batches(prepared, made):
            for one in timed("model", forward, pipeline, made, batch):
                timed("write", finish, one, made.writing, folder)
    return {stage: seconds / images for stage, seconds in spent.items()}


def rates(photos: list[Path], work: Path, images: int = 160, size: int = 224) -> dict[str, Any]:
    """Stages alone, then the whole."""
    torch.set_num_threads(1)
    made = recipe(size)
    source = link_photos(work / "in", photos, images)
    alone = stages_alone(made, source, OutFolder(work / "alone"))
    samples: list[tuple[Any, ...]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.5):
            done = sum(1 for _ in (work / "whole" / "masks").glob("*.png"))
            found = workers_of(os.getpid())
            if done and len(found) == 1:
                times = scheduled(os.getpid()), scheduled(found[0])
                samples.append((time.monotonic(), done, *times))

    watcher = threading.Thread(target=sample)
    watcher.start()
    run(made, source, work / "whole", workers=1, threads=1)
    over.set()
    watcher.join()
    inner = [one for one in samples if images * 0.15 < one[1] < images * 0.9]
    (began, first, *before), (ended, last, *after) = inner[0], inner[-1]
    sides = {}
    for name, early, late in zip(("model", "worker"), before, after, strict=True):
        ran, waited = (late[part] - early[part] for part in (0, 1))
        sides[name] = {"ran": ran / (last - first), "ready": waited / (last - first)}
    span = (ended - began) / (last - first)
    slower = max(alone["model"], alone["read"] + alone["write"])
    side = "model" if slower == alone["model"] else "worker"
    quiet = span - sides[side]["ready"]
    return {
        "images": images,
        "size": size,
        "alone_cpu_seconds_per_image": alone,
        "slower_side": side,
        "slower_side_alone": slower,
        "whole_wall_seconds_per_image": span,
        "whole_sides_per_image": sides,
        "whole_seconds_per_image_without_others": quiet,
        "share_of_slower_side": slower / quiet,
    }


def tree(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "journal.sqlite" and ".locks" not in path.parts
    }


def kills(photos: list[Path], work: Path, images: int = 500, count: int = 50) -> dict[str, Any]:
    """Half the kills are of the parent, half of a worker; compared with a run undisturbed."""
    del photos  # drawn ones take less time
    torch.set_num_threads(1)
    made = recipe(96, crf=False)
    write_shapes(work / "in", images)
    source = PhotoFolder(work / "in" / "JPEGImages")
    start = time.monotonic()
    run(made, source, work / "whole", workers=0, threads=1)
    alone = time.monotonic() - start
    luck = random.Random(9)
    out = work / "killed"
    parents = workers = 0
    while parents < count // 2:
        child = os.fork()
        if not child:
            run(made, source, out, workers=int(parents % 5 == 4), threads=1)
            os._exit(0)
        time.sleep(luck.uniform(0.1, 3 * alone / count) + 20 * (parents % 5 == 4))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            break  # it was done
        parents += 1
    done_then = sum(1 for _ in (out / "masks").glob("*.png"))
    over = threading.Event()

    def kill() -> None:
        nonlocal workers
        while parents + workers < count and not over.wait(luck.uniform(0.2, 1.5)):
            if living := workers_of(os.getpid()):
                os.kill(luck.choice(living), signal.SIGKILL)
                workers += 1

    killer = threading.Thread(target=kill)
    killer.start()
    ran = run(made, source, out, workers=2, threads=1)
    over.set()
    killer.join()
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


def memory(photos: list[Path], work: Path, images: int = 5000, size: int = 96) -> dict[str, Any]:
    """Resident memory of parent and worker, from the first hundred images to the last."""
    torch.set_num_threads(1)
    made = recipe(size, crf=False)
    source = link_photos(work / "in", photos, images)
    series, over = [], threading.Event()
    model = sum(one.numel() * one.element_size() for one in made.model().parameters()) / 2**20
    loaded = resident(os.getpid())

    def sample() -> None:
        while not over.wait(2):
            done = sum(1 for _ in (work / "out" / "masks").glob("*.png"))
            series.append(
                (done, resident(os.getpid()), sum(map(resident, workers_of(os.getpid()))))
            )

    watcher = threading.Thread(target=sample)
    watcher.start()
    run(made, source, work / "out", workers=1, threads=1)
    over.set()
    watcher.join()
    steps = [next(one for one in series if one[0] >= images * part / 10) for part in range(1, 10)]
    return {
        "images": images,
        "size": size,
        "weights_mib": model,
        "parent_before_mib": loaded,
        "done_parent_workers_mib": steps,
        "peak_mib": max(one[1] + one[2] for one in series),
    }


def resident(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in text.splitlines() if "VmRSS" in line), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=("rates", "kills", "memory"))
    default = Path(os.environ.get("CAMKIT_DATA", ".")) / "voc12_animals"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--images", type=int)
    options = parser.parse_args()
    photos = sorted((options.data / "JPEGImages").glob("*.jpg"))
    parts = {"rates": rates, "kills": kills, "memory": memory}
    for name in options.parts:
        with tempfile.TemporaryDirectory() as work:
            settings = {} if options.images is None else {"images": options.images}
            found = parts[name](photos, Path(work), **settings)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        machine = {"torch": torch.__version__, "python": platform.python_version()}
        machine |= {"cpu": platform.machine(), "cores": os.cpu_count()}
        kept[name] = found | {"command": " ".join(sys.argv), "machine": machine}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(json.dumps(kept[name], indent=1))


if __name__ == "__main__":
    main()
