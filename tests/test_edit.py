"""An edit changes the output of attention blocks, and nothing else, while it is attached."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import hooks_on, modes_on, with_outputs_scaled
from hosts import FAMILIES, HandMade, tiny
from torch import nn

from camkit import attach, watch
from camkit.edits import ScaleOutput
from camkit.errors import CaptureError


def unchanged(tokens, output, attention, site):
    return output


class ReturnsItsMap(nn.Module):
    """Attention that returns its map beside the tokens, as research hosts do."""

    def __init__(self, dim=24, num_heads=2):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        weights = F.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2), weights


class TupleHost(HandMade):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ReturnsItsMap() for _ in range(2))
        self.maps = []

    def tokens(self, pixels):
        x = self.sequence(self.patch_embed(pixels).flatten(2).mT)
        for block in self.blocks:
            added, weights = block(self.norm(x))
            self.maps.append(weights)
            x = x + added
        return self.norm(x)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("edit", [unchanged, ScaleOutput(1.0)], ids=["returned", "times one"])
def test_an_edit_that_changes_nothing_leaves_the_logits_bit_equal(family, edit):
    model, pixels = tiny(family)
    expected = model(pixels)
    with attach(model, edit):
        assert torch.equal(model(pixels), expected)


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        (None, (0, 1, 2)),
        (1, (2,)),
        (2, (1, 2)),
        ([0], (0,)),
        ([-3, 2], (0, 2)),
        ([1, -2], (1,)),
    ],
)
def test_exactly_the_chosen_blocks_are_scaled(blocks, chosen):
    model, pixels = tiny("vit")
    expected = with_outputs_scaled(model, dict.fromkeys(chosen, 2.0))(pixels)
    with attach(model, ScaleOutput(2.0), blocks=blocks):
        torch.testing.assert_close(model(pixels), expected)


@pytest.mark.parametrize("blocks", [0, -1, 4, [], [3], [-4], [0, 7]])
def test_blocks_that_do_not_exist_are_refused(blocks):
    model, _ = tiny("vit")
    with pytest.raises(ValueError, match="must name some of the 3 attention modules, got"):
        attach(model, ScaleOutput(), blocks=blocks)
    assert hooks_on(model) == 0


def test_a_paused_edit_does_nothing_and_goes_on_when_enabled():
    model, pixels = tiny("vit")
    plain = model(pixels)
    with attach(model, ScaleOutput(3.0)) as handle:
        changed = model(pixels)
        handle.enabled = False
        assert torch.equal(model(pixels), plain)
        handle.enabled = True
        assert torch.equal(model(pixels), changed)
    assert not torch.allclose(changed, plain)


def test_remove_is_exact_and_harmless_twice(family):
    model, pixels = tiny(family)
    plain = model(pixels)
    handle = attach(model, ScaleOutput(2.0))
    model(pixels)
    handle.remove()
    handle.remove()
    assert hooks_on(model) == modes_on() == 0
    assert torch.equal(model(pixels), plain)


def test_of_a_returned_tuple_only_the_tokens_are_edited():
    model, pixels = TupleHost(), torch.randn(2, 3, 16, 24)
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.register_forward_hook(lambda *call: (call[2][0] * 2.0, *call[2][1:]))
    expected = twin(pixels)
    with attach(model, ScaleOutput(2.0)):
        torch.testing.assert_close(model(pixels), expected)
    for mine, theirs in zip(model.maps, twin.maps, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_flow_through_an_edit_as_by_hand(family):
    model, pixels = tiny(family)
    twin = with_outputs_scaled(model, {0: 2.0, 1: 2.0, 2: 2.0})
    twin(pixels).square().sum().backward()
    with attach(model, ScaleOutput(2.0)):
        model(pixels).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_gradients_reach_a_weight_inside_the_edit():
    model, pixels = tiny("vit")
    factor = torch.ones((), requires_grad=True)
    with attach(model, lambda *told: told[1] * factor, blocks=[1]):
        model(pixels).sum().backward()
    step = 1e-2
    above, below = (with_outputs_scaled(model, {1: 1.0 + s})(pixels).sum() for s in (step, -step))
    torch.testing.assert_close(factor.grad, (above - below) / (2 * step), rtol=1e-2, atol=1e-2)


def test_two_edits_act_one_after_the_other():
    model, pixels = tiny("vit")
    expected = with_outputs_scaled(model, {0: 2.0, 1: 2.0, 2: 6.0})(pixels)
    first = attach(model, ScaleOutput(2.0))
    with attach(model, ScaleOutput(3.0), blocks=1):
        torch.testing.assert_close(model(pixels), expected)
        first.remove()
        expected = with_outputs_scaled(model, {2: 3.0})(pixels)
        torch.testing.assert_close(model(pixels), expected)
    assert hooks_on(model) == modes_on() == 0


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("edit_first", [False, True])
def test_an_edit_and_a_watcher_live_together_in_either_order(edit_first, gradients):
    model, pixels = tiny("vit")
    twin = with_outputs_scaled(model, dict.fromkeys(range(3), 2.0))
    with watch(twin) as expected:
        logits = twin(pixels)
    handles = [attach(model, ScaleOutput(2.0))] if edit_first else []
    with watch(model, gradients=gradients) as seen:
        handles = handles or [attach(model, ScaleOutput(2.0))]
        torch.testing.assert_close(model(pixels), logits)
    handles[0].remove()
    torch.testing.assert_close(
        seen.capture.class_to_patch(), expected.capture.class_to_patch(), rtol=1e-4, atol=1e-6
    )
    assert hooks_on(model) == modes_on() == 0


def test_an_edit_is_told_tokens_attention_and_anatomy(family):
    model, pixels = tiny(family)
    with watch(model) as seen:
        model(pixels)
    told = []

    def listen(tokens, output, attention, site):
        told.append((tokens.shape == output.shape, attention.rows([0, -1]), site.anatomy))
        return output

    with attach(model, listen):
        model(pixels)
    assert len(told) == 3
    for (same_shape, rows, anatomy), block in zip(told, seen.capture.blocks, strict=True):
        assert same_shape
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]))
        torch.testing.assert_close(rows, block.rows([0, -1]))
        assert anatomy == seen.capture.anatomy


def raising(error):
    def hook(*_):
        raise error

    return hook


@pytest.mark.parametrize("hooked_first", [False, True], ids=["hook second", "hook first"])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt("stop")], ids=repr)
@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.qkv", "norm"])
def test_a_forward_that_breaks_leaves_nothing_and_the_next_one_is_edited(
    place, error, hooked_first
):
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    expected = with_outputs_scaled(model, {0: 2.0, 1: 2.0})(pixels)
    with watch(model):
        model(pixels)
    if hooked_first:
        hook = model.get_submodule(place).register_forward_pre_hook(raising(error))
    with attach(model, ScaleOutput(2.0)):
        if not hooked_first:
            hook = model.get_submodule(place).register_forward_pre_hook(raising(error))
        with pytest.raises(type(error), match="stop"):
            model(pixels)
        hook.remove()
        torch.testing.assert_close(model(pixels), expected)
        assert modes_on() == 0
    assert hooks_on(model) == modes_on() == 0


def test_an_edit_that_raises_leaves_nothing():
    model, pixels = tiny("vit")
    with pytest.raises(KeyError, match="mine"), attach(model, raising(KeyError("mine"))):
        model(pixels)
    assert hooks_on(model) == modes_on() == 0


def test_a_deep_copy_of_an_edited_model_is_not_edited():
    model, pixels = tiny("vit")
    plain = model(pixels)
    with attach(model, ScaleOutput(2.0)):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(pixels), plain)


def test_blocks_called_outside_their_model_are_refused_with_words():
    model, _ = tiny("vit")
    with (
        attach(model, ScaleOutput(2.0)),
        pytest.raises(CaptureError, match="attach to the module that you call"),
    ):
        model.blocks[0](torch.randn(1, 25, 48))
