"""Each way of letting colours in, against its t x t matrix written out."""

import pytest
import torch
import torch.nn.functional as F

from camkit.edits import HybridAlignment
from camkit.edits.alignment import COLOUR_READINGS, Cues
from camkit.ops.similarity import colour_mass

TAU, WIDTH = 0.1, 0.15
CLASSES, PATCHES, TOKENS = [0, 1, 2], list(range(4, 16)), 16  # token 3 is a register


def inputs(dtype=torch.float64):
    tokens = torch.randn(2, TOKENS, 8, dtype=dtype)
    colours = torch.rand(2, len(PATCHES), 3, dtype=dtype)
    return Cues(tokens, colours, CLASSES, PATCHES, TAU, WIDTH)


def gaussian(colours):
    return (torch.cdist(colours, colours).square() / (-2 * WIDTH**2)).exp()


def stochastic(matrix):
    return matrix / matrix.sum(-1, keepdim=True)


def whole(cues, reading):
    """The (t, t) matrix of a reading."""
    directions = F.normalize(cues.tokens, dim=-1)
    g = (directions @ directions.mT / TAU).softmax(-1)
    k = torch.eye(TOKENS, dtype=g.dtype).repeat(2, 1, 1)
    k[:, 4:, 4:] = stochastic(gaussian(cues.colours))
    if reading == "one_sided":
        return k @ g
    if reading == "two_sided":
        return stochastic(k @ g @ k.mT)
    return stochastic(gaussian(stochastic(g[:, :, 4:]) @ cues.colours))


@pytest.mark.parametrize("reading", COLOUR_READINGS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_rows_and_columns_are_those_of_the_whole_matrix(reading, dtype, atol):
    cues = inputs()
    expected = whole(cues, reading)
    found = COLOUR_READINGS[reading](
        cues._replace(tokens=cues.tokens.to(dtype), colours=cues.colours.to(dtype))
    )
    for part, block in (
        (found.class_to_class, expected[:, :3, :3]),
        (found.class_to_patch, expected[:, :3, 4:]),
        (found.patch_to_class, expected[:, 4:, :3]),
    ):
        torch.testing.assert_close(part.double(), block, atol=atol, rtol=0.0)


@pytest.mark.parametrize("reading", ["one_sided", "two_sided"])
def test_gradients_are_those_of_the_whole_matrix(reading):
    cues = inputs()
    weights = torch.randn(2, len(PATCHES), 3, dtype=torch.float64)
    tokens = cues.tokens.requires_grad_()
    (expected,) = torch.autograd.grad((whole(cues, reading)[:, 4:, :3] * weights).sum(), tokens)
    found = COLOUR_READINGS[reading](cues).patch_to_class
    (gradient,) = torch.autograd.grad((found * weights).sum(), tokens)
    torch.testing.assert_close(gradient, expected)


def test_gathered_colours_take_no_gradient():
    cues = inputs()
    cues.tokens.requires_grad_()
    assert not COLOUR_READINGS["descriptor"](cues).patch_to_class.requires_grad


def test_the_mass_of_a_colour_counts_those_like_it():
    colours = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    torch.testing.assert_close(colour_mass(colours, width=0.1), torch.tensor([[2.0, 2.0, 1.0]]))


def test_an_unknown_reading_is_refused(no_shape_checks):
    with pytest.raises(ValueError, match="one of one_sided, two_sided, descriptor, got 'both'"):
        HybridAlignment(reading="both")
