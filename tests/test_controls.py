"""What a real edit or refiner must beat: blur, scaled outputs, one more hop, random gates."""

import copy
import math
from dataclasses import replace

import cv2
import oracles
import pytest
import torch
from hosts import HandMade, OneTokenPerClass, tiny
from skimage.filters import gaussian

from camkit import DOEI, attach
from camkit.capture import Anatomy, Capture
from camkit.capture.attention import ExplicitAttention, FusedAttention
from camkit.edits import (
    BlockContext,
    KeepToSelf,
    MeanInjection,
    OneMoreHop,
    RandomGates,
    ScaleOutput,
    SharpenLogits,
)
from camkit.edits.protocol import Picture
from camkit.errors import UnsupportedModelError
from camkit.grid import Grid
from camkit.refiners import Blur

NOTHING = Capture((), (), Anatomy(), Grid(1, 1))
WIDTHS = [(0.3, 1), (0.7, 2), (1.0, 3), (1.5, 4), (2.3, 7)]  # three deviations, rounded


@pytest.mark.parametrize("grid", [(14, 21), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(("width", "reach"), WIDTHS)
def test_blur_is_that_of_opencv(width, reach, grid):
    cam = torch.rand(2, 3, *grid, dtype=torch.float64)
    found, size = Blur(width)(cam, NOTHING), 2 * reach + 1
    for maps, blurred in zip(cam.flatten(0, 1), found.flatten(0, 1), strict=True):
        expected = cv2.GaussianBlur(
            maps.numpy(), (size, size), width, borderType=cv2.BORDER_REPLICATE
        )
        torch.testing.assert_close(blurred, torch.from_numpy(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [(14, 21), (2, 3)], ids=str)
@pytest.mark.parametrize(("width", "reach"), WIDTHS)
def test_blur_is_that_of_scikit_image(width, reach, grid):
    cam = torch.rand(1, 1, *grid, dtype=torch.float64)
    expected = gaussian(
        cam[0, 0].numpy(), width, mode="nearest", truncate=reach / width, preserve_range=True
    )
    torch.testing.assert_close(Blur(width)(cam, NOTHING)[0, 0], torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [0.5, 1.0, 4.0])
def test_blur_keeps_a_constant_map(width, dtype):
    cam = torch.full((1, 2, 5, 7), 0.5, dtype=dtype)
    torch.testing.assert_close(Blur(width)(cam, NOTHING), cam, atol=5e-3, rtol=0)


def test_a_narrow_blur_changes_next_to_nothing():
    cam = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(Blur(0.1)(cam, NOTHING), cam)


def test_a_point_far_from_the_edge_is_spread_and_not_lost():
    cam = torch.zeros(1, 1, 15, 15)
    cam[..., 7, 7] = 1.0
    found = Blur(1.0)(cam, NOTHING)[0, 0]
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))
    torch.testing.assert_close(found[7, 8] / found[7, 7], torch.tensor(math.exp(-0.5)))
    assert found[7, 7] == found.max()


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_a_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ValueError, match=f"`width` must be positive.*, got {width}"):
        Blur(width)


IMAGES, HEADS, GRID, DIM = 3, 2, Grid(4, 5), 6
SPECIAL = Anatomy(class_tokens=(0,), register_tokens=(1, 2), other_tokens=(-1,))
PATCHES = range(3, 3 + GRID.size)


def block(*, index=1, images=IMAGES, dtype=torch.float64):
    """A block's tokens, output and attention, and the site it is edited at."""
    tokens = GRID.size + 4
    x, o = torch.randn(2, images, tokens, DIM, dtype=dtype).unbind(0)
    q, k = torch.randn(2, images, HEADS, tokens, 4, dtype=dtype).unbind(0)
    picture = Picture(pixels=torch.rand(images, 3, 32, 40), grid=GRID)
    return x, o, FusedAttention(q, k, 0.5), BlockContext(SPECIAL, index, 4, picture)


