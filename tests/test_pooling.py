"""Attention of single queries that pool the patches: SigLIP's head and CaiT's class attention."""

import copy

import pytest
import timm
import torch
import zoo
from hosts import shaken
from torch.overrides import TorchFunctionMode

from camkit import GradientSeed, attach, watch
from camkit.edits import ScaleOutput
from camkit.refiners import HybridPropagate
from camkit.seeds import ClassAttentionSeed, RelevanceSeed

NAMES = ["timm siglip", "timm cait", "transformers siglip"]
CLASSES = torch.tensor([[1, 4, 0], [3, 0, 2]])


def opened(name):
    entry = zoo.ZOO[name]
    model, pixels = shaken(entry.build()), torch.randn(2, 3, *entry.shape)
    return model, lambda host: entry.call(host, pixels)


def scored(name):
    """A host with a classifier of five classes, and two images it takes."""
    kinds = {"timm siglip": "vit_base_patch16_siglip_224", "timm cait": "cait_xxs24_224"}
    settings = {"embed_dim": 64, "num_heads": 4, "depth": 2, "img_size": 64, "num_classes": 5}
    return shaken(timm.create_model(kinds[name], **settings)), torch.randn(2, 3, 64, 64)


class Softmaxed(TorchFunctionMode):
    """Keeps what every softmax returns, in the graph of its host."""

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            self.maps.append(result)
        return result


def unfused(model, call):
    """Outputs of an un-fused timm copy, its maps between patches, and those of single queries."""
    model = copy.deepcopy(model).requires_grad_()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with torch.enable_grad(), Softmaxed() as seen:
        outputs = call(model)
    single = [m for m in seen.maps if m.shape[2] == 1]
    return outputs, [m for m in seen.maps if m.shape[2] > 1], single


def expected_rows(name, model, call):
    """The rows of the pooling queries, and which of their columns are patches."""
    if name == "transformers siglip":
        return zoo.asked(model, call), slice(None)
    _, _, single = unfused(model, call)
    # the class token of CaiT joins the patches in front
    return [m.detach() for m in single], slice(1 if name == "timm cait" else 0, None)


def tensors_of(output):
    return [output] if isinstance(output, torch.Tensor) else list(output.to_tuple())


def seen_by(model, call, **options):
    with watch(model, **options) as seen:
        call(model)
    return seen.capture


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("options", [{}, {"class_rows_only": True}, {"blocks": 1}], ids=str)
@torch.no_grad()
def test_rows_of_the_pooling_queries_are_those_of_the_host(name, options):
    model, call = opened(name)
    expected, patches = expected_rows(name, model, call)
    pooling = seen_by(model, call, **options).pooling
    assert len(pooling) == len(expected) == (2 if name == "timm cait" else 1)
    for found, rows in zip(pooling, expected, strict=True):
        torch.testing.assert_close(found.attention.rows([0]), rows, atol=2e-6, rtol=1e-4)
        assert found.patches == list(range(rows.shape[3]))[patches]


@torch.no_grad()
def test_class_attention_is_the_mean_row_of_the_pooling_queries_on_the_grid(name):
    model, call = opened(name)
    rows, patches = expected_rows(name, model, call)
    capture = seen_by(model, call)
    found = ClassAttentionSeed()(capture, torch.tensor([[0, 7], [3, -1]]))
    mean = torch.stack([m.mean(1)[:, 0, patches] for m in rows]).mean(0)
    expected = mean.view(2, capture.grid.rows, capture.grid.cols)
    for image, slot in ((0, 0), (0, 1), (1, 0)):
        torch.testing.assert_close(found[image, slot], expected[image], atol=2e-6, rtol=1e-4)
    assert not found[1, 1].any()


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("change", ["", "frozen", "no_grad", "frozen no_grad"])
def test_the_gradient_seed_is_that_of_the_pooling_maps(name, change):
    model, pixels = scored(name)
    outputs, _, single = unfused(model, lambda host: host(pixels))
    model.requires_grad_("frozen" not in change)
    with torch.set_grad_enabled("no_grad" not in change):
        capture = seen_by(model, lambda host: host(pixels), gradients=True)
    found = GradientSeed()(capture, CLASSES).flatten(2)
    start = 1 if name == "timm cait" else 0
    for slot, column in enumerate(CLASSES.T):
        score = outputs.gather(1, column[:, None]).sum()
        gradients = torch.autograd.grad(score, single, retain_graph=True)
        products = [
            (a * g).clamp_min(0).mean(1)[:, 0, start:]
            for a, g in zip(single, gradients, strict=True)
        ]
        expected = torch.stack(products).mean(0).detach()
        torch.testing.assert_close(found[:, slot], expected, atol=1e-6, rtol=1e-3)
    assert found.max() > 1e-4


