"""Class attention times the exponential of cosines: laws, plain formulas, planted objects."""

import math

import oracles
import pytest
import timm
import torch
import torch.nn.functional as F
import zoo
from helpers import capture_of, state_of
from hosts import HandMade, OneTokenPerClass, shaken, tiny
from torch import nn

import camkit
from camkit.edits import StaticCalibration, VirtualClassTokens
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import (
    ClassAttentionSeed,
    HybridAttentionSeed,
    PrototypeSeed,
    TextClasses,
)
from camkit.vocabulary import Vocabulary

CLASSES = torch.tensor([[1, 4, 0], [3, 0, 2]])
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class PatchHead(OneTokenPerClass):
    """As MCTformer-V2: each token scores its class, and a 3x3 convolution scores patches."""

    def __init__(self):
        super().__init__(class_tokens=5)
        self.head = nn.Conv2d(24, 5, 3, padding=1)

    def forward(self, pixels):
        tokens = self.tokens(pixels)
        size = pixels.shape[2] // 8, pixels.shape[3] // 8
        return tokens[:, :5].mean(-1), self.head(tokens[:, 5:].mT.unflatten(2, size))


class OwnRows(HandMade):
    """Each class token is scored by its own row of a linear layer."""

    def __init__(self):
        super().__init__(class_tokens=5)

    def forward(self, pixels):
        return self.head(self.tokens(pixels)[:, :5]).diagonal(dim1=1, dim2=2)


def double(model, *size):
    return model.double().eval(), torch.randn(2, 3, *size, dtype=torch.float64)


def class_attention(capture, blocks):
    """The mean over heads of softmax(q k^T) from class tokens to patches, and over blocks."""
    tokens, patches = list(capture.anatomy.class_tokens), capture.patches
    maps = [oracles.full_attention(b.q, b.k, b.scale) for b in capture.blocks[-blocks:]]
    return torch.stack([m.mean(1)[:, tokens][..., patches] for m in maps]).mean(0)


def product(attended, cosines, temperature):
    """The formula, scaled to a maximum of one."""
    maps = attended * (cosines / temperature).exp()
    return maps / maps.amax(-1, keepdim=True)


def unit_max(cam):
    maps = cam.flatten(2)
    return maps / maps.amax(-1, keepdim=True)


def cosines(rows, patches):
    return F.normalize(rows, dim=-1) @ F.normalize(patches, dim=-1).mT


@pytest.mark.parametrize("centred", [True, False])
def test_it_is_the_plain_formula_with_the_rows_of_a_linear_classifier(centred):
    model, pixels = double(tiny("vit")[0], 64, 96)
    seed = HybridAttentionSeed("classifier", temperature=0.3, blocks=2, centred=centred)
    capture = capture_of(model, pixels, seed)
    rows = model.head.weight.detach()
    rows = rows - rows.mean(0) if centred else rows
    patches = model.forward_features(pixels)[:, 1:].detach()
    attended = class_attention(capture, 2)
    expected = product(attended, cosines(rows[CLASSES], patches), 0.3)
    torch.testing.assert_close(unit_max(seed(capture, CLASSES)), expected, **EXACT)


def test_it_is_the_plain_formula_with_one_token_for_each_class():
    model, pixels = double(PatchHead(), 16, 24)
    seed = HybridAttentionSeed(("class tokens", "classifier"), temperature=0.4, centred=False)
    capture = capture_of(model, pixels, seed)
    tokens = model.tokens(pixels).detach()
    rows = model.head.weight.detach().sum((2, 3))
    picked = torch.arange(2)[:, None], CLASSES
    likeness = cosines(tokens[picked], tokens[:, 5:]) + cosines(rows[CLASSES], tokens[:, 5:])
    expected = product(class_attention(capture, 4)[picked], likeness, 0.4)
    torch.testing.assert_close(unit_max(seed(capture, CLASSES)), expected, **EXACT)


