"""What wrap does when nobody says otherwise: calibrated where the model bears it, else not."""

import gc
import logging

import numpy as np
import pytest
import timm
import torch
from hosts import shaken
from torch import nn

from camkit import GradientSeed, Vocabulary, photo_from_array, wrap
from camkit.capture import Capture
from camkit.edits import ScaleOutput, StaticCalibration
from camkit.method import CALIBRATED, GRADIENT, POOLED
from camkit.seeds import ClassWeightSeed, GatedProductSeed

PRODUCT = GatedProductSeed(GradientSeed(), ClassWeightSeed())


def vit(depth, **options):
    torch.manual_seed(0)
    settings = {"embed_dim": 48, "num_heads": 3, "num_classes": 5, "img_size": 48}
    return shaken(timm.create_model("vit_tiny_patch16_224", depth=depth, **settings | options))


@pytest.fixture(scope="module")
def deep():
    return vit(6)


@pytest.fixture(scope="module")
def photo():
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return photo_from_array(colours, size=(48, 48))


def same(found, wanted):
    return torch.equal(found.cam, wanted.cam) and torch.equal(found.mask, wanted.mask)


def test_a_classifier_on_the_class_token_is_calibrated(deep, photo):
    found = wrap(deep)(photo, classes=[1, 3])
    asked = wrap(deep, seed=PRODUCT, edit=StaticCalibration(), edit_blocks=4, background_score=0.54)
    assert same(found, asked(photo, classes=[1, 3]))
    assert found.settings == asked.settings
    assert "StaticCalibration" in found.settings["edit"]
    found = wrap(deep)(photo, classes=[0, 1, 2, 3, 4])  # of some class both agree
    plain = wrap(deep, seed=GradientSeed())(photo, classes=[0, 1, 2, 3, 4])
    assert not torch.equal(found.cam, plain.cam)
    assert torch.allclose(found.logits, plain.logits, atol=1e-6)  # the classifier is left alone


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"depth": 5}, id="few blocks"),
        pytest.param({"depth": 6, "global_pool": "avg"}, id="pooled beside a class token"),
        pytest.param({"depth": 6, "class_token": False, "global_pool": "map"}, id="pooling query"),
    ],
)
def test_others_are_read_by_their_gradients(options, photo):
    model = vit(**options)
    found = wrap(model)(photo, classes=[1, 3])
    asked = wrap(model, seed=GradientSeed())(photo, classes=[1, 3])
    assert same(found, asked)
    assert found.settings == asked.settings
    assert found.settings["background_score"] == GRADIENT.method.background_score


POOLED_VIT = {"class_token": False, "global_pool": "avg", "fc_norm": True}


@pytest.mark.parametrize("depth", [2, 6])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(POOLED_VIT, id="mean"),
        pytest.param(POOLED_VIT | {"global_pool": "max"}, id="maximum"),
        pytest.param(POOLED_VIT | {"fc_norm": False}, id="a norm before"),
    ],
)
def test_pooled_patches_are_scored_by_the_classifier(options, depth, photo):
    model = vit(depth, **options)
    found = wrap(model)(photo, classes=[1, 3])
    asked = wrap(model, seed=ClassWeightSeed(), background_score=POOLED.method.background_score)
    assert same(found, asked(photo, classes=[1, 3]))
    assert found.settings == asked.settings


def test_a_host_that_casts_its_scores_is_read_as_well(photo):
    model = vit(2, **POOLED_VIT).bfloat16()
    pipeline = wrap(model, scores=lambda output: output.float())
    found, exact = pipeline(photo, classes=[1]), wrap(vit(2, **POOLED_VIT))(photo, classes=[1])
    assert found.settings["seed"] == exact.settings["seed"] == "ClassWeightSeed()"
    assert (found.cam - exact.cam).abs().mean() < 0.05


def test_a_head_that_takes_all_tokens_in_a_row_is_read_by_gradients(photo):
    torch.manual_seed(0)
    tokens = vit(2, num_classes=0, global_pool="")
    model = nn.Sequential(tokens, nn.Flatten(), nn.Linear(10 * 48, 5)).eval()
    found = wrap(model)(photo, classes=[1])
    assert found.settings["seed"] == "GradientSeed()"
    assert same(found, wrap(model, seed=GradientSeed())(photo, classes=[1]))


