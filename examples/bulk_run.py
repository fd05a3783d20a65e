"""Masks of a whole folder, resumable. Runs on drawn pictures with random weights, no download.

The same from the shell, with trained weights: camkit run photos --classes cat,dog --out masks
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
    """Called where the model runs; your own, with its weights."""
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
            writing=Writing(finish=(camkit.GuidedFilter(),), cams="both"),
            vocabulary=camkit.Vocabulary(SHAPE_CLASSES),
            labels=(0, 2),  # in every photo; or those of a data set, or the classifier's guess
        )
        out = Path(home) / "out"
        for _ in range(2):  # the second run finds all of it done
            ran = run(recipe, PhotoFolder(photos), out, workers=0, threads=1)
            print(f"{ran.written} done now, {ran.settled} before, {ran.errors} failed")
        print(", ".join(sorted(path.name for path in out.iterdir())))
