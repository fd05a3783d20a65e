"""Watch, seed, refine and score by hand. Runs on drawn shapes, no download."""

import timm
import torch

import camkit
from camkit.data import SHAPE_CLASSES, draw_shapes
from camkit.score import confusion_matrix, mean_iou

if __name__ == "__main__":
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, depth=3, num_classes=3, dynamic_img_size=True
    ).eval()
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    refine = camkit.chain(camkit.Propagate(steps=2, balance=3), camkit.refiners.Normalize("minmax"))
    for picture, truth in draw_shapes(4, size=(96, 144)):
        photo = camkit.photo_from_array(picture, size=144)
        present = sorted({int(value) - 1 for value in set(truth.flatten())} - {-1})
        classes = torch.tensor([present])
        with torch.no_grad(), camkit.watch(model, gradients=True, rgb=photo.rgb) as seen:
            model(photo.pixels)
        seed = camkit.normalize_cam(camkit.GradientSeed()(seen.capture, classes))
        cam = camkit.resize_cam(refine(seed, seen.capture), photo.size)
        mask = camkit.to_mask(cam, classes, background_score=0.5)[0]
        confusion += confusion_matrix(torch.from_numpy(truth), mask, num_classes=4)
    print(f"mIoU over background, {', '.join(SHAPE_CLASSES)}: {float(mean_iou(confusion)):.3f}")
    print("(random weights: this shows how to combine the stages, not how good they are)")
