"""Likeness of tokens and colours against whole maps, and what is kept of them for the backward."""

import math

import pytest
import torch
from oracles import PRECISIONS
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from camkit.ops import reweight_plain
from camkit.ops.similarity import colour_smooth, cosine_rows_and_columns

SIZES = [(2, 1), (2, 17), (2, 196), (1, 785), (0, 17)]
CASES = [(size, dtype) for size in SIZES for dtype in (torch.float64, torch.float32)]
CASES += [((2, 17), dtype) for dtype in (torch.float16, torch.bfloat16)]
TEMPERATURE, WIDTH = 0.1, 0.15


def cosine_rows(tokens, places, *, temperature):
    return cosine_rows_and_columns(tokens, places, temperature=temperature)[0]


def cosine_columns(tokens, places, *, temperature):
    return cosine_rows_and_columns(tokens, places, temperature=temperature)[1]


def likeness(tokens, temperature=TEMPERATURE):
    """The whole map in float64."""
    x = normalize(tokens.double(), dim=-1)
    return (x @ x.mT / temperature).softmax(-1)


def smoothed(colours, values, width=WIDTH):
    """The whole kernel in float64, times the values."""
    r = colours.double()
    distance = (r[:, :, None] - r[:, None]).square().sum(-1)
    return (-distance / (2 * width**2)).softmax(-1) @ values.double()


