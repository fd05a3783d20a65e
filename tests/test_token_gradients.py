"""The Grad-CAM family on tokens: its formulas, its shortcuts, and what it leaves alone."""

import copy
from contextlib import contextmanager

import numpy as np
import oracles
import pytest
import timm
import torch
from helpers import capture_of, state_of
from hosts import HandMade, shaken, tiny
from torch import nn

import camkit
from camkit.capture.class_query import ClassQuery
from camkit.capture.intercept import EvenRows, Intercept
from camkit.capture.record import WatchSpec, required_by
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds.token_gradients import principal_component

CLASSES = torch.tensor([[1, 4], [3, 0]])
PIXELS = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
METHODS = ["gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "elementwise"]
SEEDS = [
    camkit.seeds.GradCAMSeed(),
    camkit.seeds.GradCAMSeed(
        "layercam", blocks=2, contrast=camkit.seeds.FinerCAMContrast(classes=2)
    ),
    camkit.seeds.GradCAMSeed("gradcam++", noise=camkit.seeds.SmoothGrad(samples=2)),
    camkit.seeds.EigenCAMSeed(),
    camkit.seeds.LeGradSeed(),
    camkit.seeds.LeGradSeed(token="class"),
    camkit.seeds.AttentionRolloutSeed(),
]


@pytest.fixture(params=SEEDS, ids=repr)
def seed(request):
    return request.param


def slow_tokens(model, pixels, column, block=-1):
    """Tokens behind a block's first norm and their gradient, by a hook and the whole graph."""
    kept = []
    hook = model.blocks[block].norm1.register_forward_hook(lambda *call: kept.append(call[-1]))
    outputs = model(pixels)
    hook.remove()
    (gradient,) = torch.autograd.grad(oracles.chosen(outputs, column), kept[0])
    return kept[0].detach(), gradient


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "deit distilled", "average pooled"])
def test_each_method_is_its_formula_written_out_place_by_place(family):
    model, pixels = tiny(family, depth=2)
    model, pixels = model.double(), pixels.double()
    capture = capture_of(model, pixels, camkit.seeds.GradCAMSeed())
    slow = slow_tokens(model, pixels, CLASSES[:, 0])
    tokens, gradient = (each[:, capture.patches] for each in slow)
    for method in METHODS:
        maps = camkit.seeds.GradCAMSeed(method)(capture, CLASSES[:, :1]).flatten(1).double()
        expected = oracles.token_cam(method, tokens, gradient)
        np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-7, err_msg=method)


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "qk norm", "explicit softmax"])
def test_the_class_query_alone_gives_the_same_scores_and_maps(family):
    model, pixels = tiny(family)
    seed = camkit.seeds.GradCAMSeed()
    whole = capture_of(model, pixels, seed)
    short = capture_of(model, pixels, seed, skip_unused_patches=True)
    assert (whole.class_query_only, short.class_query_only) == (False, True)
    torch.testing.assert_close(short.outputs, whole.outputs, rtol=1e-5, atol=1e-5)
    for each in (seed, camkit.seeds.GradCAMSeed("layercam")):
        torch.testing.assert_close(each(short, CLASSES), each(whole, CLASSES), rtol=1e-4, atol=1e-6)
    for name in ("q", "k"):
        if hasattr(whole.blocks[-1], name):
            ours, theirs = (getattr(capture.blocks[-1], name) for capture in (short, whole))
            torch.testing.assert_close(ours, theirs)


class ReadsBoth(nn.Module):
    """Reads its patches a little, or beside the class token."""

    def __init__(self, *, beside=False):
        super().__init__()
        self.vit, self.beside = tiny("vit", depth=2)[0], beside
        self.head = nn.Linear(96 if beside else 48, 5)

    def forward(self, pixels):
        tokens = self.vit.forward_features(pixels)
        token, mean = tokens[:, 0], tokens[:, 1:].mean(1)
        return self.head(torch.cat([token, mean], -1) if self.beside else token + 0.01 * mean)


@pytest.mark.parametrize("host", ["average pooled", "deit distilled", "both"])
def test_a_host_that_reads_more_than_its_class_token_is_evaluated_whole(host):
    model, pixels = tiny("vit" if host == "both" else host, depth=2)
    model = ReadsBoth().eval() if host == "both" else model
    capture = capture_of(model, pixels, camkit.seeds.GradCAMSeed(), skip_unused_patches=True)
    assert not capture.class_query_only
    torch.testing.assert_close(capture.outputs, model(pixels))


