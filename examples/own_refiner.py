"""Use any function (cam, capture) -> cam as a refiner. Runs on drawn shapes, no download."""

import timm
import torch

import camkit
from camkit.data import draw_shapes


def keep_the_strongest_fifth(cam: torch.Tensor, capture: camkit.Capture) -> torch.Tensor:
    """Set scores below the 80th percentile of their map to zero."""
    scores = capture.grid.flatten(cam)
    floor = scores.quantile(0.8, dim=-1, keepdim=True)
    return capture.grid.fold(scores * (scores >= floor))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, depth=3, num_classes=3, dynamic_img_size=True
    )
    pipeline = camkit.wrap(model, refine=[keep_the_strongest_fifth, camkit.refiners.Normalize()])
    (picture, _), *_ = draw_shapes(1, size=(96, 144))
    result = pipeline(camkit.photo_from_array(picture, size=144), classes=[0, 2])
    print(f"maps {tuple(result.cam.shape)}, mask values {result.mask.unique().tolist()}")
    print("(random weights: this shows the calls and the array shapes; the maps are noise)")