def strengths(output, edited):
    """Length of the change over that of the output, token by token."""
    return (edited - output).norm(dim=-1) / output.norm(dim=-1)


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5, 0.0])
def test_one_more_hop_is_the_output_and_the_whole_map_times_it(strength):
    x, o, attention, site = block()
    whole = oracles.full_attention(attention.q, attention.k, 0.5).mean(1)
    expected = o + strength * torch.einsum("bij,bjd->bid", whole, o)
    found = OneMoreHop(strength=strength)(x, o, attention, site)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_one_more_hop_worked_by_hand():
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]])
    output = torch.tensor([[[4.0], [8.0]]])
    found = OneMoreHop()(output, output, ExplicitAttention(weights), BlockContext(Anatomy()))
    torch.testing.assert_close(found, torch.tensor([[[10.0], [14.0]]]))


@pytest.mark.parametrize("family", ["vit", "explicit softmax", "dinov2 registers"])
def test_an_attached_hop_does_what_plain_hooks_do(family):
    model, pixels = tiny(family)
    twin, kept = copy.deepcopy(model), {}
    for layer in twin.blocks:
        layer.attn.fused_attn = False
        layer.attn.attn_drop.register_forward_hook(lambda *call: kept.update(map=call[2]))
        layer.attn.register_forward_hook(lambda *call: call[2] + kept["map"].mean(1) @ call[2])
    expected = twin(pixels)
    with attach(model, OneMoreHop()):
        torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 1.0, 2.5])
def test_a_scaled_output_is_a_multiple_for_every_token(factor):
    x, o, attention, site = block()
    expected = torch.stack([token * factor for token in o.unbind(1)], 1)
    assert torch.equal(ScaleOutput(factor)(x, o, attention, site), expected)


def test_an_injected_mean_worked_by_hand():
    output = torch.tensor([[[1.0, 0.0], [2.0, 4.0], [4.0, 8.0]]])  # a class token, two patches
    site = BlockContext(Anatomy(class_tokens=(0,)))
    found = MeanInjection(0.5)(output, output, ExplicitAttention(torch.eye(3)[None, None]), site)
    expected = torch.tensor([[[1.0, 0.0], [3.5, 7.0], [5.5, 11.0]]])
    torch.testing.assert_close(found, expected)


def test_an_injected_mean_is_what_flat_confidences_rebuild():
    x, o, _, _ = block()
    site = BlockContext(Anatomy(class_tokens=(0, 1)))
    flat = ExplicitAttention(torch.full((IMAGES, HEADS, 24, 24), 1 / 24, dtype=torch.float64))
    rebuilt = DOEI.as_drawn(alignment=None, class_reading="none", strength=0.7)
    found = MeanInjection(0.7)(x, o, flat, site)
    torch.testing.assert_close(found, rebuilt(x, o, flat, site))


@pytest.mark.parametrize("weight", [4.0, -1.0])
def test_keeping_to_oneself_is_a_weight_on_the_diagonal(weight):
    x, _, attention, site = block()
    bias = KeepToSelf(weight).pair_bias(x, attention, site)
    found = oracles.full_attention(attention.q, attention.k, 0.5, bias.rows())
    logits = attention.q @ attention.k.mT * 0.5
    expected = (logits + weight * torch.eye(logits.shape[-1])).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("factor", [1.5, 0.0])
def test_sharper_logits_are_multiples_of_each_heads_own(factor):
    x, _, attention, site = block()
    bias = SharpenLogits(factor).pair_bias(x, attention, site)
    found = oracles.full_attention(attention.q, attention.k, 0.5, bias.rows())
    expected = (factor * 0.5 * attention.q @ attention.k.mT).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def keeping(weights):
    """The map with e^2 times as much on the diagonal, rows scaled back."""
    raised = weights * (1 + math.expm1(2.0) * torch.eye(weights.shape[-1]))
    return raised / raised.sum(-1, keepdim=True)