def test_a_host_is_tried_again_when_its_weights_have_changed():
    model, seed = ReadsBoth().eval(), camkit.seeds.EigenCAMSeed()
    nn.init.zeros_(model.head.weight)  # now nothing is read at all
    assert capture_of(model, PIXELS, seed, skip_unused_patches=True).class_query_only
    nn.init.normal_(model.head.weight)
    assert not capture_of(model, PIXELS, seed, skip_unused_patches=True).class_query_only


@pytest.mark.parametrize("other", ["training", "hook", "edit"])
def test_a_seed_that_reads_all_tokens_gets_them(other):
    model, pixels = tiny("vit")
    seed, shapes = camkit.seeds.EigenCAMSeed(), []
    if other == "training":
        model.train()
    if other == "hook":
        model.norm.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    if other == "edit":
        camkit.attach(model, camkit.edits.ScaleOutput(2.0))
    assert not capture_of(model, pixels, seed, skip_unused_patches=True).class_query_only


def test_patches_behind_the_last_block_are_not_read_when_they_were_not_evaluated():
    model, pixels = tiny("vit")
    capture = capture_of(model, pixels, camkit.seeds.EigenCAMSeed(), skip_unused_patches=True)
    for read in (capture.patch_embeddings, capture.patch_scores):
        with pytest.raises(CaptureError, match="evaluated for the class token only"):
            read()


def test_smooth_maps_average_powers_of_the_gradient_over_noised_images():
    model, pixels = tiny("vit")
    noise = camkit.seeds.SmoothGrad(samples=3, spread=0.2, rng_seed=5)
    seed = camkit.seeds.GradCAMSeed("gradcam++", noise=noise)
    before = torch.get_rng_state()
    capture = capture_of(model, pixels, seed)
    assert torch.equal(torch.get_rng_state(), before)
    draws = torch.Generator().manual_seed(5)
    found = [
        slow_tokens(
            model, pixels + 0.2 * torch.randn(pixels.shape, generator=draws), CLASSES[:, 0]
        )[1][:, 1:].double()
        for _ in range(3)
    ]
    powers = [sum(g**p for g in found) / 3 for p in (1, 2, 3)]
    tokens = slow_tokens(model, pixels, CLASSES[:, 0])[0][:, 1:].double()
    expected = oracles.smooth_grad_cam_plus_plus(tokens, *powers)
    maps = seed(capture, CLASSES[:, :1]).flatten(1).double()
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-7)


def test_a_contrast_of_no_strength_is_the_class_score():
    model, pixels = tiny("vit")
    plain = camkit.seeds.GradCAMSeed("hirescam")
    weak = camkit.seeds.GradCAMSeed(
        "hirescam", contrast=camkit.seeds.FinerCAMContrast(strength=0.0)
    )
    capture = capture_of(model, pixels, plain, weak)
    torch.testing.assert_close(weak(capture, CLASSES), plain(capture, CLASSES))


def test_a_contrast_is_worked_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0, -5.0]])
    found = camkit.seeds.FinerCAMContrast(classes=2, strength=0.5)(scores, torch.tensor([0]))
    e1, e2 = np.exp(1.0), np.exp(2.0)
    expected = (e1 * (3 - 0.5) + e2 * (3 - 1.0)) / (e1 + e2)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


def test_the_first_component_is_that_of_a_singular_value_decomposition():
    for shape in ((2, 6, 9), (2, 9, 6)):
        tokens = torch.randn(*shape, dtype=torch.float64)
        found = principal_component(tokens)
        for own, each in zip(found, tokens.numpy(), strict=True):
            centred = each - each.mean(0)
            expected = centred @ np.linalg.svd(centred)[2][0]
            expected *= 1 if abs(expected.max()) >= abs(expected.min()) else -1
            np.testing.assert_allclose(own.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("vit", None),
        ("vit", 2),
        ("explicit softmax", 2),
        ("average pooled", None),
        ("learned bias", None),
    ],
)
def test_legrad_is_the_positive_gradient_of_every_blocks_own_score(family, blocks):
    model, pixels = tiny(family)
    seed = camkit.seeds.LeGradSeed(blocks=blocks)
    capture = capture_of(model, pixels, seed)
    found = seed(capture, CLASSES).flatten(2)
    for slot, column in enumerate(CLASSES.T):
        expected = oracles.legrad(model, pixels, column, capture.patches, blocks or 3)
        torch.testing.assert_close(found[:, slot], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["vit", "qk norm", "dinov2 registers"])
