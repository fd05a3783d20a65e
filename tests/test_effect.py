"""A warning for edits that move the class scores of a host far."""

import warnings

import pytest
import torch
from helpers import hooks_on, modes_on, state_of
from hosts import tiny

from camkit import attach
from camkit.edits import ScaleOutput
from camkit.edits.effect import FAR


class Told(ScaleOutput):
    checks_scores = True


def correlation(one, other):
    """Pearson's, image by image, averaged."""
    pairs = zip(one, other, strict=True)
    return sum(torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs) / len(one)


def scores_under(model, pixels, factor):
    with attach(model, ScaleOutput(factor)), torch.no_grad():
        return model(pixels)


@pytest.mark.parametrize("training", [False, True])
def test_an_edit_warns_where_the_scores_move_far_and_only_there(training):
    model, pixels = tiny("vit", num_classes=20)
    model.train(training)
    plain = model(pixels).detach()
    near, far = (scores_under(model, pixels, factor) for factor in (1.02, -40.0))
    assert correlation(plain, near) > 0.9 > FAR > correlation(plain, far)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, Told(1.02)):
            model(pixels)
    with attach(model, Told(-40.0)):
        told = f"correlate by {correlation(plain, far):.2f}"
        with pytest.warns(UserWarning, match=rf"Told in 3 blocks .* far: they {told}"):
            model(pixels)


def test_it_warns_once_and_leaves_the_model_as_it_is():
    model, pixels = tiny("vit", num_classes=20)
    model.train()
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(model.training))
    before, rng = state_of(model), torch.get_rng_state()
    with attach(model, Told(-40.0)):
        with pytest.warns(UserWarning, match="moves the class scores"):
            model(pixels).sum().backward()
        model(pixels)
    with attach(model, Told(-40.0)):
        model(pixels)
    hook.remove()
    assert calls.count(False) == 1  # one forward in evaluation mode
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert not hooks_on(model)
    assert not modes_on()
    model.zero_grad(set_to_none=True)
    after = state_of(model)
    assert before.keys() == after.keys()


def test_a_host_that_fails_without_the_edit_or_returns_no_scores_is_left_alone():
    model, pixels = tiny("vit", num_classes=20)
    own = model.forward

    def only_in_training(given):
        if not model.training:
            raise RuntimeError("evaluation is not implemented")
        return own(given)

    model.forward = only_in_training
    model.train()
    with attach(model, Told(-40.0), class_tokens=[0], other_tokens=[]):
        model(pixels)
    model, pixels = tiny("vit", num_classes=9)
    with attach(model, Told(-40.0)):  # a few numbers correlate by chance
        model(pixels)


def test_a_new_classifier_of_zeros_tells_nothing():
    model, pixels = tiny("vit", num_classes=20)
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, Told(-40.0)):
            model(pixels)
