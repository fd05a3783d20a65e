"""Tiny hosts: real timm families with random weights, and hand-made ones for rare habits."""

import timm
import torch
import torch.nn.functional as F
from forks import shaken
from torch import nn

from camkit.edits import ScaleOutput

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (64, 96)),
    "explicit softmax": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (64, 96)),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True, "img_size": 64}, (64, 64)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, (64, 64)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, (56, 56)),
    "average pooled": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "fc_norm": True, "class_token": False, "img_size": 64},
        (64, 64),
    ),
    "learned bias": ("beit_base_patch16_224", {"img_size": 64}, (64, 64)),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 56}, (56, 56)),
}


def tiny(family, *, depth=3, **options):
    """A model of a timm family and two images it takes."""
    name, settings, size = FAMILIES[family]
    settings = {"depth": depth, "embed_dim": 48, "num_heads": 3, "num_classes": 5} | settings
    model = shaken(timm.create_model(name, pretrained=False, **(settings | options)))
    if family == "explicit softmax":
        for block in model.blocks:
            block.attn.fused_attn = False
    return model, torch.randn(2, 3, *size)


class Block(nn.Module):
    """Pre-norm attention without MLP."""

    def __init__(self, dim=24, num_heads=2):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class HandMade(nn.Module):
    """A small ViT whose subclasses decide where special tokens go and what is returned."""

    def __init__(self, *, class_tokens=1, blocks=2, dim=24, dropout=0.0, batch_norm=False):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.stem = nn.BatchNorm2d(dim) if batch_norm else nn.Identity()
        self.cls_token = nn.Parameter(torch.randn(1, class_tokens, dim))
        self.dist_token = nn.Parameter(torch.randn(1, 1, dim))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)

    def sequence(self, patches):
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)

    def tokens(self, pixels):
        x = self.stem(self.patch_embed(pixels)).flatten(2).mT
        x = self.drop(self.sequence(x))
        for block in self.blocks:
            x = x + block(block.norm(x))
        return self.norm(x)

    def forward(self, pixels):
        return self.head(self.tokens(pixels)[:, 0])


class ClassTokenLast(HandMade):
    """Patches first, then the class token."""

    def sequence(self, patches):
        return torch.cat([patches, self.cls_token.expand(len(patches), -1, -1)], dim=1)

    def forward(self, pixels):
        return self.head(self.tokens(pixels)[:, -1])


class DistillationFirst(HandMade):
    """The distillation token goes before the class token."""

    def sequence(self, patches):
        special = torch.cat([self.dist_token, self.cls_token], dim=1)
        return torch.cat([special.expand(len(patches), -1, -1), patches], dim=1)


class OneTokenPerClass(HandMade):
    """As MCTformer: class c is scored by the mean of its own token; scores come in a tuple.

    Behind a LayerNorm with equal weights every mean is zero but for rounding, so they differ here.
    """

    def __init__(self, **sizes):
        super().__init__(**sizes)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, pixels):
        tokens = self.tokens(pixels)
        count = self.cls_token.shape[1]
        return tokens[:, :count].mean(-1), tokens[:, count:].mean(1)


class TowardsTheFirstKeys:
    """A key edit: the first three tokens get e times their attention."""

    def log_weights(self, tokens, *_):
        weights = torch.zeros(tokens.shape[:2])
        weights[:, :3] = 1.0
        return weights


EDITS = {"output": ScaleOutput(2.0), "keys": TowardsTheFirstKeys()}


class Scaled(nn.Module):
    """Takes the scale of its pixels as a second input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels, scale):
        return self.model(pixels * scale)