@pytest.mark.parametrize("name", NAMES[:2])
def test_rollout_starts_from_what_the_pooling_queries_weigh(name):
    model, pixels = scored(name)
    outputs, maps, single = unfused(model, lambda host: host(pixels))
    capture = seen_by(model, lambda host: host(pixels), gradients=True)
    found = RelevanceSeed()(capture, CLASSES).flatten(2)
    start = 1 if name == "timm cait" else 0
    for slot, column in enumerate(CLASSES.T):
        score = outputs.gather(1, column[:, None]).sum()
        gradients = torch.autograd.grad(score, [*maps, *single], retain_graph=True)
        weighted = [
            (a * g).clamp_min(0).mean(1) for a, g in zip([*maps, *single], gradients, strict=True)
        ]
        rollout = torch.eye(maps[0].shape[-1]).expand(2, -1, -1)
        for block in weighted[: len(maps)]:
            rollout = rollout + block @ rollout
        pooled = sum(row[:, :, start:] for row in weighted[len(maps) :])
        expected = (pooled @ rollout)[:, 0].detach()
        torch.testing.assert_close(found[:, slot], expected, atol=1e-6, rtol=1e-3)
    assert found.max() > 1e-4


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("seed", [GradientSeed(), RelevanceSeed()], ids=repr)
def test_a_padded_class_has_no_map_and_leaves_the_others(name, seed):
    model, pixels = scored(name)
    capture = seen_by(model, lambda host: host(pixels), gradients=True)
    padded = torch.tensor([[1, -1, 0], [-1, 0, -1]])
    found = seed(capture, padded)
    assert torch.equal(found[padded < 0], torch.zeros(3, 4, 4))
    torch.testing.assert_close(found[padded >= 0], seed(capture, CLASSES)[padded >= 0])


@pytest.mark.parametrize("name", NAMES[:2])
@torch.no_grad()
def test_patch_embeddings_are_the_tokens_behind_the_last_norm(name):
    model, pixels = scored(name)
    expected = model.forward_features(pixels)
    capture = seen_by(model, lambda host: host(pixels))
    found = capture.patch_embeddings()
    torch.testing.assert_close(found, expected[:, -capture.grid.size :], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_patch_embeddings_of_transformers_are_the_tokens_behind_the_last_norm():
    model, call = opened("transformers siglip")
    expected = call(model).last_hidden_state
    found = seen_by(model, call).patch_embeddings()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_alignment_keeps_maps_of_a_pooled_host_in_their_range(name):
    model, call = opened(name)
    capture = seen_by(model, call)
    cam = torch.rand(2, 3, capture.grid.rows, capture.grid.cols)
    found = HybridPropagate(colour_width=None, balance=0)(cam, capture)
    assert (found <= cam.amax((2, 3), keepdim=True) + 1e-6).all()
    assert (found >= cam.amin((2, 3), keepdim=True) - 1e-6).all()
    assert not torch.allclose(found, cam, atol=0.05)


@pytest.mark.parametrize("name", NAMES[:2])
@torch.no_grad()
def test_the_last_block_to_edit_is_the_last_before_the_pooling(name):
    model, pixels = scored(name)
    twin = copy.deepcopy(model)
    twin.blocks[1].attn.register_forward_hook(lambda *call: call[2] * 3.0)
    expected = twin(pixels)
    assert not torch.allclose(expected, model(pixels), atol=1e-3)
    with attach(model, ScaleOutput(3.0), blocks=1):
        torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_watching_a_pooled_host_changes_no_bit_and_leaves_no_hook(name):
    model, call = opened(name)
    before = tensors_of(call(model))
    seen_by(model, call)
    for one, two in zip(before, tensors_of(call(model)), strict=True):
        assert torch.equal(one, two)
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in kinds)
