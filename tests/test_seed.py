"""Each seed against a slow plain version on un-fused copies of real hosts."""

from functools import partial

import oracles
import pytest
import torch
from helpers import capture_of as any_capture_of
from hosts import HandMade, OneTokenPerClass, tiny

import camkit
from camkit.bench import Variant
from camkit.bench.evaluator import variant_maps
from camkit.capture import watch
from camkit.capture.record import required_by
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.photo import Photo
from camkit.seeds import (
    ClassAttentionSeed,
    ClassWeightSeed,
    FusedSeed,
    GradientSeed,
    RelevanceSeed,
    Views,
)
from camkit.vocabulary import Vocabulary

SEEDS = [ClassAttentionSeed(), ClassWeightSeed(), GradientSeed(), RelevanceSeed()]
CLASSES = torch.tensor([[1, 4, 0], [3, 0, 2]])
WITH_CLASS_TOKEN = [
    "vit",
    "explicit softmax",
    "qk norm",
    "deit distilled",
    "dinov2 registers",
    "learned bias",
    "eva02",
]
capture_of = partial(any_capture_of, gradients=True)


@pytest.fixture(params=SEEDS, ids=repr)
def seed(request):
    return request.param


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_the_gradient_seed_is_attention_times_its_gradient(family):
    model, pixels = tiny(family)
    capture = capture_of(model, pixels)
    outputs, maps = oracles.unfused(model, pixels)
    found = GradientSeed()(capture, CLASSES).flatten(2)
    for slot, column in enumerate(CLASSES.T):
        expected = oracles.gradient_seed(outputs, maps, column, [0], capture.patches)
        torch.testing.assert_close(found[:, slot], expected)


@pytest.mark.parametrize("family", [*WITH_CLASS_TOKEN, "average pooled"])
def test_the_rollout_seed_is_the_published_matrix_rule(family):
    model, pixels = tiny(family)
    capture = capture_of(model, pixels)
    outputs, maps = oracles.unfused(model, pixels)
    start = capture.patches if family == "average pooled" else [0]
    found = RelevanceSeed()(capture, CLASSES).flatten(2)
    for slot, column in enumerate(CLASSES.T):
        expected = oracles.rollout_seed(outputs, maps, column, start, capture.patches)
        torch.testing.assert_close(found[:, slot], expected)


@pytest.mark.parametrize("blocks", [1, [0, 2]])
def test_the_gradient_seed_averages_the_watched_blocks_only(blocks):
    model, pixels = tiny("vit")
    outputs, maps = oracles.unfused(model, pixels)
    kept = [maps[i] for i in ([2] if blocks == 1 else blocks)]
    capture = capture_of(model, pixels, blocks=blocks)
    expected = oracles.gradient_seed(outputs, kept, CLASSES[:, 0], [0], capture.patches)
    torch.testing.assert_close(GradientSeed()(capture, CLASSES[:, :1]).flatten(1), expected)


def layers_behind_pooling(family, model):
    if family in ("average pooled", "learned bias"):
        return [[model.fc_norm, model.head]]
    if family == "deit distilled":
        return [[model.head], [model.head_dist]]
    return [[model.head]]


@pytest.mark.parametrize("family", [*WITH_CLASS_TOKEN[:-1], "average pooled"])
def test_the_class_weight_seed_scores_every_token_alone(family):
    model, pixels = tiny(family)
    capture = capture_of(model, pixels, gradients=False)
    tokens, patches = model.forward_features(pixels), capture.patches
    scored = [
        oracles.patch_scores(tokens, patches, *layers)
        for layers in layers_behind_pooling(family, model)
    ]
    scores = (sum(scored) / len(scored)).detach()
    torch.testing.assert_close(capture.patch_scores(), scores)
    asked = torch.stack([scores[i, :, row].T for i, row in enumerate(CLASSES)])
    expected = (asked - asked.mean(-1, keepdim=True)).clamp_min(0)
    torch.testing.assert_close(ClassWeightSeed()(capture, CLASSES).flatten(2), expected)


def test_class_attention_of_a_single_token_is_the_same_map_for_every_class():
    model, pixels = tiny("vit")
    capture = capture_of(model, pixels, gradients=False)
    _, maps = oracles.unfused(model, pixels)
    expected = torch.stack(maps).mean((0, 2))[:, :1, 1:].detach().expand(-1, 3, -1)
    torch.testing.assert_close(ClassAttentionSeed()(capture, CLASSES).flatten(2), expected)


