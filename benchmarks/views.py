"""What other sizes, mirror images and tiles of a photo add to the default seed, and to its maps.

    CAMKIT_DATA=folder python benchmarks/views.py [--limit 24]

Background scores are picked on `train`, figures come from `val`, as in gains.py. The CPU time is
that of making the maps of one line alone, per image, one thread.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from tables import measure, table_options, write

from camkit import bench
from camkit.bench.evaluator import variant_maps
from camkit.cli.models import OpenedModel
from camkit.data import Sample
from camkit.method import CALIBRATED, WITHOUT_EDGES
from camkit.seeds import Views

METHODS = {"hybrid": CALIBRATED.method}
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
    for name, method in METHODS.items():
        for refine, words in ((), ""), (WITHOUT_EDGES, ", refined"):
            single = bench.Variant(f"{name}{words}", replace(method, refine=refine))
            found.append(single)
            for label, views in VIEWS.items():
                seen = replace(single.method, views=views)
                found.append(bench.Variant(f"{name}{words}: {label}", seen, base=single))
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
    options = table_options(__doc__).parse_args()
    found = measure(lines(), options)
    timed = found.dataset.split("val")[:3]
    seconds = {
        v.name: seconds_per_image(found.opened, timed, v) for v in lines() if not v.method.refine
    }
    told = "\n".join(f"- {name}: {value:.2f} s of CPU an image" for name, value in seconds.items())
    write(found.report, options, "views", told=told, cpu_seconds_per_image=seconds)


if __name__ == "__main__":
    main()
