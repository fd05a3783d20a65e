"""What fitting a read-out costs, over plain forwards and over the chain that it is fitted on.

    CAMKIT_DATA=folder python benchmarks/fit_cost.py

ViT-Ti/16 at a long side of 384 pixels, labelled photos of `train` of voc12_animals, one thread. CPU
time of the process. Photos: batch by batch, a plain forward, the chain (`Pipeline.stages`) and the
fit (`camkit.fitting.Fitter` and `Sums`) take turns; ratios are taken batch by batch. Runs:
`camkit.bulk.run` in one process, without a fit and with one. Memory: resident size of the process
while `camkit.bulk.fit_readout` goes through photos of 64 pixels, early and late.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from bulk_setting import MODEL, RESULTS, bulk_recipe, link_photos, resident, watched
from tables import BEFORE, CLASSES, found_data

import camkit
from camkit.bulk import Writing, fit_readout, run
from camkit.cli.models import OpenedModel, open_model
from camkit.data import Sample, open_dataset
from camkit.fitting import Fitter, Sums
from camkit.manifest import environment
from camkit.method import CALIBRATED, WITHOUT_EDGES
from camkit.photo import Photo

METHODS = {
    "without edges": replace(CALIBRATED.method, refine=WITHOUT_EDGES),
    "former default, with gradients": BEFORE,
}
Batch = tuple[torch.Tensor, torch.Tensor, list[list[str]]]


def batches(pipeline: camkit.Pipeline, samples: list[Sample], names: Any) -> list[Batch]:
    """Batches of at most eight photos of one size, with their labels."""
    groups: dict[torch.Size, list[tuple[Photo, list[str]]]] = {}
    for sample in samples:
        photo = pipeline.prepare(sample.photo)
        labels = [names[index] for index in sample.classes if names[index] in CLASSES]
        groups.setdefault(photo.pixels.shape, []).append((photo, labels))
    parts = [part[i : i + 8] for part in groups.values() for i in range(0, len(part), 8)]
    return [
        (
            torch.cat([photo.pixels for photo, _ in part]),
            torch.cat([photo.rgb for photo, _ in part]),
            [labels for _, labels in part],
        )
        for part in parts
    ]


def photos(opened: OpenedModel, method: camkit.Method, limit: int, rounds: int) -> dict[str, Any]:
    """CPU time of a photo for a forward, the chain and the fit."""
    dataset = open_dataset(found_data() / "voc12_animals")
    names = dataset.classes
    samples = [s for s in dataset.split("train") if any(names[c] in CLASSES for c in s.classes)]
    vocabulary = opened.vocabulary.subset(CLASSES)
    pipeline = camkit.Pipeline(
        opened.model, method, vocabulary=vocabulary, photos=opened.photos, call=opened.call
    )
    fitter, sums = Fitter(pipeline), Sums()
    found: dict[str, list[float]] = {"forward": [], "chain": [], "fit": []}
    for round_ in range(rounds + 1):
        for pixels, rgb, labels in batches(pipeline, samples[:limit], names):
            ways: dict[str, Callable[[], object]] = {
                "forward": lambda p=pixels: opened.model(p),
                "chain": lambda b=(pixels, rgb, labels): pipeline.stages(
                    b[0], rgb=b[1], classes=b[2]
                ),
                "fit": lambda b=(pixels, rgb, labels): sums.add(fitter.of(*b)),
            }
            for way, work in ways.items():
                begun = time.process_time()
                with torch.no_grad():
                    work()
                if round_:  # the first round warms up
                    found[way].append((time.process_time() - begun) / len(labels))
    ratios = [fit / chain for fit, chain in zip(found["fit"], found["chain"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        **{f"{way}_ms": 1000 * mean(times) for way, times in found.items()},
        "fit_over_chain": median(ratios),
        "low": low,
        "high": high,
        "fit_over_forward": mean(found["fit"]) / mean(found["forward"]),
    }


def runs(photos: list[Path], work: Path, count: int) -> dict[str, float]:
    """CPU time of an image in a run without a fit, and with one."""
    source = link_photos(work / "in", photos, count)
    opened = open_model(MODEL)
    recipe = replace(
        bulk_recipe(opened.photos.size, crf=False),
        method=METHODS["without edges"],
        writing=Writing(),
    )
    found = {}
    for name, form in (("run", None), ("run with a fit", "auto")):
        begun = time.process_time()
        run(replace(recipe, fit=form), source, work / name, workers=0, threads=1)
        found[name] = 1000 * (time.process_time() - begun) / count
    return found


def memory(photos: list[Path], work: Path, count: int) -> dict[str, float]:
    """Resident memory of the process, early and late in a fit."""
    source = link_photos(work / "in", photos, count)
    recipe = replace(bulk_recipe(64, crf=False), method=METHODS["without edges"], fit="auto")
    series: list[int] = []
    with watched(1, lambda: series.append(resident(os.getpid()))):
        fit_readout(recipe, source, work / "a.safetensors", workers=0, threads=1)
    parts = len(series)
    return {
        "images": count,
        "mib_from_20_to_40_percent": mean(series[parts // 5 : 2 * parts // 5]),
        "mib_from_80_percent": mean(series[4 * parts // 5 :]),
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| chain | forward, ms | chain, ms | fit, ms | fit over chain (quartiles) | over forward |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in results["photos"].items():
        lines.append(
            f"| {name} | {row['forward_ms']:.0f} | {row['chain_ms']:.0f} | {row['fit_ms']:.0f} | "
            f"{row['fit_over_chain']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | "
            f"{row['fit_over_forward']:.2f} |"
        )
    taken, held = results["runs"], results["memory"]
    lines += [
        "",
        f"An image of a run without edges takes {taken['run']:.0f} ms of CPU time, and "
        f"{taken['run with a fit']:.0f} ms with a fit "
        f"({taken['run with a fit'] / taken['run']:.2f} x). In a fit over {held['images']} "
        "photos the memory of the process changed by "
        f"{held['mib_from_80_percent'] - held['mib_from_20_to_40_percent']:+.0f} MiB between 20 to "
        "40% of the time and the last fifth of it.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=32, help="photos (default: 32)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=1500, help="of the measured memory")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(MODEL)
    pictures = sorted((found_data() / "voc12_animals" / "JPEGImages").glob("*.jpg"))
    results: dict[str, Any] = {
        "photos": {
            name: photos(opened, method, options.limit, options.rounds)
            for name, method in METHODS.items()
        }
    }
    for name, part, count in (("runs", runs, options.limit), ("memory", memory, options.images)):
        with tempfile.TemporaryDirectory() as work:
            results[name] = part(pictures, Path(work), count)
    results |= {"limit": options.limit, "rounds": options.rounds, "environment": environment()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fit_cost.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "fit_cost.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