def test_class_attention_of_one_token_per_class_gives_each_its_row():
    model, pixels = OneTokenPerClass(class_tokens=5), torch.randn(2, 3, 16, 24)
    capture = capture_of(model, pixels, gradients=False)
    assert capture.anatomy.class_tokens == (0, 1, 2, 3, 4)
    rows = torch.stack([block.head_mean()[:, :5, 5:] for block in capture.blocks]).mean(0)
    expected = torch.stack([rows[0, CLASSES[0]], rows[1, CLASSES[1]]])
    torch.testing.assert_close(ClassAttentionSeed()(capture, CLASSES).flatten(2), expected)


def test_several_classes_in_one_call_equal_single_calls(seed):
    capture = capture_of(*tiny("deit distilled"))
    together = seed(capture, CLASSES)
    for slot in range(3):
        torch.testing.assert_close(together[:, [slot]], seed(capture, CLASSES[:, [slot]]))


def test_padding_gives_zeros_and_leaves_the_rest(seed):
    capture = capture_of(*tiny("vit"))
    classes = torch.tensor([[1, -1, 0], [-1, -1, 2]])
    cam, full = seed(capture, classes), seed(capture, CLASSES)
    assert torch.equal(cam[classes < 0], torch.zeros(3, 4, 6))
    torch.testing.assert_close(cam[classes >= 0], full[classes >= 0])


def test_permuted_classes_give_permuted_maps(seed):
    capture, order = capture_of(*tiny("vit")), [2, 0, 1]
    torch.testing.assert_close(seed(capture, CLASSES[:, order]), seed(capture, CLASSES)[:, order])


@pytest.mark.parametrize("family", ["vit", "explicit softmax", "learned bias"])
def test_maps_are_never_negative_and_hold_no_graph(seed, family):
    cam = seed(capture_of(*tiny(family)), CLASSES)
    assert (cam >= 0).all()
    assert not cam.requires_grad


@pytest.mark.parametrize("change", ["frozen", "no_grad", "frozen no_grad", "explicit softmax"])
def test_a_seed_is_the_same_on_a_host_that_is(seed, change):
    model, pixels = tiny("vit")
    expected = seed(capture_of(model, pixels), CLASSES)
    model.requires_grad_("frozen" not in change)
    if change == "explicit softmax":
        for block in model.blocks:
            block.attn.fused_attn = False
    with torch.set_grad_enabled("no_grad" not in change):
        found = seed(capture_of(model, pixels), CLASSES)
    torch.testing.assert_close(found, expected)


def test_gradients_of_parameters_are_left_alone(seed):
    model, pixels = tiny("vit")
    model(pixels).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    seed(capture_of(model, pixels), CLASSES)
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_the_score_of_a_group_is_the_log_of_its_summed_mass():
    model, pixels = tiny("vit")
    members = ((0, 3), (2,), (1, 4))
    capture = capture_of(model, pixels, vocabulary=Vocabulary(("a", "b", "c"), members=members))
    expected = oracles.grouped(model(pixels), members).float()
    torch.testing.assert_close(capture.scores, expected)


@pytest.mark.parametrize("of_group", [ClassWeightSeed(), GradientSeed(), RelevanceSeed()], ids=repr)
def test_a_group_of_one_is_that_output(of_group):
    model, pixels = tiny("vit")
    groups = Vocabulary(("one", "four"), members=((1,), (4,)))
    found = of_group(capture_of(model, pixels, vocabulary=groups), torch.tensor([[0, 1], [1, 0]]))
    plain = of_group(capture_of(model, pixels), torch.tensor([[1, 4], [4, 1]]))
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([[5], [0]], r"must lie in 0 to 4 .or be -1 for none., got 5"),
        ([[-2], [0]], "got -2"),
        ([[1]], r"one row per image \(2\), got 1"),
        ([[], []], "at least one class, got none"),
    ],
)
@pytest.mark.parametrize("asked", SEEDS[1:], ids=repr)
def test_classes_that_do_not_fit_are_refused(asked, classes, words):
    capture = capture_of(*tiny("vit"))
    with pytest.raises(ValueError, match=words):
        asked(capture, torch.tensor(classes, dtype=torch.int64))


@pytest.mark.parametrize("asked", [ClassAttentionSeed(), GradientSeed()], ids=repr)
def test_a_host_without_class_token_is_sent_elsewhere(asked):
    capture = capture_of(*tiny("average pooled"))
    with pytest.raises(CaptureError, match=r"no class token.*use"):
        asked(capture, CLASSES)


