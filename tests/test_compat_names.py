"""Every name of grad-cam is there, or says what to use; targets and pictures give its numbers."""

import importlib
import importlib.util
import inspect
import re
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import camkit
from camkit import compat
from camkit.compat import ablation_layer, guided_backprop
from camkit.compat.missing import INSTEAD
from camkit.compat.utils import image, model_targets, reshape_transforms
from camkit.errors import CamkitError

METHODS = [
    *("GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM"),
    *("EigenCAM", "EigenGradCAM", "SegEigenCAM", "KPCA_CAM", "RandomCAM", "ShapleyCAM", "FEM"),
    *("ScoreCAM", "AblationCAM", "FinerCAM", "RefineCAM"),
]
MODULES = [
    *("", ".utils.model_targets", ".utils.image", ".utils.reshape_transforms"),
    *(".metrics.road", ".metrics.cam_mult_image", ".utils.svd_on_activations"),
]


@pytest.fixture
def theirs():
    return pytest.importorskip("pytorch_grad_cam")


def own_names(module):
    """The public classes and functions of grad-cam that a module defines or, at the top, shows."""
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None) or ""
        top = module.__name__ == "pytorch_grad_cam" and home.startswith("pytorch_grad_cam")
        if (
            name[0] != "_"
            and not isinstance(value, ModuleType)
            and (top or home == module.__name__)
        ):
            yield name


@pytest.mark.parametrize("place", MODULES)
def test_each_name_of_grad_cam_is_there_or_says_what_to_use(theirs, place):
    names = list(own_names(importlib.import_module(f"pytorch_grad_cam{place}")))
    assert names
    for name in names:
        if name in vars(compat):
            assert callable(getattr(compat, name))
        elif name not in ("NoisyLinearImputer", "multiply_tensor_with_cam"):  # inner workings
            missing = getattr(compat, name)  # scripts import more than they use
            words = rf"^camkit.compat has no {name}: .*(use|keep) "
            with pytest.raises(CamkitError, match=words):
                missing(nn.Identity(), target_layers=[])


def test_what_is_named_in_place_of_a_missing_name_exists():
    for text in INSTEAD.values():
        for path in re.findall(r"camkit((?:\.[A-Za-z_]\w*)+)", text):
            value = camkit
            for name in path.strip(".").split("."):
                value = getattr(value, name, None) or importlib.import_module(
                    f"{value.__name__}.{name}"
                )


def test_an_import_of_an_unknown_name_suggests_the_closest():
    with pytest.raises(CamkitError, match=r"compat has no GradCam: did you mean 'GradCAM'\?"):
        exec("from camkit.compat import GradCam")
    with pytest.raises(AttributeError, match="did you mean 'show_cam_on_image'"):
        compat.show_cam_on_img  # noqa: B018
    assert not hasattr(compat, "pytest_plugins")


def test_modules_lie_where_grad_cam_has_them(theirs):
    for module in (ablation_layer, guided_backprop, image, model_targets, reshape_transforms):
        place = module.__name__.removeprefix("camkit.compat")
        assert importlib.util.find_spec(f"pytorch_grad_cam{place}")
    for module in (ablation_layer, guided_backprop, image, model_targets, reshape_transforms):
        here = [name for name in vars(module) if name[0] != "_" and name in vars(compat)]
        assert here
        assert all(getattr(compat, name) is getattr(module, name) for name in here)
    with pytest.raises(CamkitError, match="for each concept"):
        image.show_factorization_on_image(np.zeros((2, 2, 3)), np.zeros((1, 2, 2)))


@pytest.mark.parametrize("method", METHODS)
def test_arguments_have_the_names_and_places_of_grad_cam(theirs, method):
    own, other = getattr(compat, method), getattr(theirs, method)
    pairs = [(own.__init__, other.__init__), (own.__call__, other.__call__)]
    if method in ("FinerCAM", "RefineCAM"):
        pairs[1] = own.__call__, other.forward
    for here, there in pairs:
        kinds = {p: v.kind for p, v in inspect.signature(there).parameters.items()}
        expected = [
            p for p, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        assert list(inspect.signature(here).parameters)[: len(expected)] == expected


ROW = torch.tensor([1.0, 3.0, 2.0])
PLANES = torch.arange(24.0).view(2, 3, 4)
CHECKER = (np.indices((3, 4)).sum(0) % 2).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "arguments", "output"),
    [
        ("ClassifierOutputTarget", (1,), ROW),
        ("ClassifierOutputSoftmaxTarget", (1,), ROW),
        ("ClassifierOutputReST", (2,), ROW),
        ("BinaryClassifierOutputTarget", (0,), ROW[:1]),
        ("BinaryClassifierOutputTarget", (1,), ROW[:1]),
        ("RawScoresOutputTarget", (), ROW[:1]),
        ("SoftmaxOutputTarget", (), ROW),
        ("SemanticSegmentationTarget", (1, CHECKER), PLANES),
        ("FinerWeightedTarget", (1, [0, 2], 0.5), ROW),
    ],
)
def test_targets_are_those_of_grad_cam(theirs, name, arguments, output):
    expected = getattr(theirs.utils.model_targets, name)(*arguments)(output)
    torch.testing.assert_close(getattr(compat, name)(*arguments)(output), expected)


