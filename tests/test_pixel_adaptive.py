"""Pixel-adaptive refinement against all neighbours stacked, by hand, and the laws it keeps."""

import math

import pytest
import torch
from coarse import captured
from torch.utils._python_dispatch import TorchDispatchMode

from camkit import resize_cam
from camkit.ops.edge_aware import adapt_to_colours
from camkit.refiners.edge_aware import PixelAdaptive

DILATIONS = (1, 2, 4, 8, 12, 24)
SIZES = [(1, 1), (1, 7), (13, 17), (40, 33)]


def stacked(planes, dilations):
    """All neighbours at once, ``(b, c, neighbours, H, W)``, read by their row and column."""
    rows, cols = planes.shape[2:]
    y, x = torch.arange(rows)[:, None], torch.arange(cols)[None]
    found = [
        planes[:, :, (y + down * d).clamp(0, rows - 1), (x + right * d).clamp(0, cols - 1)]
        for d in dilations
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if down or right
    ]
    return torch.stack(found, 2)


def stacked_float32(maps, rgb, *, steps):
    """The formula as research code runs it: float32, every neighbour of every map at once."""
    return plain(maps, rgb, steps=steps, dtype=torch.float32)


def plain(
    maps,
    rgb,
    *,
    steps,
    dilations=DILATIONS,
    colour_width=0.3,
    position_weight=0.01,
    dtype=torch.float64,
):
    """The formula as it is written."""
    maps, rgb = maps.to(dtype), rgb.to(dtype)
    colours = stacked(rgb, dilations)
    difference = (colours - rgb[:, :, None]).abs()
    difference = difference / (colours.std(2, keepdim=True) + 1e-8) / colour_width
    affinity = (-difference.square()).mean(1).softmax(1)
    ring = torch.tensor([math.sqrt(2), 1.0] * 2 + [1.0, math.sqrt(2)] * 2, dtype=dtype)
    distance = torch.cat([d * ring for d in dilations])
    nearness = (-(distance / (distance.std() + 1e-8) / 0.3).square()).softmax(0)
    affinity = affinity + position_weight * nearness[:, None, None]
    for _ in range(steps):
        maps = (affinity[:, None] * stacked(maps, dilations)).sum(2)
    return maps


def pictures(size, images=2, maps=3, dtype=torch.float64):
    return torch.randn(images, maps, *size, dtype=dtype), torch.rand(images, 3, *size, dtype=dtype)


@pytest.mark.parametrize(
    "settings",
    [{}, {"dilations": (3, 1)}, {"colour_width": 2.0, "position_weight": 0.5}],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_the_formula_with_all_neighbours_stacked(size, dtype, error, settings):
    maps, rgb = pictures(size, dtype=dtype)
    found = adapt_to_colours(maps, rgb, steps=4, **settings)
    assert found.dtype == dtype
    expected = plain(maps, rgb, steps=4, **settings)
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_it_equals_the_formula_on_the_few_colours_of_a_drawing(size):
    maps = torch.randn(2, 3, *size)
    rgb = torch.randint(0, 3, (2, 3, *size)) / 2
    expected = plain(maps, rgb, steps=4)
    found = adapt_to_colours(maps, rgb, steps=4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_rounds_only_what_comes_in_and_goes_out(dtype, error):
    maps, rgb = pictures((13, 17), dtype=dtype)
    found = adapt_to_colours(maps, rgb, steps=10)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), plain(maps, rgb, steps=10), rtol=error, atol=1e-5)


