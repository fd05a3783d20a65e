"""Layer tools on real photos: the lens by depth, fusions, the layer that agrees best.

    CAMKIT_DATA=folder python benchmarks/layers.py [--limit 24]

Background scores are picked on `train`, figures come from `val`, as in gains.py. Last comes what a
choice by suppression is worth: for each photo and class it takes the layer and the threshold that
leave least of the class's score outside a small area, and no mask has a part in it.
"""

from collections.abc import Sequence

import torch
from tables import CLASSES, Measured, measure, table_options, write
from tqdm import tqdm

import camkit
from camkit import bench
from camkit.data import Sample, read_mask
from camkit.score import confusion_matrix, mean_iou

LENSES = tuple(camkit.contrib.LogitLensSeed(layer) for layer in range(-6, 0))
PAIR = (camkit.contrib.LogitLensSeed(-2), camkit.contrib.LogitLensSeed(-1))
SEEDS = {
    "class weight": camkit.seeds.ClassWeightSeed(),
    **{f"lens {lens.layer}": lens for lens in LENSES},
    "lenses -2 and -1, mean": camkit.seeds.FusedSeed(PAIR, "mean"),
    "lenses -2 and -1, maximum": camkit.seeds.FusedSeed(PAIR, "max"),
    "lenses -2 and -1, product": camkit.seeds.FusedSeed(PAIR, "product"),
    "lens that agrees best": camkit.contrib.BestAgreementSeed(LENSES),
    "lens that agrees with the gradient seed": camkit.contrib.BestAgreementSeed(
        LENSES, camkit.GradientSeed()
    ),
    "gradient": camkit.GradientSeed(),
    "gradient, last block": camkit.contrib.BlockSeed(camkit.GradientSeed(), (-1,)),
}


def chosen_iou(found: Measured, samples: Sequence[Sample]) -> float:
    """Mean IoU of masks whose layer and threshold were chosen photo by photo."""
    opened, dataset, vocabulary = found.opened, found.dataset, found.vocabulary
    choose = bench.SuppressionChoice()
    candidates = [
        bench.Variant(name, camkit.Method(SEEDS[name], refine=()))
        for name in SEEDS
        if name.startswith("lens -")
    ]
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
    options = table_options(__doc__).parse_args()
    single = bench.Variant("class weight", camkit.Method(SEEDS["class weight"], refine=()))
    others = [
        bench.Variant(name, camkit.Method(seed, refine=()), base=single)
        for name, seed in SEEDS.items()
    ]
    found = measure([single, *others[1:]], options)
    chosen = chosen_iou(found, found.dataset.split("val")[: options.limit])
    told = f"Lens and threshold chosen photo by photo, by suppression: {chosen:.1%}."
    write(found.report, options, "layers", told=told, chosen_by_suppression=chosen)


if __name__ == "__main__":
    main()
