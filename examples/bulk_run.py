"""Segment a folder of photos in a resumable run. Drawn pictures, random weights, no download.

From the shell, with trained weights: camkit run photos --classes cat,dog --out masks
"""

import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image

import camkit
from camkit.bulk import Loading, PhotoFolder, Recipe, Writing, run
from camkit.data import SHAPE_CLASSES, draw_shapes


def open_model() -> torch.nn.Module:
    """Open the model; camkit calls this in the process that runs it. Load your weights here."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, depth=3, num_classes=3, dynamic_img_size=True
    ).eval()


if __name__ == "__main__":  # worker processes import this file again
    with tempfile.TemporaryDirectory() as home:
        photos = Path(home) / "photos"
        photos.mkdir()
        for index, (picture, _) in enumerate(draw_shapes(6, size=(64, 96))):
            Image.fromarray(picture).save(photos / f"{index}.png")
        recipe = Recipe(
            open_model,
            loading=Loading(size=96),
            writing=Writing(finish=(camkit.refiners.GuidedFilter(),), cams="both"),
            vocabulary=camkit.Vocabulary(SHAPE_CLASSES),
            labels=(0, 2),  # classes of every photo; or those of a data set, or predictions
        )
        out = Path(home) / "out"
        for _ in range(2):  # the second run has nothing left to do
            summary = run(recipe, PhotoFolder(photos), out, workers=0, threads=1)
            print(f"{summary.written} done now, {summary.settled} before, {summary.errors} failed")
        print(", ".join(sorted(path.name for path in out.iterdir())))
