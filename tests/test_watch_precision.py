"""Watching in other precisions, modes and layouts, and what a capture costs to keep."""

import gc

import pytest
import torch
from hosts import HandMade, tiny
from torch import nn

from camkit.capture import find_attention, watch
from camkit.seeds import RelevanceSeed

CLASSES = torch.tensor([[1], [2]])
PLACES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_outputs_and_rows_hold_under(place):
    model, pixels = tiny("vit")
    with place():
        expected = model(pixels)
        with watch(model) as seen:
            assert torch.equal(model(pixels), expected)
    with torch.no_grad(), watch(model) as plain:
        model(pixels)
    expected = plain.capture.class_to_patch()
    torch.testing.assert_close(
        seen.capture.class_to_patch().float(), expected, rtol=0.1, atol=2e-3, check_dtype=False
    )


@pytest.mark.parametrize("family", ["vit", "qk norm", "explicit softmax", "deit distilled"])
def test_autocast_gradients_and_propagation_are_close_to_full_precision(family):
    model, pixels = tiny(family)
    maps = []
    for enabled in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            watch(model, gradients=True) as seen,
        ):
            model(pixels)
        cam = RelevanceSeed()(seen.capture, CLASSES)
        values = seen.capture.grid.flatten(cam)
        maps.append(
            seen.capture.blocks[-1].propagate(values, seen.capture.patches).float().detach()
        )
    torch.testing.assert_close(maps[1], maps[0], rtol=0.2, atol=0.05 * float(maps[0].max()))


@pytest.mark.parametrize("family", ["vit", "explicit softmax"])
def test_half_precision_weights_are_watched(family):
    model, pixels = tiny(family)
    model, pixels = model.bfloat16(), pixels.bfloat16()
    expected = model(pixels)
    with watch(model, gradients=True) as seen:
        assert torch.equal(model(pixels), expected)
    cam = RelevanceSeed()(seen.capture, CLASSES)
    assert cam.isfinite().all()
    assert seen.capture.class_to_patch().sum() < 2


def test_channels_last_gives_the_same_rows():
    model, pixels = tiny("vit")
    rows = []
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad(), watch(model) as seen:
            model(pixels.to(memory_format=layout))
        rows.append(seen.capture.class_to_patch())
    torch.testing.assert_close(*rows)


def reachable_bytes(root):
    """Bytes of all tensor storages reachable from an object, modules left out."""
    found, todo, known = {}, [root], set()
    while todo:
        item = todo.pop()
        if id(item) in known or isinstance(item, nn.Module | type):
            continue
        known.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, tuple | list | dict) or hasattr(item, "__dataclass_fields__"):
            todo.extend(gc.get_referents(item))
    return sum(found.values())


def test_no_map_is_kept_of_a_fused_host():
    model, pixels = HandMade(blocks=12, dim=8), torch.randn(1, 3, 136, 136)  # 290 tokens
    with torch.no_grad(), watch(model) as seen:
        model(pixels)
    capture = seen.capture
    assert len(capture.blocks) == len(find_attention(model)) == 12
    one_map = 2 * 290 * 290 * 4
    assert reachable_bytes(capture) < one_map
    capture.blocks[0].head_mean()
    assert reachable_bytes(capture) < one_map