@pytest.mark.parametrize("class_query", [False, True])
def test_legrad_of_the_class_token_is_the_gradient_at_its_row_alone(family, class_query):
    model, pixels = tiny(family)
    seed = camkit.seeds.LeGradSeed(blocks=2, token="class")
    capture = capture_of(model, pixels, seed, skip_unused_patches=class_query)
    found = seed(capture, CLASSES).flatten(2)
    for slot, column in enumerate(CLASSES.T):
        expected = oracles.legrad(model, pixels, column, capture.patches, 2, "class")
        torch.testing.assert_close(found[:, slot], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("explicit softmax", "writes its softmax out"),
        ("average pooled", "has 0 class tokens, but one is needed"),
        ("learned bias", "cannot be called with the class token alone"),
        ("training", "is in training mode"),
        ("hooked", "carries hooks or edits"),
        ("edited", "computes another class token"),
    ],
)
def test_a_class_token_that_cannot_be_followed_alone_is_refused(host, words):
    known = host in ("explicit softmax", "average pooled", "learned bias")
    model, pixels = tiny(host if known else "vit", depth=2)
    if host == "training":
        model.train()
    if host == "hooked":
        model.blocks[0].norm1.register_forward_hook(lambda *_: None)
    edit = camkit.edits.ScaleOutput(2.0) if host == "edited" else None

    def watched():
        with watching(model, camkit.seeds.LeGradSeed(token="class"), edit):
            model(pixels)

    with pytest.raises(UnsupportedModelError, match=rf"{words}.*token=.mean."):
        watched()


@contextmanager
def watching(model, seed, edit):
    """A watched model without gradients, edited only after its hooks are on."""
    with torch.no_grad(), camkit.watch(model, requires=seed.requires):
        if edit is not None:
            camkit.attach(model, edit)
        yield


def test_a_callers_own_graph_keeps_the_gradients_of_its_weights():
    model, pixels = tiny("vit", depth=2)
    model(pixels).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for seed in (camkit.seeds.LeGradSeed(), camkit.seeds.LeGradSeed(token="class")):
        with camkit.watch(model, requires=seed.requires):
            scores = model(pixels)
        scores.square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
        model.zero_grad()


def test_legrad_of_a_graph_that_others_need_whole_is_the_same():
    model, pixels = tiny("vit")
    alone = capture_of(model, pixels, camkit.seeds.LeGradSeed())
    beside = capture_of(model, pixels, camkit.seeds.LeGradSeed(), camkit.GradientSeed())
    seed = camkit.seeds.LeGradSeed()
    torch.testing.assert_close(seed(beside, CLASSES), seed(alone, CLASSES))
    with pytest.raises(CaptureError, match="does not hold the tokens that GradCAMSeed"):
        camkit.seeds.GradCAMSeed()(alone, CLASSES)


