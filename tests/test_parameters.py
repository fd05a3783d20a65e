"""Parameters of any kind, and wrappers around a model: camkit sees what it sees in a plain one."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import capture_of, hooks_of, modes_on
from hosts import HandMade, tiny
from kinds import (
    KINDS,
    WRAPPED,
    Adapter,
    AddedTo,
    IntegerLinear,
    fsdp_shard,
    of_kind,
    offloaded,
    sharded,
)
from torch import nn

from camkit import DOEI, attach, seeds, watch, wrap
from camkit.capture.parameters import (
    applied,
    device_of,
    linear_weight,
    move_model,
    norm_weight,
    to_input,
)
from camkit.edits import ScaleOutput, VirtualClassTokens
from camkit.errors import CaptureError, UnsupportedModelError

CLASSES = torch.tensor([[1, 3], [2, 0]])
SEEDS = [seeds.GradientSeed(), seeds.ClassWeightSeed(), seeds.GradCAMSeed(), seeds.LeGradSeed()]
# rounding alone; a head of 16 bits rounds its scores, and so do the gradients that leave it
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
ROUNDED = {"rtol": 0.05, "atol": 0.02}


@pytest.fixture(scope="module")
def one_process():
    """A distributed run of one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=[*KINDS, *WRAPPED])
def kind(request):
    if request.param in ("FSDP2", "tensor parallel", "DDP"):
        request.getfixturevalue("one_process")
    return request.param


def tolerance(kind):
    return ROUNDED if kind == "a head of 16 bits" else CLOSE


def belongings(model):
    """Everything of the user's that can be compared without reading values."""
    return {
        "hooks": hooks_of(model),
        "training": [module.training for module in model.modules()],
        "parameters": [
            (name, p.dtype, p.device.type, p.requires_grad, p.grad is None, type(p))
            for name, p in model.named_parameters()
        ],
        "forward": ["forward" in vars(module) for module in model.modules()],
        "modes": modes_on(),
    }


def test_a_capture_is_that_of_the_plain_twin(kind):
    model, twin, pixels = of_kind(kind)
    with torch.no_grad():
        output = model(pixels)
    before = belongings(model)
    capture, expected = capture_of(model, pixels), capture_of(twin, pixels)
    assert capture.anatomy == expected.anatomy
    assert capture.anatomy.class_tokens == (0,)
    torch.testing.assert_close(capture.scores.float(), expected.scores, **tolerance(kind))
    for mine, theirs in zip(capture.blocks, expected.blocks, strict=True):
        torch.testing.assert_close(mine.rows([0, 5]), theirs.rows([0, 5]))
    modules = dict(model.named_modules())
    assert all(name in modules for name in capture.names)
    with torch.no_grad(), watch(model):
        assert torch.equal(model(pixels), output)
    assert belongings(model) == before


def test_seeds_are_those_of_the_plain_twin(kind):
    model, twin, pixels = of_kind(kind)
    with torch.no_grad():
        model(pixels)  # a sharded model gathers the weights of its root once and for all
    before = belongings(model)
    for seed in SEEDS[:-1] if kind == "FSDP2" else SEEDS:
        expected = seed(capture_of(twin, pixels, seed), CLASSES)
        found = seed(capture_of(model, pixels, seed), CLASSES)
        assert expected.max() > 1e-3
        bounds = {**tolerance(kind), "atol": tolerance(kind)["atol"] * float(expected.max())}
        torch.testing.assert_close(found.float(), expected, **bounds)
    if kind != "FSDP2":  # its own backward drops what it had gathered
        assert belongings(model) == before


def test_an_edit_acts_as_on_the_plain_twin(kind):
    model, twin, pixels = of_kind(kind)
    if kind == "compiled":
        pytest.skip("refused: see test_contract_compile")
    with torch.no_grad():
        plain = model(pixels)
        for edit in (ScaleOutput(2.0), DOEI.as_drawn(), DOEI()):
            with attach(twin, edit):
                expected = twin(pixels)
            with attach(model, edit):
                torch.testing.assert_close(model(pixels).float(), expected, **tolerance(kind))
        assert torch.equal(model(pixels), plain)


def test_a_pipeline_segments_as_with_the_plain_twin(kind):
    model, twin, pixels = of_kind(kind)
    rgb = torch.rand(2, 3, *pixels.shape[2:])
    found, expected = (
        wrap(host, refine=()).stages(pixels.double(), rgb=rgb, classes=CLASSES)
        for host in (model, twin)
    )
    assert found.method == expected.method
    torch.testing.assert_close(found.cam, expected.cam, rtol=0.01, atol=0.01)


