"""Class maps of camkit and its peers, each made the way its own documentation shows.

All get the same weights, pixels and class scores; a class that stands for several classifier
outputs is scored by `camkit.Vocabulary.score` everywhere. A method answers for all classes asked of
an image in one call, which is what is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import camkit
from camkit.method import CALIBRATED, DEFAULT_REFINE, WITHOUT_EDGES
from camkit.photo import Photo

Maps: TypeAlias = Callable[[Photo, list[int]], Tensor]
"""``(photo, classes) -> (k, h, w)`` maps in [0, 1], on the patch grid or finer."""


@dataclass(frozen=True)
class Method:
    """A way to make maps.

    Attributes:
        package: the distribution it comes from.
        settings: what was chosen, for the table.
        build: makes it around a model of its own, which it may change.
    """

    package: str
    settings: str
    build: Callable[[Any, camkit.Vocabulary], Maps]


class MultiheadBlock(nn.Module):
    """A timm block around `torch.nn.MultiheadAttention`, of the same weights and the same result.

    torchcam's LeGrad reads no other attention.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        heads, width = block.attn.num_heads, block.attn.qkv.in_features
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.self_attention.in_proj_weight = block.attn.qkv.weight
        self.self_attention.in_proj_bias = block.attn.qkv.bias
        self.self_attention.out_proj = block.attn.proj
        self.train(block.training)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.self_attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


def grid_of(photo: Photo) -> tuple[int, int]:
    rows, cols = photo.pixels.shape[-2:]
    return rows // 16, cols // 16


def on_grid(photo: Photo) -> Callable[[Tensor], Tensor]:
    """The reshape transform of both packages' guides, for grids that are no 14x14 square."""
    grid = grid_of(photo)
    return lambda tokens: tokens[:, 1:].unflatten(1, grid).movedim(-1, 1)


def target(vocabulary: camkit.Vocabulary, index: int) -> Callable[[Tensor], Tensor]:
    """One class's score, taken from the classifier's outputs for one image."""
    return lambda outputs: vocabulary.score(outputs)[index]


def grad_cam(name: str, layer: int = -1, **smoothing: bool) -> Method:
    """A method of grad-cam; several classes as in its guides, one copy of the image for each."""

    def build(model: Any, vocabulary: camkit.Vocabulary) -> Maps:
        import pytorch_grad_cam

        extractor = getattr(pytorch_grad_cam, name)

        def maps(photo: Photo, classes: list[int]) -> Tensor:
            targets = [target(vocabulary, index) for index in classes]
            pixels = photo.pixels.repeat(len(classes), 1, 1, 1)
            layers = [model.blocks[layer].norm1]
            with extractor(model, layers, reshape_transform=on_grid(photo)) as cam:
                return minmax(torch.from_numpy(cam(pixels, targets, **smoothing)))

        return maps

    settings = "".join(f", {word}={value}" for word, value in smoothing.items())
    return Method("grad-cam", f"{name}, blocks[{layer}].norm1{settings}", build)


def torch_cam(name: str, layer: int = -1, *, blocks: int = 1) -> Method:
    """A method of torchcam: one forward, then one call per class; several layers are fused."""

    def build(model: Any, vocabulary: camkit.Vocabulary) -> Maps:
        import torchcam.methods

        extractor = getattr(torchcam.methods, name)
        chosen = [model.blocks[layer]] if blocks == 1 else model.blocks[-blocks:]
        layers = [block.norm1 for block in chosen]

        def maps(photo: Photo, classes: list[int]) -> Tensor:
            with extractor(model, layers, reshape_transform=on_grid(photo)) as cam:
                scores = model(photo.pixels)
                found = []
                for index in classes:
                    again = index != classes[-1]
                    asked = target(vocabulary, index)
                    each = cam(scores=scores, targets=asked, retain_graph=again)
                    found.append(cam.fuse_cams(each))
            return minmax(torch.cat(found))

        return maps

    layers = f"blocks[{layer}].norm1" if blocks == 1 else f"norm1 of the last {blocks} blocks"
    return Method("torchcam", f"{name}, {layers}", build)


