"""grad-cam's call shapes: its numbers where it is right, errors where it is not."""

import numpy as np
import pytest
import timm
import torch
from helpers import state_of
from hosts import shaken
from oracles import chosen, token_cam
from torch import nn
from torch.nn.functional import interpolate

from camkit import compat
from camkit.errors import CamkitError, CaptureError, UnsupportedModelError

METHODS = {
    "GradCAM": "gradcam",
    "GradCAMPlusPlus": "gradcam++",
    "HiResCAM": "hirescam",
    "XGradCAM": "xgradcam",
    "LayerCAM": "layercam",
    "GradCAMElementWise": "elementwise",
}
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "average": ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}),
}
CATEGORIES = [1, 3]
TARGETS = [compat.ClassifierOutputTarget(index) for index in CATEGORIES]


@pytest.fixture(params=MODELS)
def host(request):
    return built(request.param)


def built(name="vit"):
    kind, settings = MODELS[name]
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    model = shaken(timm.create_model(kind, **sizes, **settings))
    side = settings["img_size"]
    return model, torch.randn(2, 3, side, side)


def onto_grid(model):
    prefix = model.num_prefix_tokens
    return lambda tokens: tokens[:, prefix:].unflatten(1, (4, 4)).movedim(-1, 1)


def rescaled(maps):
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + 1e-7)


def test_maps_are_the_formulas_scaled_and_resized_as_grad_cam_does(host):
    model, pixels = host
    kept = []
    hook = model.blocks[-1].norm1.register_forward_hook(lambda *call: kept.append(call[-1]))
    outputs = model(pixels)
    hook.remove()
    (gradient,) = torch.autograd.grad(chosen(outputs, torch.tensor(CATEGORIES)), kept[0])
    own = slice(model.num_prefix_tokens, None)
    for name, method in METHODS.items():
        cam = getattr(compat, name)(model, [model.blocks[-1].norm1], onto_grid(model))
        found = cam(pixels, TARGETS)
        maps = token_cam(method, kept[0].detach()[:, own], gradient[:, own]).view(2, 4, 4)
        large = interpolate(rescaled(maps)[:, None], pixels.shape[-2:], mode="bilinear")[:, 0]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, rescaled(large).numpy(), atol=1e-4, err_msg=name)
        torch.testing.assert_close(cam.outputs, outputs.detach(), rtol=1e-5, atol=1e-5)


def of_grad_cam(method, model, layers, reshape, targets, pixels, **settings):
    """The maps of grad-cam itself; ``settings`` are of its call, ``init_`` those of its class."""
    theirs = pytest.importorskip("pytorch_grad_cam")
    given = {k.removeprefix("init_"): v for k, v in settings.items() if k.startswith("init_")}
    called = {k: v for k, v in settings.items() if not k.startswith("init_")}
    if method == "AblationCAM":
        given["ablation_layer"] = theirs.AblationLayerVit()
    cam = getattr(theirs, method)(model, layers, reshape, **given)
    return cam(pixels, targets, **called)


@pytest.mark.parametrize(
    ("method", "smooth"),
    [
        *((method, {}) for method in (*METHODS, "FinerCAM", "RefineCAM", "SegEigenCAM")),
        *((method, {}) for method in ("KPCA_CAM", "FEM", "ScoreCAM", "AblationCAM")),
        ("LayerCAM", {"aug_smooth": True}),
    ],
)
def test_maps_are_those_of_grad_cam(host, method, smooth):
    model, pixels = host
    layers, reshape = [block.norm1 for block in model.blocks], onto_grid(model)
    targets = None if method == "FinerCAM" else TARGETS
    found = getattr(compat, method)(model, layers, reshape)(pixels, targets, **smooth)
    expected = of_grad_cam(method, model, layers, reshape, targets, pixels, **smooth)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "poly", "rbf", "sigmoid", "cosine"])
@pytest.mark.parametrize("gamma", [None, 0.01])
def test_kernel_components_are_those_of_grad_cam(kernel, gamma):
    model, pixels = built()
    layers, reshape = [model.blocks[-1].norm1], onto_grid(model)
    found = compat.KPCA_CAM(model, layers, reshape, kernel, gamma)(pixels)
    given = {"init_kernel": kernel, "init_gamma": gamma}
    expected = of_grad_cam("KPCA_CAM", model, layers, reshape, TARGETS, pixels, **given)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["EigenCAM", "EigenGradCAM"])
