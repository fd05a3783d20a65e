"""Measure a refiner on your own masks. Runs on drawn shapes, no download.

The folder here has the layout of PASCAL VOC. The same function opens COCO, ImageNet-S, and plain
folders with images/, masks/ and labels.csv.
"""

import tempfile
from pathlib import Path

import timm
import torch

import camkit
from camkit.bench import PhotoSettings, Variant, run, to_markdown
from camkit.data import open_dataset, write_shapes

if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as home:
        write_shapes(Path(home) / "VOC2012", 16, size=(64, 96))
        dataset = open_dataset(Path(home) / "VOC2012")  # your folder
        model = timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, depth=3, num_classes=3, dynamic_img_size=True
        ).eval()
        seed = Variant("gradient", camkit.Method(camkit.GradientSeed(), refine=()))
        refine = (camkit.Propagate(steps=2, balance=3), camkit.refiners.Normalize("minmax"))
        report = run(
            model,
            dataset,
            vocabulary=camkit.Vocabulary(dataset.classes),  # outputs of the model, by name
            variants=[
                seed,
                Variant("refined", camkit.Method(camkit.GradientSeed(), refine=refine), base=seed),
            ],
            split="val",  # figures are measured here
            tune_split="train",  # background scores are chosen here
            photos=PhotoSettings(size=96),
        )
    print(to_markdown(report))
    print("(random weights: this shows how to measure, not how good the method is)")
