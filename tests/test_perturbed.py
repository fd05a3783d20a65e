"""Score-CAM and Ablation-CAM as seeds: grad-cam's maps, batches, the borrowed model."""

import numpy as np
import pytest
import torch
from helpers import capture_of, state_of
from hosts import tiny
from torch import nn

import camkit
from camkit.contrib import AblationCAMSeed, ScoreCAMSeed
from camkit.errors import CaptureError

CLASSES = torch.tensor([[1, 4], [3, -1]])
SEEDS = [ScoreCAMSeed, AblationCAMSeed]


def raw_maps(method, model, pixels, grid, column, **settings):
    """grad-cam's map of a class per image before it is cut at zero, scaled and resized."""
    theirs, kept, prefix = pytest.importorskip("pytorch_grad_cam"), [], model.num_prefix_tokens

    class Kept(getattr(theirs, method)):
        def get_cam_image(self, *given):
            kept.append(super().get_cam_image(*given))
            return kept[-1]

    def reshape(tokens):
        return tokens[:, prefix:].mT.unflatten(-1, (grid.rows, grid.cols))

    targets = [theirs.utils.model_targets.ClassifierOutputTarget(index) for index in column]
    Kept(model, [model.blocks[-1].norm1], reshape, **settings)(pixels, targets)
    return torch.from_numpy(np.float32(kept[0]))


def zeroing():
    """grad-cam's layer for transformers, with zero as the paper has it."""
    theirs = pytest.importorskip("pytorch_grad_cam")

    class Zeroing(theirs.AblationLayerVit):
        def __call__(self, _):
            tokens = self.activations.clone()
            for row, channel in zip(tokens, self.indices, strict=False):
                row[:, channel] = 0.0
            return tokens

    return Zeroing()


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "average pooled"])
def test_score_cam_is_that_of_grad_cam(family):
    model, pixels = tiny(family)
    seed = ScoreCAMSeed(model, batch_size=20)
    capture = capture_of(model, pixels, seed)
    cam = seed(capture, CLASSES)
    expected = raw_maps("ScoreCAM", model, pixels, capture.grid, [1, 3]).clamp_min(0.0)
    torch.testing.assert_close(cam[:, 0], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    assert not cam[1, 1].any()


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "average pooled"])
def test_ablation_cam_is_that_of_grad_cam_with_zeros_and_times_the_score(family):
    model, pixels = tiny(family)
    seed = AblationCAMSeed(model, batch_size=20)
    capture = capture_of(model, pixels, seed)
    cam = seed(capture, CLASSES)
    settings = {"ablation_layer": zeroing()}
    ratio = raw_maps("AblationCAM", model, pixels, capture.grid, [1, 3], **settings)
    scores = capture.scores[[0, 1], [1, 3]].detach()
    expected = (ratio * scores[:, None, None]).clamp_min(0.0)
    torch.testing.assert_close(cam[:, 0], expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


@pytest.mark.parametrize("kind", SEEDS)
def test_classes_of_an_image_share_the_forwards_of_its_channels(kind):
    model, pixels = tiny("vit")
    runs = []
    seed = kind(model, lambda m, images: runs.append(len(images)) or m(images), batch_size=20)
    capture = capture_of(model, pixels, kind(model))
    both = seed(capture, CLASSES)
    assert runs == ([20, 20, 8] if kind is ScoreCAMSeed else [2, 1, 1, 1, 1]) * 2
    for column in range(2):
        one = kind(model)(capture, CLASSES[:, column : column + 1])
        torch.testing.assert_close(both[:, column : column + 1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SEEDS)
def test_the_model_is_left_alone_also_after_an_error(kind):
    model, pixels = tiny("vit")
    capture = capture_of(model, pixels, kind(model))
    model(pixels).sum().backward()
    model.train()
    before = state_of(model)
    kind(model)(capture, CLASSES)
    assert state_of(model) == before

    def failing(model, images):
        raise RuntimeError(f"no memory for {len(images)} images of {type(model).__name__}")

    with pytest.raises(RuntimeError, match=r"no memory for \d+ images of VisionTransformer"):
        kind(model, failing)(capture, CLASSES)
    assert state_of(model) == before


class Counting(nn.Module):
    """A ViT that cannot have more images behind a layer than before it."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, pixels):
        scores = self.vit(pixels)
        return scores + torch.zeros(len(pixels), 1) if len(scores) == len(pixels) else scores[:1]


def test_batches_that_cannot_join_in_the_middle_run_from_the_beginning():
    model, pixels = tiny("vit")
    host, runs = Counting(model).eval(), []
    seed = AblationCAMSeed(host, lambda m, x: runs.append(len(x)) or m(x), batch_size=20)
    found = seed(capture_of(host, pixels, seed), CLASSES)
    assert runs[-10:] == [2, 1, 20, 20, 8] * 2
    seed = AblationCAMSeed(model)
    expected = seed(capture_of(model, pixels, seed), CLASSES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class WithIds(nn.Module):
    """A ViT that cannot be called with images alone."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, ids, pixels):
        return self.vit(pixels) * ids


@pytest.mark.parametrize("kind", SEEDS)
def test_wrap_takes_these_seeds_with_views_and_a_call(kind):
    model, pixels = tiny("vit")
    host = WithIds(model).eval()
    photo = camkit.Photo(pixels=pixels[:1], rgb=torch.rand(1, 3, 64, 96), size=(64, 96))

    def call(model, images):
        return model(1.0, images)

    views = camkit.Views(flip=True)
    wrapped = camkit.wrap(host, seed=kind(host, call), call=call, views=views, refine=[])
    result = wrapped(photo, classes=[1])
    expected = camkit.wrap(model, seed=kind(model), views=views, refine=[])(photo, classes=[1])
    torch.testing.assert_close(result.cam, expected.cam, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_run_again_is_refused():
    model, pixels = tiny("vit")
    capture = capture_of(model, pixels, camkit.seeds.EigenCAMSeed())
    with pytest.raises(CaptureError, match="does not hold the images; watch one forward"):
        ScoreCAMSeed(model)(capture, CLASSES)
    with pytest.raises(ValueError, match="`batch_size` must be a whole number"):
        AblationCAMSeed(model, batch_size=0)
