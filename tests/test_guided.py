"""The guided filter against its formula window by window, OpenCV, and the laws it keeps."""

import math

import pytest
import torch
from coarse import captured

from camkit import resize_cam
from camkit.ops.edge_aware import box_mean, box_mean_torch, guided_filter
from camkit.refiners import GuidedFilter

SIZES = [(1, 1), (1, 9), (7, 1), (11, 14)]


def windows(place, size, radius):
    """Rows and columns of the picture within a window."""
    return tuple(
        slice(max(0, at - radius), at + radius + 1) for at, _ in zip(place, size, strict=True)
    )


def fit(values, colours, eps):
    """Least squares with ``eps`` on the slopes but not on the offset, by normal equations."""
    ones = torch.cat([colours, torch.ones(len(colours), 1).double()], 1)
    penalty = len(colours) * eps * torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    return torch.linalg.solve(ones.T @ ones + penalty, ones.T @ values)


def plain(maps, low, high, radius, eps):
    """Every window's fit, every pixel's mean over the windows that hold it; one image, float64."""
    rows, cols = maps.shape[-2:]
    fits = torch.zeros(maps.shape[0], 4, rows, cols, dtype=torch.float64)
    for y in range(rows):
        for x in range(cols):
            inside = windows((y, x), (rows, cols), radius)
            colours = low[(slice(None), *inside)].flatten(1).T.double()
            values = maps[(slice(None), *inside)].flatten(1).T.double()
            fits[:, :, y, x] = fit(values, colours, eps).T
    mean = torch.zeros_like(fits)
    for y in range(rows):
        for x in range(cols):
            inside = windows((y, x), (rows, cols), radius)
            mean[:, :, y, x] = fits[(..., *inside)].flatten(2).mean(2)
    mean = resize_cam(mean, high.shape[-2:])
    return (mean[:, :3] * high[None].double()).sum(1) + mean[:, 3]


def pictures(size, images=2, maps=3, dtype=torch.float64):
    return torch.rand(images, maps, *size, dtype=dtype), torch.rand(images, 3, *size, dtype=dtype)


@pytest.mark.parametrize(("radius", "eps"), [(1, 1e-3), (3, 1e-2), (40, 1e-4)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_a_fit_in_every_window(size, dtype, error, radius, eps):
    maps, rgb = pictures(size, dtype=dtype)
    found = guided_filter(maps, rgb, radius=radius, eps=eps)
    assert found.dtype == dtype
    expected = [plain(m, c, c, radius, eps) for m, c in zip(maps, rgb, strict=True)]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=error, atol=error)


@pytest.mark.parametrize("size", [(11, 14), (23, 27), (5, 40)], ids=str)
def test_upsampling_equals_the_small_fits_applied_to_the_large_picture(size):
    maps, low = pictures((11, 14), images=1)
    high = torch.rand(1, 3, *size, dtype=torch.float64)
    found = guided_filter(maps, low, high, radius=2, eps=1e-3)
    expected = plain(maps[0], low[0], high[0], 2, 1e-3)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)


def mirrored(planes, border):
    """The picture and its mirror images around it, pixels on the rim twice: OpenCV's border."""
    for dim in (-1, -2):
        size = planes.shape[dim]
        places = torch.arange(-border, size + border) % (2 * size)
        planes = planes.index_select(dim, torch.minimum(places, 2 * size - 1 - places))
    return planes


@pytest.mark.parametrize(("radius", "eps"), [(4, 1e-3), (8, 1e-4), (3, 1e-2)])
def test_inside_it_equals_opencv_and_at_the_rim_where_the_picture_is_mirrored(
    ximgproc, radius, eps
):
    maps, rgb = pictures((60, 75), images=1, maps=2, dtype=torch.float32)
    arrays = [x[0].permute(1, 2, 0).contiguous().numpy() for x in (rgb, maps)]
    theirs = torch.from_numpy(ximgproc.guidedFilter(*arrays, radius, eps)).permute(2, 0, 1)
    border = 2 * radius  # how far a pixel is seen
    inside = (..., slice(border, -border), slice(border, -border))
    ours = guided_filter(maps, rgb, radius=radius, eps=eps)[0]
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-5)
    wide = guided_filter(mirrored(maps, border), mirrored(rgb, border), radius=radius, eps=eps)
    torch.testing.assert_close(wide[0][inside], theirs, rtol=0, atol=1e-5)
    assert (ours - theirs).abs().max() > 1e-3  # at the rim the two do differ


