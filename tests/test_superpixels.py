"""Superpixels: maps constant within segments, by loops over segments and by scikit-image."""

import pytest
import torch
from coarse import captured
from skimage.segmentation import felzenszwalb, slic

from camkit import resize_cam
from camkit.ops.region_scores import segment_means
from camkit.refiners import Superpixels

BOTH = pytest.mark.parametrize("method", ["slic", "felzenszwalb"])


def blotches(images=1, rows=40, cols=60):
    """Smooth random colours, in which both methods find pieces of several sizes."""
    return resize_cam(torch.rand(images, 3, rows // 8, cols // 8), (rows, cols))


def test_each_value_becomes_the_mean_of_its_segment():
    maps, segments = torch.rand(2, 3, 7, 9).double(), torch.randint(0, 5, (2, 7, 9))
    found = segment_means(maps, segments)
    for image in range(2):
        for segment in range(5):
            inside = segments[image] == segment
            for one in range(3):
                mean = maps[image, one][inside].mean()
                torch.testing.assert_close(
                    found[image, one][inside], mean.expand(int(inside.sum()))
                )


@BOTH
def test_maps_are_constant_within_segments_and_keep_their_mass_and_range(method):
    refiner, rgb = Superpixels(method, size=50), blotches(2)
    cam = torch.rand(2, 3, 40, 60)
    found = refiner(cam, captured(rgb))
    segments = refiner.segments(rgb)
    assert segments[0].max() > 1
    for image in range(2):
        for segment in segments[image].unique():
            inside = found[image][:, segments[image] == segment]
            assert torch.equal(inside.amin(1), inside.amax(1))
    torch.testing.assert_close(found.sum((2, 3)), cam.sum((2, 3)))
    assert (found >= cam.amin((2, 3), keepdim=True)).all()
    assert (found <= cam.amax((2, 3), keepdim=True)).all()


@BOTH
def test_a_constant_map_is_unchanged_and_a_second_time_changes_nothing(method):
    refiner, capture = Superpixels(method), captured(blotches())
    constant = torch.full((1, 1, 40, 60), 0.3)
    torch.testing.assert_close(refiner(constant, capture), constant)
    once = refiner(torch.rand(1, 2, 40, 60), capture)
    torch.testing.assert_close(refiner(once, capture), once)


def test_segments_are_those_of_scikit_image():
    rgb = blotches()
    picture = (255 * rgb[0].permute(1, 2, 0)).round().byte().numpy()
    found = Superpixels("slic", size=100, coherence=5.0, sigma=0.5).segments(rgb)
    expected = slic(picture, n_segments=24, compactness=5.0, sigma=0.5, start_label=0)
    assert torch.equal(found[0], torch.from_numpy(expected).long())
    found = Superpixels("felzenszwalb", size=30, coherence=50.0, sigma=0.5).segments(rgb)
    expected = felzenszwalb(picture, scale=50.0, sigma=0.5, min_size=30)
    assert torch.equal(found[0], torch.from_numpy(expected).long())


@BOTH
def test_a_map_that_misses_an_edge_is_drawn_to_it(method):
    left = torch.zeros(1, 1, 40, 60)
    left[..., :30] = 1.0
    rgb = torch.cat([0.8 * left, 0.5 * left, 1 - left], 1)
    off = left.clone()
    off[..., 30:33] = 1.0  # three columns too wide
    assert torch.equal(
        Superpixels(method, size=40, sigma=0.0)(off, captured(rgb)) > 0.5, left > 0.5
    )


def test_votes_are_the_share_of_pixels_whose_class_is_strongest():
    left = torch.zeros(1, 1, 20, 40)
    left[..., :20] = 1.0
    rgb = torch.cat([left, left, 1 - left], 1)  # two halves: two segments
    cam = torch.zeros(1, 2, 20, 40)
    cam[:, 0, :, :5] = 0.9  # a quarter of the left half
    cam[:, 1, :, 5:15] = 0.6  # a half of it
    cam[:, 0, :, 5:15] = 0.5  # which is not the strongest there
    cam[:, 1, :, 20:] = 0.4  # the background is stronger
    refiner = Superpixels("felzenszwalb", size=100, sigma=0.0, vote=0.5)
    assert refiner.segments(rgb).unique().tolist() == [0, 1]
    found = refiner(cam, captured(rgb))
    expected = torch.zeros(1, 2, 20, 40)
    expected[:, 0, :, :20] = 0.25
    expected[:, 1, :, :20] = 0.5
    torch.testing.assert_close(found, expected)


def test_means_are_differentiable_in_the_maps():
    cam = torch.rand(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    refiner = Superpixels("felzenszwalb", size=4, coherence=1.0, sigma=0.0)
    capture = captured(torch.rand(1, 3, 4, 6).double())
    assert refiner.segments(capture.rgb).max() > 0
    assert torch.autograd.gradcheck(lambda maps: refiner(maps, capture), (cam,))


@BOTH
def test_small_and_flat_pictures(method):
    pixel = Superpixels(method)(torch.full((1, 1, 1, 1), 0.3), captured(torch.rand(1, 3, 1, 1)))
    torch.testing.assert_close(pixel, torch.full((1, 1, 1, 1), 0.3))
    cam, flat = torch.rand(1, 1, 20, 30), torch.full((1, 3, 20, 30), 0.5)
    whole = Superpixels(method, size=600)(cam, captured(flat))
    torch.testing.assert_close(whole, cam.mean().expand(1, 1, 20, 30))