@pytest.mark.parametrize("asked", [GradientSeed(), RelevanceSeed()], ids=repr)
@pytest.mark.parametrize("family", ["vit", "explicit softmax"])
def test_a_capture_without_gradients_says_how_to_get_them(asked, family):
    capture = capture_of(*tiny(family), gradients=False)
    with pytest.raises(CaptureError, match=r"watch\(model, gradients=True\)"):
        asked(capture, CLASSES)


class SumPooled(HandMade):
    """Pools in a way that no patch can be scored by."""

    def forward(self, pixels):
        return self.head(self.tokens(pixels).amax(1))


class Scaled(HandMade):
    """Changes the scores after its classifier."""

    def forward(self, pixels):
        return 3 * super().forward(pixels)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (SumPooled, "neither a special token nor the mean"),
        (Scaled, "not those of a linear classifier"),
        (partial(OneTokenPerClass, class_tokens=5), "not those of a linear classifier"),
    ],
)
def test_a_pooling_that_patches_cannot_go_through_is_refused(host, words):
    capture = capture_of(host(), torch.randn(2, 3, 16, 24))
    with pytest.raises(UnsupportedModelError, match=words):
        capture.patch_scores()


def test_every_seed_says_whether_it_needs_gradients():
    assert [one.requires.gradients for one in SEEDS] == [False, False, True, True]


def test_a_class_of_several_outputs_is_read_from_all_their_tokens():
    model, pixels = OneTokenPerClass(class_tokens=5), torch.randn(2, 3, 16, 24)
    both = Vocabulary(("both",), members=((1, 3),))
    grouped = ClassAttentionSeed()(capture_of(model, pixels, vocabulary=both), CLASSES[:, :1] * 0)
    single = ClassAttentionSeed()(capture_of(model, pixels), torch.tensor([[1, 3]] * 2))
    torch.testing.assert_close(grouped[:, 0], single.mean(1))


@pytest.mark.parametrize("seed", [GradientSeed(), RelevanceSeed()])
def test_a_class_with_its_own_token_is_seeded_the_same_under_another_number(seed):
    model, pixels = OneTokenPerClass(class_tokens=5), torch.randn(2, 3, 16, 24)
    renamed = Vocabulary(("fourth", "second"), members=((3,), (1,)))
    found = seed(capture_of(model, pixels, vocabulary=renamed), torch.tensor([[0, 1]] * 2))
    torch.testing.assert_close(found, seed(capture_of(model, pixels), torch.tensor([[3, 1]] * 2)))


def own_seed(capture, classes):
    """A seed as a user writes it: it may read gradients, and the tokens that leave each block."""
    assert len(capture.leaving) == len(capture.blocks)
    return GradientSeed()(capture, classes)


@pytest.mark.parametrize("views", [None, Views(flip=True), Views(scales=(1.0, 0.5), tiles=2)])
def test_a_plain_function_is_a_seed_in_a_pipeline_and_its_views(views):
    model, pixels = tiny("vit")
    rgb = torch.rand(2, 3, 64, 96)
    refine = [camkit.Propagate(), camkit.refiners.Normalize()]
    own, known = (
        camkit.wrap(model, seed=seed, views=views, refine=refine).stages(
            pixels, rgb=rgb, classes=CLASSES
        )
        for seed in (own_seed, GradientSeed())
    )
    torch.testing.assert_close(own.seed, known.seed)
    torch.testing.assert_close(own.cam, known.cam)


def test_a_plain_function_is_a_seed_of_a_benchmark_and_of_other_seeds():
    model, _ = tiny("vit")
    photo = Photo(torch.randn(1, 3, 64, 96), torch.rand(1, 3, 64, 96), (64, 96))
    pairs = [
        (own_seed, GradientSeed()),
        (FusedSeed((own_seed, ClassWeightSeed())), FusedSeed((GradientSeed(), ClassWeightSeed()))),
    ]
    for seeds in pairs:
        own, known = (Variant(repr(seed), camkit.Method(seed, refine=())) for seed in seeds)
        maps = variant_maps(model, photo, CLASSES[:1], [own, known], Vocabulary(tuple("abcde")))
        torch.testing.assert_close(maps[own], maps[known])


def test_a_plain_function_goes_before_a_chain():
    model, pixels = tiny("vit")
    refine = camkit.chain(camkit.Propagate(), camkit.refiners.Normalize())
    spec = required_by(own_seed, refine)
    assert spec.gradients
    assert spec.leaving
    with watch(model, requires=spec) as seen:
        model(pixels)
    cam = refine(own_seed(seen.capture, CLASSES), seen.capture)
    torch.testing.assert_close(cam, refine(GradientSeed()(seen.capture, CLASSES), seen.capture))
