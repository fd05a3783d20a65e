"""The published table: what refiners gain on held-out images, over their seeds and over controls.

    CAMKIT_DATA=folder python benchmarks/gains.py
    CAMKIT_DATA=folder python benchmarks/gains.py --coco
    CAMKIT_DATA=folder python benchmarks/gains.py --html out/gains.html

ViT-Ti with its ImageNet classifier. Background scores are picked on `train` of voc12_animals,
figures come from its `val`, or from photos of COCO. Settings of the refiners were chosen on
`train` (docs/benchmark.md).
"""

import argparse
import sys
from pathlib import Path

from doei_gains import CHAIN, CLASSES, KEPT, RESULTS, SEED, Across

import camkit
from camkit.bench import (
    Variant,
    collect_examples,
    run,
    standard_variants,
    to_html,
    to_json,
    to_markdown,
)
from camkit.cli.models import DEFAULT_MODEL, data_folder, open_model
from camkit.data import DataSet, open_dataset

BEST = "gradient + balanced propagation"


def variants() -> tuple[Variant, ...]:
    """The standard seeds and propagations, controls of the best, and what follows colours."""
    lines = {line.name: line for line in standard_variants()}
    seed, minmax = lines["gradient"], CHAIN[1]
    controls = tuple(
        Variant(f"control: gradient + blur {width:g}", SEED, (camkit.Blur(width), minmax), seed)
        for width in (1.0, 2.0)
    )
    best = lines[BEST] = Variant(BEST, SEED, CHAIN, seed, controls=controls)
    crf = camkit.DenseCRF(background_score=0.5)
    edges = {
        "GuidedFilter": camkit.GuidedFilter(),
        "PixelAdaptive, half size": camkit.PixelAdaptive(scale=0.5),
        "DenseCRF": crf,
        "DenseCRF, half size": camkit.Reduced(crf, scale=0.5),
    }
    after = (
        Variant(f"{BEST} + {name}", SEED, (*CHAIN, refiner), best)
        for name, refiner in edges.items()
    )
    return (*lines.values(), *controls, *after)


def main() -> None:
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/ and weights/")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="only the first images of each split")
    parser.add_argument("--coco", action="store_true", help="measure on coco100_voc")
    parser.add_argument("--html", type=Path, help="also write a page with pictures there")
    options = parser.parse_args()
    data: DataSet = open_dataset(folder / "voc12_animals")
    tune_split, split, name = "train", "val", "gains"
    if options.coco:
        data = Across(data, open_dataset(folder / "coco100_voc"))
        tune_split, split, name = *data.splits, "gains_coco"
    opened = open_model(DEFAULT_MODEL)
    vocabulary = opened.vocabulary.subset(CLASSES)
    report = run(
        opened.model,
        data,
        vocabulary=vocabulary,
        variants=variants(),
        split=split,
        tune_split=tune_split,
        photos=opened.photos,
        cache=KEPT,
        outlines=True,
        limit=options.limit,
    )
    (RESULTS / f"{name}.json").write_text(to_json(report))
    (RESULTS / f"{name}.md").write_text(to_markdown(report))
    print(to_markdown(report))
    if options.html:
        shown = collect_examples(
            opened.model, data, report, vocabulary=vocabulary, photos=opened.photos
        )
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(to_html(report, shown), encoding="utf-8")


if __name__ == "__main__":
    main()
