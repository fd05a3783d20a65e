"""The same bulk run by the local engine and by Ray on this machine: seconds of CPU and of the wall.

    python benchmarks/bulk_ray.py [--images 500] [--repeats 3] [--data VOC_FOLDER]

Both engines make masks and maps with a dense CRF of the same real photos, the model on one core
and everything else on another, in turns. Each run is a process of its own; the CPU time of all
processes that came of it is read from /proc, so a busy machine disturbs little but the wall clock.
Counted is the whole, and from the tenth part of the images onwards, when everything has begun. The
entry "ray" in benchmarks/results/bulk.json is replaced.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bulk_report import report
from bulk_setting import RESULTS, below, cpu, link_photos, made_in, recipe, tree

from camkit.bulk import RayEngine, run
from camkit.bulk.sources import PhotoFolder

ENGINES = ("local", "ray")
TICKS = os.sysconf("SC_CLK_TCK")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: what Ray leaves to init stays below this process


def work(engine: str, photos: Path, out: Path, size: int) -> None:
    """One run, in the process that is measured."""
    torch.set_num_threads(1)
    source = PhotoFolder(photos)
    if engine == "local":
        run(recipe(size), source, out, workers=1, threads=1)
        return
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    run(recipe(size), source, out, ray=RayEngine(actors=1), threads=1)
    ray.shutdown()


def measured(engine: str, photos: Path, out: Path, size: int, images: int) -> dict[str, float]:
    """Seconds of one run, as a whole and from the tenth part of the images onwards."""
    began, spent = time.monotonic(), {}
    command = [
        sys.executable,
        __file__,
        "--run",
        engine,
        str(photos),
        str(out),
        "--size",
        str(size),
    ]
    process = subprocess.Popen(command)
    early: tuple[int, float, float] | None = None
    while process.poll() is None:
        for one in below(os.getpid()):
            spent[one] = max(spent.get(one, 0.0), cpu_of(one))
        done = made_in(out)
        if early is None and done >= images / 10:
            early = done, time.monotonic() - began, sum(spent.values())
        time.sleep(0.2)
    if process.returncode or early is None:
        raise SystemExit(f"the {engine} run ended with {process.returncode}")
    wall, cpu = time.monotonic() - began, sum(spent.values())
    left = images - early[0]
    return {
        "wall": wall,
        "cpu": cpu,
        "wall_per_image_running": (wall - early[1]) / left,
        "cpu_per_image_running": (cpu - early[2]) / left,
    }


def cpu_of(process: int) -> float:
    """Seconds that a process has used, threads that ended among them."""
    try:
        told = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(told[11]) + int(told[12])) / TICKS


def ray(photos: list[Path], folder: Path, images: int, repeats: int, size: int) -> dict[str, Any]:
    """Both engines in turns, medians, and what Ray costs more."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    link_photos(folder / "in", photos, images)
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for number in range(repeats):
        for engine in ENGINES:
            out = folder / f"{engine}-{number}"
            runs[engine].append(measured(engine, folder / "in", out, size, images))
            print(engine, runs[engine][-1], flush=True)
    found = {
        engine: {name: median(one[name] for one in some) for name in some[0]}
        for engine, some in runs.items()
    }
    return {
        "images": images,
        "size": size,
        "repeats": repeats,
        **found,
        "ray_costs_more": {
            name: found["ray"][name] / found["local"][name] - 1 for name in found["ray"]
        },
        "files_identical": tree(folder / "ray-0") == tree(folder / "local-0"),
        "runs": runs,
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(os.environ.get("CAMKIT_DATA", ".")) / "voc12_animals"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        work(options.run[0], Path(options.run[1]), Path(options.run[2]), options.size)
        return
    photos = sorted((options.data / "JPEGImages").glob("*.jpg"))
    with tempfile.TemporaryDirectory() as folder:
        found = ray(photos, Path(folder), options.images, options.repeats, options.size)
    path = RESULTS / "bulk.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine |= {"cpu": cpu(), "cores": os.cpu_count()}
    command = f"python benchmarks/bulk_ray.py --images {options.images}"
    command += f" --repeats {options.repeats}"
    kept["ray"] = found | {"command": command, "machine": machine}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / "bulk.md").write_text(report(kept))


if __name__ == "__main__":
    main()
