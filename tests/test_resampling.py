"""Resizing of class maps and masks."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

from camkit.ops import images
from camkit.ops.images import resize_cam

SIDES = st.integers(1, 12)


def test_doubling_a_row_keeps_patch_centres_where_they_are():
    cam = torch.tensor([[[[0.0, 1.0]]]])
    out = resize_cam(cam, (1, 4))
    torch.testing.assert_close(out, torch.tensor([[[[0.0, 0.25, 0.75, 1.0]]]]))


def test_halving_smooths_so_that_no_value_is_skipped():
    cam = torch.zeros(1, 1, 1, 8)
    cam[..., 3] = 1.0
    # the triangle of width 4 around new centres 2 and 4 (old pixels 3.5 -> weights 3/8 and 1/8)
    out = resize_cam(cam, (1, 4))
    torch.testing.assert_close(out, torch.tensor([[[[0.0, 0.375, 0.125, 0.0]]]]))


def test_halving_without_smoothing_takes_the_mean_of_the_middle_two():
    cam = torch.arange(8.0).view(1, 1, 1, 8) ** 2
    out = resize_cam(cam, (1, 2), antialias=False)  # new centres between old 1 and 2, 5 and 6
    assert out.flatten().tolist() == [(1 + 4) / 2, (25 + 36) / 2]


def test_the_same_size_changes_nothing():
    cam = torch.rand(2, 3, 5, 7)
    assert torch.equal(resize_cam(cam, (5, 7)), cam)


@given(rows=SIDES, cols=SIDES, new_rows=SIDES, new_cols=SIDES)
def test_the_range_of_a_cam_is_kept(rows, cols, new_rows, new_cols):
    cam = torch.rand(1, 2, rows, cols)
    out = resize_cam(cam, (new_rows, new_cols))
    assert out.shape == (1, 2, new_rows, new_cols)
    assert out.min() >= cam.min() - 1e-6
    assert out.max() <= cam.max() + 1e-6


@pytest.mark.parametrize("size", [(9, 3), (2, 11), (2, 3), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, size):
    cam = torch.rand(1, 2, 4, 5).to(dtype)
    out = resize_cam(cam, size)
    assert out.dtype == dtype
    torch.testing.assert_close(out, resize_cam(cam.float(), size).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(6, 7), (2, 2), (2, 7)])
def test_the_gradient_of_resizing_is_right(size):
    cam = torch.rand(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_cam(x, size), cam)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_no_image_or_no_class_at_all_gives_none(shape):
    assert resize_cam(torch.zeros(*shape, 4, 4), (8, 2)).shape == (*shape, 8, 2)


def test_a_strided_cam_resizes_like_its_copy():
    cam = torch.rand(1, 2, 6, 5).transpose(-1, -2)
    torch.testing.assert_close(resize_cam(cam, (9, 4)), resize_cam(cam.contiguous(), (9, 4)))


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_a_size_below_one_is_refused(size):
    words = f"at least 1x1 .rows, columns., got {size[0]}x{size[1]}"
    with pytest.raises(ValueError, match=words):
        resize_cam(torch.rand(1, 1, 2, 2), size)


@pytest.mark.parametrize("size", [(7, 9), (7, 31), (28, 36), (40, 57), (384, 500)], ids=str)
def test_opencv_and_torch_enlarge_alike(size, monkeypatch):
    cam = torch.rand(2, 3, 7, 9).mT.contiguous().mT  # strided
    before, exact = cam.clone(), resize_cam(cam.double(), size)
    torch.testing.assert_close(resize_cam(cam, size).double(), exact, rtol=0, atol=2e-6)
    assert torch.equal(cam, before)
    monkeypatch.setattr(images, "USE_OPENCV", False)
    in_torch = resize_cam(cam, size)
    assert torch.equal(in_torch, F.interpolate(cam, size, mode="bilinear", align_corners=False))
    torch.testing.assert_close(in_torch.double(), exact, rtol=0, atol=1e-4)


def test_maps_are_resized_under_vmap():
    cam = torch.rand(4, 1, 2, 7, 9)
    found = torch.vmap(lambda one: resize_cam(one, (14, 18)))(cam)
    torch.testing.assert_close(found, torch.stack([resize_cam(one, (14, 18)) for one in cam]))