@pytest.mark.parametrize("radius", [1, 2, 7, 100])
def test_the_mean_of_a_window_counts_only_pixels_of_the_picture(radius):
    planes = torch.rand(1, 2, 9, 13, dtype=torch.float64)
    found = box_mean(planes, radius)
    for place in [(0, 0), (4, 6), (8, 12), (0, 7)]:
        inside = windows(place, (9, 13), radius)
        expected = planes[(..., *inside)].mean((-2, -1))
        torch.testing.assert_close(found[..., place[0], place[1]], expected)


@pytest.mark.parametrize("radius", [1, 4, 100])
@pytest.mark.parametrize("size", [*SIZES, (40, 57)], ids=str)
def test_opencv_and_plain_torch_compute_the_same_means(size, radius):
    planes = torch.rand(2, 3, *size)
    exact = box_mean_torch(planes.double(), radius)
    for found in (box_mean(planes, radius), box_mean_torch(planes, radius)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=5e-7, atol=0)


def test_opencv_takes_strided_planes_and_leaves_them_as_they_are():
    planes = torch.rand(2, 9, 3, 13).transpose(1, 2)
    before = planes.clone()
    torch.testing.assert_close(box_mean(planes, 2), box_mean_torch(before, 2))
    assert torch.equal(planes, before)


def test_means_that_need_a_gradient_have_one_in_single_precision():
    planes = torch.rand(1, 1, 5, 6, requires_grad=True)
    box_mean(planes, 1).sum().backward()
    expected = box_mean_torch(torch.ones(1, 1, 5, 6), 1)
    assert planes.grad.sum() == pytest.approx(30)
    torch.testing.assert_close(planes.grad[..., 2, 2], expected[..., 2, 2])


def test_means_keep_their_digits_on_a_long_picture():
    planes = torch.rand(1, 1, 3, 40_000) + 100
    found = box_mean(planes, 8)
    torch.testing.assert_close(found.double(), box_mean(planes.double(), 8), rtol=3e-7, atol=0)


def test_a_map_that_is_linear_in_the_colours_is_kept():
    _, rgb = pictures((30, 40))
    linear = (rgb * torch.tensor([0.5, -0.25, 1.0])[:, None, None]).sum(1, keepdim=True) + 0.1
    found = guided_filter(linear, rgb, radius=4, eps=1e-12)
    torch.testing.assert_close(found, linear, rtol=0, atol=1e-8)


def test_a_picture_of_one_colour_leaves_the_mean_of_means():
    maps, _ = pictures((30, 40))
    grey = torch.full((2, 3, 30, 40), 0.5, dtype=torch.float64)
    found = guided_filter(maps, grey, radius=3, eps=1e-3)
    torch.testing.assert_close(found, box_mean(box_mean(maps, 3), 3))


def test_constant_maps_are_kept():
    _, rgb = pictures((30, 40), dtype=torch.float32)
    maps = torch.full((2, 1, 30, 40), 0.3)
    torch.testing.assert_close(guided_filter(maps, rgb, radius=5, eps=1e-6), maps)


@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_flat_and_dark_pictures_do_no_harm_in_single_precision(eps):
    maps = torch.rand(1, 1, 30, 40)
    rgb = 0.9 + 1e-4 * torch.rand(1, 3, 30, 40)
    found = guided_filter(maps, rgb, radius=3, eps=eps)
    exact = guided_filter(maps.double(), rgb.double(), radius=3, eps=eps)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3)


def test_a_map_that_misses_an_edge_is_drawn_to_it():
    left = torch.zeros(1, 1, 30, 40)
    left[..., :20] = 1.0
    rgb = torch.cat([0.8 * left, 0.5 * left, 1 - left], 1)
    off = left.clone()
    off[..., 20:22] = 1.0  # two columns too wide
    assert torch.equal(guided_filter(off, rgb, radius=8, eps=1e-4) > 0.5, left > 0.5)


