"""Every host family: what is captured is what the host computes, and nothing is left behind."""

import pytest
import torch
from zoo import ZOO

from camkit.capture import watch


def opened(name):
    entry = ZOO[name]
    model = entry.build().eval()
    pixels = torch.randn(2, 3, *entry.shape)
    return entry, model, lambda host: entry.call(host, pixels)


def plain(output):
    """The tensors of an output, whatever it comes in."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [v for v in output.to_tuple() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", ZOO)
def test_captured_maps_are_those_of_the_host(name):
    entry, model, call = opened(name)
    with torch.no_grad():
        expected = entry.maps(model, call)
        with watch(model) as seen:
            call(model)
    blocks = seen.capture.blocks
    assert len(blocks) == 2
    for block, maps in zip(blocks, expected[:2], strict=True):
        torch.testing.assert_close(block.head_mean(), maps.mean(1), atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(block.rows([0, 3]), maps[:, :, [0, 3]], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_token_roles_and_grid_are_measured(name):
    entry, model, call = opened(name)
    with torch.no_grad(), watch(model) as seen:
        call(model)
    capture = seen.capture
    anatomy = capture.anatomy
    found = (anatomy.class_tokens, anatomy.distillation_tokens, anatomy.register_tokens)
    assert (found, anatomy.other_tokens) == (entry.roles, ())
    side = 14 if entry.shape[1] == 84 else 16
    assert (capture.grid.rows * side, capture.grid.cols * side) == entry.shape


@pytest.mark.parametrize("name", ZOO)
def test_watching_moves_no_output_and_leaves_no_hook(name):
    _, model, call = opened(name)
    with torch.no_grad():
        before = plain(call(model))
        with watch(model):
            during = plain(call(model))
        after = plain(call(model))
    for one, two, three in zip(before, during, after, strict=True):
        torch.testing.assert_close(two, one, atol=5e-6, rtol=1e-5)
        assert torch.equal(three, one)
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    assert not any(getattr(module, kind) for module in model.modules() for kind in kinds)