def test_components_are_those_of_grad_cam_up_to_their_sign(host, method):
    theirs = pytest.importorskip("pytorch_grad_cam")
    model, pixels = host
    layers, reshape = [model.blocks[-1].norm1], onto_grid(model)
    found = getattr(compat, method)(model, layers, reshape)(pixels, TARGETS)
    with getattr(theirs, method)(model, layers, reshape) as cam:
        signed = cam.get_cam_image
        maps = [cam(pixels, TARGETS)]
        cam.get_cam_image = lambda *given: -signed(*given)
        maps.append(cam(pixels, TARGETS))
    for own, *both in zip(found, *maps, strict=True):
        assert min(abs(own - each).max() for each in both) < 1e-4


@pytest.mark.parametrize("method", ["FinerCAM", "RefineCAM"])
def test_methods_on_top_of_others_average_over_mirror_images_and_brightness(method):
    model, pixels = built()
    cam = getattr(compat, method)(model)
    views = [cam(pixels * factor, TARGETS) for factor in (0.9, 1.0, 1.1)]
    views += [cam(pixels.flip(-1) * factor, TARGETS)[..., ::-1] for factor in (0.9, 1.0, 1.1)]
    found = cam(pixels, TARGETS, aug_smooth=True)
    np.testing.assert_allclose(found, np.mean(views, axis=0), atol=1e-6)


def test_random_weights_weight_channels_as_in_grad_cam():
    theirs = pytest.importorskip("pytorch_grad_cam")
    model, pixels = built()
    layers, reshape = [model.blocks[-1].norm1], onto_grid(model)
    torch.manual_seed(0)
    drawn = torch.rand(2, 48) * 2 - 1
    torch.manual_seed(0)
    found = compat.RandomCAM(model, layers, reshape)(pixels)

    class Drawn(theirs.RandomCAM):
        def get_cam_weights(self, *_):
            return drawn.numpy()

    np.testing.assert_allclose(found, Drawn(model, layers, reshape)(pixels, TARGETS), atol=1e-4)


def test_shapley_maps_are_those_of_grad_cam_where_it_can_make_them(host):
    theirs = pytest.importorskip("pytorch_grad_cam")
    model, pixels = host
    found = compat.ShapleyCAM(model, [model.patch_embed.proj])(pixels, TARGETS)
    for block in model.blocks:
        block.attn.fused_attn = False  # it needs this; with tokens it fails in any case
    cam = theirs.ShapleyCAM(model, [model.patch_embed.proj])
    np.testing.assert_allclose(found, cam(pixels, TARGETS), atol=1e-4)
    cam.activations_and_grads.gradients.clear()  # it cannot free these


def test_shapley_weights_of_tokens_are_gradients_half_a_step_back(host):
    """The Hessian times the tokens, by the difference of two gradients."""
    model, pixels = host
    model, pixels, norm = model.double(), pixels.double(), model.blocks[-1].norm1
    found = compat.ShapleyCAM(model, [norm])(pixels, TARGETS)
    factor, kept = 1.0, []

    def scaled(*call):
        kept.append((call[-1] * factor).detach().requires_grad_())
        return kept[-1]

    norm.register_forward_hook(scaled)
    slopes = []
    for factor in (1.0, 1 + 1e-4, 1 - 1e-4):  # noqa: B007 - the hook reads it
        total = chosen(model(pixels), torch.tensor(CATEGORIES))
        slopes += torch.autograd.grad(total, kept[-1])
    slope = slopes[0] - 0.5 * (slopes[1] - slopes[2]) / 2e-4
    own = slice(model.num_prefix_tokens, None)
    weights = slope[:, own].mean(1, keepdim=True)
    maps = (kept[0][:, own].detach() * weights).sum(-1).clamp_min(0.0).view(2, 4, 4)
    large = interpolate(rescaled(maps)[:, None], pixels.shape[-2:], mode="bilinear")[:, 0]
    np.testing.assert_allclose(found, rescaled(large).numpy(), atol=1e-4)


def test_layer_and_layout_are_found_where_none_are_given(host):
    model, pixels = host
    named = compat.GradCAM(model, [model.blocks[-1].norm1], onto_grid(model))
    assert np.array_equal(compat.GradCAM(model)(pixels, TARGETS), named(pixels, TARGETS))


