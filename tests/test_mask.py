"""Class maps turned into pseudo masks."""

import pytest
import torch
from hypothesis import given, strategies as st

from camkit.mask import gate, mask_at, power_threshold, to_mask
from camkit.ops.images import resize_cam
from camkit.seeds.protocol import check_classes


def row(*classes: list[float]) -> torch.Tensor:
    """One image of one row of pixels; each argument is the map of one class."""
    return torch.tensor(classes)[None, :, None, :]


def test_a_pixel_takes_its_strongest_class_if_that_beats_the_background():
    cam = row([0.9, 0.2, 0.5, 0.1], [0.3, 0.8, 0.6, 0.4])
    mask = to_mask(cam, torch.tensor([[7, 2]]), background_score=0.45)
    assert mask.tolist() == [[[8, 3, 3, 0]]]
    assert mask.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tie_with_the_background_goes_to_the_background(dtype):
    cam = row([0.1, 0.45, 0.46]).to(dtype)
    assert to_mask(cam, background_score=0.45).tolist() == [[[0, 0, 1]]]


def test_a_tie_between_classes_goes_to_the_one_asked_first():
    assert to_mask(row([0.7], [0.7]), torch.tensor([[5, 1]])).tolist() == [[[6]]]


def test_padding_never_wins_even_over_a_background_of_zero():
    cam = row([0.0, 0.2, 0.0], [1.0, 1.0, 1.0])
    mask = to_mask(cam, torch.tensor([[4, -1]]), background_score=0.0)
    assert mask.tolist() == [[[0, 5, 0]]]


def test_gate_zeroes_padded_slots_only():
    cam = row([0.3, 0.4], [0.5, 0.6])
    assert torch.equal(gate(cam, torch.tensor([[-1, 0]])), row([0.0, 0.0], [0.5, 0.6]))


def test_without_classes_the_mask_is_numbered_by_slot():
    assert to_mask(row([0.9, 0.0], [0.0, 0.9])).tolist() == [[[1, 2]]]


def test_the_ignore_band_lies_above_its_lower_bound_and_up_to_the_background_score():
    cam = row([0.2, 0.25, 0.26, 0.7, 0.71])
    mask = to_mask(cam, background_score=0.7, ignore_below=0.25)
    assert mask.tolist() == [[[0, 0, 255, 255, 1]]]


@pytest.mark.parametrize(
    ("alpha", "root"), [(1.0, 0.5), (2.0, (3 - 5**0.5) / 2), (0.5, (5**0.5 - 1) / 2)]
)
def test_power_thresholds_known_in_closed_form(alpha, root):
    assert power_threshold(alpha) == pytest.approx(root, abs=1e-15)


@given(alpha=st.floats(0.05, 20.0))
def test_the_power_background_draws_the_mask_of_the_literal_background_plane(alpha):
    cam = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    plane = (1 - cam.amax(dim=1, keepdim=True)) ** alpha
    known = torch.cat([plane, cam], dim=1).argmax(dim=1)
    mask = to_mask(cam, background="power", background_score=alpha)
    assert torch.equal(mask.long(), known)


def test_permuted_classes_draw_the_same_mask():
    cam = torch.rand(2, 4, 9, 9)
    classes = torch.tensor([[3, 0, 9, -1], [2, 7, 5, 1]])
    order = torch.tensor([2, 3, 1, 0])
    assert torch.equal(to_mask(cam, classes), to_mask(cam[:, order], classes[:, order]))


def test_a_cam_with_a_gradient_can_be_drawn():
    cam = torch.tensor([[[[0.9, 0.1]]]], requires_grad=True)
    assert to_mask(cam).tolist() == [[[1, 0]]]


def test_no_image_at_all_gives_no_mask():
    assert to_mask(torch.zeros(0, 2, 4, 4), torch.zeros(0, 2).long()).shape == (0, 4, 4)


def test_class_253_is_the_last_that_fits():
    assert to_mask(row([0.9]), torch.tensor([[253]])).tolist() == [[[254]]]
    with pytest.raises(ValueError, match="0 to 253, got class 254; use bits=16, or classes=None"):
        to_mask(row([0.9]), torch.tensor([[254]]))


def test_more_slots_than_fit_are_refused():
    with pytest.raises(ValueError, match="classes 0 to 253, got class 254"):
        to_mask(torch.zeros(1, 255, 1, 1))