class Embedding(nn.Module):
    """Puts a class token of its own before the patches."""

    def __init__(self, token):
        super().__init__()
        self.cls_token = token

    def forward(self, patches):
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)


class TokenApart(HandMade):
    """Keeps its class token in a module that may be sharded by itself."""

    def __init__(self):
        super().__init__()
        self.embed = Embedding(self.cls_token)
        del self.cls_token

    def sequence(self, patches):
        return self.embed(patches)


def test_a_class_token_that_is_sharded_by_itself_is_found(one_process):
    """FSDP gathers it as its module is called, in place of the changed copy that is measured."""
    model, pixels = TokenApart().eval(), torch.randn(2, 3, 16, 24)
    expected = model(pixels).detach()
    for part in (model.embed, model):
        fsdp_shard(part)
    assert capture_of(model, pixels).anatomy.class_tokens == (0,)
    with torch.no_grad():
        assert torch.equal(model(pixels), expected)
    loss = model(pixels).sum()
    loss.backward()
    assert model.embed.cls_token.grad.full_tensor().abs().max() > 0


def test_a_sharded_model_says_what_keeps_its_weights_for_a_second_class(one_process):
    """Parts that a seed calls after the forward have no hook of FSDP that gathers them again."""
    model, twin, pixels = of_kind("FSDP2")
    seed = seeds.LeGradSeed()
    with pytest.raises(CaptureError, match=r"set_reshard_after_backward\(False\)"):
        seed(capture_of(model, pixels, seed), CLASSES)
    model.set_reshard_after_backward(False)
    found = seed(capture_of(model, pixels, seed), CLASSES)
    torch.testing.assert_close(found, seed(capture_of(twin, pixels, seed), CLASSES), **CLOSE)


# single layers


