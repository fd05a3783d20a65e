"""Refiners that follow the colours of the picture: what each gains, and what it costs.

    CAMKIT_DATA=folder python benchmarks/edges.py

Maps of ViT-Ti by the default seed of camkit.wrap and balanced propagation at 384 pixels, refined at
the original size of the photos; those with drawn boxes are left out. Background scores are picked
on `train`, figures come from `val`; settings of the fast filters were chosen on 60 images of
`train` (`--choose`). One thread; CPU time of the process. Memory: growth of the peak resident size
over one photo of 500x375 and two maps, in a process of its own (Linux). CRFs get the background
score that is best on `train` without any refiner.

Cost (`--cost` measures it alone): CPU time on photos of 500x375 and maps of one and three classes
on a grid of 24x24, pooled from the true masks, with noise. Refiners take turns on each photo; the
median of the rounds is taken for each photo, then the mean over the photos. CRFs have the lattice
of the Gaussian kernel in the cache, as from the second photo of a size on.

Boundary IoU is that of Cheng et al. 2021, pixels of all images together
(`camkit.score.boundary_confusion`).
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tables import CHAIN, CLASSES, RESULTS, Clean
from torch import Tensor
from watching import _peak

import camkit
from camkit.capture import Capture
from camkit.cli.models import DEFAULT_MODEL, data_folder, open_model
from camkit.data import DataSet, Sample, open_dataset, read_mask
from camkit.manifest import environment
from camkit.method import CALIBRATED
from camkit.ops.mean_field import Kernels
from camkit.photo import read_picture
from camkit.refiners import Refiner
from camkit.refiners.crf import PRESETS
from camkit.score import (
    THRESHOLDS,
    best_threshold,
    boundary_confusion,
    confusion_matrix,
    mean_iou,
    paired_gain,
    sweep_confusions,
)
from camkit.screen import progress
from camkit.tensors import IGNORE

LABELS = len(CLASSES) + 1
CHOSEN_ON = 60
CLASS_COUNTS = (1, 3)
COST_PHOTOS = 5


def nothing(cam: Tensor, capture: Capture) -> Tensor:
    del capture
    return cam


@dataclass(frozen=True)
class OnSeed:
    """In place of the propagation that the maps of the others come from."""

    refiner: Refiner

    def __call__(self, cam: Tensor, capture: Capture) -> Tensor:
        return camkit.normalize_cam(self.refiner(cam, capture), mode="minmax")


def refiners(background_score: float) -> dict[str, Refiner]:
    crf = camkit.DenseCRF(preset="clip_es", background_score=background_score)
    return {
        "none": nothing,
        "DenseCRF": crf,
        "DenseCRF, half size": camkit.refiners.AtReducedSize(crf, scale=0.5),
        "DenseCRF, quarter size": camkit.refiners.AtReducedSize(crf, scale=0.25),
        "PixelAdaptive, half size": camkit.refiners.PixelAdaptive(scale=0.5),
        "GuidedFilter": camkit.refiners.GuidedFilter(),
        "FastGlobalSmooth": camkit.refiners.FastGlobalSmooth(),
        "Superpixels, SLIC": camkit.refiners.Superpixels("slic"),
        "Superpixels, Felzenszwalb": camkit.refiners.Superpixels("felzenszwalb"),
        "RandomWalk in place of propagation": OnSeed(camkit.refiners.RandomWalk()),
    }


def candidates(background_score: float) -> dict[str, Refiner]:
    """Settings among which the defaults were chosen."""

    def grid(make: Callable[..., Refiner], **values: Sequence[object]) -> list[Refiner]:
        return [
            make(**dict(zip(values, chosen, strict=True)))
            for chosen in itertools.product(*values.values())
        ]

    slic, felzenszwalb = ("slic",), ("felzenszwalb",)
    kernels = ("clip_es", "psa", "irn", "afa", "toco", "toco_cam", "mctformer_seg")
    met = {"background_score": (background_score,)}
    found = [
        *grid(camkit.DenseCRF, preset=kernels, temperature=(0.25, 0.5, 1.0), **met),
        *grid(
            camkit.refiners.GuidedFilter, radius=(4, 8, 16), eps=(1e-4, 1e-3, 1e-2), scale=(0.5,)
        ),
        *grid(camkit.refiners.GuidedFilter, radius=(4, 8), eps=(1e-3,), scale=(0.25,)),
        *grid(
            camkit.refiners.FastGlobalSmooth,
            smoothness=(100.0, 300.0, 1000.0, 3000.0),
            colour_width=(0.01, 0.02, 0.04, 0.08),
        ),
        *map(OnSeed, grid(camkit.refiners.RandomWalk, beta=(1.0, 2.0, 4.0), logt=(1, 2, 3))),
        *map(OnSeed, grid(camkit.refiners.RandomWalk, beta=(1.0, 2.0), logt=(1,), boxes=(0.4,))),
        *grid(
            camkit.refiners.Superpixels, method=slic, size=(200, 400, 800), coherence=(10.0, 20.0)
        ),
        *grid(camkit.refiners.Superpixels, method=slic, size=(200,), vote=(0.5, 0.6)),
        *grid(
            camkit.refiners.Superpixels,
            method=felzenszwalb,
            size=(50, 200),
            coherence=(30.0, 100.0),
        ),
        *grid(camkit.refiners.Superpixels, method=felzenszwalb, size=(100,), coherence=(300.0,)),
    ]
    return {"none": nothing, **{repr(refiner): refiner for refiner in found}}


@dataclass(frozen=True)
class Row:
    """What was measured of one refiner; IoU in [0, 1], CPU milliseconds an image."""

    name: str
    settings: str
    background_score: float
    tuned_mean_iou: float
    mean_iou: float
    boundary_iou: float
    milliseconds: float
    gain: tuple[float, float, float]
    peak_mebibytes: float | None = None


@dataclass(frozen=True)
class Seen:
    """An image with its maps and its truth."""

    seed: Tensor
    cam: Tensor
    classes: Tensor
    capture: Capture
    truth: Tensor


class Images:
    """Images of a data set with their maps, one forward each."""

    def __init__(self, dataset: DataSet) -> None:
        self.opened = open_model(DEFAULT_MODEL)
        self.dataset = dataset
        self.vocabulary = self.opened.vocabulary.subset(CLASSES)

    def __call__(self, samples: Sequence[Sample], title: str) -> Iterator[Seen]:
        for sample in progress(samples, desc=title, unit="image", mininterval=2):
            present = [self.dataset.classes[index] for index in sample.classes]
            asked = [index for index, name in enumerate(CLASSES) if name in present]
            if asked and sample.mask is not None:
                yield self._see(sample, torch.tensor([asked]))

    def _see(self, sample: Sample, classes: Tensor) -> Seen:
        colours, model, settings = read_picture(sample.photo), self.opened.model, self.opened.photos
        photo = camkit.photo_from_array(
            colours,
            size=settings.size,
            mean=settings.mean,
            std=settings.std,
            multiple=settings.multiple,
        )
        watched = camkit.watch(model, vocabulary=self.vocabulary)
        handle = camkit.attach(model, CALIBRATED.method.edit, blocks=4)
        with torch.no_grad(), watched as seen:
            model(photo.pixels)
        handle.remove()
        truth = read_mask(
            sample.mask,
            size=photo.size,
            num_classes=len(self.dataset.classes),
            form=sample.form,
            classes=[self.dataset.classes.index(name) for name in CLASSES],
        )
        full = torch.from_numpy(colours).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            cam = seed = camkit.normalize_cam(CALIBRATED.method.seed(seen.capture, classes).float())
            for stage in CHAIN:
                cam = stage(cam, seen.capture)
        return Seen(seed, cam, classes, replace(seen.capture, rgb=full), truth)


def refine(refiner: Refiner, seen: Seen) -> tuple[Tensor, float]:
    """Maps at the size of the truth, and the milliseconds that the refiner alone took."""
    start = time.process_time()
    with torch.no_grad():
        refined = refiner(seen.seed if isinstance(refiner, OnSeed) else seen.cam, seen.capture)
    spent = time.process_time() - start
    rows, cols = seen.truth.shape
    return camkit.resize_cam(refined, (rows, cols)).clamp(0, 1), 1000 * spent


def tune(each: dict[str, Refiner], images: Iterator[Seen]) -> dict[str, tuple[float, float]]:
    """Best background score of every refiner, and the mean IoU there."""
    totals: dict[str, Tensor] = {}
    for seen in images:
        for name, refiner in each.items():
            cam, _ = refine(refiner, seen)
            swept = sweep_confusions(cam[0], seen.classes[0], seen.truth, num_classes=LABELS)
            totals[name] = totals.get(name, 0) + swept
    best = {name: best_threshold(total, THRESHOLDS) for name, total in totals.items()}
    return {name: (found.threshold, found.mean_iou) for name, found in best.items()}


def measure(
    each: dict[str, Refiner], tuned: dict[str, tuple[float, float]], images: Iterator[Seen]
) -> list[Row]:
    matrices: dict[str, list[Tensor]] = {name: [] for name in each}
    outlines: dict[str, list[Tensor]] = {name: [] for name in each}
    times: dict[str, list[float]] = {name: [] for name in each}
    for seen in images:
        for name, refiner in each.items():
            cam, spent = refine(refiner, seen)
            mask = camkit.to_mask(cam, seen.classes, background_score=tuned[name][0])[0]
            matrices[name].append(confusion_matrix(seen.truth, mask, num_classes=LABELS))
            outlines[name].append(boundary_confusion(seen.truth, mask, num_classes=LABELS))
            times[name].append(spent)
    rows, base = [], torch.stack(matrices["none"])
    for name, refiner in each.items():
        found = torch.stack(matrices[name])
        gain = paired_gain(base, found)
        outline = torch.stack(outlines[name]).sum(0)
        rows.append(
            Row(
                name=name,
                settings=repr(refiner) if name != "none" else "",
                background_score=tuned[name][0],
                tuned_mean_iou=tuned[name][1],
                mean_iou=float(mean_iou(found.sum(0))),
                boundary_iou=float(mean_iou(outline, classes=range(LABELS))),
                milliseconds=float(np.mean(times[name])),
                gain=(gain.gain, gain.low, gain.high),
            )
        )
    return rows


def growth(name: str) -> float:
    """Growth of the peak over a call of one refiner, which has run on a small photo before."""
    refiner, model = refiners(0.5)[name], open_model(DEFAULT_MODEL).model
    for rows, cols in ((48, 64), (375, 500)):
        with torch.no_grad(), camkit.watch(model, rgb=torch.rand(1, 3, rows, cols)) as seen:
            model(torch.randn(1, 3, 288, 384))
        cam = torch.rand(1, 2, 18, 24)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        before = _peak()
        with torch.no_grad():
            refiner(cam, seen.capture)
    return _peak() - before


def with_memory(row: Row) -> Row:
    command = [sys.executable, __file__, "--grow", row.name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return replace(row, peak_mebibytes=float(done.stdout))


def costly() -> dict[str, Refiner]:
    """Refiners whose cost is measured; CRFs once for each set of kernels."""
    names: dict[Kernels, list[str]] = {}
    for name, kernels in PRESETS.items():
        names.setdefault(kernels, []).append(name)
    default = camkit.DenseCRF()
    return {
        "GuidedFilter": camkit.refiners.GuidedFilter(),
        "FastGlobalSmooth": camkit.refiners.FastGlobalSmooth(),
        "PixelAdaptive": camkit.refiners.PixelAdaptive(),
        "PixelAdaptive, half size": camkit.refiners.PixelAdaptive(scale=0.5),
        f"DenseCRF, full size: {default.preset}": default,
        **{
            f"DenseCRF, half size: {', '.join(same)}": camkit.refiners.AtReducedSize(
                camkit.DenseCRF(preset=same[0]), scale=0.5
            )
            for same in names.values()
        },
    }


def cost(samples: Sequence[Sample], rounds: int) -> dict[str, Any]:
    """CPU milliseconds of each refiner for a photo, by number of classes."""
    model, each = open_model(DEFAULT_MODEL).model, costly()
    totals = {name: dict.fromkeys(CLASS_COUNTS, 0.0) for name in each}
    for sample, classes in itertools.product(samples, CLASS_COUNTS):
        cam, capture = coarse(sample, classes, model)
        spent: dict[str, list[float]] = {name: [] for name in each}
        for round_ in range(rounds + 1):
            for name, refiner in each.items():
                start = time.process_time()
                with torch.no_grad():
                    refiner(cam, capture)
                if round_:  # the first fills caches
                    spent[name].append(time.process_time() - start)
        for name, seconds in spent.items():
            totals[name][classes] += 1000 * float(np.median(seconds)) / len(samples)
    rows = [
        {"name": name, **{f"classes_{count}_ms": round(ms, 1) for count, ms in found.items()}}
        for name, found in totals.items()
    ]
    return {"environment": environment(), "photos": len(samples), "rounds": rounds, "rows": rows}


def coarse(sample: Sample, classes: int, model: torch.nn.Module) -> tuple[Tensor, Capture]:
    """Maps of true masks on a grid of 24x24, with noise, and the capture of the photo."""
    mask = torch.from_numpy(np.array(Image.open(sample.mask)))
    there = [value for value in mask.unique().tolist() if 0 < value < IGNORE][:classes]
    truth = torch.zeros(1, classes, *mask.shape)
    for slot, value in enumerate(there):
        truth[0, slot] = mask == value
    generator = torch.Generator().manual_seed(0)
    cam = F.adaptive_avg_pool2d(truth, 24)
    cam = (cam + 0.2 * torch.randn(cam.shape, generator=generator)).clamp(0, 1)
    rgb = torch.from_numpy(read_picture(sample.photo)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad(), camkit.watch(model, rgb=rgb) as seen:
        model(torch.zeros(1, 3, 384, 384))
    return cam, seen.capture


def cost_table(found: dict[str, Any]) -> str:
    heads = ["refiner", *(f"ms, {count} class{'es' * (count > 1)}" for count in CLASS_COUNTS)]
    lines = ["| " + " | ".join(heads) + " |", "|" + len(heads) * "---|"]
    for row in found["rows"]:
        cells = [f"{row[f'classes_{count}_ms']:.0f}" for count in CLASS_COUNTS]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    told = (
        f"CPU time for a photo of 500x375, one thread, maps on a grid of 24x24; mean over "
        f"{found['photos']} photos, median of {found['rounds']} rounds each.\n\n"
    )
    return told + "\n".join(lines)


def of_one_size(samples: Sequence[Sample]) -> list[Sample]:
    sizes = ((sample, Image.open(sample.photo).size) for sample in samples[::10] if sample.mask)
    return [sample for sample, size in sizes if size == (500, 375)][:COST_PHOTOS]


def write(found: dict[str, Any]) -> None:
    """Write what was measured; parts that were not measured now stay as they were."""
    path = RESULTS / "edges.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= found
    path.write_text(json.dumps(known, indent=2) + "\n")
    parts = []
    if "rows" in known:
        images = known["images"]
        rows = [Row(**row) for row in known["rows"]]
        parts.append(
            f"Images: {images['train']} of train, {images['val']} of val.\n\n{table(rows)}"
        )
    if "cost" in known:
        parts.append(cost_table(known["cost"]))
    (RESULTS / "edges.md").write_text("\n\n".join(parts) + "\n")


def table(rows: Sequence[Row]) -> str:
    columns = ["refiner", "background score", "on train", "mIoU", "gain (95% interval)"]
    columns += ["boundary IoU", "ms", "MiB"]
    lines = ["| " + " | ".join(columns) + " |", "|" + len(columns) * "---|"]
    for row in rows:
        gain, low, high = (f"{100 * value:+.1f}" for value in row.gain)
        cells = [
            row.name,
            f"{row.background_score:.2f}",
            f"{100 * row.tuned_mean_iou:.1f}",
            f"{100 * row.mean_iou:.1f}",
            "" if row.name == "none" else f"{gain} ({low} to {high})",
            f"{100 * row.boundary_iou:.1f}",
            f"{row.milliseconds:.0f}",
            "" if row.peak_mebibytes is None else f"{row.peak_mebibytes:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/ and weights/")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="only the first images of each split")
    parser.add_argument("--tune-limit", type=int, help="only the first images of train")
    parser.add_argument("--choose", action="store_true", help="compare settings on train alone")
    parser.add_argument("--only", default="", help="with --choose: names that begin so")
    parser.add_argument("--cost", action="store_true", help="measure only the cost")
    parser.add_argument("--rounds", type=int, default=5, help="of the cost")
    parser.add_argument("--grow", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.grow:
        print(growth(options.grow))
        return
    dataset = Clean(open_dataset(folder / "voc12_animals"))
    if options.cost:
        found = cost(of_one_size(dataset.split("train")), options.rounds)
        print(cost_table(found))
        write({"cost": found})
        return
    images = Images(dataset)
    if options.choose:
        samples = dataset.split("train")[::2][: options.limit or CHOSEN_ON]
        alone = tune({"none": nothing}, images(samples, "without refiners"))["none"][0]
        named = candidates(alone).items()
        each = {n: r for n, r in named if n == "none" or n.startswith(options.only)}
        rows = measure(each, tune(each, images(samples, "tuning")), images(samples, "measuring"))
        print(table(rows))
        return
    train, val = (dataset.split(name)[: options.limit] for name in ("train", "val"))
    train = train[: options.tune_limit]
    alone = tune({"none": nothing}, images(train, "without refiners"))
    each = refiners(alone["none"][0])
    rows = measure(each, tune(each, images(train, "tuning")), images(val, "measuring"))
    rows = [with_memory(row) for row in rows]
    print(table(rows))
    count = {"train": len(train), "val": len(val)}
    found = {"environment": environment(), "images": count, "rows": [asdict(row) for row in rows]}
    write(found | {"cost": cost(of_one_size(dataset.split("train")), options.rounds)})


if __name__ == "__main__":
    main()
