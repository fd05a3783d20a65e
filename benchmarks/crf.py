"""The dense CRF against pydensecrf: CPU and wall time, labels, probabilities, peak memory, threads.

    CAMKIT_DATA=folder python benchmarks/crf.py
    CAMKIT_DATA=folder python benchmarks/crf.py --settings toco_cam    # only these rows anew

Photos are those of voc12_animals/train, every 60th, at their own sizes. A batch is a photo and its
mirror image; class maps are the true masks at a sixteenth of the size with noise, sharpened as
`camkit.DenseCRF` does; labels that a photo lacks are noise. Ten updates. "Half size" is the picture
that `AtReducedSize(DenseCRF(), scale=0.5)` hands to the CRF, with its kernels.

Times: all ways take turns on each batch, and a ratio is taken batch by batch. With two threads each
of the two images has a thread of its own; pydensecrf has one thread. The plain version runs on the
first two batches only. The Gaussian lattice of the size is in the cache of the compiled version
before, as over a data set. Memory: growth of the peak resident size over one photo of 375x500
pixels (two threads: two photos), each in a process of its own, which has run on a small photo
before and has no lattice of the size (Linux).
"""

import argparse
import ctypes
import itertools
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
PLAIN = 2  # photos that the plain version also runs on


class Way(NamedTuple):
    """A backend on some threads."""

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
OURS = tuple(WAYS)[1:]


class Case(NamedTuple):
    """What `mean_field` takes."""

    scores: torch.Tensor
    rgb: torch.Tensor
    kernels: Kernels


def photos(count: int) -> list[str]:
    names = (DATA / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    return names[::60][:count]


def case(name: str, preset: str, scale: float, labels: int) -> Case:
    """A photo and its mirror image, with scores of some labels, those that are there first."""
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
    """Seconds of one call."""

    cpu: float
    wall: float


class Compared:
    """Times and results of all ways, on the same batches."""

    def __init__(self) -> None:
        self._spent: dict[str, list[Timed]] = {name: [] for name in WAYS}
        self._errors: dict[str, list[torch.Tensor]] = {name: [] for name in OURS}
        self._differ = dict.fromkeys(OURS, 0)

    def add(self, batch: Case, names: Sequence[str]) -> None:
        mean_field(*batch, steps=1, backend="native")  # the Gaussian lattice is cached by size
        found = {}
        for name in names:
            cpu, wall = time.process_time(), time.perf_counter()
            found[name] = WAYS[name](batch)
            spent = Timed(time.process_time() - cpu, time.perf_counter() - wall)
            self._spent[name].append(spent)
        theirs = found.pop(THEIRS)
        for name, ours in found.items():
            self._differ[name] += int((ours.argmax(1) != theirs.argmax(1)).sum())
            self._errors[name].append((ours - theirs).abs().flatten())

    def row(self) -> dict[str, Any]:
        """Milliseconds an image, times faster than pydensecrf, and differences from it."""
        row: dict[str, Any] = {}
        for name, clock in itertools.product(WAYS, Timed._fields):
            seconds = [getattr(spent, clock) for spent in self._spent[name]]
            row[f"{name}_{clock}_ms"] = round(500 * statistics.fmean(seconds), 1)  # two images
            if name != THEIRS:
                theirs = [getattr(spent, clock) for spent in self._spent[THEIRS]]
                found = [a / b for a, b in zip(theirs, seconds, strict=False)]
                row[f"{name}_{clock}_times"] = spread(found)
        for name in OURS:
            errors = torch.cat(self._errors[name])
            row[f"{name}_error_max"], row[f"{name}_error_mean"] = map(
                float, (errors.max(), errors.mean())
            )
            row[f"{name}_labels_differ"] = self._differ[name]
        return row


def spread(values: Sequence[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(quartiles[1], 2), "quartiles": [round(q, 2) for q in quartiles[::2]]}


def growth(name: str, preset: str, scale: float, labels: int) -> float:
    """MiB that one photo (two with two threads) adds to the peak of this process."""
    way, whole = WAYS[name], case(large_photo(), preset, scale, labels)
    count = 2 if way.threads == 2 else 1
    scores, rgb = whole.scores[:count].clone(), whole.rgb[:count].clone()
    way(Case(scores[..., :40, :50], rgb[:, :40, :50], whole.kernels))
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be taken again without growth
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _peak()
    way(Case(scores, rgb, whole.kernels))
    return max(0.0, _peak() - before)


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


def summary(rows: Sequence[dict[str, Any]]) -> str:
    differ = sum(row[f"{name}_labels_differ"] for row in rows for name in OURS)
    medians = {
        title: [row["native_cpu_times"]["median"] for row in rows if (row["labels"] <= 5) == few]
        for title, few in (("2 to 5 labels", True), ("21 labels", False))
    }
    counts = sorted({len(row["photos"]) for row in rows})
    found = [f"with {title} {min(v):.1f} to {max(v):.1f}" for title, v in medians.items() if v]
    return (
        f"{' or '.join(map(str, counts))} photos a row (crf.json names them) and their mirror "
        f"images, {STEPS} updates. ms: CPU time of the compiled "
        "version for an image, one thread. Times: how many times the CPU or wall time of the "
        "compiled version pydensecrf needs, median and quartiles over batches. Plain: the same of "
        "plain torch. Largest difference: of any probability from that of pydensecrf. MiB: growth "
        "of peak memory over one photo of 375x500 pixels.\n\n"
        f"Labels that differ from those of pydensecrf, all rows together: {differ}. pydensecrf "
        f"needs {', '.join(found)} times the CPU time of the compiled version (medians, one "
        "thread)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--settings", nargs="+", default=CHOSEN, choices=PRESETS)
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = list(itertools.product(options.settings, SCALES, options.labels))
    memories = [memory(preset, SCALES[size], labels) for preset, size, labels in kinds]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if set(options.settings) < set(CHOSEN):
        rows = {kind_of(row): row for row in measured_before(options.out)}
    for (preset, size, labels), found in zip(kinds, memories, strict=True):
        compared = Compared()
        for place, name in enumerate(photos(options.photos)):
            batch = case(name, preset, SCALES[size], labels)
            compared.add(batch, [way for way in WAYS if way != "torch" or place < PLAIN])
        kind = {"preset": preset, "size": size, "labels": labels}
        row = kind | compared.row() | found | {"photos": photos(options.photos)}
        rows[kind_of(row)] = row
        print(table([row]).splitlines()[-1], flush=True)
        write(options.out, sorted(rows.values(), key=order))


def measured_before(folder: Path) -> list[dict[str, Any]]:
    path = folder / "crf.json"
    return json.loads(path.read_text())["against_pydensecrf"] if path.exists() else []


def kind_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("preset", "size", "labels"))


def order(row: dict[str, Any]) -> tuple[int, int, int]:
    return list(PRESETS).index(row["preset"]), list(SCALES).index(row["size"]), row["labels"]


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows; also after each, so that a stopped run loses nothing."""
    found = {"environment": environment(), "steps": STEPS, "against_pydensecrf": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "crf.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "crf.md").write_text(f"{summary(rows)}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
