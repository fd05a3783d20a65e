"""Layer tools on real photos: the lens by depth, fusions, the layer that agrees best, concepts.

    CAMKIT_DATA=folder python benchmarks/layers.py [--limit 24]

Background scores are picked on `train`, figures come from `val`, as in gains.py. Last comes what a
choice by suppression is worth: for each photo and class it takes the layer and the threshold that
leave least of the class's score outside a small area, and no mask has a part in it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import camkit
from camkit import bench
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, data_folder, open_model
from camkit.data import DataSet, Sample, open_dataset, read_mask
from camkit.manifest import environment
from camkit.score import confusion_matrix, mean_iou

RESULTS = Path(__file__).parent / "results" / "layers.json"
CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
LENSES = tuple(camkit.LogitLensSeed(layer) for layer in range(-6, 0))
PAIR = (camkit.LogitLensSeed(-2), camkit.LogitLensSeed(-1))
SEEDS = {
    "class weight": camkit.ClassWeightSeed(),
    **{f"lens {lens.layer}": lens for lens in LENSES},
    "lenses -2 and -1, mean": camkit.FusedSeed(PAIR, "mean"),
    "lenses -2 and -1, maximum": camkit.FusedSeed(PAIR, "max"),
    "lenses -2 and -1, product": camkit.FusedSeed(PAIR, "product"),
    "lens that agrees best": camkit.AgreeingSeed(LENSES),
    "lens that agrees with the gradient seed": camkit.AgreeingSeed(LENSES, camkit.GradientSeed()),
    "gradient": camkit.GradientSeed(),
    "gradient, last block": camkit.BlockSeed(camkit.GradientSeed(), (-1,)),
    "concepts": camkit.ConceptSeed(),
}


def chosen_iou(opened: OpenedModel, dataset: DataSet, samples: Sequence[Sample]) -> float:
    """Mean IoU of masks whose layer and threshold were chosen photo by photo."""
    vocabulary = opened.vocabulary.subset(CLASSES)
    choose = bench.SuppressionChoice()
    candidates = [bench.Variant(name, SEEDS[name]) for name in SEEDS if name.startswith("lens -")]
    total = torch.zeros(len(CLASSES) + 1, len(CLASSES) + 1, dtype=torch.int64)
    for sample in tqdm(samples, desc="choosing", unit="image"):
        photo = opened.photos.load(sample.photo)
        wanted = [dataset.classes.index(name) for name in CLASSES]
        truth = read_mask(
            sample.mask,
            size=photo.size,
            num_classes=len(dataset.classes),
            form=sample.form,
            classes=wanted,
        )
        asked = [place for place, index in enumerate(wanted) if index in sample.classes]
        mask = torch.zeros(photo.size, dtype=torch.int64)
        if asked:
            picked = choose(opened.model, photo, asked, candidates, vocabulary)
            cam = torch.stack([one.cam for one in picked])[None]
            cam = camkit.resize_cam(cam, photo.size).clamp(0, 1)
            mask = camkit.to_mask(cam, torch.tensor([asked]), background_score=0.5)[0].long()
        total += confusion_matrix(truth, mask, num_classes=len(CLASSES) + 1)
    return float(mean_iou(total))


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
    single = bench.Variant("class weight", SEEDS["class weight"])
    others = [bench.Variant(name, seed, base=single) for name, seed in SEEDS.items()]
    report = bench.run(
        opened.model,
        dataset,
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=[single, *others[1:]],
        split="val",
        tune_split="train",
        photos=opened.photos,
        limit=args.limit,
    )
    print(bench.to_markdown(report))
    chosen = chosen_iou(opened, dataset, dataset.split("val")[: args.limit])
    print(f"lens and threshold chosen by suppression: {chosen:.1%}")
    found = {
        "report": json.loads(bench.to_json(report)),
        "chosen_by_suppression": chosen,
        "limit": args.limit,
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
