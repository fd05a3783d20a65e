"""Segment a photo in one call. Runs on a drawn picture with random weights, no download."""

import timm
import torch

import camkit
from camkit.data import SHAPE_CLASSES, draw_shapes

if __name__ == "__main__":
    torch.manual_seed(0)
    model = timm.create_model(  # for trained weights: pretrained=True, and no depth or num_classes
        "vit_tiny_patch16_224", pretrained=False, depth=3, num_classes=3, dynamic_img_size=True
    )
    refined = camkit.wrap(model, vocabulary=SHAPE_CLASSES)  # a model of ImageNet has names
    (picture, _), *_ = draw_shapes(1, size=(96, 144))
    result = refined(picture, classes=["circle", "triangle"])  # or refined("cat.jpg")
    print(refined)
    print(result)
    folder = result.save("out/one_call")
    print(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
    print("(random weights: this shows the calls and the array shapes; the maps are noise)")
