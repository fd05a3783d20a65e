"""The same bulk run by the local engine and by Ray on this machine: CPU and wall-clock seconds.

    python benchmarks/bulk_ray.py [--images 500] [--repeats 3] [--data VOC_FOLDER]

Both engines write masks and maps of the same photos with a dense CRF, in turns, with the model on
one core and everything else on another. Each run is a separate process; the CPU time of it and its
descendants is read from /proc, so that a busy machine disturbs only the wall clock. Both times are
reported for the whole run and for the images after the first tenth, when everything has started.
Replaces the entry "ray" in benchmarks/results/bulk.json.
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
from bulk_setting import RESULTS, below, bulk_recipe, count_masks, cpu, link_photos, tree

from camkit.bulk import RayEngine, run
from camkit.bulk.sources import PhotoFolder

ENGINES = ("local", "ray")
TICKS = os.sysconf("SC_CLK_TCK")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans of Ray become children of this process


def work(engine: str, photos: Path, out: Path, size: int) -> None:
    """Run one engine, in the process that is measured."""
    torch.set_num_threads(1)
    source = PhotoFolder(photos)
    if engine == "local":
        run(bulk_recipe(size), source, out, workers=1, threads=1)
        return
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    run(bulk_recipe(size), source, out, ray=RayEngine(actors=1), threads=1)
    ray.shutdown()


def measured(engine: str, photos: Path, out: Path, size: int, images: int) -> dict[str, float]:
    """Return seconds of one run, as a whole and after the first tenth of the images."""
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
        for process_id in below(os.getpid()):
            spent[process_id] = max(spent.get(process_id, 0.0), cpu_of(process_id))
        done = count_masks(out)
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
    """Return CPU seconds of a process, including threads that ended."""
    try:
        fields = (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        )
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def ray(photos: list[Path], folder: Path, images: int, repeats: int, size: int) -> dict[str, Any]:
    """Run both engines in turns; return medians and the additional cost of Ray."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    link_photos(folder / "in", photos, images)
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for number in range(repeats):
        for engine in ENGINES:
            out = folder / f"{engine}-{number}"
            runs[engine].append(measured(engine, folder / "in", out, size, images))
            print(engine, runs[engine][-1], flush=True)
    results = {
        engine: {name: median(run[name] for run in engine_runs) for name in engine_runs[0]}
        for engine, engine_runs in runs.items()
    }
    return {
        "images": images,
        "size": size,
        "repeats": repeats,
        **results,
        "ray_costs_more": {
            name: results["ray"][name] / results["local"][name] - 1 for name in results["ray"]
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
        results = ray(photos, Path(folder), options.images, options.repeats, options.size)
    path = RESULTS / "bulk.json"
    report_parts = json.loads(path.read_text()) if path.exists() else {}
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine |= {"cpu": cpu(), "cores": os.cpu_count()}
    command = f"python benchmarks/bulk_ray.py --images {options.images}"
    command += f" --repeats {options.repeats}"
    report_parts["ray"] = results | {"command": command, "machine": machine}
    path.write_text(json.dumps(report_parts, indent=1) + "\n")
    (RESULTS / "bulk.md").write_text(report(report_parts))


if __name__ == "__main__":
    main()