def test_what_was_tried_is_let_go_at_once(photo):
    model = vit(5)
    gc.collect()
    before = captures()
    gc.disable()
    try:
        wrap(model)(photo, classes=[1])
        after = captures()
    finally:
        gc.enable()
    assert after == before


def captures():
    return sum(type(one) is Capture for one in gc.get_objects())


def test_why_a_model_is_not_calibrated_is_told(photo, caplog):
    model = vit(6)
    for block in model.blocks:
        block.attn.fused_attn = False
    with caplog.at_level(logging.INFO, "camkit"):
        found = wrap(model)(photo, classes=[2])
    assert found.settings["seed"] == "GradientSeed()"
    assert "VisionTransformer does not support GatedProductSeed" in caplog.text
    assert "the host writes its attention out" in caplog.text


def test_it_is_tried_once_for_all_photos(deep, photo):
    calls = []
    handle = deep.register_forward_hook(lambda *_: calls.append(1))
    pipeline = wrap(deep)
    pipeline(photo, classes=[1])
    tried = len(calls)
    pipeline(photo, classes=[1])
    pipeline(photo, classes=[2])
    handle.remove()
    assert (tried, len(calls)) == (3, 5)


def test_a_score_of_ones_own_is_read_by_gradients(deep, photo):
    own = [lambda output: output[2] - output[4]]
    found = wrap(deep)(photo, classes=own)
    assert same(found, wrap(deep, seed=GradientSeed())(photo, classes=own))
    pipeline = wrap(deep)
    pipeline(photo, classes=[1])
    assert pipeline(photo, classes=own).settings["seed"] == "GradientSeed()"
    assert "GatedProduct" in pipeline(photo, classes=[1]).settings["seed"]


def test_a_batch_is_what_its_photos_are(deep, photo):
    pixels = torch.cat([photo.pixels, photo.pixels.flip(-1)])
    rgb = torch.cat([photo.rgb, photo.rgb.flip(-1)])
    both = wrap(deep).stages(pixels, rgb=rgb, classes=torch.tensor([[1], [3]]))
    one = wrap(deep).stages(pixels[1:], rgb=rgb[1:], classes=torch.tensor([[3]]))
    assert torch.allclose(both.cam[1:], one.cam, rtol=1e-3, atol=1e-3)


def test_what_is_asked_for_is_kept(deep, photo):
    assert wrap(deep, background_score=0.0)(photo).settings["background_score"] == 0.0
    shallow = wrap(vit(2), background_score=0.3)(photo).settings
    assert (shallow["background_score"], shallow["seed"]) == (0.3, "GradientSeed()")
    edited = wrap(deep, edit=ScaleOutput(1.5))(photo).settings
    assert (edited["seed"], edited["edit_blocks"]) == ("GradientSeed()", 3)
    weighed = wrap(deep, seed=ClassWeightSeed())(photo).settings
    assert (weighed["seed"], weighed["edit"]) == ("ClassWeightSeed()", "None")
    assert CALIBRATED.method.background_score == 0.54


def test_grouped_outputs_are_read_together(deep, photo):
    groups = Vocabulary(("cat", "dog"), members=((0, 1), (2, 3, 4)))
    found = wrap(deep, vocabulary=groups)(photo, classes=["dog"])
    asked = wrap(
        deep, vocabulary=groups, seed=PRODUCT, edit=StaticCalibration(), edit_blocks=4,
        background_score=0.54,
    )  # fmt: skip
    assert same(found, asked(photo, classes=["dog"]))


def test_the_model_is_as_it_was(deep, photo):
    deep.train()
    weights = {name: value.clone() for name, value in deep.state_dict().items()}
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in deep.modules()]
    wrap(deep)(photo, classes=[1])
    after = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in deep.modules()]
    assert deep.training
    assert hooks == after
    assert all(torch.equal(value, weights[name]) for name, value in deep.state_dict().items())
    assert all(value.grad is None for value in deep.parameters())
    deep.eval()