class Cosine(nn.Module):
    """A classifier of cosines: not linear in its input."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) @ self.weight.T


LAYERS = {
    "linear": lambda layer: layer,
    "adapted": Adapter,
    "added to": AddedTo,
    "integers": IntegerLinear,
    "parametrised": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_the_weights_of_a_layer_are_what_it_multiplies_by(build):
    torch.manual_seed(0)
    layer = build(nn.Linear(6, 4)).train(False)
    x = torch.randn(5, 6)
    torch.testing.assert_close(x @ linear_weight(layer).T, layer(x) - layer(torch.zeros(1, 6)))
    torch.testing.assert_close(applied(layer, x[None]), layer(x)[None])


def test_a_convolution_is_applied_to_tokens_as_to_pixels():
    torch.manual_seed(0)
    layer, tokens = nn.Conv2d(6, 4, 1), torch.randn(2, 9, 6)
    as_pixels = layer(tokens.mT.unflatten(2, (3, 3))).flatten(2).mT
    torch.testing.assert_close(applied(layer, tokens), as_pixels)
    layer.forward = nn.Conv2d.forward.__get__(layer)  # as accelerate's hooks replace it
    torch.testing.assert_close(applied(layer, tokens), as_pixels)
    torch.testing.assert_close(linear_weight(layer), layer.weight.flatten(1))


def test_hooks_of_the_user_do_not_run_where_a_layer_is_read():
    layer, called = Adapter(nn.Linear(6, 4)), []
    layer.register_forward_hook(lambda *_: called.append(1))
    linear_weight(layer)
    applied(layer, torch.zeros(2, 6))
    assert called == []


def test_weights_of_a_layer_that_is_not_linear_are_refused():
    with pytest.raises(UnsupportedModelError, match="Cosine is not linear in its input"):
        linear_weight(Cosine(nn.Linear(6, 4)))


@pytest.mark.parametrize("build", [Adapter, AddedTo])
def test_shares_in_the_score_are_those_of_the_merged_classifier(build):
    torch.manual_seed(0)
    model, pixels = tiny("average pooled", depth=2)
    model.head = build(model.head)
    seed = seeds.ContributionSeed()
    found = seed(capture_of(model, pixels, seed), CLASSES)
    head = nn.Linear(48, 5)
    with torch.no_grad():
        head.bias.copy_(model.head(torch.zeros(48)))
        head.weight.copy_((model.head(torch.eye(48)) - head.bias).T)
    model.head = head
    torch.testing.assert_close(found, seed(capture_of(model, pixels, seed), CLASSES), **CLOSE)


def test_virtual_class_tokens_are_the_rows_of_the_merged_classifier():
    torch.manual_seed(0)
    model, _ = tiny("vit", depth=2)
    model.head = Adapter(model.head)
    rows = VirtualClassTokens.from_classifier(model).embeddings
    torch.testing.assert_close(rows, model.head.merged().weight.detach())


@pytest.mark.parametrize("make", [offloaded, sharded], ids=["offloaded", "sharded"])
def test_shares_in_the_score_are_those_of_the_plain_twin_behind_its_norm(make, one_process):
    torch.manual_seed(0)
    model, pixels = tiny("average pooled", depth=2)
    model, twin = make(model)
    seed = seeds.ContributionSeed()
    expected = seed(capture_of(twin, pixels, seed), CLASSES)
    torch.testing.assert_close(seed(capture_of(model, pixels, seed), CLASSES), expected, **CLOSE)


@pytest.mark.parametrize("width", [7, 8])
def test_the_weights_of_a_norm_are_measured_where_they_are_not_plain(width):
    norm, like = nn.LayerNorm(width, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    expected = norm.weight.detach()
    norm.weight = nn.Parameter(norm.weight.to("meta"))
    norm.forward = lambda x: F.layer_norm(x, (width,), expected, norm.bias, norm.eps)
    torch.testing.assert_close(norm_weight(norm, like), expected)


# where pixels and models go


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_are_of_the_type_of_the_patch_embedding(dtype):
    model = HandMade()
    model.patch_embed.to(dtype)
    assert to_input(model, torch.zeros(1, 3, 8, 8)).dtype == dtype


def test_pixels_stay_as_they_are_for_a_model_without_weights():
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    assert to_input(nn.Flatten(), pixels) is pixels
    assert to_input(nn.Linear(3, 3, device="meta"), pixels) is pixels


def test_a_model_that_accelerate_placed_is_not_moved():
    model, _ = offloaded(HandMade())
    assert move_model(model, "meta") is model
    assert model.blocks[0].qkv.weight.device.type == "meta"  # as it was
    assert model.head._hf_hook.weights_map["weight"].device.type == "cpu"
    assert move_model(HandMade(), "meta").cls_token.is_meta


def test_texts_go_to_the_device_of_weights_that_are_there():
    here, away = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    assert device_of(nn.Sequential(away, here)) == torch.device("cpu")
    assert device_of(away) is None
    away._hf_hook = SimpleNamespace(execution_device=torch.device("cpu"))
    assert device_of(away) == torch.device("cpu")


def test_pixels_go_where_accelerate_loads_the_patch_embedding():
    model, pixels = nn.Sequential(nn.Conv2d(3, 8, 4, 4, device="meta")), torch.zeros(1, 3, 8, 8)
    assert to_input(model, pixels).device == pixels.device
    model[0]._hf_hook = SimpleNamespace(execution_device="meta")
    assert to_input(model, pixels).device.type == "meta"


# quantised activations


@pytest.fixture
def quantised():
    """A model with dynamically quantised linear layers, and the model it was made from."""
    if torch.backends.quantized.engine == "none":
        pytest.skip("torch was built without quantised kernels")
    torch.manual_seed(0)
    model, pixels = tiny("vit", depth=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao is to take its place
        found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return found, model, pixels


def test_a_quantised_model_is_seen_up_to_its_rounding(quantised):
    model, twin, pixels = quantised
    with torch.no_grad():
        output = model(pixels)
    seed = seeds.ClassWeightSeed()
    capture, expected = capture_of(model, pixels, seed), capture_of(twin, pixels, seed)
    assert torch.equal(capture.scores, output)
    found, wanted = capture.blocks[0].rows([0]), expected.blocks[0].rows([0])
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.01)
    assert not torch.equal(found, wanted)
    maps, wanted = (seed(c, CLASSES).flatten(2) for c in (capture, expected))
    assert torch.nn.functional.cosine_similarity(maps, wanted, dim=-1).min() > 0.98
    rows = VirtualClassTokens.from_classifier(model).embeddings
    torch.testing.assert_close(rows, twin.head.weight.detach(), rtol=0.0, atol=0.02)


@pytest.mark.filterwarnings("ignore:quantized..linear_dynamic")  # torch's own words
@pytest.mark.parametrize("seed", [seeds.GradientSeed(), seeds.RelevanceSeed(), seeds.LeGradSeed()])
def test_gradients_through_quantised_activations_are_refused_with_what_works(quantised, seed):
    model, _, pixels = quantised
    with pytest.raises(UnsupportedModelError, match=r"quantised activations.*ClassWeightSeed"):
        seed(capture_of(model, pixels, seed), CLASSES)
    pipeline = wrap(model, seed=seeds.ClassWeightSeed(), refine=())
    stages = pipeline.stages(pixels, rgb=torch.rand(2, 3, 64, 96), classes=CLASSES)
    assert float(stages.cam.max()) == 1.0