@pytest.mark.parametrize("even", [True, False])
def test_a_linear_layer_of_even_rows_has_the_gradient_of_any_other(even):
    layer, tokens = nn.Linear(4, 3).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    weights = torch.randn(2, 1 if even else 5, 3, dtype=torch.float64).expand(2, 5, 3)
    found = []
    for mode in (lambda: Intercept(EvenRows()), torch.enable_grad):
        start = tokens.clone().requires_grad_()
        with mode():
            output = layer(start)
        found.append(torch.autograd.grad((output * weights).sum(), start)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("residual", [0.5, 0.0])
def test_attention_rollout_is_the_product_of_all_maps(residual):
    model, pixels = tiny("vit")
    seed = camkit.seeds.AttentionRolloutSeed(residual=residual)
    _, maps = oracles.unfused(model, pixels)
    whole = torch.eye(maps[0].shape[-1])
    for attention in maps:
        mixed = (1 - residual) * attention.mean(1) + residual * torch.eye(len(whole[-1]))
        whole = mixed.detach() @ whole
    found = seed(capture_of(model, pixels, seed), CLASSES).flatten(2)
    torch.testing.assert_close(found, whole[:, :1, 1:].expand(-1, 2, -1))


class Dead(HandMade):
    """Its classifier sees no patch."""

    def forward(self, pixels):
        self.tokens(pixels)
        token = self.norm(self.cls_token[:, 0].expand(len(pixels), -1))
        return self.head(token)


def test_a_place_that_no_score_depends_on_is_an_error_with_its_name():
    model, pixels, seed = Dead(), torch.randn(2, 3, 16, 24), camkit.seeds.GradCAMSeed()
    capture = capture_of(model, pixels, seed, scores=lambda output: output)
    with pytest.raises(CaptureError, match=r"no gradients|do not depend on .* enter blocks\.1"):
        seed(capture, CLASSES)


def test_a_capture_for_another_seed_says_what_to_do():
    model, pixels = tiny("vit", depth=2)
    with torch.no_grad(), camkit.watch(model) as seen:
        model(pixels)
    for seed in SEEDS[:-1]:  # all but rollout, which reads attention alone
        with pytest.raises(CaptureError, match=r"requires=seed\.requires"):
            seed(seen.capture, CLASSES)


def test_classes_in_one_call_equal_single_calls_and_padding_gives_zeros(seed):
    capture = capture_of(*tiny("vit", depth=2), seed)
    together = seed(capture, CLASSES)
    for slot in range(2):
        torch.testing.assert_close(together[:, [slot]], seed(capture, CLASSES[:, [slot]]))
    padded = seed(capture, torch.tensor([[1, -1], [-1, 0]]))
    assert not padded[0, 1].any()
    assert not padded[1, 0].any()
    torch.testing.assert_close(padded[0, 0], together[0, 0])
    torch.testing.assert_close(padded[1, 1], together[1, 1])


def test_modes_and_frozen_weights_change_nothing_and_nothing_changes(seed):
    model, pixels = tiny("vit", depth=2)
    expected = seed(capture_of(model, pixels, seed, skip_unused_patches=True), CLASSES)
    model(pixels).sum().backward()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        model.requires_grad_(mode is not torch.no_grad)
        before = state_of(model)
        with mode():
            with camkit.watch(model, requires=seed.requires, skip_unused_patches=True) as seen:
                model(pixels)
            found = seed(seen.capture, CLASSES)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert state_of(model) == before


def test_a_model_in_half_precision_makes_nearly_the_same_map(seed):
    model, pixels = tiny("vit", depth=2)
    expected = seed(capture_of(model, pixels, seed), CLASSES)
    half = copy.deepcopy(model).bfloat16()
    found = seed(capture_of(half, pixels.bfloat16(), seed), CLASSES).float()
    assert found.isfinite().all()
    likeness = torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1]
    assert likeness > 0.9


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_makes_the_same_maps():
    model, pixels = tiny("vit", depth=1)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    compiled(pixels)
    for seed in (camkit.seeds.GradCAMSeed(), camkit.seeds.LeGradSeed()):
        expected = seed(capture_of(model, pixels, seed), CLASSES)
        found = seed(capture_of(compiled, pixels, seed, skip_unused_patches=True), CLASSES)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_a_forward_that_breaks_in_the_last_block_leaves_no_trace():
    model, pixels = tiny("vit")
    seed = camkit.seeds.GradCAMSeed()
    capture_of(model, pixels, seed, skip_unused_patches=True)
    before = state_of(model)
    with torch.no_grad(), camkit.watch(model, requires=seed.requires, skip_unused_patches=True):
        with pytest.raises(RuntimeError):
            model(pixels[:, :2])
        torch.testing.assert_close(model(pixels[:1]), model(pixels)[:1])
    assert state_of(model) == before
    assert model.blocks[-1](torch.randn(1, 7, 48)).shape == (1, 7, 48)


def test_one_forward_serves_seeds_of_every_kind_as_one_each():
    model, pixels = tiny("vit")
    together = capture_of(model, pixels, *SEEDS)
    for one in SEEDS:
        alone = one(capture_of(model, pixels, one), CLASSES)
        torch.testing.assert_close(one(together, CLASSES), alone, rtol=1e-4, atol=1e-6)


