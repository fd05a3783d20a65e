"""Refine, draw and score the CAM files of another codebase. Runs on drawn shapes, no download.

The files here have the form of MCTformer and PSA, {class: map}; camkit reads the other forms of the
field as well. The commands camkit refine, camkit mask and camkit eval do the same from the shell.
"""

import tempfile
from pathlib import Path

import torch

import camkit
from camkit.bulk import CamFolder, RefineCam, pair_truth, score_cams, write_all
from camkit.data import read_mask, write_cam, write_shapes


def write_weak_maps(home: Path) -> None:
    """Write what another codebase might produce: a coarse and noisy map of each class."""
    (home / "cams").mkdir()
    dataset = write_shapes(home / "VOC2012", 8, size=(64, 96))
    for sample in (*dataset.split("train"), *dataset.split("val")):
        mask = read_mask(sample.mask, size=(64, 96), num_classes=3)
        present = torch.stack([mask == index + 1 for index in sample.classes])[None].float()
        coarse = torch.nn.functional.adaptive_avg_pool2d(present, (8, 12))
        noisy = (0.7 * coarse + 0.3 * torch.rand_like(coarse)).clamp(0, 1)
        maps = camkit.resize_cam(noisy, (64, 96))[0]
        write_cam(home / "cams" / f"{sample.name}.npy", sample.classes, maps, form="psa")


if __name__ == "__main__":  # worker processes import this file again
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_weak_maps(home)
        cams = CamFolder(home / "cams", home / "VOC2012" / "JPEGImages")
        refiner = camkit.DenseCRF(backend="torch")  # "native" is faster, but compiles C++ once
        summary = write_all(RefineCam(refiner, "psa"), cams, home / "refined", workers=0)
        print(f"{summary.written} files refined, {len(summary.failures)} failed")
        for name in ("cams", "refined"):
            truth = pair_truth(home / name, home / "VOC2012" / "SegmentationClass", cams=True)
            scored = score_cams(truth, num_classes=4, background_score=0.5, workers=0)
            print(f"{name}: mIoU {float(camkit.score.mean_iou(scored.confusion)):.3f}")
