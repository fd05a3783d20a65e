"""What other sizes, mirror images and tiles of a photo add to a seed, and to refined maps.

    CAMKIT_DATA=folder python benchmarks/views.py [--limit 24]

Background scores are picked on `train`, figures come from `val`, as in gains.py. The CPU time is
that of making the maps of one line alone, per image, one thread.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import camkit
from camkit import bench
from camkit.bench.maps import variant_maps
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, data_folder, open_model
from camkit.data import Sample, open_dataset
from camkit.manifest import environment
from camkit.pipeline import DEFAULT_REFINE
from camkit.seed import Seed, Views

RESULTS = Path(__file__).parent / "results" / "views.json"
CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
SEEDS: dict[str, Seed] = {
    "gradient": camkit.GradientSeed(),
    "class weight": camkit.ClassWeightSeed(),
}
TOCO = (1.0, 0.5, 1.5)
VIEWS = {
    "mirrored": Views(flip=True),
    "MCTformer+": Views(scales=(1.0, 0.75, 1.25), flip=True),
    "ToCo": Views(scales=TOCO, flip=True, join_flip="max"),
    "IRN": Views(scales=(1.0, 0.5, 1.5, 2.0), flip=True),
    "ToCo's sizes, maximum": Views(scales=TOCO, flip=True, join="max"),
    "ToCo's sizes, levelled": Views(scales=TOCO, flip=True, normalize="before"),
    "half size": Views(scales=(1.0, 0.5), flip=True),
    "tiles": Views(tiles=2),
}


def lines() -> list[bench.Variant]:
    found = []
    for name, seed in SEEDS.items():
        for refine, words in ((), ""), (DEFAULT_REFINE, ", refined"):
            single = bench.Variant(f"{name}{words}", seed, refine)
            found.append(single)
            for label, views in VIEWS.items():
                line = f"{name}{words}: {label}"
                found.append(bench.Variant(line, seed, refine, single, views=views))
    return found


def seconds_per_image(
    opened: OpenedModel, samples: Sequence[Sample], variant: bench.Variant
) -> float:
    classes = torch.tensor([[0]])
    photos = [opened.photos.load(sample.photo) for sample in samples]
    variant_maps(opened.model, photos[0], classes, [variant], opened.vocabulary)
    start = time.process_time()
    for photo in photos:
        variant_maps(opened.model, photo, classes, [variant], opened.vocabulary)
    return (time.process_time() - start) / len(photos)


def main() -> None:
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/ and weights/")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="use only the first images of each split")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(DEFAULT_MODEL, size=384)
    dataset = open_dataset(folder / "voc12_animals")
    vocabulary = opened.vocabulary.subset(CLASSES)
    report = bench.run(
        opened.model,
        dataset,
        vocabulary=vocabulary,
        variants=lines(),
        split="val",
        tune_split="train",
        photos=opened.photos,
        limit=args.limit,
    )
    print(bench.to_markdown(report))
    timed = dataset.split("val")[:3]
    seconds = {v.name: seconds_per_image(opened, timed, v) for v in lines() if not v.refine}
    for name, value in seconds.items():
        print(f"{value:6.2f} s  {name}")
    found = {
        "report": json.loads(bench.to_json(report)),
        "cpu_seconds_per_image": seconds,
        "limit": args.limit,
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