def test_the_own_rows_of_class_tokens_are_their_classifier():
    model, pixels = double(OwnRows(), 16, 24)
    capture = capture_of(model, pixels)
    found = HybridAttentionSeed(centred=False).likeness(capture, CLASSES)
    expected = cosines(model.head.weight.detach()[CLASSES], model.tokens(pixels)[:, 5:].detach())
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_classifier_of_class_token_and_mean_is_compared_with_each_patch_as_both():
    entry = zoo.ZOO["transformers dinov2"]
    model, pixels = double(shaken(entry.build()), 64, 64)
    capture = capture_of(model, pixels, call=lambda x: entry.call(model, x))
    patches = model.dinov2(pixel_values=pixels).last_hidden_state[:, 1:].detach()
    classes = torch.tensor([[0], [1]])
    rows = model.classifier.weight.detach()
    found = HybridAttentionSeed(centred=False).likeness(capture, classes)
    expected = cosines(rows[classes], torch.cat([patches, patches], -1))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("centred", [True, False])
def test_texts_are_compared_with_patches_in_their_own_space(centred):
    entry = zoo.ZOO["transformers clip whole"]
    model, pixels = double(shaken(entry.build()), 64, 64)
    width = model.config.projection_dim
    space = camkit.seeds.JointSpace.of(model)
    names, background = torch.randn(5, width, dtype=torch.float64).split([2, 3])
    text = TextClasses(("a", "b"), names, background, space=space)
    seed = HybridAttentionSeed(text, temperature=0.2, blocks=None, centred=centred)
    capture = capture_of(
        model, pixels, seed, call=lambda x: entry.call(model, x), scores=text.scores
    )
    tower = model.vision_model(pixel_values=pixels)
    patches = model.vision_model.post_layernorm(tower.last_hidden_state[:, 1:])
    patches = model.visual_projection(patches).detach()
    classes = torch.tensor([[1, 0], [0, 1]])
    attended = class_attention(capture, len(capture.blocks))
    common = torch.cat([text.embeddings, text.background]).mean(0) if centred else 0.0
    rows = text.embeddings - common
    expected = product(attended, cosines(rows[classes], patches), 0.2)
    torch.testing.assert_close(unit_max(seed(capture, classes)), expected, **EXACT)


@pytest.mark.parametrize("sides", ["classifier", "class tokens"])
@pytest.mark.parametrize("family", ["vit", "explicit softmax", "deit distilled", "eva02"])
def test_an_infinite_temperature_leaves_class_attention(family, sides):
    model, pixels = tiny(family)
    capture = capture_of(model, pixels)
    seed = HybridAttentionSeed(sides, temperature=math.inf, blocks=None)
    torch.testing.assert_close(seed(capture, CLASSES), ClassAttentionSeed()(capture, CLASSES))


def test_a_pooling_query_attends_in_place_of_a_class_token():
    sizes = {"embed_dim": 64, "num_heads": 4, "depth": 2, "img_size": 64, "num_classes": 5}
    model = shaken(timm.create_model("vit_base_patch16_siglip_224", **sizes))
    capture = capture_of(model, torch.randn(2, 3, 64, 64))
    found = HybridAttentionSeed(temperature=math.inf)(capture, CLASSES)
    torch.testing.assert_close(found, ClassAttentionSeed()(capture, CLASSES))
    sharp = HybridAttentionSeed(temperature=0.1)(capture, CLASSES)
    assert not torch.allclose(sharp[:, 0], sharp[:, 1])


def test_patches_pooled_by_their_mean_are_told_apart_by_likeness_alone():
    model, pixels = tiny("average pooled")
    capture = capture_of(model, pixels)
    seed = HybridAttentionSeed(temperature=0.5, centred=False)
    patches = model.fc_norm(model.forward_features(pixels)).detach()
    expected = product(1.0, cosines(model.head.weight.detach()[CLASSES], patches), 0.5)
    torch.testing.assert_close(unit_max(seed(capture, CLASSES)), expected)


@pytest.mark.parametrize("build", [lambda: tiny("vit")[0], PatchHead, OwnRows])
@pytest.mark.parametrize("sides", ["classifier", ("class tokens", PrototypeSeed())])
def test_each_class_has_the_map_that_it_has_alone(build, sides):
    model = build().eval()
    capture = capture_of(model, torch.randn(2, 3, 32, 48))
    seed = HybridAttentionSeed(sides)
    together = seed(capture, CLASSES)
    for slot in range(3):
        alone = seed(capture, CLASSES[:, slot : slot + 1])
        torch.testing.assert_close(together[:, slot : slot + 1], alone)
    order = [2, 0, 1]
    torch.testing.assert_close(seed(capture, CLASSES[:, order]), together[:, order])