@pytest.mark.parametrize("wrong", [-0.01, 1.01])
def test_a_cam_outside_its_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got values from .* normalise"):
        to_mask(row([0.5, wrong]))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_cam_that_is_not_finite_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be finite, got \w+ in image 0, map 1"):
        to_mask(row([0.5, 0.5], [0.5, wrong]))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("wrong", [[[1.9]], [[True]]])
def test_classes_are_whole_numbers(wrong):
    classes = torch.tensor(wrong)
    for check in (lambda: to_mask(row([0.5]), classes), lambda: check_classes(classes, 1, 3)):
        with pytest.raises(TypeError, match=f"indices of an integer dtype, got {classes.dtype}"):
            check()


def test_rounding_past_the_range_is_accepted():
    assert to_mask(row([1.00005, -0.00005])).tolist() == [[[1, 0]]]


def test_a_cam_without_maps_is_refused():
    with pytest.raises(ValueError, match="at least one class map, got none; pad with class -1"):
        to_mask(torch.zeros(1, 0, 2, 2))


def test_classes_below_minus_one_are_refused():
    with pytest.raises(ValueError, match="indices from 0, or -1 for padding, got -2"):
        to_mask(row([0.5]), torch.tensor([[-2]]))


@pytest.mark.usefixtures("no_shape_checks")
def test_classes_that_do_not_name_every_map_are_refused():
    with pytest.raises(ValueError, match=r"name the 2 maps of each of 1 images, got shape \(1, 3"):
        to_mask(torch.zeros(1, 2, 2, 2), torch.tensor([[0, 1, 2]]))


@pytest.mark.usefixtures("no_shape_checks")
def test_an_unknown_background_is_refused():
    with pytest.raises(ValueError, match='"constant" or "power", got "otsu"'):
        to_mask(row([0.5]), background="otsu")


def test_an_exponent_is_no_constant_background_score():
    with pytest.raises(ValueError, match=r"lie in \[0, 1\], got 2.0; use background=.power"):
        to_mask(row([0.5]), background_score=2.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_an_exponent_must_be_above_zero(alpha):
    with pytest.raises(ValueError, match=f"must be above 0, got {alpha}"):
        to_mask(row([0.5]), background="power", background_score=alpha)


@pytest.mark.parametrize("low", [0.45, 0.6, -0.1])
def test_an_ignore_band_must_lie_below_the_background_score(low):
    with pytest.raises(ValueError, match=rf"must lie in \[0, 0.45\), .*, got {low}"):
        to_mask(row([0.5]), background_score=0.45, ignore_below=low)


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_a_few_classes_are_drawn_as_they_are_among_many(slots):
    """Scores of few levels, so that classes tie with each other and with the background."""
    cam = torch.randint(0, 9, (2, slots, 20, 30)) / 8
    classes = torch.stack([torch.randperm(200)[:slots] for _ in range(2)])
    padding = 9 - slots
    more = torch.cat([cam, torch.ones(2, padding, 20, 30)], 1)
    padded = torch.cat([classes, torch.full((2, padding), -1)], 1)
    drawn = to_mask(cam, classes, background_score=0.5, ignore_below=0.25)
    assert torch.equal(drawn, to_mask(more, padded, background_score=0.5, ignore_below=0.25))


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize(
    "settings",
    [
        {"background_score": 0.6},
        {"background_score": 0.6, "ignore_below": 0.3},
        {"background_score": 1.5, "background": "power", "bits": 16},
    ],
)
def test_a_large_mask_drawn_class_by_class_is_the_same(monkeypatch, count, settings):
    generator = torch.Generator().manual_seed(count)
    cam = (torch.rand(2, count, 5, 7, generator=generator) * 8).round() / 8  # with ties
    classes = torch.stack([torch.randperm(20, generator=generator)[:count] for _ in range(2)])
    whole = mask_at(cam, (31, 40), classes, **settings)
    assert torch.equal(whole, to_mask(resize_cam(cam, (31, 40)).clamp(0, 1), classes, **settings))
    monkeypatch.setattr("camkit.mask._AT_ONCE", 0)
    by_class = mask_at(cam, (31, 40), classes, **settings)
    assert by_class.dtype == whole.dtype
    assert torch.equal(by_class, whole)
    assert len(whole.unique()) > 1


def test_a_large_mask_refuses_the_classes_that_a_small_one_refuses(monkeypatch):
    monkeypatch.setattr("camkit.mask._AT_ONCE", 0)
    with pytest.raises(ValueError, match="holds classes 0 to 253, got class 254"):
        mask_at(torch.zeros(1, 2, 4, 4), (8, 8), torch.tensor([[254, 0]]))
