"""Refiners on a reduced picture: what they are given, and how their maps come back."""

import numpy as np
import pytest
import torch
from coarse import captured

from camkit import DenseCRF, chain, resize_cam
from camkit.ops.edge_aware import guided_filter
from camkit.ops.mean_field import Kernels
from camkit.refiners import AtReducedSize, FastGlobalSmooth, Normalize, PixelAdaptive


def fitted(cam, capture):
    """The maps at the size of the picture, nothing else."""
    return resize_cam(cam, tuple(capture.rgb.shape[-2:]))


@pytest.mark.parametrize(
    ("scale", "size"), [(0.5, (10, 16)), (0.25, (5, 8)), (0.3, (6, 9)), (0.01, (1, 1))]
)
def test_the_refiner_sees_the_small_picture_and_its_maps_are_brought_back(scale, size):
    cam, rgb, seen = torch.rand(2, 3, 2, 3), torch.rand(2, 3, 20, 31), []

    def refiner(cam, capture):
        seen.append(capture.rgb)
        return fitted(cam, capture)

    found = AtReducedSize(refiner, scale=scale, radius=2, eps=1e-3)(cam, captured(rgb))
    torch.testing.assert_close(seen[0], resize_cam(rgb, size))
    small = resize_cam(cam, size)
    expected = guided_filter(small, resize_cam(rgb, size), rgb, radius=2, eps=1e-3)
    low, high = small.amin((2, 3), keepdim=True), small.amax((2, 3), keepdim=True)
    torch.testing.assert_close(found, torch.minimum(torch.maximum(expected, low), high))


def test_at_full_size_it_is_the_refiner():
    cam, capture = torch.rand(1, 2, 2, 3), captured(torch.rand(1, 3, 20, 31))
    refiner = FastGlobalSmooth()
    assert torch.equal(AtReducedSize(refiner, scale=1.0)(cam, capture), refiner(cam, capture))


def test_edges_that_the_small_picture_shows_come_back_sharp():
    left = torch.zeros(1, 1, 64, 96)
    left[..., :50] = 1.0
    rgb = torch.cat([0.8 * left, 0.5 * left, 1 - left], 1)
    capture = captured(rgb, (8, 12))
    cam = resize_cam(left, (8, 12))  # column 48 to 56 lies in one patch
    found = AtReducedSize(FastGlobalSmooth(), scale=0.25)(cam, capture)
    assert torch.equal(found > 0.5, left > 0.5)


def test_constant_maps_and_batches_and_classes_do_not_mix():
    cam, rgb = torch.rand(2, 2, 2, 3), torch.rand(2, 3, 20, 32)
    cam[:, 1] = 0.3
    reduced = AtReducedSize(FastGlobalSmooth())
    found = reduced(cam, captured(rgb))
    torch.testing.assert_close(found[:, 1], torch.full((2, 20, 32), 0.3), rtol=0, atol=1e-4)
    for image in range(2):
        one = slice(image, image + 1)
        alone = reduced(cam[one, :1], captured(rgb[one]))
        torch.testing.assert_close(found[one, :1], alone, rtol=0, atol=1e-5)


def test_a_gradient_goes_through_where_the_refiner_lets_it():
    cam = torch.rand(1, 1, 2, 3, requires_grad=True)
    AtReducedSize(PixelAdaptive(steps=1))(cam, captured(torch.rand(1, 3, 20, 32))).sum().backward()
    torch.testing.assert_close(cam.grad.sum(), torch.tensor(640.0), rtol=0.2, atol=0)


def test_a_refiner_that_returns_another_size_is_refused():
    with pytest.raises(ValueError, match=r"size of its picture, 10x16, got 5x8; PixelAdaptive\("):
        AtReducedSize(PixelAdaptive(scale=0.5))(
            torch.rand(1, 1, 2, 3), captured(torch.rand(1, 3, 20, 32))
        )


@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_no_refiner_is_refused():
    with pytest.raises(TypeError, match=r"must be a refiner such as DenseCRF\(\), got 'clip_es'"):
        AtReducedSize("clip_es")


def crf_of_small_picture(scores, rgb, reach):
    """pydensecrf called directly, widths of IRN but for the reach of the bilateral kernel."""
    library = pytest.importorskip("pydensecrf.densecrf", reason="needs the extra camkit[crf]")
    labels, rows, cols = scores.shape
    field = library.DenseCRF2D(cols, rows, labels)
    field.setUnaryEnergy(np.ascontiguousarray(-scores.log().flatten(1).numpy()))
    field.addPairwiseGaussian(sxy=3, compat=3)
    picture = (255 * rgb.permute(1, 2, 0)).round().byte().numpy().copy()
    field.addPairwiseBilateral(sxy=reach, srgb=5, rgbim=picture, compat=10)
    return torch.from_numpy(np.array(field.inference(10))[1].reshape(1, 1, rows, cols))


@pytest.mark.usefixtures("no_shape_checks")  # by which a chain may not change the size of maps
@pytest.mark.parametrize("preset", ["irn", Kernels(3, 3, 50, 5, 10)], ids=["name", "own"])
@pytest.mark.parametrize(
    "wrapped", [lambda crf: crf, lambda crf: chain(Normalize(), crf)], ids=["alone", "in a chain"]
)
def test_in_a_reduced_crf_the_bilateral_kernel_shrinks_with_the_picture_and_the_other_does_not(
    preset, wrapped
):
    rgb = resize_cam(torch.rand(1, 3, 9, 12), (96, 128))
    rgb = (rgb + 0.03 * torch.randn_like(rgb)).clamp(0, 1)
    cam = torch.rand(1, 1, 6, 8)
    cam = cam / cam.max()
    low, maps = resize_cam(rgb, (24, 32)), resize_cam(cam, (24, 32))
    scores = (torch.cat([torch.full_like(maps, 0.5), maps], 1) / 0.25).softmax(1)
    crf = DenseCRF(preset=preset, steps=10, temperature=0.25, background_score=0.5)
    found = AtReducedSize(wrapped(crf), scale=0.25)(cam, captured(rgb))
    away = {}
    for reach in (50 / 4, 50):
        refined = crf_of_small_picture(scores[0], low[0], reach)
        expected = guided_filter(refined, low, rgb, radius=4, eps=1e-5)
        away[reach] = (found - expected.clamp(refined.min(), refined.max())).abs()
    assert away[50 / 4].mean() < 1e-4
    assert away[50].mean() > 5e-3
