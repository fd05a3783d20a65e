"""Real objects known only to the patch: what a refiner that looks at the picture has to undo."""

from functools import cache

import torch

from camkit import load_photo, resize_cam
from camkit.capture import Anatomy, Capture
from camkit.capture.attention import ExplicitAttention
from camkit.data import open_dataset, read_mask
from camkit.grid import Grid


def captured(rgb, grid=(2, 3)):
    """A capture of a picture whose patches attend to all alike."""
    grid = Grid(*grid)
    rows = ExplicitAttention(torch.full((1, 1, grid.size, grid.size), 1 / grid.size))
    return Capture((rows,), ("a",), Anatomy(), grid, rgb=rgb)


@cache
def coarse_objects(folder, count=6, patch=32):
    """Photos, the patches that their objects fill by half, and masks with 255 for unknown."""
    objects = []
    dataset = open_dataset(folder / "voc12_animals")
    for sample in dataset.split("train")[:count]:
        photo = load_photo(sample.photo, size=256)
        size = tuple(photo.rgb.shape[-2:])
        mask = read_mask(sample.mask, size=photo.size, num_classes=len(dataset.classes))
        truth = torch.nn.functional.interpolate(
            mask[None, None].float(), size, mode="nearest-exact"
        )
        truth = truth.to(mask.dtype)
        covered = (truth > 0).float().masked_fill(truth == 255, 0.5)
        cam = (torch.nn.functional.avg_pool2d(covered, patch) > 0.5).float()
        objects.append((cam, captured(photo.rgb, tuple(cam.shape[-2:])), truth))
    return objects


@cache
def coarse_iou(refiner, folder):
    """IoU of the objects found by a refiner, or without any, at one half over all photos."""
    shared, joined = 0, 0
    for cam, capture, truth in coarse_objects(folder):
        refined = refiner(cam, capture) if refiner else cam
        found = resize_cam(refined, tuple(truth.shape[-2:])) > 0.5
        true, known = truth > 0, truth != 255
        shared = shared + (found & true & known).sum()
        joined = joined + ((found | true) & known).sum()
    return float(shared / joined)
