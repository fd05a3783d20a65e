"""Each way for colours to enter, against its t x t matrix written out."""

import pytest
import torch
import torch.nn.functional as F

from camkit.capture import Anatomy
from camkit.contrib import DescriptorAlignment, TwoSidedAlignment
from camkit.edits import BlockContext, HybridAlignment
from camkit.edits.protocol import Picture
from camkit.grid import Grid
from camkit.ops.similarity import colour_mass

TAU, WIDTH = 0.1, 0.15
PATCHES, TOKENS = 12, 16  # three class tokens and a register
ALIGNMENTS = {
    "one sided": HybridAlignment(join="mean", temperature=TAU, colour_width=WIDTH),
    "two sided": TwoSidedAlignment(join="mean", temperature=TAU, colour_width=WIDTH),
    "descriptor": DescriptorAlignment(join="mean", temperature=TAU, colour_width=WIDTH),
}


def inputs():
    """Tokens, and the colours of their patches."""
    tokens = torch.randn(2, TOKENS, 8, dtype=torch.float64)
    return tokens, torch.rand(2, PATCHES, 3, dtype=torch.float64)


def cues(kind, tokens, colours):
    """What an alignment joins with attention, for patches of one pixel each."""
    rgb = colours.mT.unflatten(-1, (3, 4))
    site = BlockContext(
        Anatomy(class_tokens=(0, 1, 2), register_tokens=(3,)),
        picture=Picture(rgb, rgb, grid=Grid(3, 4), _colours=colours),
    )
    return ALIGNMENTS[kind].cues(tokens, site)


def gaussian(colours):
    return (torch.cdist(colours, colours).square() / (-2 * WIDTH**2)).exp()


def stochastic(matrix):
    return matrix / matrix.sum(-1, keepdim=True)


def whole(kind, tokens, colours):
    """The (t, t) matrix of an alignment."""
    directions = F.normalize(tokens, dim=-1)
    g = (directions @ directions.mT / TAU).softmax(-1)
    k = torch.eye(TOKENS, dtype=g.dtype).repeat(2, 1, 1)
    k[:, 4:, 4:] = stochastic(gaussian(colours))
    if kind == "one sided":
        return k @ g
    if kind == "two sided":
        return stochastic(k @ g @ k.mT)
    return stochastic(gaussian(stochastic(g[:, :, 4:]) @ colours))


@pytest.mark.parametrize("kind", ALIGNMENTS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_rows_and_columns_are_those_of_the_whole_matrix(kind, dtype, atol):
    tokens, colours = inputs()
    expected = whole(kind, tokens, colours)
    found = cues(kind, tokens.to(dtype), colours.to(dtype))
    for part, block in (
        (found.class_to_class, expected[:, :3, :3]),
        (found.class_to_patch, expected[:, :3, 4:]),
        (found.patch_to_class, expected[:, 4:, :3]),
    ):
        torch.testing.assert_close(part.double(), block, atol=atol, rtol=0.0)


@pytest.mark.parametrize("kind", ["one sided", "two sided"])
def test_gradients_are_those_of_the_whole_matrix(kind):
    tokens, colours = inputs()
    weights = torch.randn(2, PATCHES, 3, dtype=torch.float64)
    tokens = tokens.requires_grad_()
    matrix = whole(kind, tokens, colours)
    (expected,) = torch.autograd.grad((matrix[:, 4:, :3] * weights).sum(), tokens)
    (gradient,) = torch.autograd.grad(
        (cues(kind, tokens, colours).patch_to_class * weights).sum(), tokens
    )
    torch.testing.assert_close(gradient, expected)


def test_gathered_colours_take_no_gradient():
    tokens, colours = inputs()
    found = cues("descriptor", tokens.requires_grad_(), colours)
    assert not found.patch_to_class.requires_grad


@pytest.mark.parametrize("alignment", [TwoSidedAlignment, DescriptorAlignment])
def test_without_colours_there_is_one_alignment(alignment):
    tokens, _ = inputs()
    site = BlockContext(Anatomy(class_tokens=(0, 1, 2), register_tokens=(3,)))
    expected = HybridAlignment(join="mean", colour_width=None).cues(tokens, site)
    found = alignment(colour_width=None).cues(tokens, site)
    assert torch.equal(found.patch_to_class, expected.patch_to_class)
    assert torch.equal(found.class_to_patch, expected.class_to_patch)


def test_the_mass_of_a_colour_counts_those_like_it():
    colours = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    torch.testing.assert_close(colour_mass(colours, width=0.1), torch.tensor([[2.0, 2.0, 1.0]]))
