"""Tiny real models of every host family, with independent ways to show and tilt maps."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import pytest
import timm
import torch
import torchvision
from optional import open_clip, transformers
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
        tilted: what a call returns when log-weights on the keys, ``(b, s)`` or ``(b, a, s)``, are
            added to the logits of both blocks, by the host's own or torch's means.
        shape: rows and columns of the image it is called with.
        patch: side of a patch.
        call: how the model is called.
        roles: positions of class, distillation, register and other tokens.
    """

    build: Callable[[], nn.Module]
    maps: Callable[[nn.Module, Callable], list[torch.Tensor]]
    tilted: Callable[[nn.Module, Callable, torch.Tensor], object]
    shape: tuple[int, int] = (64, 64)
    patch: int = 16
    call: Callable[[nn.Module, torch.Tensor], object] = field(default=lambda m, x: m(x))
    roles: tuple[tuple[int, ...], ...] = ((0,), (), (), ())


def per_head(log_weights, keys):
    """Log-weights of the first ``keys`` keys, to be added to ``(b, a, t, s)`` logits.

    What has four axes already, a bias of pairs, is cut to as many queries.
    """
    log_weights = log_weights[..., :keys]
    if log_weights.dim() == 4:
        return log_weights[:, :, :keys]
    return log_weights[:, None, None] if log_weights.dim() == 2 else log_weights[:, :, None]


def reweighed(weights, log_weights):
    """Softmax rows as if log-weights had been added before; rows of a single query stay."""
    if weights.shape[2] == 1:
        return weights
    weights = weights * per_head(log_weights, weights.shape[3]).exp()
    return weights / weights.sum(-1, keepdim=True)


def _unfused(model):
    """A copy of a timm model, and the attention dropouts that its maps now pass through."""
    model = copy.deepcopy(model)
    modules = [m for m in model.modules() if hasattr(m, "fused_attn") and hasattr(m, "attn_drop")]
    for module in modules:
        module.fused_attn = False
    return model, [module.attn_drop for module in modules]


def unfused(model, call):
    """timm: an un-fused copy, read at its attention dropout."""
    model, dropouts = _unfused(model)
    maps = []
    for dropout in dropouts:
        dropout.register_forward_hook(lambda _, __, out: maps.append(out))
    call(model)
    return maps


def unfused_tilted(model, call, log_weights):
    """timm: an un-fused copy, whose attention dropout hands on a reweighed map."""
    model, dropouts = _unfused(model)
    for dropout in dropouts:
        dropout.register_forward_hook(lambda _, __, out: reweighed(out, log_weights))
    return call(model)


def _before_talking(model, function):
    """timm's CaiT: a copy whose maps go through ``function`` before their heads are mixed."""
    model = copy.deepcopy(model)

    def hook(_, args):
        changed = function(args[0].permute(0, 3, 1, 2))
        return (changed.permute(0, 2, 3, 1),)

    for name, module in model.named_modules():
        if name.endswith("proj_w"):
            module.register_forward_pre_hook(hook)
    return model


def talking(model, call):
    """timm's CaiT: read where the softmax's maps go into the mixing of heads."""
    maps = []
    call(_before_talking(model, lambda weights: maps.append(weights) or weights))
    return maps


def talking_tilted(model, call, log_weights):
    """timm's CaiT: reweighed where the softmax's maps go into the mixing of heads."""
    return call(_before_talking(model, lambda weights: reweighed(weights, log_weights)))


def eager(model, call):
    """transformers: the eager implementation hands its maps out."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    maps = []
    for name, module in model.named_modules():
        outer = any(type(child).__name__.endswith("Attention") for child in module.children())
        if type(module).__name__.endswith("Attention") and not outer and "text" not in name:
            module.register_forward_hook(lambda _, __, out: maps.append(out[1]))
    call(model)
    return maps


def interface_tilted(model, call, log_weights):
    """transformers: a copy switched to an attention function of our own."""

    def attend(module, query, key, value, attention_mask, *, scaling=None, **options):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        added = per_head(log_weights, key.shape[2])
        logits = query @ key.mT * scaling + (0.0 if query.shape[2] == 1 else added)
        for bias in (attention_mask, options.get("position_bias")):
            logits = logits if bias is None else logits + bias
        weights = logits.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    transformers.AttentionInterface.register("tilted by the zoo", attend)
    model = copy.deepcopy(model)
    model.set_attn_implementation("tilted by the zoo")
    return call(model)


def _multihead(model):
    """A copy, and its modules of torch's own attention outside the text tower."""
    model = copy.deepcopy(model)
    kinds = [nn.MultiheadAttention.__name__, "Attention"]
    named = model.named_modules()
    return model, [
        m for n, m in named if type(m).__name__ in kinds and not n.startswith("transformer")
    ]


