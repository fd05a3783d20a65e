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


def test_an_edit_warns_where_the_scores_move_far_and_only_there():
    model, pixels = tiny("vit", num_classes=20)
    model.eval()
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


def test_in_training_and_along_a_ramp_it_waits_for_evaluation_at_full_strength():
    model, pixels = tiny("vit", num_classes=20, proj_drop_rate=0.3)
    with attach(model, Told(-40.0)) as handle:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.train()
            model(pixels)
            model.eval()
            handle.strength = 0.01
            model(pixels)
        handle.strength = 1.0
        with pytest.warns(UserWarning, match="moves the class scores"):
            model(pixels)


def test_hooks_of_the_user_see_the_edited_forward_alone():
    model, pixels = tiny("vit", num_classes=20)
    model.eval()
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, Told(-40.0)):
            model(pixels)
    hook.remove()
    assert len(seen) == 1


def test_it_warns_once_and_leaves_the_model_as_it_is():
    model, pixels = tiny("vit", num_classes=20)
    model.eval()
    before, rng = state_of(model), torch.get_rng_state()
    with attach(model, Told(-40.0)):
        with pytest.warns(UserWarning, match="moves the class scores"):
            model(pixels).sum().backward()
        model(pixels)
    with attach(model, Told(-40.0)):
        model(pixels)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not hooks_on(model)
    assert not modes_on()
    model.zero_grad(set_to_none=True)
    assert before.keys() == state_of(model).keys()


def test_a_host_that_fails_a_second_time_or_has_few_classes_is_left_alone():
    model, pixels = tiny("vit", num_classes=20)
    model.eval()
    own, calls = model.forward, []

    def only_once(given):
        calls.append(len(given))
        if len(calls) > 1:
            raise RuntimeError("one forward a day")
        return own(given)

    model.forward = only_once
    with attach(model, Told(-40.0), class_tokens=[0], other_tokens=[]):
        model(pixels)
    assert calls == [2, 2]
    model, pixels = tiny("vit", num_classes=9)
    model.eval()
    with attach(model, Told(-40.0)):  # a few numbers correlate by chance
        model(pixels)
