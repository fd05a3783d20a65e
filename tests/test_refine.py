"""Refiners worked by hand, and the laws they keep."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from camkit.capture import Anatomy, Capture
from camkit.capture.attention import ExplicitAttention, FusedAttention
from camkit.grid import Grid
from camkit.refiners import Chain, Normalize, Propagate, chain, normalize_cam


def capture_of(*blocks, grid=None, class_tokens=()):
    return Capture(blocks, tuple("ab"), Anatomy(class_tokens), grid or Grid(2, 4))


@pytest.fixture
def two_halves():
    """A 2x4 grid without class token whose left and right halves attend only to themselves."""
    left = torch.tensor([1.0, 1.0, 0.0, 0.0] * 2)
    sides = torch.stack([left, 1 - left], dim=-1)[None, None]
    return capture_of(FusedAttention(1000 * sides, sides, 1.0))


def weights(*rows):
    return ExplicitAttention(torch.tensor(rows)[None, None])


@pytest.fixture
def line():
    """Class token and two patches in two blocks; the first patch gets 1/4, then 1/2 of itself."""
    first = weights([1.0, 0.0, 0.0], [0.6, 0.1, 0.3], [0.0, 0.0, 1.0])
    second = weights([1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.8, 0.0, 0.2])
    return capture_of(first, second, grid=Grid(1, 2), class_tokens=(0,))


def test_propagation_fills_its_own_half_only(two_halves):
    cam = torch.zeros(1, 1, 2, 4)
    cam[..., 0, 0] = 1.0
    out = Propagate(steps=1)(cam, two_halves)
    torch.testing.assert_close(out[..., :2], torch.full((1, 1, 2, 2), 0.25))
    torch.testing.assert_close(out[..., 2:], torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("settings", "first_patch"),
    [
        ({}, 0.375),  # the mean of 1/4 and 1/2
        ({"blocks": 1}, 0.5),
        ({"blocks": 2}, 0.375),
        ({"steps": 2}, 0.375**2),
        ({"steps": 3, "blocks": 1}, 0.125),
        ({"mix": 0.5}, 0.6875),
        ({"steps": 2, "mix": 0.5}, 0.6875**2),
        ({"mix": 0.0}, 1.0),
    ],
    ids=str,
)
def test_propagation_worked_by_hand(line, settings, first_patch):
    out = Propagate(**settings)(torch.tensor([[[[1.0, 0.0]]]]), line)
    torch.testing.assert_close(out, torch.tensor([[[[first_patch, 0.0]]]]))


def random_capture(heads=2):
    q, k = torch.randn(2, 1, heads, 9, 4).unbind(0)
    return capture_of(FusedAttention(2 * q, k, 0.7), class_tokens=(-1,))


def test_propagation_without_mix_changes_nothing():
    cam = torch.rand(1, 3, 2, 4)
    assert torch.equal(Propagate(steps=4, mix=0.0)(cam, random_capture()), cam)


def test_propagation_keeps_the_range_of_each_map():
    cam = torch.randn(1, 3, 2, 4)
    out = Propagate(steps=3, mix=0.9)(cam, random_capture())
    assert (out <= cam.amax((-2, -1), keepdim=True) + 1e-6).all()
    assert (out >= cam.amin((-2, -1), keepdim=True) - 1e-6).all()


def test_propagation_treats_permuted_classes_alike():
    cam, capture, order = torch.rand(1, 3, 2, 4), random_capture(), [2, 0, 1]
    out = Propagate(steps=2)(cam, capture)
    torch.testing.assert_close(Propagate(steps=2)(cam[:, order], capture), out[:, order])


def test_fused_and_explicit_attention_spread_alike():
    capture = random_capture()
    block = capture.blocks[0]
    explicit = capture_of(ExplicitAttention(block.rows(range(9))), class_tokens=(-1,))
    cam = torch.rand(1, 3, 2, 4)
    torch.testing.assert_close(Propagate()(cam, explicit), Propagate()(cam, capture))


def test_a_map_on_another_grid_is_refused(two_halves):
    with pytest.raises(ValueError, match="2x4 patch grid, got 4x2; refine on the grid first"):
        Propagate()(torch.rand(1, 1, 4, 2), two_halves)


@pytest.mark.parametrize(
    ("mode", "scores", "expected"),
    [
        ("max", [1.0, 2.0, 4.0], [0.25, 0.5, 1.0]),
        ("max", [-3.0, 0.0, 2.0], [0.0, 0.0, 1.0]),
        ("max", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ("max", [-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]),
        ("minmax", [1.0, 2.0, 5.0], [0.0, 0.25, 1.0]),
        ("minmax", [-3.0, 1.0, 2.0], [0.0, 0.5, 1.0]),
        ("minmax", [3.0, 3.0, 3.0], [0.0, 0.0, 0.0]),
    ],
)
def test_normalisation_worked_by_hand(mode, scores, expected):
    found = normalize_cam(torch.tensor(scores).view(1, 1, 1, 3), mode=mode)
    assert found.flatten().tolist() == expected


def test_an_epsilon_keeps_faint_maps_faint():
    cam = torch.tensor([[1.0, 2.5], [0.0, 0.5], [7.0, 7.0]]).view(1, 3, 1, 2)
    found = normalize_cam(cam, mode="minmax", epsilon=0.5)
    assert found.flatten().tolist() == [0.0, 0.75, 0.0, 0.5, 0.0, 0.0]
    assert not normalize_cam(torch.zeros(1, 1, 2, 2).half(), epsilon=1e-8).any()


def test_every_map_is_normalised_alone():
    cam = torch.tensor([[[[1.0, 2.0]], [[10.0, 5.0]]], [[[0.0, 0.0]], [[3.0, 0.3]]]])
    expected = torch.tensor([[[[0.5, 1.0]], [[1.0, 0.5]]], [[[0.0, 0.0]], [[1.0, 0.1]]]])
    torch.testing.assert_close(normalize_cam(cam), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flat_map_becomes_zeros_in_half_precision(dtype):
    cam = torch.zeros(1, 1, 2, 2, dtype=dtype)
    assert torch.equal(normalize_cam(cam), cam)


@pytest.mark.parametrize("mode", ["max", "minmax"])
def test_the_refiner_normalises_as_the_function(mode, two_halves):
    cam = torch.randn(1, 2, 2, 4)
    assert torch.equal(Normalize(mode=mode)(cam, two_halves), normalize_cam(cam, mode=mode))
    faint = normalize_cam(cam, mode=mode, epsilon=0.1)
    assert torch.equal(Normalize(mode=mode, epsilon=0.1)(cam, two_halves), faint)


@pytest.mark.usefixtures("no_shape_checks")
def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match='"max" or "minmax", got \'softmax\''):
        Normalize(mode="softmax")


def test_a_chain_runs_its_refiners_in_order(line):
    cam = torch.tensor([[[[2.0, 0.0]]]])
    out = chain(Propagate(blocks=1), Normalize())(cam, line)
    torch.testing.assert_close(out, torch.tensor([[[[1.0, 0.0]]]]))
    out = chain(Normalize(), Propagate(blocks=1))(cam, line)
    torch.testing.assert_close(out, torch.tensor([[[[0.5, 0.0]]]]))


def test_a_chain_is_itself_a_refiner(line):
    cam = torch.rand(1, 2, 1, 2)
    nested = chain(chain(Propagate()), lambda cam, _: cam * 2)
    torch.testing.assert_close(nested(cam, line), 2 * Propagate()(cam, line))
    assert chain(Normalize(), Propagate()) == Chain((Normalize(), Propagate()))


def test_an_empty_chain_changes_nothing(two_halves):
    cam = torch.rand(1, 1, 2, 4)
    assert torch.equal(chain()(cam, two_halves), cam)


def test_kept_attention_is_that_of_the_capture_and_goes_with_it():
    maps = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    cam = torch.rand(1, 1, 2, 3)
    capture = Capture.of_attention([maps[:1], maps[1:]], (2, 3))
    both, last = Propagate(balance=3), Propagate(balance=3, blocks=1)
    first = both(cam, capture)
    assert torch.equal(both(cam, capture), first)
    again = Capture.of_attention([maps[1:]], (2, 3))
    assert torch.equal(last(cam, capture), both(cam, again))
    assert not torch.equal(last(cam, capture), first)
    gone = weakref.ref(capture)
    del capture
    gc.collect()
    assert gone() is None


def test_attention_read_without_gradients_does_not_cut_later_ones():
    maps = torch.rand(1, 1, 7, 7).softmax(-1).requires_grad_()
    capture = replace(Capture.of_attention([maps], (2, 3)), blocks=(ExplicitAttention(maps),))
    cam = torch.rand(1, 1, 2, 3)
    with torch.no_grad():
        Propagate(balance=3)(cam, capture)
    Propagate(balance=3)(cam, capture).sum().backward()
    Propagate(balance=3)(cam, capture).pow(2).sum().backward()
    assert maps.grad is not None
