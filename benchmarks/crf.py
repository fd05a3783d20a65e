"""The dense CRF against pydensecrf: CPU time, labels, peak memory, threads.

    python benchmarks/crf.py
    python benchmarks/crf.py --threads         # on a machine with two idle cores

Six photos of voc12_animals/train of 375x500 pixels, ten updates; class maps are the true masks at
a sixteenth of the size with noise, sharpened as `camkit.DenseCRF` does. Time: CPU time of the
process on one thread, all photos once a round; rounds interleave the ways and ratios are taken
round by round. The Gaussian lattice of the size is kept by our backends from the first round on, as
over a data set. Memory: growth of the peak resident size over one photo in a process of its own,
whose first photo, a small one, has loaded everything (Linux). Threads: wall time of two photos,
twice each, on one thread over that on two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from watching import RESULTS, _peak, ratios

from camkit.manifest import environment
from camkit.ops.mean_field import Kernels, mean_field
from camkit.refiners.crf import PRESETS

Case = tuple[torch.Tensor, torch.Tensor]
DATA = Path(os.environ.get("CAMKIT_DATA", "data")) / "voc12_animals"
CHOSEN = ("psa", "irn", "clip_es")
LABELS = (2, 5, 21)
STEPS = 10


def photos(count: int) -> list[str]:
    names = (DATA / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    sizes = ((name, Image.open(DATA / "JPEGImages" / f"{name}.jpg").size) for name in names)
    return [name for name, size in sizes if size == (500, 375)][::10][:count]


def case(name: str, labels: int) -> Case:
    """Scores of ``labels`` labels, the ones that are there first, and the photo."""
    rgb = torch.from_numpy(np.array(Image.open(DATA / "JPEGImages" / f"{name}.jpg")))
    mask = torch.from_numpy(np.array(Image.open(DATA / "SegmentationClass" / f"{name}.png")))
    there = [value for value in mask.unique().tolist() if value != 255][:labels]
    truth = torch.stack([mask == value for value in there])[None].float()
    coarse = F.adaptive_avg_pool2d(truth, (24, 32))
    coarse = F.pad(coarse, (0, 0, 0, 0, 0, labels - len(there)))
    coarse = coarse + 0.2 * torch.randn(coarse.shape, generator=torch.Generator().manual_seed(0))
    cam = F.interpolate(coarse.clamp(0, 1), mask.shape, mode="bilinear")
    return (cam / 0.25).softmax(1), rgb[None]


def way(backend: str, kernels: Kernels) -> object:
    def run(cases: list[Case]) -> list[torch.Tensor]:
        return [mean_field(*pair, kernels, steps=STEPS, backend=backend) for pair in cases]

    return run


def speed(preset: str, cases: list[Case], rounds: int) -> dict[str, object]:
    """How many times faster than pydensecrf."""
    row: dict[str, object] = {}
    for backend in ("native", "torch"):
        runs = {name: way(name, PRESETS[preset]) for name in (backend, "pydensecrf")}
        found = ratios(runs, cases, rounds)
        row[f"{backend}_ms"] = round(found[f"{backend}_ms"] / len(cases), 1)
        row[f"{backend}_times"] = found["pydensecrf"]
    return row


def agreement(preset: str, cases: list[Case]) -> dict[str, object]:
    """The worst of the photos."""
    row: dict[str, object] = {}
    expected = way("pydensecrf", PRESETS[preset])(cases)
    for backend in ("native", "torch"):
        pairs = list(zip(way(backend, PRESETS[preset])(cases), expected, strict=True))
        errors = [(a.double() - b.double()).abs() for a, b in pairs]
        same = [(a.argmax(1) == b.argmax(1)).double().mean().item() for a, b in pairs]
        row[f"{backend}_labels_percent"] = round(100 * min(same), 4)
        row[f"{backend}_error_q9999"] = max(float(np.quantile(e.numpy(), 0.9999)) for e in errors)
        row[f"{backend}_error_mean"] = max(e.mean().item() for e in errors)
    return row


def growth(backend: str, preset: str, labels: int) -> float:
    run = way(backend, PRESETS[preset])
    scores, rgb = case(photos(1)[0], labels)
    run([(scores[..., :40, :50], rgb[:, :40, :50])])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    run([(scores, rgb)])
    return _peak() - before


def memory(preset: str, labels: int) -> dict[str, float]:
    row = {}
    for backend in ("pydensecrf", "native", "torch"):
        command = [sys.executable, __file__, "--way", backend, preset, str(labels)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row[f"{backend}_MiB"] = round(float(done.stdout), 1)
    return row


def threads(preset: str, cases: list[Case], rounds: int) -> dict[str, object]:
    """Wall time of two photos, twice each, one after the other, over that on two threads."""
    run = way("native", PRESETS[preset])
    pair = cases[:2]
    shares = [pair, pair[::-1]]  # photos take differently long, and each thread has both
    batch = [tuple(torch.cat(parts) for parts in zip(*pair, *pair[::-1], strict=True))]
    python, own = [], []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(rounds):
            alone = _seconds(lambda: run(shares[0] + shares[1]))
            python.append(alone / _seconds(lambda: list(pool.map(run, shares))))
            torch.set_num_threads(2)
            own.append(alone / _seconds(lambda: run(batch)))
            torch.set_num_threads(1)
    return {
        "two_python_threads_times": round(statistics.median(python), 2),
        "one_call_two_threads_times": round(statistics.median(own), 2),
    }


def _seconds(run: object) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--threads", action="store_true", help="only two threads against one")
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.way:
        print(growth(options.way[0], options.way[1], int(options.way[2])))
        sys.exit()
    rows = []
    if options.threads:
        for preset in CHOSEN:
            found = threads(preset, [case(name, 5) for name in photos(2)], options.rounds)
            rows.append({"preset": preset, "labels": 5} | found)
        result = {"environment": environment(), "rounds": options.rounds, "threads": rows}
        (RESULTS / "crf_threads.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(rows))
        sys.exit()
    for preset in CHOSEN:
        for labels in LABELS:
            cases = [case(name, labels) for name in photos(options.photos)]
            row: dict[str, object] = {"preset": preset, "labels": labels}
            row |= speed(preset, cases, options.rounds) | agreement(preset, cases)
            row |= memory(preset, labels)
            print(json.dumps(row))
            rows.append(row)
    result = {
        "environment": environment(),
        "photos": photos(options.photos),
        "steps": STEPS,
        "rounds": options.rounds,
        "against_pydensecrf": rows,
    }
    (RESULTS / "crf.json").write_text(json.dumps(result, indent=2) + "\n")
