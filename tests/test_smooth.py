"""Fast global smoothing as OpenCV does it when called directly, and by its linear system."""

import cv2
import numpy as np
import pytest
import torch
from coarse import captured

from camkit import CamkitError, resize_cam
from camkit.refiners import FastGlobalSmooth


def direct(ximgproc, plane, rgb, smoothness, sigma):
    guide = np.round(255 * rgb.permute(1, 2, 0).numpy()).astype(np.uint8)
    smoother = ximgproc.fastGlobalSmootherFilter
    return torch.from_numpy(smoother(guide, plane.numpy(), smoothness, sigma))


@pytest.mark.parametrize("maps", [1, 3, 4, 5, 9])
def test_every_map_equals_a_call_of_opencv_of_its_own(ximgproc, maps):
    cam, rgb = torch.rand(2, maps, 20, 31), torch.rand(2, 3, 20, 31)
    found = FastGlobalSmooth(smoothness=300.0, colour_width=0.2)(cam, captured(rgb))
    for image in range(2):
        for one in range(maps):
            expected = direct(ximgproc, cam[image, one], rgb[image], 300.0, 51.0)
            torch.testing.assert_close(found[image, one], expected, rtol=0, atol=1e-6)


def test_a_row_solves_the_least_squares_of_the_paper(ximgproc):
    """Three solves with falling weights, on a picture of one row: no columns to solve for."""
    rgb = torch.randint(0, 256, (1, 3, 1, 24)) / 255
    cam = torch.rand(1, 1, 1, 24)
    colours = (255 * rgb[0, :, 0]).round().double()
    likeness = torch.exp(-(colours[:, 1:] - colours[:, :-1]).norm(dim=0) / 51.0)
    values = cam[0, 0, 0].double()
    for weight in (300.0, 75.0, 300.0 / 16):  # OpenCV: a quarter of the last
        system = torch.eye(24, dtype=torch.float64)
        for i, like in enumerate(likeness):
            system[i : i + 2, i : i + 2] += weight * like * torch.tensor([[1, -1], [-1, 1]])
        values = torch.linalg.solve(system, values)
    found = FastGlobalSmooth(smoothness=300.0, colour_width=0.2)(cam, captured(rgb))
    torch.testing.assert_close(found[0, 0, 0].double(), values, rtol=0, atol=1e-3)


def test_a_map_from_the_grid_comes_back_at_the_size_of_the_picture():
    cam, rgb = torch.rand(1, 2, 2, 3, dtype=torch.float64), torch.rand(1, 3, 20, 31)
    found = FastGlobalSmooth()(cam, captured(rgb))
    assert found.dtype == torch.float64
    large = FastGlobalSmooth()(resize_cam(cam, (20, 31)), captured(rgb))
    torch.testing.assert_close(found, large, rtol=0, atol=1e-6)


@pytest.mark.parametrize("smoothness", [1.0, 1000.0, 1e5])
@pytest.mark.parametrize("colour_width", [1e-3, 0.02, 1.0])
def test_maps_keep_their_range_and_constant_ones_their_value(smoothness, colour_width):
    cam, rgb = torch.rand(1, 2, 20, 31), torch.rand(1, 3, 20, 31)
    cam[:, 1] = 0.3
    found = FastGlobalSmooth(smoothness=smoothness, colour_width=colour_width)(cam, captured(rgb))
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(found[:, 1], cam[:, 1], rtol=0, atol=1e-3)


def test_a_map_that_misses_an_edge_is_drawn_to_it():
    left = torch.zeros(1, 1, 30, 40)
    left[..., :20] = 1.0
    rgb = torch.cat([0.8 * left, 0.5 * left, 1 - left], 1)
    off = left.clone()
    off[..., 20:25] = 1.0  # five columns too wide
    assert torch.equal(FastGlobalSmooth()(off, captured(rgb)) > 0.5, left > 0.5)


def test_an_opencv_without_its_extra_modules_is_told_with_the_way_to_get_them(monkeypatch):
    monkeypatch.delattr(cv2, "ximgproc")
    with pytest.raises(CamkitError, match="pip install opencv-contrib-python-headless"):
        FastGlobalSmooth()(torch.rand(1, 1, 2, 3), captured(torch.rand(1, 3, 20, 31)))