class Sizes(TorchDispatchMode):
    """Numbers of elements of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        self.made += [x.numel() for x in outputs if isinstance(x, torch.Tensor)]
        return result


def largest_made_and_kept(function):
    """Elements of the largest tensor made, and of the largest kept for the backward."""
    kept = []
    with Sizes() as sizes:
        with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = function()
        out.square().sum().backward()
    return max(sizes.made), max(kept)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]} images of {size[1]}")
def size(request):
    return request.param


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def tokens_of(images, tokens, dtype=torch.float32, width=8):
    """Tokens as a view of something wider, with a shared part, as tokens of a ViT have it."""
    return (torch.randn(images, width, 2 * tokens) + 0.5).to(dtype).mT[:, ::2]


def picture_of(images, patches, dtype=torch.float32, maps=5):
    colours = torch.rand(images, 3, patches).to(dtype).mT
    return colours, torch.rand(images, maps, 2 * patches).to(dtype).mT[:, ::2]


def positions(tokens):
    return [0, -1, tokens // 2]


def assert_near(found, expected, dtype):
    assert found.dtype == dtype
    error = PRECISIONS[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


def test_rows_equal_those_of_the_whole_map(case):
    size, dtype = case
    tokens, chosen = tokens_of(*size, dtype), positions(size[1])
    rows = cosine_rows(tokens, chosen, temperature=TEMPERATURE)
    assert_near(rows, likeness(tokens)[:, chosen], dtype)


def test_columns_equal_those_of_the_whole_map(case):
    size, dtype = case
    tokens, chosen = tokens_of(*size, dtype), positions(size[1])
    columns = cosine_columns(tokens, chosen, temperature=TEMPERATURE)
    assert_near(columns, likeness(tokens)[..., chosen], dtype)


@pytest.mark.parametrize("maps", [1, 4, 5, 21])
def test_smoothing_equals_the_whole_kernel(case, maps):
    size, dtype = case
    colours, values = picture_of(*size, dtype, maps)
    assert_near(colour_smooth(colours, values, width=WIDTH), smoothed(colours, values), dtype)


def test_streamed_columns_equal_the_whole_map(monkeypatch):
    monkeypatch.setattr(reweight_plain, "HELD", 2 * 5 * 17)  # 5 tokens at a time
    tokens = tokens_of(2, 17).double()
    columns = cosine_columns(tokens, [3, -2], temperature=TEMPERATURE)
    assert_near(columns, likeness(tokens)[..., [3, -2]], torch.float64)


def test_half_of_the_likeness_by_hand():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    temperature = 1 / math.log(2)  # powers of two: 2 for the same direction, 1 for a right angle
    rows = cosine_rows(tokens, [0, 1], temperature=temperature)
    torch.testing.assert_close(rows, torch.tensor([[[0.4, 0.2, 0.4], [0.25, 0.5, 0.25]]]))
    columns = cosine_columns(tokens, [1], temperature=temperature)
    torch.testing.assert_close(columns, torch.tensor([[[0.2], [0.5], [0.2]]]))


def test_a_colour_three_times_as_near_counts_three_times():
    colours = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    values, width = torch.tensor([[[0.0], [1.0]]]), (2 * math.log(3)) ** -0.5
    expected = torch.tensor([[[0.25], [0.75]]])
    torch.testing.assert_close(colour_smooth(colours, values, width=width), expected)


def test_rows_sum_to_one_over_tokens_and_columns_over_keys(size):
    images, tokens = size
    x = tokens_of(images, tokens)
    rows = cosine_rows(x, range(tokens), temperature=TEMPERATURE)
    columns = cosine_columns(x, range(tokens), temperature=TEMPERATURE)
    ones = torch.ones(images, tokens)
    torch.testing.assert_close(rows.sum(-1), ones)
    torch.testing.assert_close(columns.sum(-1), ones)


def test_permuted_tokens_are_alike_as_before():
    tokens, order = tokens_of(2, 17), torch.randperm(17)
    moved = [order.tolist().index(key) for key in (0, 5)]
    rows = cosine_rows(tokens[:, order], moved, temperature=TEMPERATURE)
    columns = cosine_columns(tokens[:, order], moved, temperature=TEMPERATURE)
    before = cosine_rows(tokens, [0, 5], temperature=TEMPERATURE)[..., order]
    torch.testing.assert_close(rows, before)
    before = cosine_columns(tokens, [0, 5], temperature=TEMPERATURE)[:, order]
    torch.testing.assert_close(columns, before)


def test_permuted_patches_are_smoothed_as_before():
    (colours, values), order = picture_of(2, 17), torch.randperm(17)
    moved = colour_smooth(colours[:, order], values[:, order], width=WIDTH)
    torch.testing.assert_close(moved, colour_smooth(colours, values, width=WIDTH)[:, order])


def test_the_length_of_a_token_does_not_matter():
    tokens = tokens_of(2, 17)
    longer = tokens * torch.rand(2, 17, 1).mul(100)
    for form in (cosine_rows, cosine_columns):
        expected = form(tokens, [0, -1], temperature=TEMPERATURE)
        torch.testing.assert_close(form(longer, [0, -1], temperature=TEMPERATURE), expected)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 0.1])
def test_a_token_of_zeros_is_equally_like_all_and_gets_no_gradient(temperature):
    tokens = torch.randn(1, 17, 8)
    tokens[:, 4] = 0.0
    tokens.requires_grad_()
    columns = cosine_columns(tokens, [0, 4], temperature=temperature)
    rows = cosine_rows(tokens, [0, 4], temperature=temperature)
    torch.testing.assert_close(columns[:, 4], torch.full((1, 2), 1 / 17))
    torch.testing.assert_close(rows[:, 1], torch.full((1, 17), 1 / 17))
    (columns.square().sum() + rows.square().sum()).backward()
    assert torch.equal(tokens.grad[:, 4], torch.zeros(1, 8))
    assert tokens.grad.isfinite().all()


def test_a_cold_softmax_leaves_a_token_only_its_like():
    tokens = torch.eye(17)[None]
    columns = cosine_columns(tokens, range(17), temperature=1e-4)
    torch.testing.assert_close(columns, tokens)


def test_a_constant_stays_constant_when_smoothed(size):
    colours, _ = picture_of(*size)
    values = torch.full((*size, 2), 0.3)
    torch.testing.assert_close(colour_smooth(colours, values, width=WIDTH), values)


def test_smoothed_values_stay_in_the_range_of_their_map():
    colours, values = picture_of(2, 196)
    smooth = colour_smooth(colours, values, width=0.05)
    assert (smooth <= values.amax(1, keepdim=True) + 1e-6).all()
    assert (smooth >= values.amin(1, keepdim=True) - 1e-6).all()


@pytest.mark.parametrize(("width", "error"), [(0.05, 2e-5), (0.01, 3e-4), (1e-3, 1e-2), (1e-6, 0)])
def test_small_widths_on_a_bright_picture_lose_few_digits(width, error):
    colours, values = picture_of(1, 196)
    colours = 0.9 + 0.1 * colours  # without centring the error is several times as large
    smooth = colour_smooth(colours, values, width=width)
    expected = smoothed(colours, values, width)
    torch.testing.assert_close(smooth.double(), expected, rtol=0, atol=error)


def test_rows_and_columns_are_differentiable(monkeypatch):
    monkeypatch.setattr(reweight_plain, "HELD", 2 * 2 * 5)  # 2 tokens at a time
    tokens = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    for form in (cosine_rows, cosine_columns):
        assert torch.autograd.gradcheck(lambda x, f=form: f(x, [0, -1, 0], temperature=0.3), tokens)


def test_smoothing_is_differentiable_in_the_values():
    colours, values = picture_of(2, 5, torch.float64, maps=2)
    values = values.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: colour_smooth(colours, v, width=WIDTH), values)


def test_colours_get_no_gradient():
    colours, values = (x.requires_grad_() for x in picture_of(1, 17))
    colour_smooth(colours, values, width=WIDTH).sum().backward()
    assert colours.grad is None


def test_the_gradient_of_columns_is_that_of_the_whole_map(size):
    tokens = tokens_of(*size).requires_grad_()
    weights = torch.randn(*size, 2)
    columns = cosine_columns(tokens, [0, -1], temperature=TEMPERATURE)
    (found,) = torch.autograd.grad((columns * weights).sum(), tokens)
    loss = (likeness(tokens)[..., [0, -1]] * weights).sum()
    (expected,) = torch.autograd.grad(loss, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_columns_hold_no_map_of_all_pairs(monkeypatch):
    images, tokens, width = 2, 785, 16
    monkeypatch.setattr(reweight_plain, "HELD", 50 * images * tokens)
    x = tokens_of(images, tokens, width=width).requires_grad_()
    made, kept = largest_made_and_kept(
        lambda: cosine_columns(x, [0, 1, 2], temperature=TEMPERATURE)
    )
    assert made == 50 * images * tokens
    assert kept == images * tokens * width


def test_smoothing_of_strided_values_holds_no_map_of_all_pairs():
    images, patches, maps = 2, 784, 20  # a width that needs no padding, so nothing is copied
    colours, values = picture_of(images, patches, maps=maps)
    values = values.detach().requires_grad_()
    made, kept = largest_made_and_kept(lambda: colour_smooth(colours, values, width=WIDTH))
    assert max(made, kept) == images * patches * maps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_no_digits(dtype):
    tokens, (colours, values) = tokens_of(2, 17), picture_of(2, 17)

    def everything():
        columns = cosine_columns(tokens, [0], temperature=TEMPERATURE)
        rows = cosine_rows(tokens, [0], temperature=TEMPERATURE)
        return columns, rows, colour_smooth(colours, values, width=WIDTH)

    expected = everything()
    with torch.autocast("cpu", dtype):
        found = everything()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", [cosine_rows, cosine_columns])
def test_a_position_that_is_not_there_is_an_error(form):
    with pytest.raises(IndexError, match="17"):
        form(torch.randn(1, 17, 4), [17], temperature=TEMPERATURE)


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
def test_temperature_and_width_must_be_positive(bad):
    tokens, (colours, values) = tokens_of(1, 17), picture_of(1, 17)
    for form in (cosine_rows, cosine_columns):
        with pytest.raises(ValueError, match=f"`temperature` must be positive .*, got {bad}"):
            form(tokens, [0], temperature=bad)
    with pytest.raises(ValueError, match=f"`width` must be positive .*, got {bad}"):
        colour_smooth(colours, values, width=bad)
