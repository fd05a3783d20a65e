"""Tiny real models of every host family, each with its own independent way to show its maps."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import open_clip
import timm
import torch
import torchvision
import transformers
from torch import nn

SIDES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
PATCHES = {"image_size": 64, "patch_size": 16}


@dataclass(frozen=True)
class Entry:
    """A host, how it is called, and what is true of it.

    Attributes:
        build: makes the model, weights random.
        maps: the maps of a call, ``(b, a, t, t)`` per block, by the host's own or torch's means.
        shape: rows and columns of the image it is called with.
        call: how the model is called.
        roles: positions of class, distillation and register tokens.
    """

    build: Callable[[], nn.Module]
    maps: Callable[[nn.Module, Callable], list[torch.Tensor]]
    shape: tuple[int, int] = (64, 64)
    call: Callable[[nn.Module, torch.Tensor], object] = field(default=lambda m, x: m(x))
    roles: tuple[tuple[int, ...], ...] = ((0,), (), ())


def unfused(model, call):
    """timm: an un-fused copy, read at its attention dropout."""
    model, maps = copy.deepcopy(model), []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda _, __, out: maps.append(out))
    call(model)
    return maps


def eager(model, call):
    """transformers: the eager implementation hands its maps out."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    maps = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and "text" not in name:
            module.register_forward_hook(lambda _, __, out: maps.append(out[1]))
    call(model)
    return maps


def asked(model, call):
    """nn.MultiheadAttention: asked for its weights, head by head."""
    model, maps = copy.deepcopy(model), []

    def ask(module, args, kwargs, _):
        options = {**kwargs, "need_weights": True, "average_attn_weights": False}
        maps.append(nn.MultiheadAttention.forward(module, *args, **options)[1])

    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not name.startswith("transformer"):
            module.register_forward_hook(ask, with_kwargs=True)
    call(model)
    return maps


def _timm(name, *, shape=(64, 96), roles=((0,), (), ()), **options):
    options = {"depth": 2, **options}
    if "img_size" not in options:
        options["dynamic_img_size"] = True
    return Entry(lambda: timm.create_model(name, **options), unfused, shape, roles=roles)


def _hugging_face(kind, *, config=None, roles=((0,), (), ()), implementation="sdpa", **options):
    def build():
        settings = getattr(transformers, config or kind.split("For")[0] + "Config")
        made = settings(**SIDES, **PATCHES, attn_implementation=implementation, **options)
        return getattr(transformers, kind)(made)

    return Entry(build, eager, roles=roles, call=lambda m, x: m(pixel_values=x))


def _clip():
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 64}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
    return open_clip.model.CLIP(16, vision, text)


def _encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.cut = nn.Conv2d(3, 32, 16, 16)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, pixels):
            return self.encoder(self.cut(pixels).flatten(2).mT)

    return Encoder()


NONE = ((), (), ())
ZOO = {
    "timm vit": _timm("vit_tiny_patch16_224"),
    "timm deit distilled": _timm("deit_tiny_distilled_patch16_224", roles=((0,), (1,), ())),
    "timm dinov2 registers": _timm(
        "vit_small_patch14_reg4_dinov2", shape=(56, 84), roles=((0,), (), (1, 2, 3, 4))
    ),
    "timm dinov3": _timm("vit_small_patch16_dinov3", roles=((0,), (), (1, 2, 3, 4))),
    "timm eva02": _timm("eva02_tiny_patch14_224", shape=(56, 84)),
    "timm eva": _timm("eva_giant_patch14_224", shape=(56, 84), embed_dim=64, num_heads=4),
    "timm beit": _timm("beit_base_patch16_224", shape=(64, 64), img_size=64),
    "timm relative position": _timm(
        "vit_relpos_small_patch16_224", shape=(64, 64), img_size=64, roles=NONE
    ),
    "timm clip": _timm("vit_base_patch16_clip_224", embed_dim=64, num_heads=4),
    "torchvision": Entry(
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=7), asked
    ),
    "open_clip": Entry(_clip, asked, call=lambda m, x: m.encode_image(x)),
    "torch encoder": Entry(_encoder, asked, roles=NONE),
    "transformers vit": _hugging_face("ViTForImageClassification"),
    "transformers vit eager": _hugging_face("ViTForImageClassification", implementation="eager"),
    "transformers deit": _hugging_face(
        "DeiTForImageClassificationWithTeacher", config="DeiTConfig", roles=((0,), (1,), ())
    ),
    "transformers dinov2": _hugging_face("Dinov2ForImageClassification"),
    "transformers dinov2 registers": _hugging_face(
        "Dinov2WithRegistersForImageClassification", roles=((0,), (), (1, 2, 3, 4))
    ),
    "transformers dinov3": _hugging_face(
        "DINOv3ViTModel",
        config="DINOv3ViTConfig",
        num_register_tokens=2,
        roles=((0,), (), (1, 2)),
    ),
    "transformers beit": _hugging_face("BeitForImageClassification"),
    "transformers clip": _hugging_face("CLIPVisionModel", config="CLIPVisionConfig"),
    "transformers siglip": _hugging_face(
        "SiglipVisionModel", config="SiglipVisionConfig", roles=NONE
    ),
}