def legrad(blocks: int = 4) -> Method:
    """LeGrad as torchcam has it, over as many blocks as in its example.

    It takes no callable targets, so its score projection (torchcam's own for torchvision: the norm
    and head of the mean token) ends in the vocabulary's classes.
    """

    def build(model: Any, vocabulary: camkit.Vocabulary) -> Maps:
        from torchcam.methods import LeGrad

        model.blocks = nn.Sequential(*(MultiheadBlock(block) for block in model.blocks))
        layers = list(model.blocks[-blocks:])

        def scores(tokens: Tensor) -> Tensor:
            return vocabulary.score(model.head(model.norm(tokens.mean(1))))

        def maps(photo: Photo, classes: list[int]) -> Tensor:
            grid = grid_of(photo)
            with LeGrad(model, layers, score_projection=scores, grid_shape=grid) as cam:
                model(photo.pixels)
                found = []
                for index in classes:
                    found += cam(index, retain_graph=index != classes[-1])
            return minmax(torch.cat(found))

        return maps

    return Method("torchcam", f"LeGrad, last {blocks} blocks", build)


def rollout() -> Method:
    """Attention rollout by fast-vit-rollout: one map for all classes, fused attention off."""

    def build(model: Any, vocabulary: camkit.Vocabulary) -> Maps:
        from fast_vit_rollout import ViTAttentionRollout

        del vocabulary
        for block in model.blocks:
            block.attn.fused_attn = False
        extractor = ViTAttentionRollout(model)

        def maps(photo: Photo, classes: list[int]) -> Tensor:
            row = extractor(photo.pixels)[0, 0, 1:]
            return minmax(row.view(1, *grid_of(photo)).repeat(len(classes), 1, 1))

        return maps

    return Method("fast-vit-rollout", "defaults (mean of heads, discard_ratio=0.9)", build)


def chain(seed: Any, *refine: Any, edit: Any = None, edit_blocks: int | None = None) -> Method:
    """A seed and refiners of camkit."""

    def build(model: Any, vocabulary: camkit.Vocabulary) -> Maps:
        pipeline = camkit.wrap(
            model,
            seed=seed,
            edit=edit,
            edit_blocks=edit_blocks,
            refine=refine,
            vocabulary=vocabulary,
        )

        def maps(photo: Photo, classes: list[int]) -> Tensor:
            asked = torch.tensor([classes])
            return pipeline.stages(photo.pixels, rgb=photo.rgb, classes=asked).cam[0]

        return maps

    under = [] if edit is None else [f"under {edit!r} of the last {edit_blocks} blocks"]
    return Method("camkit", ", ".join([repr(seed), *under, *map(repr, refine)]), build)


def minmax(maps: Tensor) -> Tensor:
    """To [0, 1]: as the packages return maps, all but grad-cam's smoothed ones."""
    return camkit.normalize_cam(maps[None].float(), mode="minmax")[0]


SMOOTHED = "grad-cam GradCAM, smoothed"
LAYERS = (-1, -2, -3, -4)
"""The blocks whose first norm a method of one layer may read; which one is chosen on `train`."""


def by_layer(title: str, make: Callable[[str, int], Method]) -> dict[str, Method]:
    """A method at each layer that may be chosen."""
    name = title.split()[-1]
    return {f"{title}, layer {layer}": make(name, layer) for layer in LAYERS}


def family(name: str) -> str:
    """The method without its layer."""
    return name.partition(", layer ")[0]


PEERS: dict[str, Method] = {
    **by_layer("grad-cam GradCAM", grad_cam),
    SMOOTHED: grad_cam("GradCAM", aug_smooth=True, eigen_smooth=True),
    **by_layer("grad-cam GradCAMPlusPlus", grad_cam),
    **by_layer("grad-cam HiResCAM", grad_cam),
    **by_layer("grad-cam LayerCAM", grad_cam),
    **by_layer("torchcam GradCAM", torch_cam),
    **by_layer("torchcam LayerCAM", torch_cam),
    "torchcam LayerCAM, fused": torch_cam("LayerCAM", blocks=4),
    "torchcam RefineCAM": torch_cam("RefineCAM", blocks=4),
    "torchcam LeGrad": legrad(),
    "fast-vit-rollout": rollout(),
}

HYBRID = {"edit": CALIBRATED.method.edit, "edit_blocks": CALIBRATED.method.edit_blocks}
OURS: dict[str, Method] = {
    "gradient": chain(camkit.GradientSeed()),
    "class weight": chain(camkit.seeds.ClassWeightSeed()),
    "gradient + balanced": chain(camkit.GradientSeed(), *WITHOUT_EDGES),
    "hybrid": chain(CALIBRATED.method.seed, **HYBRID),
    "hybrid + balanced": chain(CALIBRATED.method.seed, *WITHOUT_EDGES, **HYBRID),
    "default": chain(CALIBRATED.method.seed, *DEFAULT_REFINE, **HYBRID),
}
METHODS = PEERS | OURS
