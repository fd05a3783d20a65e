"""The dense CRF against pydensecrf: CPU and wall time, labels, probabilities, peak memory, threads.

    CAMKIT_DATA=folder python benchmarks/crf.py

Photos are those of voc12_animals/train, every 60th, at their own sizes. A batch is a photo and its
mirror image; class maps are the true masks at a sixteenth of the size with noise, sharpened as
`camkit.DenseCRF` does; labels that a photo lacks are noise. Ten updates. "Half size" is the picture
that `AtReducedSize(DenseCRF(), scale=0.5)` hands to the CRF, with its kernels.

Times: all ways take turns on each batch, and a ratio is taken batch by batch, against pydensecrf
right before. With two threads each of the two images has a thread of its own; pydensecrf has one
thread. The plain version runs in the first round only. The Gaussian lattice of the size is cached
by our backends from the first round on, as over a data set; that round is measured too. Memory:
growth of the peak resident size over one photo of 375x500 pixels (two threads: two photos), each in
a process of its own, which has run on a small photo before (Linux).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from watching import RESULTS, _peak

import camkit
from camkit.manifest import environment
from camkit.ops.mean_field import Kernels, mean_field
from camkit.refiners.crf import PRESETS
from camkit.refiners.protocol import picture_bytes, scaled_size

DATA = Path(os.environ.get("CAMKIT_DATA", "data")) / "voc12_animals"
CHOSEN = ("psa", "irn", "clip_es", "toco_cam")
LABELS = (2, 3, 5, 21)
SCALES = {"full": 1.0, "half": 0.5}
STEPS = 10


class Way(NamedTuple):
    backend: Any
    threads: int

    def __call__(self, case: "Case") -> torch.Tensor:
        torch.set_num_threads(self.threads)
        try:
            return mean_field(*case, steps=STEPS, backend=self.backend)
        finally:
            torch.set_num_threads(1)


THEIRS = "pydensecrf"
WAYS = {
    THEIRS: Way("pydensecrf", 1),
    "native": Way("native", 1),
    "native_2_threads": Way("native", 2),
    "torch": Way("torch", 1),
}


class Case(NamedTuple):
    scores: torch.Tensor
    rgb: torch.Tensor
    kernels: Kernels


def photos(count: int) -> list[str]:
    names = (DATA / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    return names[::60][:count]


def case(name: str, preset: str, scale: float, labels: int) -> Case:
    """A photo and its mirror image, with scores of ``labels`` labels, those that are there first."""
    rgb = torch.from_numpy(np.array(Image.open(DATA / "JPEGImages" / f"{name}.jpg")))
    mask = torch.from_numpy(np.array(Image.open(DATA / "SegmentationClass" / f"{name}.png")))
    there = [value for value in mask.unique().tolist() if value != 255][:labels]
    truth = torch.stack([mask == value for value in there])[None].float()
    coarse = F.adaptive_avg_pool2d(truth, (24, 32))
    coarse = F.pad(coarse, (0, 0, 0, 0, 0, labels - len(there)))
    coarse = coarse + 0.2 * torch.randn(coarse.shape, generator=torch.Generator().manual_seed(0))
    pictures, kernels = rgb.permute(2, 0, 1)[None].float() / 255, PRESETS[preset]
    if scale < 1:
        pictures = camkit.resize_cam(pictures, scaled_size(pictures, scale))
        kernels = kernels._replace(bilateral_sxy=kernels.bilateral_sxy * scale)
    cam = F.interpolate(coarse.clamp(0, 1), pictures.shape[-2:], mode="bilinear")
    scores = torch.cat([cam, cam.flip(-1)]).div(0.25).softmax(1)
    return Case(scores, picture_bytes(torch.cat([pictures, pictures.flip(-1)])), kernels)


class Timed(NamedTuple):
    cpu: float
    wall: float


def speed(cases: Sequence[Case], rounds: int) -> dict[str, Any]:
    """Milliseconds an image, and how many times faster than pydensecrf."""
    seconds: dict[str, list[Timed]] = {name: [] for name in WAYS}
    for round_ in range(rounds):
        for each in cases:
            for name, way in WAYS.items():
                if name == "torch" and round_:
                    continue
                cpu, wall = time.process_time(), time.perf_counter()
                way(each)
                spent = Timed(time.process_time() - cpu, time.perf_counter() - wall)
                seconds[name].append(spent)
    row: dict[str, Any] = {}
    for name in WAYS:
        for clock in Timed._fields:
            found = [getattr(spent, clock) for spent in seconds[name]]
            row[f"{name}_{clock}_ms"] = round(500 * statistics.fmean(found), 1)  # two images
            if name == THEIRS:
                continue
            pairs = zip(seconds[THEIRS], found, strict=False)
            row[f"{name}_{clock}_times"] = spread([getattr(a, clock) / b for a, b in pairs])
    return row


def spread(values: Sequence[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(quartiles[1], 2), "quartiles": [round(q, 2) for q in quartiles[::2]]}


def agreement(cases: Sequence[Case]) -> dict[str, Any]:
    """Equal labels in % of all pixels, and differences of probabilities."""
    found: dict[str, Any] = {}
    for name in ("native", "torch"):
        pixels, same, errors = 0, 0, []
        for each in cases:
            ours, theirs = WAYS[name](each), WAYS[THEIRS](each)
            equal = ours.argmax(1) == theirs.argmax(1)
            pixels, same = pixels + equal.numel(), same + int(equal.sum())
            errors.append((ours - theirs).abs())
        found[f"{name}_labels_percent"] = 100 * same / pixels
        found[f"{name}_labels_differ"] = pixels - same
        found[f"{name}_error_max"] = max(float(error.max()) for error in errors)
        found[f"{name}_error_mean"] = statistics.fmean(float(error.mean()) for error in errors)
    return found


def growth(name: str, preset: str, scale: float, labels: int) -> float:
    """MiB that one photo (two with two threads) adds to the peak of this process."""
    way, whole = WAYS[name], case(large_photo(), preset, scale, labels)
    count = 2 if way.threads == 2 else 1
    scores, rgb = whole.scores[:count].clone(), whole.rgb[:count].clone()
    way(Case(scores[..., :40, :50], rgb[:, :40, :50], whole.kernels))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    way(Case(scores, rgb, whole.kernels))
    return _peak() - before


def large_photo() -> str:
    names = photos(1000)
    sizes = {name: Image.open(DATA / "JPEGImages" / f"{name}.jpg").size for name in names}
    return next(name for name, size in sizes.items() if size == (500, 375))


def memory(preset: str, scale: float, labels: int) -> dict[str, float]:
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as fresh:
        return {
            f"{name}_MiB": round(fresh.apply(growth, (name, preset, scale, labels)), 1)
            for name in WAYS
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["setting", "size", "labels", "ms", "CPU", "wall", "CPU, 2 threads", "wall, 2 threads"]
    heads += ["plain, CPU", "largest difference", "MiB", "MiB of pydensecrf"]
    lines = ["| " + " | ".join(heads) + " |", "|" + len(heads) * "---|"]
    for row in rows:
        times = [
            _told(row[f"{name}_{clock}_times"])
            for name in ("native", "native_2_threads")
            for clock in Timed._fields
        ]
        cells = [row["preset"], row["size"], str(row["labels"]), f"{row['native_cpu_ms']:.0f}"]
        cells += [*times, f"{row['torch_cpu_times']['median']:.1f}"]
        cells += [f"{row['native_error_max']:.0e}", f"{row['native_MiB']:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{row['pydensecrf_MiB']:.0f}"]) + " |")
    return "\n".join(lines)


def _told(times: dict[str, Any]) -> str:
    low, high = times["quartiles"]
    return f"{times['median']:.1f} ({low:.1f} to {high:.1f})"


def summary(rows: Sequence[dict[str, Any]], count: int) -> str:
    equal = [f"{min(row[f'{name}_labels_percent'] for row in rows):.4f} %" for name in WAYS_OURS]
    few = [row["native_cpu_times"]["median"] for row in rows if row["labels"] <= 5]
    many = [row["native_cpu_times"]["median"] for row in rows if row["labels"] > 5]
    return (
        f"{count} photos and their mirror images, {STEPS} updates. ms: CPU time of the compiled "
        "version for an image, one thread. Times: how many times less CPU or wall time than "
        "pydensecrf needs, median and quartiles over batches. MiB: growth of peak memory over one "
        "photo of 375x500 pixels. Largest difference: of any probability to that of pydensecrf.\n\n"
        f"Labels equal to those of pydensecrf, worst row: native {equal[0]}, plain {equal[1]}. "
        f"With 2 to 5 labels the compiled version needs {min(few):.1f} to {max(few):.1f} times "
        f"less CPU time, with 21 labels {min(many):.1f} to {max(many):.1f} times less (medians)."
    )


WAYS_OURS = ("native", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--settings", nargs="+", default=CHOSEN, choices=PRESETS)
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for preset in options.settings:
        for size, scale in SCALES.items():
            for labels in options.labels:
                row: dict[str, Any] = {"preset": preset, "size": size, "labels": labels}
                row |= memory(preset, scale, labels)
                cases = [case(name, preset, scale, labels) for name in photos(options.photos)]
                row |= agreement(cases) | speed(cases, options.rounds)
                print(table([row]).splitlines()[-1], flush=True)
                rows.append(row)
    result = {
        "environment": environment(),
        "photos": photos(options.photos),
        "steps": STEPS,
        "rounds": options.rounds,
        "against_pydensecrf": rows,
    }
    told = f"{summary(rows, options.photos)}\n\n{table(rows)}\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "crf.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "crf.md").write_text(told)
    print(told)


if __name__ == "__main__":
    main()