def test_a_convolutional_model_needs_no_reshape():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    pixels = torch.randn(2, 3, 9, 9)
    found = compat.GradCAM(model, [model[1]])(pixels, TARGETS)
    planes = model[1](model[0](pixels)).detach()  # the score is the mean of its own channel
    maps = torch.stack([planes[image, index] / 16 for image, index in enumerate(CATEGORIES)])
    large = interpolate(rescaled(maps)[:, None], (9, 9), mode="bilinear")[:, 0]
    np.testing.assert_allclose(found, rescaled(large).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="name it with `target_layers=`"):
        compat.GradCAM(model)


@pytest.mark.parametrize("layer", ["blocks.1", "norm", "blocks.1.norm2"])
def test_a_layer_that_no_score_depends_on_is_an_error_that_names_the_right_one(layer):
    model, pixels = built()
    cam = compat.LayerCAM(model, [model.get_submodule(layer)])
    words = rf"patches in the output of {layer}: .* use `blocks\.1\.norm1`"
    with pytest.raises(CaptureError, match=words):
        cam(pixels, TARGETS)


@pytest.mark.parametrize("count", [1, 3])
def test_a_target_for_each_image_or_an_error(count):
    model, pixels = built()
    with pytest.raises(ValueError, match=f"each of 2 images, got {count}"):
        compat.GradCAM(model)(pixels, TARGETS[:1] * count)