def test_maps_of_a_batch_do_not_mix():
    maps, rgb = pictures((13, 17))
    found = guided_filter(maps, rgb, radius=2, eps=1e-3)
    for image in range(2):
        for one in range(3):
            alone = maps[image : image + 1, one : one + 1]
            single = guided_filter(alone, rgb[image : image + 1], radius=2, eps=1e-3)
            torch.testing.assert_close(found[image : image + 1, one : one + 1], single)


def test_it_is_linear_and_differentiable_in_the_maps_and_colours_get_no_gradient():
    maps, low = pictures((3, 3), images=1, maps=1)
    high = torch.rand(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    maps.requires_grad_()

    def upsampled(values):
        return guided_filter(values, low, high, radius=1, eps=1e-2)

    torch.testing.assert_close(upsampled(3 * maps), 3 * upsampled(maps))
    assert torch.autograd.gradcheck(upsampled, (maps,))
    upsampled(maps).sum().backward()
    assert high.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_also_under_autocast(dtype):
    maps, rgb = pictures((13, 17), dtype=torch.float32)
    maps = maps.to(dtype)
    expected = guided_filter(maps.float(), rgb, radius=3, eps=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = guided_filter(maps, rgb, radius=3, eps=1e-4)
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)


def test_strided_input_is_taken_as_it_is():
    maps, rgb = pictures((13, 17))
    strided = maps.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    found = guided_filter(strided, rgb, radius=2, eps=1e-3)
    torch.testing.assert_close(found, guided_filter(maps, rgb, radius=2, eps=1e-3))


WRONG = [
    ({"radius": 0}, "`radius` must be at least 1 pixel, got 0"),
    ({"radius": math.nan}, "`radius` must be at least 1 pixel, got nan"),
    ({"eps": 0.0}, "`eps` must be positive and finite, got 0.0"),
    ({"eps": math.nan}, "`eps` must be positive and finite, got nan"),
]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("settings", "words"), WRONG, ids=str)
def test_settings_out_of_range_are_refused(settings, words):
    maps, rgb = pictures((3, 5))
    with pytest.raises(ValueError, match=words):
        guided_filter(maps, rgb, **{"radius": 2, "eps": 1e-3, **settings})
    with pytest.raises(ValueError, match=words):
        GuidedFilter(**settings)


@pytest.mark.usefixtures("no_shape_checks")
def test_colours_of_another_size_are_refused():
    maps, _ = pictures((3, 5))
    with pytest.raises(ValueError, match="must be 2x3x3x5 to match `maps`, got 2x3x5x3; use"):
        guided_filter(maps, torch.rand(2, 3, 5, 3), radius=1, eps=1e-3)


@pytest.mark.parametrize(("scale", "size"), [(1.0, (20, 31)), (0.5, (10, 16)), (0.01, (1, 1))])
def test_the_refiner_fits_at_its_scale_and_keeps_the_range(scale, size):
    cam, rgb = torch.rand(2, 4, 2, 3), torch.rand(2, 3, 20, 31)
    found = GuidedFilter(radius=2, eps=1e-2, scale=scale)(cam, captured(rgb))
    low = rgb if scale == 1 else resize_cam(rgb, size)
    free = guided_filter(resize_cam(cam, size), low, rgb, radius=2, eps=1e-2)
    inside = (free > cam.amin((2, 3), keepdim=True)) & (free < cam.amax((2, 3), keepdim=True))
    torch.testing.assert_close(found[inside], free[inside])
    assert (found <= cam.amax((2, 3), keepdim=True)).all()
    assert (found >= cam.amin((2, 3), keepdim=True)).all()


def test_many_maps_are_filtered_as_each_alone():
    cam, rgb = torch.rand(2, 37, 4, 5), torch.rand(2, 3, 64, 80)
    capture = captured(rgb)
    together = GuidedFilter()(cam, capture)
    assert together.shape == (2, 37, 64, 80)
    for slot in (0, 15, 16, 36):
        alone = GuidedFilter()(cam[:, slot : slot + 1], capture)
        torch.testing.assert_close(together[:, slot : slot + 1], alone, rtol=0, atol=1e-6)
    assert GuidedFilter()(cam[:, :0], capture).shape == (2, 0, 64, 80)