def asked(model, call):
    """nn.MultiheadAttention: asked for its weights, head by head."""
    model, modules = _multihead(model)
    maps = []

    def ask(module, args, kwargs, _):
        options = {**kwargs, "need_weights": True, "average_attn_weights": False}
        maps.append(nn.MultiheadAttention.forward(module, *args, **options)[1])

    for module in modules:
        module.register_forward_hook(ask, with_kwargs=True)
    call(model)
    return maps


def mask_tilted(model, call, log_weights):
    """Hosts whose attention takes a mask: log-weights are a mask of floats."""
    model, modules = _multihead(model)

    def mask(module, args, kwargs):
        images, tokens, _ = args[0].shape
        added = per_head(log_weights, tokens)
        added = added.expand(images, module.num_heads, tokens, tokens).flatten(0, 1)
        return args, {**kwargs, "attn_mask": added}

    for module in modules:
        module.register_forward_pre_hook(mask, with_kwargs=True)
    return call(model)


def from_norms(model, call):
    """open_clip's own attention: worked out from the queries and keys that leave its norms."""
    model, modules = _multihead(model)
    seen, maps = {}, []

    def attend(module, keys):
        queries = seen.pop(module)
        maps.append((queries @ keys.mT * module.scale).softmax(-1))

    for module in modules:
        module.ln_q.register_forward_hook(lambda *c, of=module: seen.update({of: c[-1]}))
        module.ln_k.register_forward_hook(lambda *c, of=module: attend(of, c[-1]))
    call(model)
    return maps


def timm_model(name, **options):
    """A model of timm; the test skips where the installed timm does not have it yet."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return timm.create_model(name, **options)


def of_transformers(name):
    """A class of transformers; the test skips where the installed one does not have it yet."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {version('transformers')} has no {name}")
    return getattr(transformers, name)


NONE = ((), (), (), ())
CLASS = ((0,), (), (), ())


def _timm(name, *, shape=(64, 96), roles=CLASS, ways=(unfused, unfused_tilted), **options):
    patch = 14 if "patch14" in name else 16
    if patch == 14:
        shape = (56, 84) if shape == (64, 96) else (56, 56)
    if shape[0] == shape[1]:
        options["img_size"] = shape[0]
    elif "naflex" not in name:
        options["dynamic_img_size"] = True
    options = {"depth": 2, **options}
    return Entry(lambda: timm_model(name, **options), *ways, shape, patch, roles=roles)


def _hugging_face(kind, *, config=None, roles=CLASS, implementation="sdpa", **options):
    def build():
        settings = of_transformers(config or kind.split("For")[0] + "Config")
        made = settings(**{**SIDES, **PATCHES, "attn_implementation": implementation, **options})
        return of_transformers(kind)(made)

    return Entry(build, eager, interface_tilted, roles=roles, call=lambda m, x: m(pixel_values=x))


