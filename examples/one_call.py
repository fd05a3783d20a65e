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
    pipeline = camkit.wrap(model, vocabulary=camkit.Vocabulary(SHAPE_CLASSES))
    print(pipeline)
    (picture, _), *_ = draw_shapes(1, size=(96, 144))
    photo = camkit.photo_from_array(picture, size=144)  # or camkit.load_photo("cat.jpg", size=384)
    result = pipeline(photo, classes=["circle", "triangle"])
    folder = result.save("out/one_call")
    print(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
    print("(random weights: this shows the calls and the array shapes; the maps are noise)")
