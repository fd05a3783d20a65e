"""A watched model leaves our hands as it came."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import state_of
from hosts import HandMade

from camkit import attach
from camkit.capture import watch
from camkit.edits import ScaleOutput
from camkit.seeds import RelevanceSeed

CLASSES = torch.tensor([[1], [2]])


class Broken(HandMade):
    """Fails behind its blocks."""

    def tokens(self, pixels):
        super().tokens(pixels)
        raise RuntimeError("the host broke")


class FrozenInside(HandMade):
    """Runs its backbone without gradients and its head with."""

    def tokens(self, pixels):
        with torch.no_grad():
            return super().tokens(pixels)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("host", [HandMade, FrozenInside])
def test_the_model_and_the_grad_mode_are_as_before(host, gradients, training, frozen):
    model, pixels = host().train(training), torch.randn(2, 3, 16, 24)
    model(pixels).sum().backward()
    model.requires_grad_(not frozen)
    before = state_of(model)
    with watch(model, gradients=gradients) as seen:
        model(pixels)
        assert torch.is_grad_enabled()
    if gradients:
        RelevanceSeed()(seen.capture, CLASSES)
    assert state_of(model) == before


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_a_host_that_raises_leaves_no_trace(grad_enabled):
    model, pixels = Broken().requires_grad_(False), torch.randn(2, 3, 16, 24)
    with torch.set_grad_enabled(grad_enabled):
        before = state_of(model)
        with pytest.raises(RuntimeError, match="the host broke"), watch(model, gradients=True):
            model(pixels)
        assert state_of(model) == before


def raising(error):
    def hook(*_):
        raise error

    return hook


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt("stop")], ids=repr)
@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.qkv", "norm"])
def test_an_interrupt_anywhere_leaves_no_trace(place, error):
    model, pixels = HandMade().requires_grad_(False), torch.randn(2, 3, 16, 24)
    with watch(model):
        model(pixels)
    model.get_submodule(place).register_forward_pre_hook(raising(error))
    before = state_of(model)
    with pytest.raises(type(error), match="stop"), watch(model, gradients=True), torch.no_grad():
        model(pixels)
    assert state_of(model) == before


def test_an_error_in_the_body_is_not_swallowed_and_leaves_no_trace():
    model = HandMade()
    before = state_of(model)
    with pytest.raises(IndexError, match="mine"), watch(model):
        raise IndexError("mine")
    assert state_of(model) == before


def test_training_dropout_draws_the_same_numbers():
    model, pixels = HandMade(dropout=0.5).train(), torch.randn(2, 3, 16, 24)
    torch.manual_seed(3)
    expected, state = model(pixels), torch.get_rng_state()
    torch.manual_seed(3)
    with watch(model):
        found = model(pixels)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_running_statistics_move_once_per_forward():
    model, pixels = HandMade(batch_norm=True).train(), torch.randn(2, 3, 16, 24)
    twin = copy.deepcopy(model)
    twin(pixels)
    with watch(model):
        model(pixels)
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_keys_of_the_state_dict_stay_while_watched():
    model = HandMade()
    before = list(model.state_dict())
    with watch(model):
        assert list(model.state_dict()) == before


@pytest.mark.parametrize("first_to_close", [0, 1])
@pytest.mark.parametrize("gradients", [False, True])
def test_two_watchers_see_what_one_sees_in_whatever_order_they_close(first_to_close, gradients):
    model, pixels = HandMade(blocks=3).requires_grad_(False), torch.randn(2, 3, 16, 24)
    before = state_of(model)
    watchers = [watch(model, gradients=gradients), watch(model, blocks=1, gradients=gradients)]
    for watcher in watchers:
        watcher.__enter__()
    model(pixels)
    watchers[first_to_close].__exit__(None, None, None)
    model(pixels)
    watchers[1 - first_to_close].__exit__(None, None, None)
    whole, last = (watcher.capture for watcher in watchers)
    assert (len(whole.blocks), len(last.blocks)) == (3, 1)
    torch.testing.assert_close(whole.blocks[-1].rows([0]), last.blocks[0].rows([0]))
    if gradients:
        for capture in (whole, last):
            RelevanceSeed()(capture, CLASSES)
    assert state_of(model) == before


def test_gradients_under_inference_mode_are_those_under_no_grad():
    model, pixels = HandMade(), torch.randn(2, 3, 16, 16)
    before, maps = state_of(model), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            with watch(model, gradients=True) as seen:
                model(pixels)
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
            maps.append(RelevanceSeed()(seen.capture, CLASSES))
        assert state_of(model) == before
    assert maps[0].any()
    assert torch.equal(*maps)


@pytest.mark.parametrize("edited", [False, True])
def test_a_capture_is_freed_when_it_is_let_go_and_not_when_cycles_are_collected(edited):
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    gc.collect()
    gc.disable()
    try:
        handle = attach(model, ScaleOutput(2.0)) if edited else None
        with watch(model, gradients=True) as seen:
            model(pixels)
        if handle is not None:
            handle.remove()
        capture = seen.capture
        alive = [weakref.ref(block.output) for block in capture.blocks]
        assert all(ref() is not None for ref in alive)
        del capture, seen
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["watch", "edit"])
def test_a_model_is_freed_with_its_last_name_after_it_was_borrowed(kind):
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    gc.collect()
    gc.disable()
    try:
        with watch(model) if kind == "watch" else attach(model, ScaleOutput(2.0)):
            model(pixels)
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()