def _whole_clip():
    text = {**SIDES, "vocab_size": 50, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(
        vision_config={**SIDES, **PATCHES}, text_config=text, projection_dim=16
    )
    return transformers.CLIPModel(config)


def _clip(**vision):
    vision |= {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 64}
    if unknown := vision.keys() - open_clip.CLIPVisionCfg.__dataclass_fields__.keys():
        pytest.skip(f"open_clip {version('open_clip_torch')} has no {', '.join(sorted(unknown))}")
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


SMALL = {"embed_dim": 64, "num_heads": 4}
SQUARE = (64, 64)
ZOO = {
    "timm vit": _timm("vit_tiny_patch16_224"),
    "timm vit qk norm": _timm("vit_tiny_patch16_224", qk_norm=True),
    "timm vit average pooled": _timm(
        "vit_tiny_patch16_224", global_pool="avg", fc_norm=True, class_token=False, roles=NONE
    ),
    "timm vit gap": _timm("vit_medium_patch16_gap_240", roles=NONE, **SMALL),
    "timm flexivit": _timm("flexivit_small", **SMALL),
    "timm parallel scaling": _timm("vit_base_patch16_xp_224", **SMALL),
    "timm parallel things": _timm("vit_small_patch16_18x2_224", depth=1, **SMALL),
    "timm deit distilled": _timm("deit_tiny_distilled_patch16_224", roles=((0,), (1,), (), ())),
    "timm deit3": _timm("deit3_small_patch16_224", **SMALL),
    "timm dinov2": _timm("vit_small_patch14_dinov2", **SMALL),
    "timm dinov2 registers": _timm(
        "vit_small_patch14_reg4_dinov2", roles=((0,), (), (1, 2, 3, 4), ()), **SMALL
    ),
    "timm dinov3": _timm("vit_small_patch16_dinov3", roles=((0,), (), (1, 2, 3, 4), ()), **SMALL),
    "timm eva02": _timm("eva02_tiny_patch14_224"),
    "timm eva02 fused qkv": _timm("eva02_base_patch14_224", qkv_fused=True, **SMALL),
    "timm eva": _timm("eva_giant_patch14_224", **SMALL),
    "timm beit": _timm("beit_base_patch16_224", shape=SQUARE, **SMALL),
    "timm relative position": _timm("vit_relpos_small_patch16_224", shape=SQUARE, roles=NONE),
    "timm rope mixed": _timm("vit_base_patch16_rope_mixed_224", shape=SQUARE, **SMALL),
    "timm clip": _timm("vit_base_patch16_clip_224", **SMALL),
    "timm siglip": _timm("vit_base_patch16_siglip_224", roles=NONE, **SMALL),
    "timm perception encoder": _timm("vit_pe_core_tiny_patch16_384", shape=SQUARE),
    "timm naflexvit": _timm(
        "naflexvit_base_patch16_gap", roles=((), (), (0, 1, 2, 3), ()), **SMALL
    ),
    "timm cait": _timm(
        "cait_xxs24_224", shape=SQUARE, roles=NONE, ways=(talking, talking_tilted), **SMALL
    ),
    "torchvision": Entry(
        lambda: torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=7),
        asked,
        mask_tilted,
    ),
    "open_clip": Entry(_clip, asked, mask_tilted, call=lambda m, x: m.encode_image(x)),
    "open_clip own attention": Entry(
        lambda: _clip(block_type="custom", qk_norm=True),
        from_norms,
        mask_tilted,
        call=lambda m, x: m.encode_image(x),
    ),
    "torch encoder": Entry(_encoder, asked, mask_tilted, roles=NONE),
    "transformers vit": _hugging_face("ViTForImageClassification"),
    "transformers vit eager": _hugging_face("ViTForImageClassification", implementation="eager"),
    "transformers deit": _hugging_face(
        "DeiTForImageClassificationWithTeacher", config="DeiTConfig", roles=((0,), (1,), (), ())
    ),
    "transformers dinov2": _hugging_face("Dinov2ForImageClassification"),
    "transformers dinov2 eager": _hugging_face(
        "Dinov2ForImageClassification", implementation="eager"
    ),
    "transformers dinov2 registers": _hugging_face(
        "Dinov2WithRegistersForImageClassification", roles=((0,), (), (1, 2, 3, 4), ())
    ),
    "transformers dinov3": _hugging_face(
        "DINOv3ViTModel",
        config="DINOv3ViTConfig",
        num_register_tokens=2,
        roles=((0,), (), (1, 2), ()),
    ),
    "transformers beit": _hugging_face("BeitForImageClassification"),
    "transformers beit eager": _hugging_face("BeitForImageClassification", implementation="eager"),
    "transformers ijepa": _hugging_face("IJepaModel", config="IJepaConfig", roles=NONE),
    "transformers msn": _hugging_face("ViTMSNModel", config="ViTMSNConfig"),
    "transformers aimv2": _hugging_face("Aimv2VisionModel", config="Aimv2VisionConfig", roles=NONE),
    "transformers yolos": _hugging_face(
        "YolosModel",
        config="YolosConfig",
        image_size=[64, 64],
        num_detection_tokens=3,
        roles=((0,), (), (), (-3, -2, -1)),
    ),
    "transformers llama4": _hugging_face(
        "Llama4VisionModel",
        config="Llama4VisionConfig",
        intermediate_size=128,
        vision_output_dim=32,
        projector_input_dim=32,
        projector_output_dim=32,
        roles=((-1,), (), (), ()),
    ),
    "transformers clip": _hugging_face("CLIPVisionModel", config="CLIPVisionConfig"),
    "transformers clip whole": Entry(
        _whole_clip,
        eager,
        interface_tilted,
        call=lambda m, x: m.get_image_features(pixel_values=x),
    ),
    "transformers siglip": _hugging_face(
        "SiglipVisionModel", config="SiglipVisionConfig", roles=NONE
    ),
}
