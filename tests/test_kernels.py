"""Kernels that hide their attention are named, and switched only where a user asks for it."""

import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hosts import Block, HandMade
from optional import transformers
from torch import nn
from zoo import ZOO

from camkit import attach, watch
from camkit.capture import torch_kernels
from camkit.edits import ScaleOutput
from camkit.errors import CaptureError, UnsupportedModelError


def flexible():
    """A transformers model told to use flex_attention, which compiles itself when it runs."""
    model = ZOO["transformers vit"].build().eval()
    model.set_attn_implementation("flex_attention")
    return model


def nested():
    """A model whose vision and text halves are told apart in its config."""
    sides = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sides, "image_size": 32, "patch_size": 16, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**sides, "vocab_size": 20}, vision_config=vision, projection_dim=8
    )
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation({"": "eager", "vision_config": "flex_attention"})
    return model


def implementations(model):
    config = model.config
    parts = [config, *(getattr(config, name) for name in config.sub_configs)]
    return [part._attn_implementation for part in parts]


class Asking(Block):
    """Asks its module for xFormers at every call, as DINOv2 does."""

    def forward(self, x):
        if sys.modules[type(self).__module__].XFORMERS_AVAILABLE:
            return x.clone()  # stands for a kernel that nothing can see into
        return super().forward(x)


@pytest.fixture
def asking(monkeypatch):
    module = types.ModuleType("research_code")
    module.XFORMERS_AVAILABLE = True
    monkeypatch.setitem(sys.modules, "research_code", module)
    monkeypatch.setattr(Asking, "__module__", "research_code")
    model = HandMade()
    model.blocks = nn.ModuleList(Asking() for _ in range(2))
    return model, module


def test_the_switched_model_shows_the_maps_of_its_eager_twin():
    model, pixels = flexible(), torch.randn(1, 3, 64, 64)
    expected = ZOO["transformers vit"].maps(model, lambda m: m(pixel_values=pixels))
    with torch.no_grad(), torch_kernels(model) as switched, watch(model) as seen:
        model(pixel_values=pixels)
    assert switched == ("flex_attention",)
    for block, maps in zip(seen.capture.blocks, expected, strict=True):
        torch.testing.assert_close(block.head_mean(), maps.mean(1), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("build", [flexible, nested])
def test_every_implementation_is_as_before_also_after_an_exception(build):
    model = build()
    before, open_ = implementations(model), []

    def break_off():
        with torch_kernels(model):
            open_.extend(implementations(model))
            raise IndexError("mine")

    with pytest.raises(IndexError, match="mine"):
        break_off()
    assert "flex_attention" not in open_
    assert implementations(model) == before


def test_a_model_that_hides_nothing_is_left_alone():
    model = nested()
    model.set_attn_implementation("eager")
    with torch_kernels(model) as switched:
        assert implementations(model) == ["eager"] * 3
    assert switched == ()


def test_xformers_is_asked_for_no_more_while_open(asking):
    model, module = asking
    pixels = torch.randn(1, 3, 16, 16)
    with torch_kernels(model) as switched, watch(model) as seen:
        model(pixels)
    q, k, _ = (
        model.blocks[0]
        .qkv(model.blocks[0].norm(model.sequence(model.patch_embed(pixels).flatten(2).mT)))
        .chunk(3, -1)
    )
    heads = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k)]
    expected = F.softmax(heads[0] @ heads[1].mT * 12**-0.5, -1)
    torch.testing.assert_close(seen.capture.blocks[0].head_mean(), expected.mean(1))
    assert switched == ("xFormers (used by research_code)",)
    assert module.XFORMERS_AVAILABLE is True


WORDS = r"xFormers \(used by research_code\).*with camkit\.capture\.torch_kernels\(model\)"


def test_a_hidden_kernel_is_named_with_the_way_out_when_watched(asking):
    model, _ = asking
    with watch(model) as seen:
        model(torch.randn(1, 3, 16, 16))
    with pytest.raises(CaptureError, match=WORDS):
        _ = seen.capture


def test_a_hidden_kernel_is_named_with_the_way_out_when_edited(asking):
    model, _ = asking
    with attach(model, ScaleOutput()), pytest.raises(CaptureError, match=WORDS):
        model(torch.randn(1, 3, 16, 16))


FLEX = r"it runs in flex_attention.*with camkit\.capture\.torch_kernels\(model\)"


@pytest.mark.parametrize("enter", [watch, lambda model: attach(model, ScaleOutput())])
def test_a_kernel_that_compiles_itself_is_named_before_the_compiler_fails(enter):
    model, pixels = flexible(), torch.randn(1, 3, 64, 64)
    with enter(model), pytest.raises(UnsupportedModelError, match=FLEX):
        model(pixel_values=pixels)
    with torch.no_grad(), enter(model), torch_kernels(model):  # opened inside, it helps as well
        model(pixel_values=pixels)


@pytest.mark.skipif(
    "reason" not in inspect.signature(torch.compiler.disable).parameters,
    reason="this torch does not report why a function is not compiled",
)
def test_compiled_code_that_meets_a_watcher_says_so_in_the_words_of_camkit():
    """A host with flex_attention of its own; torch compiles that as one whole graph."""
    torch.compiler.reset()
    model = HandMade()
    softmax = torch.compile(lambda x: torch.softmax(x, -1), backend="eager", fullgraph=True)
    model.blocks[0].qkv.register_forward_hook(lambda *call: call[2] + 0.0 * softmax(call[2]))
    words = r"camkit watches or edits attention in Python.*camkit\.capture\.torch_kernels"
    unsupported = pytest.raises(torch._dynamo.exc.Unsupported, match=words)
    with torch.no_grad(), attach(model, ScaleOutput()), unsupported:
        model(torch.randn(1, 3, 16, 16))
    torch.compiler.reset()