def test_noise_that_one_forward_cannot_hold_is_refused():
    seeds = [camkit.seeds.GradCAMSeed(noise=camkit.seeds.SmoothGrad(spread=s)) for s in (0.1, 0.2)]
    with pytest.raises(ValueError, match="one forward cannot hold samples of both"):
        required_by(*seeds)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: camkit.seeds.GradCAMSeed("scorecam"), "must be one of gradcam, .*got 'scorecam'"),
        (lambda: camkit.seeds.GradCAMSeed(blocks=0), "at least 1, got 0"),
        (lambda: camkit.seeds.LeGradSeed(blocks=0), "at least 1 or None, got 0"),
        (lambda: camkit.seeds.LeGradSeed(token="max"), '"mean" or "class", got \'max\''),
        (lambda: camkit.seeds.AttentionRolloutSeed(residual=2.0), r"in \[0, 1\], got 2.0"),
        (lambda: camkit.seeds.SmoothGrad(samples=0), "at least 1, got 0"),
        (lambda: WatchSpec(entering_gradients=True), "at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, words, no_shape_checks):
    with pytest.raises(ValueError, match=words):
        make()


def test_legrad_refuses_a_classifier_of_other_tokens():
    seed = camkit.seeds.LeGradSeed()
    capture = capture_of(ReadsBoth(beside=True).eval(), PIXELS, seed)
    with pytest.raises(UnsupportedModelError, match="not those of a linear classifier of one"):
        seed(capture, CLASSES)
    with pytest.raises(UnsupportedModelError, match="lie in no block, so there are no tokens"):
        capture_of(HandMade(), PIXELS, seed)


def test_a_pipeline_takes_any_of_them(seed):
    model = shaken(
        timm.create_model(
            "vit_tiny_patch16_224",
            depth=3,
            embed_dim=48,
            num_heads=3,
            num_classes=5,
            dynamic_img_size=True,
        )
    )
    rgb = torch.rand(1, 3, 48, 80)
    stages = camkit.wrap(model, seed=seed, refine=()).stages(
        (rgb - 0.5) / 0.5, rgb=rgb, classes=torch.tensor([[2]])
    )
    capture = capture_of(model, (rgb - 0.5) / 0.5, seed)
    expected = camkit.normalize_cam(seed(capture, torch.tensor([[2]])).float())
    torch.testing.assert_close(stages.cam, expected, rtol=1e-4, atol=1e-6)


def shown(model, seed, *, refine):
    rgb = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    pipeline = camkit.wrap(model, seed=seed, refine=refine)
    return pipeline.stages((rgb - 0.5) / 0.5, rgb=rgb, classes=torch.tensor([[2, 0]]))


def test_a_pipeline_takes_the_short_cut_where_its_refiners_are_content():
    model, seed = tiny("vit")[0], camkit.seeds.GradCAMSeed("layercam")
    for refine in ((camkit.Propagate(steps=2, balance=3), camkit.refiners.Normalize("minmax")), ()):
        short = shown(model, seed, refine=refine)
        whole = shown(model, seed, refine=(*refine, lambda cam, _: cam))
        assert (short.capture.class_query_only, whole.capture.class_query_only) == (True, False)
        torch.testing.assert_close(short.cam, whole.cam, rtol=1e-4, atol=1e-4)


def test_a_pipeline_evaluates_all_blocks_where_somebody_reads_behind_them():
    model, seed = tiny("vit")[0], camkit.seeds.GradCAMSeed()
    for refine in (
        (camkit.refiners.HybridPropagate(),),
        (camkit.chain(camkit.refiners.HybridPropagate()),),
    ):
        assert not shown(model, seed, refine=refine).capture.class_query_only
    assert not shown(model, camkit.seeds.ClassWeightSeed(), refine=()).capture.class_query_only


def test_hooks_of_the_short_cut_are_idle_without_it():
    model, pixels = tiny("vit")
    expected = model(pixels)
    hooks = camkit.capture.hooks.Hooks()
    query = ClassQuery(camkit.capture.host.Host.of(model))
    query.start(hooks)
    assert torch.equal(model(pixels), expected)
    hooks.remove()
