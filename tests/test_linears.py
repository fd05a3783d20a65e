"""Linear layers of one call of a module, kept for a second call."""

import pytest
import torch
import torch.nn.functional as F
from hosts import tiny
from torch import nn

from camkit import attach
from camkit.capture.linears import LinearCalls
from camkit.edits import StaticCalibration


@pytest.fixture
def call():
    tokens, layer = torch.randn(2, 5, 4), nn.Linear(4, 6)
    args = (tokens, layer.weight, layer.bias)
    calls = LinearCalls()
    with torch.no_grad():
        output = F.linear(*args)
        calls.add(args, {}, output)
    return calls, args, output


@torch.no_grad()
def test_the_same_tensors_give_what_was_kept(call):
    calls, args, output = call
    assert calls.output(args, {}) is output
    tokens, weight, bias = args
    assert calls.output((tokens.view(2, 5, 4), weight), {"bias": bias}) is output


@torch.no_grad()
@pytest.mark.parametrize("changed", range(4))
def test_what_was_written_to_is_computed_again(call, changed):
    calls, args, output = call
    (*args, output)[changed].add_(1.0)
    assert calls.output(args, {}) is None


@torch.no_grad()
def test_other_tensors_of_the_same_numbers_are_computed_again(call):
    calls, (tokens, weight, bias), _ = call
    assert calls.output((tokens.clone(), weight, bias), {}) is None
    assert calls.output((tokens, weight), {}) is None
    assert calls.output((tokens.transpose(0, 1), weight, bias), {}) is None


def test_a_call_with_a_graph_is_another_one(call):
    calls, args, _ = call
    assert calls.output(args, {}) is None


def test_tensors_made_in_inference_mode_are_not_kept():
    with torch.inference_mode():
        args = torch.randn(2, 4), torch.randn(6, 4)
    calls = LinearCalls()
    calls.add(args, {}, torch.zeros(2, 6))
    assert calls.output(args, {}) is None


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("family", ["average pooled", "qk norm"])
def test_a_second_stream_has_the_bits_and_gradients_it_has_without_them(family, graph, monkeypatch):
    model, pixels = tiny(family)

    def run():
        model.zero_grad()
        with attach(model, StaticCalibration(), blocks=2), torch.set_grad_enabled(graph):
            scores = model(pixels)
        if not graph:
            return [scores]
        scores.square().sum().backward()
        return [scores, *(p.grad for p in model.parameters() if p.grad is not None)]

    kept = run()
    monkeypatch.setattr(LinearCalls, "output", lambda *_: None)
    for one, other in zip(kept, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept[0], run()[0])