def sharpened(weights):
    """The map to the power of 1.5, rows scaled back."""
    return weights**1.5 / (weights**1.5).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("family", "edit", "changed"),
    [
        ("vit", KeepToSelf(2.0), keeping),
        ("explicit softmax", KeepToSelf(2.0), keeping),
        ("vit", SharpenLogits(1.5), sharpened),
    ],
)
def test_attached_controls_of_the_logits_do_what_plain_hooks_do(family, edit, changed):
    model, pixels = tiny(family, depth=4)
    twin = copy.deepcopy(model)
    for layer in twin.blocks:
        layer.attn.fused_attn = False
    for layer in twin.blocks[-3:]:
        layer.attn.attn_drop.register_forward_hook(lambda *call: changed(call[2]))
    expected = twin(pixels)
    with attach(model, edit):
        torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=1e-4)


def test_logits_that_a_host_never_shows_cannot_be_multiplied():
    x, _, _, site = block()
    written = ExplicitAttention(torch.full((IMAGES, HEADS, 24, 24), 1 / 24))
    with pytest.raises(UnsupportedModelError, match="writes its attention map out"):
        SharpenLogits().pair_bias(x, written, site)


def test_queries_that_are_no_keys_keep_nothing_to_themselves():
    x, _, attention, site = block()
    pooling = FusedAttention(attention.q[:, :, :1], attention.k, 0.5)
    with pytest.raises(UnsupportedModelError, match="1 queries attend to 24 keys"):
        KeepToSelf().pair_bias(x, pooling, site)


@pytest.mark.parametrize(
    "edit", [KeepToSelf(0.0), SharpenLogits(1.0)], ids=lambda edit: type(edit).__name__
)
def test_a_control_of_the_logits_without_strength_adds_nothing(edit):
    x, _, attention, site = block()
    assert edit.pair_bias(x, attention, site) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KeepToSelf(math.inf), "`weight` must be finite, got inf"),
        (lambda: SharpenLogits(-1.0), "`factor` must be at least 0, got -1.0"),
        (lambda: SharpenLogits(math.nan), "`factor` must be at least 0, got nan"),
        (lambda: RandomGates(DOEI()), "must change the outputs of blocks"),
        (lambda: RandomGates(KeepToSelf()), "must change the outputs of blocks"),
    ],
)
def test_wrong_settings_of_controls_are_refused(no_shape_checks, make, words):
    with pytest.raises(ValueError, match=words):
        make()


RAMPED = {
    "scale": (ScaleOutput(3.0), ScaleOutput(1.5)),
    "hop": (OneMoreHop(2.0), OneMoreHop(0.5)),
    "mean": (MeanInjection(2.0), MeanInjection(0.5)),
    "gates": (RandomGates(OneMoreHop(2.0)), RandomGates(OneMoreHop(0.5))),
    "doei": (DOEI.as_drawn(strength=2.0), DOEI.as_drawn(strength=0.5)),
    "keep": (KeepToSelf(4.0), KeepToSelf(1.0)),
    "sharpen": (SharpenLogits(3.0), SharpenLogits(1.5)),
}


@pytest.mark.parametrize("name", RAMPED)
def test_a_ramp_multiplies_the_strength_of_an_edit(name):
    x, o, attention, site = block()
    ramped, fixed = RAMPED[name]
    ramp = replace(site, strength=0.25)
    if callable(fixed):
        found, expected = ramped(x, o, attention, ramp), fixed(x, o, attention, site)
    else:
        found = ramped.pair_bias(x, attention, ramp).rows()
        expected = fixed.pair_bias(x, attention, site).rows()
    torch.testing.assert_close(found, expected)


def token_added(tokens, output, attention, site):
    return output + tokens.abs()


BORROWED = [OneMoreHop(), DOEI.as_drawn(), ScaleOutput(1.7), token_added]
NAMES = ["hop", "doei", "scaled", "plain function"]


@pytest.mark.parametrize("edit", BORROWED, ids=NAMES)
def test_gates_are_as_strong_as_the_edit_they_borrow_from_in_another_order(edit):
    x, o, attention, site = block()
    expected = strengths(o, edit(x, o, attention, site))
    found = strengths(o, RandomGates(edit)(x, o, attention, site))
    patches = list(PATCHES)
    torch.testing.assert_close(found[:, patches].sort().values, expected[:, patches].sort().values)
    special = [0, 1, 2, -1]
    torch.testing.assert_close(found[:, special], expected[:, special])