def test_scores_of_a_segmented_region_are_explained_as_in_grad_cam(theirs):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    pixels = torch.randn(1, 3, 3, 4)
    target = [compat.SemanticSegmentationTarget(1, CHECKER)]
    found = compat.GradCAM(model, [model[1]])(pixels, target)
    with theirs.GradCAM(model, [model[1]]) as cam:
        np.testing.assert_allclose(found, cam(pixels, target), atol=1e-5)
    with pytest.raises(ValueError, match=r"`targets` must be given .* \(1, 2, 3, 4\)"):
        compat.GradCAM(model, [model[1]])(pixels)
    with pytest.raises(ValueError, match=r"a mask of \(2, 2\) needs an output of"):
        compat.SemanticSegmentationTarget(0, CHECKER[:2, :2])(PLANES)


@pytest.mark.parametrize("targets", [281, [281], compat.ClassifierOutputTarget(1), "cat", [None]])
def test_targets_that_are_no_list_of_functions_are_refused(targets, no_shape_checks):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1))
    with pytest.raises(TypeError, match=r"such as \[ClassifierOutputTarget\(281\)\], got "):
        compat.GradCAM(model, [model[0]])(torch.randn(1, 3, 9, 9), targets)


def test_arguments_of_a_wrong_kind_are_refused_where_they_enter(no_shape_checks):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1))
    with pytest.raises(TypeError, match="`target_layers` must be a list of layers"):
        compat.GradCAM(model, model[0])
    for pixels, got in ((torch.rand(3, 9, 9), r"\(3, 9, 9\)"), (np.zeros((1, 3, 9, 9)), "ndarray")):
        with pytest.raises(ValueError, match=rf"tensor of \(b, channels, H, W\), got {got}"):
            compat.GradCAM(model, [model[0]])(pixels)
    with pytest.raises(ValueError, match=r"`kernel` must be one of linear, .* got 'gauss'"):
        compat.KPCA_CAM(model, [model[0]], kernel="gauss")
    with pytest.raises(AttributeError, match="nothing to release"):
        compat.GradCAM(model, [model[0]]).activations_and_grads.release()


PICTURE = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("picture", [PICTURE, np.float32(PICTURE) / 255], ids=["bytes", "floats"])
def test_pictures_are_prepared_as_grad_cam_does(theirs, picture):
    settings = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    for given in ({}, settings):
        expected = theirs.utils.image.preprocess_image(picture, **given)
        torch.testing.assert_close(compat.preprocess_image(picture, **given), expected)
    with pytest.raises(ValueError, match=r"must be uint8, or lie in \[0, 1\], got float32"):
        compat.preprocess_image(np.float32(PICTURE))


def test_gradients_and_maps_become_pictures_as_in_grad_cam(theirs):
    gradients = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    expected = theirs.utils.image.deprocess_image(gradients)
    np.testing.assert_allclose(compat.deprocess_image(gradients), expected, atol=1)
    for size in (None, (8, 10)):
        expected = theirs.utils.image.scale_cam_image(gradients, size)
        np.testing.assert_allclose(compat.scale_cam_image(gradients, size), expected, atol=1e-6)


def test_tokens_are_laid_out_as_in_grad_cam(theirs):
    there, tokens = theirs.utils.reshape_transforms, torch.randn(2, 7, 3)
    for name, given in (("vit", tokens), ("swinT", tokens[:, 1:])):
        own, other = (getattr(m, f"{name}_reshape_transform") for m in (compat, there))
        torch.testing.assert_close(own(given, height=2, width=3), other(given, height=2, width=3))
    with pytest.raises(ValueError, match="6 patch tokens do not make 14x14 places"):
        compat.vit_reshape_transform(tokens)
