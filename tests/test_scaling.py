"""Maps divided by their maximum or range: rounding is no evidence, and size does not matter."""

import pytest
import torch
from timm.models import VisionTransformer

from camkit import GradientSeed, normalize_cam, wrap
from camkit.capture import Capture
from camkit.contrib.layers import BestAgreementSeed
from camkit.ops.confidence import FuzzyMembership, MeanSplit, Otsu, TanhAroundMean, TwoMeans
from camkit.ops.images import to_rgb
from camkit.ops.propagation import balance, random_walk
from camkit.ops.scaling import flat_maps, scaled_to_max, scaled_to_range
from camkit.refiners import Amplify
from camkit.refiners.flat import FlatMapWarning, warn_of_flat_maps
from camkit.seeds.protocol import above_mean

ROUNDED = torch.linspace(0.5906587, 0.5906595, 16).view(1, 1, 4, 4)  # float32 has 14 steps there
EMPTY = Capture.of_picture(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
def test_min_max_does_not_stretch_rounding(epsilon):
    assert ROUNDED.max() > ROUNDED.min()
    assert not normalize_cam(ROUNDED, mode="minmax", epsilon=epsilon).any()


def test_a_little_above_rounding_is_evidence():
    cam = 0.59 + torch.tensor([0.0, 0.5e-4, 1e-4]).view(1, 1, 1, 3).double()
    expected = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).double()
    torch.testing.assert_close(normalize_cam(cam, mode="minmax"), expected, rtol=0, atol=1e-9)
    assert not flat_maps(cam.float()).any()
    assert normalize_cam(cam.float(), mode="minmax").max() == 1


@pytest.mark.parametrize(
    ("patches", "dtype"),
    [
        (17, torch.float32),
        (196, torch.float32),
        (785, torch.float32),
        (785, torch.float64),
        (196, torch.float16),
        (196, torch.bfloat16),
    ],
    ids=str,
)
def test_a_constant_map_is_flat_after_steps_of_attention(patches, dtype):
    attention = balance((2 * torch.randn(1, patches, patches)).softmax(-1)).to(dtype)
    rows = attention / attention.sum(-1, keepdim=True)
    cam = torch.full((1, 3, patches), 0.59, dtype=dtype)
    for _ in range(4):
        cam = cam @ rows.mT
    walked = random_walk(cam, attention, beta=1.0, steps=2)
    for maps in (cam[:, :, None], walked[:, :, None]):
        assert flat_maps(maps).all()
        assert not normalize_cam(maps, mode="minmax").any()


@pytest.mark.parametrize("mode", ["max", "minmax"])
@pytest.mark.parametrize("power", [-100, -40, 40, 100])
def test_the_size_of_the_scores_does_not_matter(mode, power):
    """Powers of two are exact."""
    cam = torch.rand(2, 3, 4, 5) - 0.2
    assert torch.equal(normalize_cam(cam * 2.0**power, mode=mode), normalize_cam(cam, mode=mode))


def test_what_cancellation_leaves_of_negative_scores_is_no_evidence():
    cam = torch.tensor([-5.0, -3.0, 1e-7, 0.0]).view(1, 1, 2, 2)
    assert not normalize_cam(cam).any()
    assert not normalize_cam(cam, mode="minmax").any()
    assert normalize_cam(torch.tensor([-5.0, -3.0, 1e-3, 0.0]).view(1, 1, 2, 2)).max() == 1


def test_a_constant_map_fills_the_picture_when_divided_by_its_maximum():
    assert torch.equal(normalize_cam(torch.full((1, 1, 2, 2), 0.3)), torch.ones(1, 1, 2, 2))


def test_scores_above_the_mean_of_a_flat_map_are_zero():
    flat = ROUNDED.flatten(2)
    assert not above_mean(flat).any()
    torch.testing.assert_close(above_mean(torch.tensor([[[1.0, 2.0, 6.0]]]))[0, 0, 2].item(), 3.0)


@pytest.mark.parametrize(
    "rule", [TanhAroundMean(), MeanSplit(), TwoMeans(), Otsu(), FuzzyMembership()], ids=repr
)
def test_confidence_rules_leave_flat_maps_as_they_are(rule):
    assert not rule(ROUNDED.flatten(2)).any()
    assert torch.equal(Amplify(rule=rule)(ROUNDED, EMPTY), ROUNDED)


def test_flat_maps_agree_with_nothing():
    lower, last = torch.zeros(2, 1, 1, 4, 4)
    lower[..., 2:, :] = last[..., 3:, :] = 1.0  # where ROUNDED happens to be higher
    seeds = (lambda *_: ROUNDED, lambda *_: last)
    best = BestAgreementSeed(seeds, reference=lambda *_: lower)
    assert torch.equal(best(EMPTY, torch.tensor([[0]])), last)


def test_a_picture_of_one_colour_is_black_not_noise():
    assert not to_rgb(700 + 100 * ROUNDED.expand(1, 3, 4, 4)).any()


def test_flat_maps_have_finite_gradients():
    cam = torch.stack([ROUNDED[0, 0], torch.zeros(4, 4), torch.rand(4, 4)])[None].requires_grad_()
    (scaled_to_range(cam) + scaled_to_max(cam)).square().sum().backward()
    assert cam.grad.isfinite().all()
    assert not scaled_to_range(cam.detach())[:, :2].any()


CLASSES, NAMES = torch.tensor([[4, 7], [2, -1]]), (("cat", "dog"), ("cow",))
CLEAR = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def test_clear_maps_and_padding_are_no_reason_to_warn():
    seed = CLEAR.clone()
    seed[1, 1] = 0.0  # padding
    warn_of_flat_maps(seed, seed, CLASSES, NAMES)
    warn_of_flat_maps(seed, torch.ones_like(seed), CLASSES, NAMES)  # a refiner filled the picture


@pytest.mark.parametrize("value", [0.0, 0.59])
def test_flat_seeds_are_told_by_name(value):
    seed = CLEAR.clone()
    seed[0, 1] = seed[1, 0] = value
    with pytest.warns(FlatMapWarning, match="the map of dog, cow is flat, so its mask means noth"):
        warn_of_flat_maps(seed, CLEAR, CLASSES, NAMES)


def test_maps_that_a_refiner_emptied_are_told_by_name():
    cam = CLEAR.repeat_interleave(2, -1).clone()
    cam[0, 0] = 0.0
    with pytest.warns(FlatMapWarning, match="the map of cat is flat"):
        warn_of_flat_maps(CLEAR, cam, CLASSES, NAMES)


def staged(model, pixels):
    stages = wrap(model, seed=GradientSeed()).stages(pixels, rgb=pixels, classes=[1])
    warn_of_flat_maps(stages.seed, stages.cam, stages.classes, stages.names)


def test_an_untrained_head_of_zeros_has_flat_maps():
    model = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )
    torch.nn.init.zeros_(model.head.weight)
    with pytest.warns(FlatMapWarning, match=r"the map of 1 is flat, .*a new head is often all z"):
        staged(model.eval(), torch.rand(1, 3, 32, 32))
