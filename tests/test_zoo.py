"""Every host family: what is captured is what the host computes, and nothing is left behind."""

import pytest
import timm
import torch
from helpers import hooks_on
from hosts import shaken
from optional import transformers
from torch import nn
from zoo import PATCHES, SIDES, ZOO, timm_model

from camkit.capture import watch
from camkit.errors import CamkitError


def opened(name):
    entry = ZOO[name]
    model = shaken(entry.build())
    pixels = torch.randn(2, 3, *entry.shape)
    return entry, model, lambda host: entry.call(host, pixels)


def plain(output):
    """The tensors of an output, whatever it comes in."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [v for v in output.to_tuple() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", ZOO)
def test_captured_maps_are_those_of_the_host(name):
    entry, model, call = opened(name)
    with torch.no_grad():
        expected = entry.maps(model, call)
        with watch(model) as seen:
            call(model)
    blocks = seen.capture.blocks
    assert len(blocks) == 2
    for block, maps in zip(blocks, expected[:2], strict=True):
        torch.testing.assert_close(block.head_mean(), maps.mean(1), atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(block.rows([0, 3]), maps[:, :, [0, 3]], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_token_roles_and_grid_are_measured(name):
    entry, model, call = opened(name)
    with torch.no_grad(), watch(model) as seen:
        call(model)
    capture = seen.capture
    anatomy = capture.anatomy
    found = (anatomy.class_tokens, anatomy.distillation_tokens, anatomy.register_tokens)
    assert (*found, anatomy.other_tokens) == entry.roles
    rows, cols = capture.grid.rows, capture.grid.cols
    assert (rows * entry.patch, cols * entry.patch) == entry.shape


@pytest.mark.parametrize("name", ZOO)
def test_watching_moves_no_output_and_leaves_no_hook(name):
    _, model, call = opened(name)
    with torch.no_grad():
        before = plain(call(model))
        with watch(model):
            during = plain(call(model))
        after = plain(call(model))
    for one, two, three in zip(before, during, after, strict=True):
        torch.testing.assert_close(two, one, atol=5e-6, rtol=1e-5)
        assert torch.equal(three, one)
    assert hooks_on(model) == 0


def _traced():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    return torch.jit.trace(model, torch.randn(1, 3, 64, 64))


MAE = {**SIDES, **PATCHES, "mask_ratio": 0.75}
STAGES = {"num_attention_heads": [1, 1, 2, 2], "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
WINDOWS = r"attention runs on 32 windows for 2 images: windowed attention \(Swin\) has no class-to"
REDUCED = r"256 queries attend to 4 keys: spatially reduced attention \(PVT, MiT\) does not relate"
REFUSED = {
    "timm swin": (
        lambda: timm.models.SwinTransformer(
            64, embed_dim=16, depths=(1, 1), num_heads=(1, 1), window_size=4
        ),
        WINDOWS,
    ),
    "timm swinv2": (
        lambda: timm.models.SwinTransformerV2(
            64, embed_dim=16, depths=(1, 1), num_heads=(1, 1), window_size=4
        ),
        WINDOWS,
    ),
    "timm pvt": (lambda: timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)), REDUCED),
    "timm xcit": (
        lambda: timm.models.Xcit(64, embed_dim=16, depth=1, num_heads=2, cls_attn_layers=1),
        "map of 8x8 belongs to no sequence of that length: attention between channels",
    ),
    "timm resnet": (
        lambda: timm.create_model("resnet10t"),
        r"no attention found in ResNet: camkit watches modules that hold a head count \(num_heads",
    ),
    "transformers segformer": (
        lambda: transformers.SegformerModel(transformers.SegformerConfig(**STAGES)),
        REDUCED,
    ),
    "transformers swin": (
        lambda: transformers.SwinModel(
            transformers.SwinConfig(
                image_size=64, embed_dim=16, depths=[1, 1], num_heads=[1, 1], window_size=4
            )
        ),
        WINDOWS,
    ),
    "transformers mae": (
        lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**MAE)),
        "the patches do not come in the order of their rows",
    ),
    "transformers mae, nothing masked": (
        lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**MAE | {"mask_ratio": 0.0})),
        "the patches do not come in the order of their rows",
    ),
    "timm pit": (
        lambda: timm.create_model("pit_ti_224", img_size=64),
        "watched blocks run on 5, 17, 50 tokens.*keep blocks of one resolution with `blocks=`",
    ),
    "timm convit": (
        lambda: timm.create_model("convit_tiny", depth=2, local_up_to_layer=1, img_size=64),
        "makes several maps in a call and mixes them in its own way",
    ),
    "timm differential": (
        lambda: timm_model("vit_dlittle_patch16_reg1_gap_256", depth=2, img_size=64),
        "makes several maps in a call and mixes them in its own way",
    ),
    "no attention": (lambda: nn.Linear(4, 4), "no attention found in Linear"),
    "torchscript": (_traced, "TorchScript module hides its attention; watch the Python model"),
}


def read(model):
    with torch.no_grad(), watch(model) as seen:
        model(torch.randn(2, 3, 64, 64))
    return seen.capture


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_by_patches_is_refused_with_a_reason(name):
    build, reason = REFUSED[name]
    model = build().eval()
    with pytest.raises(CamkitError, match=reason):
        read(model)