def test_errors_come_out_of_with():
    model, pixels = built()
    with pytest.raises(ValueError, match=r"category=9.* lack"), compat.GradCAM(model) as cam:
        cam(pixels, [compat.ClassifierOutputTarget(9)] * 2)
    with pytest.raises(IndexError, match="out of the user's hands"), compat.GradCAM(model):
        raise IndexError("out of the user's hands")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes_gradients_and_hooks_of_the_model_are_left_alone(mode):
    model, pixels = built()
    expected = compat.GradCAM(model)(pixels, TARGETS)
    model(pixels).sum().backward()
    model.train()
    before = state_of(model)
    with mode():
        found = compat.GradCAM(model)(pixels, TARGETS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert state_of(model) == before
    with pytest.raises(RuntimeError):
        compat.GradCAM(model)(pixels[:, :1], TARGETS)
    assert state_of(model) == before


def test_frozen_and_half_precision_models_work():
    model, pixels = built()
    expected = compat.GradCAM(model)(pixels, TARGETS)
    model.requires_grad_(requires_grad=False)
    assert np.array_equal(compat.GradCAM(model)(pixels, TARGETS), expected)
    found = compat.GradCAM(model.bfloat16())(pixels.bfloat16(), TARGETS)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_works():
    model, pixels = built()
    expected = compat.GradCAM(model)(pixels, TARGETS)
    compiled = torch.compile(model, backend="eager")
    compiled(pixels)
    np.testing.assert_allclose(compat.GradCAM(compiled)(pixels, TARGETS), expected, atol=1e-6)
    torch.compiler.reset()


def test_nothing_of_the_graph_outlives_the_call():
    model, pixels = built()
    cam = compat.GradCAM(model)
    cam(pixels, TARGETS)
    assert not cam.outputs.requires_grad
    assert cam.outputs.grad_fn is None


def test_targets_are_the_numbers_that_they_name():
    row = torch.tensor([1.0, 3.0, 2.0])
    share = row.softmax(0)
    both = compat.FinerWeightedTarget(1, [0, 2], alpha=0.5)(row)
    expected = (share[0] * (3 - 0.5) + share[2] * (3 - 1)) / (share[0] + share[2])
    torch.testing.assert_close(both, expected)
    assert compat.ClassifierOutputTarget(2)(row) == 2
    assert compat.ClassifierOutputSoftmaxTarget(1)(row) == share[1]
    assert compat.BinaryClassifierOutputTarget(0)(row[:1]) == -1


def test_an_overlay_is_mixed_by_hand():
    picture = np.array([[[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]])
    mask = np.array([[0.0, 1.0]])  # OpenCV's jet begins at dark blue and ends at dark red
    found = compat.show_cam_on_image(picture, mask, use_rgb=True)
    mixed = np.array([[[0, 0.25, 0.5 + 64 / 255], [0.5 + 64 / 255, 0, 0]]])
    np.testing.assert_array_equal(found, (mixed / mixed.max() * 255).astype(np.uint8))
    turned = compat.show_cam_on_image(picture[..., ::-1].copy(), mask)
    np.testing.assert_array_equal(turned, found[..., ::-1])


@pytest.mark.parametrize(
    ("picture", "mask", "weight", "words"),
    [
        (255.0, 1.0, 0.5, r"`img` must lie in \[0, 1\], got 255 to 255"),
        (1.0, 1.5, 0.5, r"`mask` must lie in \[0, 1\], got 1.5 to 1.5"),
        (1.0, 1.0, 2.0, "`image_weight` must lie in .* got 2.0"),
        (1.0, np.ones((3, 2)), 0.5, r"size of the picture, 2x3, got shape \(3, 2\)"),
    ],
)
def test_what_cannot_be_overlaid_is_refused(picture, mask, weight, words, no_shape_checks):
    mask = mask if isinstance(mask, np.ndarray) else np.full((2, 3), mask)
    with pytest.raises(ValueError, match=words):
        compat.show_cam_on_image(np.full((2, 3, 3), picture), mask, image_weight=weight)


def test_what_cannot_be_read_is_refused_with_the_way_out():
    model, pixels = built()
    with pytest.raises(ValueError, match="must be modules of the model, got another Linear"):
        compat.GradCAM(model, [nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"must return \(b, channels, h, w\).*\(2, 17, 48\)"):
        compat.GradCAM(model, reshape_transform=lambda tokens: tokens)(pixels, TARGETS)
    plain = nn.Sequential(nn.Flatten(2), nn.Linear(64, 4), nn.Flatten(1))
    with pytest.raises(UnsupportedModelError, match="give a `reshape_transform`"):
        compat.GradCAM(plain, [plain[1]])(torch.randn(2, 3, 8, 8), TARGETS)
    cam = compat.GradCAM(model, [model.blocks[0].norm1])
    model.blocks[0].forward = lambda tokens: tokens
    with pytest.raises(CaptureError, match="norm1 did not run"):
        cam(pixels, TARGETS)


@pytest.mark.parametrize("method", ["GradCAM", "KPCA_CAM", "AblationCAM"])
def test_planes_with_channels_last_need_no_reshape(method):
    sizes = {"depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2), "num_classes": 5}
    options = {"img_size": (64, 96), "window_size": 4} | sizes
    model = shaken(timm.create_model("swin_tiny_patch4_window7_224", **options))
    layer, pixels = [model.layers[-1].blocks[-1].norm1], torch.randn(1, 3, 64, 96)
    planes = lambda output: output.movedim(-1, 1)  # noqa: E731
    assert planes(model.layers[0](model.patch_embed(pixels))).shape == (1, 16, 16, 24)
    found = getattr(compat, method)(model, layer)(pixels, TARGETS[:1])
    expected = of_grad_cam(method, model, layer, planes, TARGETS[:1], pixels)
    np.testing.assert_allclose(found, expected, atol=1e-4)


PERTURBING = ["ScoreCAM", "AblationCAM"]
RERUNNING = [*PERTURBING, "ShapleyCAM"]


@pytest.mark.parametrize("method", RERUNNING)
def test_forwards_of_changed_images_leave_the_model_alone(method):
    model, pixels = built()
    expected = getattr(compat, method)(model)(pixels, TARGETS)
    model(pixels).sum().backward()
    model.train()
    before = state_of(model)
    np.testing.assert_allclose(getattr(compat, method)(model)(pixels, TARGETS), expected, atol=1e-4)
    assert state_of(model) == before


@pytest.mark.parametrize("method", PERTURBING)
def test_a_forward_that_fails_midway_leaves_the_model_alone(method):
    model, pixels = built()
    model.train()
    before, runs = state_of(model), []

    def failing(model, images):
        runs.append(len(images))
        if len(runs) >= 3:
            raise RuntimeError("out of memory")
        return model(images)

    cam = getattr(compat, method)(model, call=failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        cam(pixels, TARGETS)
    assert state_of(model) == before


@pytest.mark.parametrize("method", PERTURBING)
def test_channels_are_batched_and_maps_do_not_depend_on_the_batch(method):
    model, pixels = built()
    expected, runs = getattr(compat, method)(model)(pixels, TARGETS), []
    cam = getattr(compat, method)(
        model, call=lambda m, images: runs.append(len(images)) or m(images)
    )
    cam.batch_size = 20
    np.testing.assert_allclose(cam(pixels, TARGETS), expected, atol=1e-4)
    # 48 channels of each image; changed tokens join a forward of one image
    assert runs == [2, *([20, 20, 8] if method == "ScoreCAM" else [2, 1, 1, 1, 1]) * 2]
    cam.batch_size = 0
    with pytest.raises(ValueError, match=r"`batch_size` must be a whole number .* got 0"):
        cam(pixels, TARGETS)


class WithIds(nn.Module):
    """A ViT that cannot be called with images alone."""

    def __init__(self):
        super().__init__()
        self.vit, _ = built()

    def forward(self, ids, pixels):
        return self.vit(pixels) * ids


@pytest.mark.parametrize("method", ["GradCAM", "FinerCAM", "RefineCAM", "FEM", *RERUNNING])
def test_a_model_that_takes_more_than_images_is_called_by_call(method):
    host, (_, pixels) = WithIds().eval(), built()
    layer = [host.vit.blocks[-1].norm1]
    found = getattr(compat, method)(host, call=lambda model, images: model(1.0, images))
    expected = getattr(compat, method)(host.vit, layer)(pixels, TARGETS)
    np.testing.assert_allclose(found(pixels, TARGETS), expected, atol=1e-4)


def test_activations_that_begin_at_zero_are_ablated_to_zero():
    theirs = pytest.importorskip("pytorch_grad_cam")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(1))
    model, pixels = nn.Sequential(*model, nn.Linear(24, 5)), torch.randn(1, 3, 9, 9)
    layers, target = [model[1]], TARGETS[:1]
    with torch.no_grad():
        assert model[1](model[0](pixels)).min() == 0
    cam = theirs.AblationCAM(model, layers, ablation_layer=theirs.AblationLayer())
    for layer in (None, compat.AblationLayer()):
        found = compat.AblationCAM(model, layers, ablation_layer=layer)(pixels, target)
        np.testing.assert_allclose(found, cam(pixels, target), atol=1e-4)


def test_what_cannot_be_ablated_is_refused():
    model, pixels = built()
    with pytest.raises(CamkitError, match=r"its second, got shape .*AblationLayerVit\(\)"):
        compat.AblationCAM(model, ablation_layer=compat.AblationLayer())(pixels, TARGETS)
    with pytest.raises(CamkitError, match=r"ratio_channels_to_ablate=0.5`; use GradCAM"):
        compat.AblationCAM(model, ratio_channels_to_ablate=0.5)

    def broken(model, images):
        return model(images) * (1.0 if len(images) == 2 else torch.nan)

    with pytest.raises(CaptureError, match=r"changed images are not finite; run .* float32"):
        compat.AblationCAM(model, call=broken)(pixels, TARGETS)


def test_guided_gradients_are_those_of_grad_cam():
    theirs = pytest.importorskip("pytorch_grad_cam")
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True))
    model = nn.Sequential(*model, nn.Flatten(1), nn.Linear(150, 5)).train()
    pixels = torch.randn(1, 3, 9, 9)
    before = state_of(model)
    guided = [compat.GuidedBackpropReLUModel(model)(pixels, category) for category in (None, 3)]
    assert state_of(model) == before
    assert not pixels.requires_grad
    leaf = pixels.clone().requires_grad_()
    (plain,) = torch.autograd.grad(model(leaf)[0, 3], leaf)
    assert abs(guided[1] - plain[0].permute(1, 2, 0).numpy()).max() > 1e-3
    for category, found in zip((None, 3), guided, strict=True):
        expected = theirs.GuidedBackpropReLUModel(model)(pixels.clone(), category)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_guided_backpropagation_without_a_relu_is_refused():
    with pytest.raises(CamkitError, match=r"no ReLU module .* torch.autograd.grad\(model"):
        compat.GuidedBackpropReLUModel(built()[0])


class Pair(nn.Module):
    """Returns an embedding beside the scores of a ViT."""

    def __init__(self):
        super().__init__()
        self.vit, _ = built()

    def forward(self, pixels):
        return self.vit.forward_features(pixels)[:, 0], self.vit(pixels)


def test_two_tensors_that_may_be_scores_are_refused():
    host = Pair().eval()
    cam = compat.GradCAM(host, [host.vit.blocks[-1].norm1])
    with pytest.raises(CaptureError, match=r"returned 2 \(b, classes\) tensors"):
        cam(torch.randn(1, 3, 64, 64), TARGETS[:1])