def test_no_digits_are_lost_under_autocast():
    maps, rgb = pictures((13, 17), dtype=torch.float32)
    expected = adapt_to_colours(maps, rgb, steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapt_to_colours(maps, rgb, steps=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_strided_input_gives_what_dense_input_gives():
    maps, rgb = pictures((34, 26))
    maps, rgb = maps.mT[..., ::2], rgb.mT[..., ::2]
    expected = adapt_to_colours(maps.contiguous(), rgb.contiguous(), steps=2)
    torch.testing.assert_close(adapt_to_colours(maps, rgb, steps=2), expected)


@pytest.mark.parametrize("shape", [(0, 3, 13, 17), (2, 0, 13, 17)], ids=["images", "maps"])
def test_no_images_or_no_maps_come_back_as_none(shape):
    rgb = torch.rand(shape[0], 3, 13, 17)
    assert adapt_to_colours(torch.rand(shape), rgb, steps=2).shape == shape


def test_a_line_of_three_pixels_of_one_colour_worked_by_hand():
    maps = torch.tensor([[[[1.0, 10.0, 100.0]]]])
    rgb = torch.full((1, 3, 1, 3), 0.4)
    found = adapt_to_colours(maps, rgb, steps=1, dilations=(1,))
    # Each pixel is met three times on either side and, past the rim, twice in its own place. All
    # colours alike, an eighth each; nearness counts the four straight neighbours, a quarter each,
    # as the diagonal ones are 4.7 standard deviations of 0.3 further.
    straight = [(1 + 10 + 2) / 4, (1 + 100 + 20) / 4, (10 + 100 + 200) / 4]
    likeness = [(5 + 30) / 8, (3 + 20 + 300) / 8, (30 + 500) / 8]
    expected = torch.tensor(likeness) + 0.01 * torch.tensor(straight)
    torch.testing.assert_close(found.flatten(), expected)


def test_on_one_colour_a_slope_grows_by_the_mass_alone():
    slope = torch.arange(60.0, dtype=torch.float64).expand(1, 1, 50, 60)
    rgb = torch.full((1, 3, 50, 60), 0.7, dtype=torch.float64)
    found = adapt_to_colours(slope, rgb, steps=1)
    inner = (..., slice(24, -24), slice(24, -24))  # both sides of it within the picture
    torch.testing.assert_close(found[inner], 1.01 * slope[inner], rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.5])
def test_the_weights_of_a_pixel_sum_to_one_and_the_position_weight(weight):
    rgb = torch.rand(2, 3, 13, 17, dtype=torch.float64)
    ones = torch.ones(2, 1, 13, 17, dtype=torch.float64)
    found = adapt_to_colours(ones, rgb, steps=1, position_weight=weight)
    torch.testing.assert_close(found, (1 + weight) * ones, rtol=1e-12, atol=0)


def halves(rows=30, cols=40):
    """The left half of a map, and a picture whose halves differ in colour."""
    left = torch.zeros(1, 1, rows, cols, dtype=torch.float64)
    left[..., : cols // 2] = 1.0
    return left, torch.cat([0.8 * left, 0.5 * left, 1 - left], 1)


def test_maps_do_not_cross_an_edge_by_likeness():
    left, rgb = halves()
    found = adapt_to_colours(left, rgb, steps=10, position_weight=0.0)
    torch.testing.assert_close(found, left, rtol=0, atol=1e-12)


def test_maps_cross_an_edge_by_nearness_alone():
    left, rgb = halves()
    found = adapt_to_colours(left, rgb, steps=1, dilations=(1,))
    # one of the four straight neighbours lies over the edge; the diagonal ones count for nothing
    torch.testing.assert_close(found[..., 19], torch.full_like(found[..., 19], 1.0075))
    torch.testing.assert_close(found[..., 20], torch.full_like(found[..., 20], 0.0025))
    torch.testing.assert_close(found[..., 21:], torch.zeros_like(found[..., 21:]))
    assert adapt_to_colours(left, rgb, steps=10)[left == 0].max() <= 1.01**10 - 1


def test_a_map_that_misses_the_edge_is_drawn_to_it():
    left, rgb = halves()
    off = left.clone()
    off[..., 20:25] = 1.0  # five columns too wide
    assert torch.equal(adapt_to_colours(off, rgb, steps=10) > 0.5, left > 0.5)


@pytest.mark.parametrize("colour_width", [0.03, 0.3, 3.0])
def test_values_keep_their_range_up_to_the_mass(colour_width):
    maps, rgb = pictures((13, 17))
    found = adapt_to_colours(maps, rgb, steps=5, colour_width=colour_width) / 1.01**5
    assert (found <= maps.amax((2, 3), keepdim=True) + 1e-12).all()
    assert (found >= maps.amin((2, 3), keepdim=True) - 1e-12).all()


def test_permuted_classes_are_refined_alike():
    maps, rgb = pictures((13, 17))
    order = [2, 0, 1]
    found = adapt_to_colours(maps[:, order], rgb, steps=3)
    torch.testing.assert_close(found, adapt_to_colours(maps, rgb, steps=3)[:, order])


def test_a_batch_is_refined_as_its_images_one_by_one():
    maps, rgb = pictures((13, 17))
    alone = [adapt_to_colours(maps[i : i + 1], rgb[i : i + 1], steps=3) for i in (0, 1)]
    torch.testing.assert_close(adapt_to_colours(maps, rgb, steps=3), torch.cat(alone))


def test_a_normalised_picture_refines_as_its_colours_do():
    maps, rgb = pictures((13, 17))
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]]).double()[..., None, None]
    found = adapt_to_colours(maps, (rgb - mean) / std, steps=10)
    # not to the last digit: the small number added to the deviation does not scale along
    torch.testing.assert_close(found, adapt_to_colours(maps, rgb, steps=10), rtol=0, atol=1e-5)


def test_it_holds_one_plane_a_neighbour_and_no_stack_of_neighbours():
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple) else (result,)
            made.extend(x for x in outputs if isinstance(x, torch.Tensor))  # kept: no address twice
            return result

    maps, rgb = pictures((40, 33), dtype=torch.float32)
    with Sizes():
        adapt_to_colours(maps, rgb, steps=3)
    planes = 2 * 48 * 40 * 33
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 4 for x in made}
    assert max(x.numel() for x in made) == planes
    assert sorted(sizes.values())[-1] == planes
    # the next is a padded copy: no second stack, as a softmax out of place would make
    assert sorted(sizes.values())[-2] == 2 * 3 * (40 + 48) * (33 + 48)