@pytest.mark.parametrize("edit", BORROWED, ids=NAMES)
def test_gates_lengthen_an_output_and_do_not_turn_it(edit):
    x, o, attention, site = block()
    found = RandomGates(edit)(x, o, attention, site)
    turned = torch.nn.functional.cosine_similarity(found, o, dim=-1)
    torch.testing.assert_close(turned, torch.ones_like(turned))
    assert (found.norm(dim=-1) >= o.norm(dim=-1) - 1e-12).all()


def test_gates_of_one_seed_are_always_the_same():
    given = block()
    expected = RandomGates(OneMoreHop(), rng_seed=5)(*given)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(RandomGates(OneMoreHop(), rng_seed=5)(*given), expected)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are drawn


def test_gates_are_drawn_anew_where_tokens_have_changed():
    x, o, attention, site = block()
    first = strengths(o, RandomGates(OneMoreHop())(x, o, attention, site))
    stepped = strengths(o, RandomGates(OneMoreHop())(x + 1e-6, o, attention, site))
    torch.testing.assert_close(first.sort(1).values, stepped.sort(1).values)
    for one, other in zip(first, stepped, strict=True):
        assert not torch.allclose(one, other)


@pytest.mark.parametrize("other", ["seed", "block", "image"])
def test_gates_stand_in_another_order_in_another(other):
    x, o, attention, site = block()
    x, o = x[:1].expand_as(x), o[:1].expand_as(o)  # the same image three times
    q, k = (heads[:1].expand(IMAGES, -1, -1, -1) for heads in (attention.q, attention.k))
    attention = FusedAttention(q, k, 0.5)

    def gates(rng_seed=0, index=1):
        place = BlockContext(site.anatomy, index, site.count, site.picture)
        edited = RandomGates(OneMoreHop(), rng_seed=rng_seed)(x, o, attention, place)
        return strengths(o, edited)[:, list(PATCHES)]

    first = gates()[0]
    second = {"seed": gates(rng_seed=1)[0], "block": gates(index=2)[0], "image": gates()[1]}[other]
    torch.testing.assert_close(first.sort().values, second.sort().values)
    assert not torch.allclose(first, second)


def test_gates_that_borrow_from_an_edit_without_effect_change_nothing():
    x, o, attention, site = block()
    assert torch.equal(RandomGates(ScaleOutput(1.0))(x, o, attention, site), o)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gates_of_an_output_with_a_token_of_zeros_are_its_own_or_those_of_others(dtype):
    x, o, attention, site = block(dtype=torch.float32)
    x, o = x.to(dtype), o.to(dtype)
    o[:, 5] = 0.0
    attention = FusedAttention(attention.q.to(dtype), attention.k.to(dtype), 0.5)
    found = RandomGates(ScaleOutput(1.5))(x, o, attention, site).double()
    off = torch.stack([(found - factor * o.double()).norm(dim=-1) for factor in (1.0, 1.5)])
    near = off.amin(0) / o.double().norm(dim=-1).clamp_min(1)
    torch.testing.assert_close(near, torch.zeros_like(near), atol=2e-2, rtol=0)


def test_attached_gates_are_as_strong_in_every_block():
    model, pixels, found = OneTokenPerClass(class_tokens=5), torch.randn(2, 3, 16, 24), []

    def compared(tokens, output, attention, site):
        hop = OneMoreHop()(tokens, output, attention, site)
        gated = RandomGates(OneMoreHop())(tokens, output, attention, site)
        found.append((strengths(output, hop), strengths(output, gated)))
        return gated

    with torch.no_grad(), attach(model, compared):
        model(pixels)
    assert len(found) == 2
    for hop, gated in found:
        torch.testing.assert_close(gated[:, :5], hop[:, :5])
        torch.testing.assert_close(gated[:, 5:].sort().values, hop[:, 5:].sort().values)


@pytest.mark.parametrize("edit", [OneMoreHop(), RandomGates(DOEI.as_drawn())], ids=["hop", "gates"])
def test_a_control_comes_off_without_a_trace(edit):
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    before = model(pixels)
    with attach(model, edit):
        during = model(pixels)
    assert not torch.allclose(during, before)
    assert torch.equal(model(pixels), before)
