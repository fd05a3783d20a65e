"""Compute class maps from text prompts with an open_clip CLIP. Random weights, no download.

For real maps, use open_clip.create_model("ViT-B-16", pretrained="openai"), and load photos with
mean (0.481, 0.458, 0.408) and std (0.269, 0.261, 0.276).
"""

import open_clip
import torch

import camkit
from camkit.data import draw_shapes

CLASSES = ["circle, disk", "triangle"]  # the embeddings of synonyms are averaged


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

    similarity = camkit.wrap(  # compares patches with texts, in the calibrated last blocks
        model.visual,
        seed=camkit.seeds.TextSimilaritySeed(texts),
        edit=camkit.edits.StaticCalibration(),
    )
    print("similarity", tuple(similarity(photo, classes=texts).cam.shape))

    gradient = camkit.wrap(model.visual, seed=camkit.GradientSeed())  # attention times its gradient
    print("gradient", tuple(gradient(photo, classes=texts).cam.shape))
    print("(random weights: this shows the calls and the array shapes; the maps are noise)")