def test_neighbours_far_outside_the_picture_cost_no_memory():
    maps, rgb = pictures((2, 3))
    found = adapt_to_colours(maps, rgb, steps=2, dilations=(1, 10**9))
    torch.testing.assert_close(
        adapt_to_colours(maps, rgb, steps=2, dilations=(1, 10**8)), found, rtol=1e-6, atol=1e-6
    )


def test_it_is_differentiable_in_the_maps():
    maps, rgb = pictures((2, 3), images=2, maps=2)
    maps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: adapt_to_colours(x, rgb, steps=2), (maps,))


def test_colours_get_no_gradient():
    maps, rgb = pictures((3, 5))
    maps.requires_grad_()
    rgb.requires_grad_()
    adapt_to_colours(maps, rgb, steps=1).sum().backward()
    assert rgb.grad is None


WRONG = [
    ({"steps": 0}, "`steps` must be at least 1, got 0"),
    ({"steps": math.nan}, "`steps` must be at least 1, got nan"),
    ({"dilations": ()}, "`dilations` must name at least one distance, got none"),
    ({"dilations": (1, 0)}, r"`dilations` must be at least 1 each, got \(1, 0\)"),
    ({"dilations": (math.nan,)}, r"`dilations` must be at least 1 each, got \(nan,\)"),
    ({"colour_width": 0.0}, "`colour_width` must be positive and finite, got 0.0"),
    ({"colour_width": math.nan}, "`colour_width` must be positive and finite, got nan"),
    ({"colour_width": math.inf}, "`colour_width` must be positive and finite, got inf"),
    ({"position_weight": -0.1}, "`position_weight` must be .*, got -0.1"),
    ({"position_weight": math.nan}, "`position_weight` must be .*, got nan"),
]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(("settings", "words"), WRONG, ids=str)
def test_settings_out_of_range_are_refused(settings, words):
    maps, rgb = pictures((3, 5))
    with pytest.raises(ValueError, match=words):
        adapt_to_colours(maps, rgb, **{"steps": 1, **settings})


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (1, 3, 3, 5), (2, 1, 3, 5), (3, 3, 5)], ids=str)
def test_colours_of_another_shape_are_refused(shape):
    maps, _ = pictures((3, 5))
    found = "x".join(map(str, shape))
    with pytest.raises(ValueError, match=f"must be 2x3x3x5 to match `maps`, got {found}; use"):
        adapt_to_colours(maps, torch.rand(shape), steps=1)


@pytest.mark.parametrize(
    ("settings", "size"),
    [({}, (20, 30)), ({"scale": 0.5}, (10, 15)), ({"size": (7, 9)}, (7, 9))],
    ids=str,
)
def test_the_refiner_resizes_both_and_takes_the_mass_out(settings, size):
    cam, rgb = torch.rand(2, 4, 2, 3), torch.rand(2, 3, 20, 30)
    found = PixelAdaptive(steps=3, **settings)(cam, captured(rgb))
    expected = plain(resize_cam(cam, size), resize_cam(rgb, size), steps=3) / 1.01**3
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_refiner_hands_every_setting_on():
    cam, rgb = torch.rand(2, 4, 2, 3), torch.rand(2, 3, 20, 30)
    settings = {"dilations": (2, 3), "colour_width": 1.0, "position_weight": 0.2}
    found = PixelAdaptive(steps=2, **settings)(cam, captured(rgb))
    expected = plain(resize_cam(cam, (20, 30)), rgb, steps=2, **settings) / 1.2**2
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_refined_scores_stay_between_zero_and_one():
    cam = torch.tensor([0.0, 1.0]).expand(1, 3, 2)[:, None]
    found = PixelAdaptive(steps=30)(cam, captured(torch.rand(1, 3, 12, 16)))
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-5
    ones = PixelAdaptive(steps=30)(torch.ones(1, 1, 2, 3), captured(torch.rand(1, 3, 12, 16)))
    torch.testing.assert_close(ones, torch.ones(1, 1, 12, 16))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_maps_in_half_precision_are_rounded_once_at_the_end(dtype, error):
    cam, rgb = torch.rand(1, 2, 2, 3).to(dtype), torch.rand(1, 3, 20, 30)
    found = PixelAdaptive()(cam, captured(rgb))
    assert found.dtype == dtype
    expected = PixelAdaptive()(cam.float(), captured(rgb))
    torch.testing.assert_close(found.float(), expected, rtol=error, atol=0)


@pytest.mark.parametrize("settings", [{}, {"scale": 0.5}], ids=str)
def test_no_images_are_refined_to_no_images(settings):
    found = PixelAdaptive(**settings)(torch.rand(0, 2, 2, 3), captured(torch.rand(0, 3, 20, 30)))
    assert found.shape[:2] == (0, 2)
