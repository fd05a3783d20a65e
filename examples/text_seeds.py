"""Class maps from words, with a CLIP of open_clip. Runs with random weights, no download.

For real maps: open_clip.create_model("ViT-B-16", pretrained="openai") and its photos at mean
(0.481, 0.458, 0.408) and std (0.269, 0.261, 0.276).
"""

import open_clip
import torch

import camkit
from camkit.data import draw_shapes

CLASSES = ["circle, disk", "triangle"]  # synonyms in one name are averaged


def tiny_clip() -> torch.nn.Module:
    vision = {"image_size": 96, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()


if __name__ == "__main__":
    torch.manual_seed(0)
    model = tiny_clip()
    tokenize = open_clip.get_tokenizer("ViT-B-16")
    texts = camkit.seeds.TextClasses.from_prompts(model, CLASSES, tokenize=tokenize)
    (picture, _), *_ = draw_shapes(1, size=(96, 96))
    photo = camkit.photo_from_array(picture, size=(96, 96))

    similar = camkit.wrap(  # patches compared with texts, in the calibrated last blocks
        model.visual,
        seed=camkit.seeds.TextSimilaritySeed(texts),
        edit=camkit.edits.StaticCalibration(),
    )
    print("likeness", tuple(similar(photo, classes=texts).cam.shape))

    weighed = camkit.wrap(model.visual, seed=camkit.GradientSeed())  # attention, by the same texts
    print("gradient", tuple(weighed(photo, classes=texts).cam.shape))
    print("(random weights: the shapes of the values are right, the maps mean nothing)")
