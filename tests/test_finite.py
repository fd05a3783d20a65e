"""NaN and infinity are refused where they enter, by the same words everywhere."""

import math
from inspect import isfunction

import pytest
import torch

import camkit
from camkit.ops.finite import check_finite, finite_range


def test_the_range_of_values():
    assert finite_range("cam", torch.tensor([3.0, -1.0, 2.0])) == (-1.0, 3.0)
    assert finite_range("cam", torch.zeros(2, 0, 3, 3)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_place_is_named(value, dtype):
    cam = torch.rand(2, 3, 4, 4).to(dtype)
    cam[1, 2, 3, 3] = cam[1, 0, 0, 1] = value
    kind = "NaN" if math.isnan(value) else "infinity"
    words = rf"`cam` must be finite, got {kind} in image 1, map 0 \(2 of 96 values\)"
    with pytest.raises(ValueError, match=words):
        check_finite("cam", cam)
    with pytest.raises(ValueError, match=r"got \w+ in image 1 \(2 of 96"):
        check_finite("cam", cam, ("image",))
    with pytest.raises(ValueError, match=r"got \w+ \(2 of 96"):
        check_finite("cam", cam, ())


def test_the_largest_finite_values_pass():
    largest = torch.finfo(torch.float16).max
    assert finite_range("x", torch.tensor([largest, -largest]).half()) == (-largest, largest)


@pytest.mark.usefixtures("no_shape_checks")
def test_a_compiled_graph_has_no_break():
    def step(cam):
        check_finite("cam", cam)
        return cam * 2

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    cam = torch.rand(1, 1, 2, 2, requires_grad=True)
    compiled(cam).sum().backward()
    assert torch.equal(cam.grad, torch.full_like(cam, 2.0))


LABELS = torch.tensor([[True, False, True]] * 2)
LOSSES = {
    "background_suppression_loss": {
        "maps": torch.rand(2, 4, 4),
        "whole": torch.rand(2, 3),
        "outside": torch.rand(2, 3),
        "inside": torch.rand(2, 3),
        "classes": torch.tensor([0, 1]),
    },
    "class_contrast_loss": {
        "student": torch.rand(2, 3, 4),
        "teacher": torch.rand(2, 2, 4),
        "positive": LABELS,
    },
    "patch_contrast_loss": {
        "tokens": torch.rand(2, 5, 4),
        "labels": torch.tensor([[0, 1, 2, 1, 255]] * 2),
    },
    "patch_labels": {"cam": torch.rand(2, 3, 4, 4), "labels": LABELS},
    "patch_text_loss": {
        "patches": torch.rand(2, 5, 4),
        "texts": torch.rand(3, 4),
        "background": torch.rand(2, 4),
        "labels": torch.tensor([[0, 1, 2, 1, 255]] * 2),
    },
    "text_alignment_loss": {
        "image": torch.rand(2, 4),
        "texts": torch.rand(3, 4),
        "background": torch.rand(2, 4),
        "labels": LABELS,
    },
    "uncertain_crops": {
        "images": torch.rand(2, 3, 8, 8),
        "cam": torch.rand(2, 3, 8, 8),
        "labels": LABELS,
        "size": 4,
    },
}
FLOATS = [
    (loss, name)
    for loss, arguments in LOSSES.items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "images"
]


def test_all_losses_are_listed():
    public = {name for name, value in vars(camkit.losses).items() if isfunction(value)}
    assert set(LOSSES) == public


@pytest.mark.parametrize(("loss", "name"), FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_refuse_what_is_not_finite(loss, name, value):
    function, arguments = getattr(camkit.losses, loss), dict(LOSSES[loss])
    function(**arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][1, -1] = value
    with pytest.raises(ValueError, match=rf"`{name}` must be finite, got \w+ in (image|text) 1"):
        function(**arguments)