def test_no_class_has_no_map():
    model, pixels = tiny("vit")
    cam = HybridAttentionSeed()(capture_of(model, pixels), torch.tensor([[1, -1], [-1, -1]]))
    assert cam[0, 0].amax() > 0.0
    assert not cam[0, 1].any()
    assert not cam[1].any()


def test_the_symmetric_sum_adds_what_patches_attend_to_in_class_tokens():
    model, pixels = double(PatchHead(), 16, 24)
    capture = capture_of(model, pixels)
    seed = HybridAttentionSeed(temperature=math.inf, blocks=None, interaction="sum")
    maps = [oracles.full_attention(b.q, b.k, b.scale).mean(1) for b in capture.blocks]
    both = torch.stack([m[:, :5, 5:] + m[:, 5:, :5].mT for m in maps]).mean(0)
    expected = both[torch.arange(2)[:, None], CLASSES]
    torch.testing.assert_close(seed(capture, CLASSES).flatten(2), expected, **EXACT)


def test_head_weights_weigh_the_heads_of_the_blocks_that_are_read():
    model, pixels = double(tiny("vit")[0], 64, 96)
    capture = capture_of(model, pixels)
    weights = torch.rand(2, 3, 3, dtype=torch.float64)
    seed = HybridAttentionSeed(temperature=math.inf, blocks=2, head_weights=lambda _: weights)
    maps = [oracles.full_attention(b.q, b.k, b.scale)[:, :, 0, 1:] for b in capture.blocks]
    weighted = torch.stack([m * weights[:, i, :, None] for i, m in enumerate(maps)][-2:])
    expected = weighted.mean((0, 2))[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(seed(capture, CLASSES).flatten(2), expected, **EXACT)


def test_outputs_that_a_vocabulary_joins_count_by_the_mean_of_their_rows():
    model, pixels = double(tiny("vit")[0], 64, 96)
    groups = Vocabulary(("pair", "one"), members=((0, 3), (2,)))
    capture = capture_of(model, pixels, vocabulary=groups)
    weight = model.head.weight.detach()
    rows = torch.stack([(weight[0] + weight[3]) / 2, weight[2]])
    classes = torch.tensor([[0, 1]] * 2)
    own = HybridAttentionSeed(centred=False).likeness(capture, classes)
    patches = model.forward_features(pixels)[:, 1:].detach()
    torch.testing.assert_close(own, cosines(rows[classes], patches), **EXACT)
    for given in (VirtualClassTokens.from_classifier(model), weight, rows):
        found = HybridAttentionSeed(given, centred=False).likeness(capture, classes)
        torch.testing.assert_close(found, own, **EXACT)


def test_under_calibration_attention_is_the_hosts_and_patches_are_the_second_streams():
    model, pixels = tiny("vit")
    plain = capture_of(model, pixels)
    with camkit.attach(model, StaticCalibration(), blocks=2):
        calibrated = capture_of(model, pixels)
    rows = model.head.weight.detach() - model.head.weight.detach().mean(0)
    patches = calibrated.patch_embeddings()
    assert not torch.allclose(patches, plain.patch_embeddings(), atol=0.1)
    attended = ClassAttentionSeed()(plain, CLASSES).flatten(2)
    expected = product(attended, cosines(rows[CLASSES], patches), 0.1)
    seed = HybridAttentionSeed(temperature=0.1, blocks=None)
    torch.testing.assert_close(unit_max(seed(calibrated, CLASSES)), expected)


def test_wrap_reads_calibrated_patches():
    model, _ = tiny("vit")
    rgb = torch.rand(1, 3, 64, 96)
    photo = camkit.Photo(pixels=(rgb - 0.5) / 0.5, rgb=rgb, size=(64, 96))
    maps = {}
    for edit in (None, StaticCalibration()):
        seed = HybridAttentionSeed(temperature=0.1)
        pipeline = camkit.wrap(model, seed=seed, edit=edit, edit_blocks=2, refine=())
        maps[edit] = pipeline(photo, classes=[0, 3]).cam
    with camkit.attach(model, StaticCalibration(), blocks=2):
        twin = camkit.wrap(model, seed=seed, refine=())(photo, classes=[0, 3]).cam
    torch.testing.assert_close(maps[edit], twin)
    assert not torch.allclose(maps[None], twin, atol=1e-2)


def test_it_computes_no_gradient_and_leaves_the_model_as_it_was():
    model, pixels = tiny("vit")
    before = state_of(model)
    with camkit.watch(model) as seen:  # with a graph, as in training
        model(pixels)
    cam = HybridAttentionSeed(("classifier", "class tokens"))(seen.capture, CLASSES)
    assert not cam.requires_grad
    assert state_of(model) == before
    assert not HybridAttentionSeed().requires.gradients


class Planted(HandMade):
    """Patches of a rectangle get a share of a class's row behind the norm."""

    def __init__(self, inside, strength=6.0):
        super().__init__()
        self.register_buffer("inside", inside)
        self.plant, self.strength = nn.Identity(), strength

    def forward(self, pixels):
        tokens = self.tokens(pixels)
        row = F.normalize(self.head.weight[2] - self.head.weight.mean(0), dim=0)
        share = F.pad(self.inside.flatten().float(), (1, 0))
        tokens = self.plant(tokens + self.strength * share[:, None] * row)
        return self.head(tokens[:, 0])


def separation(cam, inside):
    """How often a patch inside scores higher than one outside (area under the ROC curve)."""
    hit, miss = cam[:, inside], cam[:, ~inside]
    return (hit[:, :, None] > miss[:, None]).double().mean().item()


def test_it_finds_a_planted_object_and_shuffled_likeness_does_not():
    torch.manual_seed(0)
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[2:6, 3:9] = True
    model = Planted(inside).eval()
    capture = capture_of(model, torch.randn(8, 3, 64, 96))
    classes = torch.full((8, 1), 2)
    attended = ClassAttentionSeed()(capture, classes)
    plain = separation(attended[:, 0], inside)
    seed = HybridAttentionSeed()
    assert separation(seed(capture, classes)[:, 0], inside) > plain + 0.2
    other = seed(capture, torch.full((8, 1), 4))
    assert separation(other[:, 0], inside) < 0.6
    likeness = seed.likeness(capture, classes)[..., torch.randperm(96)]
    shuffled = attended.flatten(2) * (likeness / seed.temperature).exp()
    assert separation(capture.grid.fold(shuffled)[:, 0], inside) < plain + 0.05


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: HybridAttentionSeed("classes"), "must hold \"classifier\".*got 'classes'"),
        (lambda: HybridAttentionSeed(()), "at least one class side, got none"),
        (lambda: HybridAttentionSeed(temperature=0.0), "must be above 0, got 0"),
        (lambda: HybridAttentionSeed(blocks=0), "at least 1, or None for all, got 0"),
        (lambda: HybridAttentionSeed(interaction="columns"), '"rows" or "sum", got \'columns\''),
        (lambda: HybridAttentionSeed(torch.zeros(3)), r"one row for each class, got shape \(3,\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words, no_shape_checks):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.ones(5, 7), "7 wide, but the patches of this model have 48 channels"),
        (torch.ones(3, 48), "one for each of the 5 classes of this model, got 3"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused(rows, words):
    model, pixels = tiny("vit")
    with pytest.raises(ValueError, match=words):
        HybridAttentionSeed(rows)(capture_of(model, pixels), CLASSES)


def test_a_model_without_the_side_says_so():
    model, pixels = tiny("average pooled")
    capture = capture_of(model, pixels)
    for seed in (HybridAttentionSeed("class tokens"), HybridAttentionSeed(interaction="sum")):
        with pytest.raises(CaptureError, match="has no class token"):
            seed(capture, CLASSES)
    entry = zoo.ZOO["timm dinov2"]
    headless = capture_of(entry.build(), torch.randn(2, 3, *entry.shape))
    with pytest.raises(UnsupportedModelError, match="no linear classifier or head for patches"):
        HybridAttentionSeed()(headless, CLASSES)
