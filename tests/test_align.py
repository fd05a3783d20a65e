"""Maps carried along attention, embeddings and colours, and maps amplified, against whole maps."""

import math

import oracles
import pytest
import torch
import torchvision
from hosts import FAMILIES, ClassTokenLast, HandMade, OneTokenPerClass, tiny
from optional import transformers
from torch import nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import PATCHES, SIDES

from camkit import Propagate, watch
from camkit.capture import Anatomy, Capture
from camkit.capture.attention import ExplicitAttention, FusedAttention
from camkit.capture.tail import TailCall
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.ops.confidence import MeanSplit, TanhAroundMean, TopShare, TwoMeans
from camkit.ops.similarity import cosine_smooth
from camkit.refiners import Amplify, HybridPropagate

TEMPERATURE, WIDTH = 0.1, 0.15
SIZES = [(2, 1), (2, 17), (2, 196), (1, 785), (0, 17)]


def likeness(tokens, temperature=TEMPERATURE):
    """The whole map in float64."""
    directions = normalize(tokens.double(), dim=-1)
    return (directions @ directions.mT / temperature).softmax(-1)


def strided(images, tokens, width, dtype):
    return (torch.randn(images, width, 2 * tokens) + 0.5).to(dtype).mT[:, ::2]


@pytest.mark.parametrize("maps", [1, 5, 21])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]} images of {size[1]}")
def test_smoothing_over_like_tokens_equals_the_whole_map(size, dtype, error, maps):
    tokens, values = strided(*size, 10, dtype), strided(*size, maps, dtype)
    found = cosine_smooth(tokens, values, temperature=TEMPERATURE)
    assert found.dtype == dtype
    expected = likeness(tokens) @ values.double()
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_smoothing_in_half_precision_rounds_only_what_comes_in_and_goes_out(dtype, error):
    tokens, values = strided(2, 17, 10, dtype), strided(2, 17, 5, dtype)
    found = cosine_smooth(tokens, values, temperature=TEMPERATURE)
    assert found.dtype == dtype
    expected = likeness(tokens) @ values.double()
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smoothing_loses_no_digits_under_autocast(dtype):
    tokens, values = torch.randn(2, 17, 8), torch.randn(2, 17, 3)
    expected = cosine_smooth(tokens, values, temperature=TEMPERATURE)
    with torch.autocast("cpu", dtype):
        found = cosine_smooth(tokens, values, temperature=TEMPERATURE)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_smoothing_is_differentiable_in_tokens_and_values():
    tokens = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, y: cosine_smooth(x, y, temperature=0.3), (tokens, values)
    )


def test_smoothing_gives_a_token_of_zeros_the_mean_of_all():
    tokens, values = torch.randn(1, 17, 8), torch.randn(1, 17, 3)
    tokens[:, 4] = 0.0
    found = cosine_smooth(tokens, values, temperature=0.01)
    torch.testing.assert_close(found[:, 4], values.mean(1))


def test_smoothing_makes_no_map_of_all_pairs():
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple) else (result,)
            made.extend(x.numel() for x in outputs if isinstance(x, torch.Tensor))
            return result

    tokens, values = torch.randn(1, 784, 30), torch.randn(1, 784, 21)
    with Sizes():
        cosine_smooth(tokens, values, temperature=TEMPERATURE)
    assert max(made) == 784 * 32  # the widest, in fours


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(bad):
    tokens = torch.randn(1, 17, 4)
    with pytest.raises(ValueError, match=f"`temperature` must be positive .*, got {bad}"):
        cosine_smooth(tokens, tokens, temperature=bad)


def block_means(rgb, grid):
    """Mean colour of every patch, one patch after the other."""
    rows, cols = rgb.shape[2] // grid.rows, rgb.shape[3] // grid.cols
    means = [
        rgb[:, :, y * rows : (y + 1) * rows, x * cols : (x + 1) * cols].mean((2, 3))
        for y in range(grid.rows)
        for x in range(grid.cols)
    ]
    return torch.stack(means, 1)


def affinity_of(maps, patches, balance):
    """One map of patch pairs from ``(b, a, t, t)`` maps of several blocks, in float64."""
    parts = [m.detach().double().mean(1)[:, patches][:, :, patches] for m in maps]
    if not balance:
        return sum(part / part.sum(-1, keepdim=True) for part in parts) / len(parts)
    whole = sum(parts)
    for _ in range(balance):
        whole = whole / whole.sum(1, keepdim=True)
        whole = whole / whole.sum(2, keepdim=True)
    return (whole + whole.mT) / 2


def aligned(cam, affinity, embeddings, colours, *, weight, steps=1):
    """Hybrid attention as one whole matrix, applied to the maps."""
    cues = likeness(embeddings)
    if colours is not None:
        distance = torch.cdist(colours.double(), colours.double()).square()
        cues = (-distance / (2 * WIDTH**2)).softmax(-1) @ cues
    joined = (affinity + weight * cues) / (1 + weight)
    scores = cam.double().flatten(2)
    for _ in range(steps):
        scores = torch.einsum("bij,bkj->bki", joined, scores)
    return scores.view(cam.shape)


@pytest.mark.parametrize("balance", [0, 3])
@pytest.mark.parametrize("coloured", [True, False], ids=["colours", "no colours"])
@pytest.mark.parametrize(
    "family", ["vit", "explicit softmax", "dinov2 registers", "average pooled"]
)
def test_hybrid_alignment_of_a_real_host_equals_its_whole_map(family, coloured, balance):
    model, pixels = tiny(family)
    rgb = torch.rand(pixels.shape)
    with torch.no_grad(), watch(model, rgb=rgb if coloured else None) as seen:
        model(pixels)
    grid, patches = seen.capture.grid, seen.capture.patches
    _, maps = oracles.unfused(model, pixels)
    cam = torch.rand(2, 3, grid.rows, grid.cols)
    expected = aligned(
        cam,
        affinity_of(maps[-2:], patches, balance),
        model.forward_features(pixels).detach()[:, patches],
        block_means(rgb, grid) if coloured else None,
        weight=0.7,
        steps=2,
    )
    align = HybridPropagate(
        steps=2,
        weight=0.7,
        colour_width=WIDTH if coloured else None,
        blocks=2,
        balance=balance,
    )
    found = align(cam, seen.capture)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def captured(images=2, *, coloured=True, dtype=torch.float32):
    """Three blocks of ten tokens, the last of them a class token, with colours and a norm."""
    q, k = torch.randn(2, 3, images, 2, 10, 4, dtype=dtype).unbind(0)
    tokens = torch.randn(images, 10, 6, dtype=dtype)
    return Capture(
        tuple(FusedAttention(2 * a, b, 0.7) for a, b in zip(q, k, strict=True)),
        ("one", "two", "three"),
        Anatomy(class_tokens=(-1,)),
        Grid(3, 3),
        tail=(TailCall(nn.Identity(), tokens, tokens),),
        rgb=torch.rand(images, 3, 12, 12, dtype=dtype) if coloured else None,
    )


SETTINGS = [
    {},
    {"weight": 3.0, "steps": 3},
    {"balance": 0, "blocks": None},
    {"colour_width": None},
    {"temperature": 0.01, "colour_width": 0.02, "blocks": 1},
]


def test_hybrid_alignment_worked_by_hand():
    attention = ExplicitAttention(torch.tensor([[[[0.5, 0.5], [0.0, 1.0]]]]))
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    rgb = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    third = math.log(3)  # a patch is three times as like itself as it is like the other
    align = HybridPropagate(
        weight=0.5,
        temperature=1 / third,
        colour_width=math.sqrt(3 / (2 * third)),
        blocks=None,
        balance=0,
    )
    capture = Capture(
        (attention,),
        ("a",),
        Anatomy(),
        Grid(1, 2),
        tail=(TailCall(nn.Identity(), tokens, tokens),),
        rgb=rgb,
    )
    # K G has 5/8 on its diagonal and 3/8 beside it; attention gives 1/2 and 0
    expected = torch.tensor([[[[(0.5 + 0.3125) / 1.5, 0.1875 / 1.5]]]])
    torch.testing.assert_close(align(torch.tensor([[[[1.0, 0.0]]]]), capture), expected)


@pytest.mark.parametrize("balance", [0, 3])
@pytest.mark.parametrize("blocks", [1, 2, None])
@pytest.mark.parametrize("steps", [1, 3])
def test_without_weight_it_is_propagation(steps, blocks, balance):
    cam, capture = torch.rand(2, 3, 3, 3), captured(coloured=False)
    found = HybridPropagate(steps=steps, weight=0.0, blocks=blocks, balance=balance)(cam, capture)
    assert torch.equal(found, Propagate(steps=steps, blocks=blocks, balance=balance)(cam, capture))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_aligned_maps_of_row_stochastic_cues_stay_in_their_range(settings):
    cam = torch.randn(2, 3, 3, 3)
    found = HybridPropagate(**{**settings, "balance": 0})(cam, captured())
    assert (found <= cam.amax((2, 3), keepdim=True) + 1e-6).all()
    assert (found >= cam.amin((2, 3), keepdim=True) - 1e-6).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_maps_aligned_by_an_affinity_in_full_balance_stay_in_their_range(settings):
    settings = {**settings, "balance": 20}  # so many rounds make rows and columns sum to one
    cam = torch.rand(2, 3, 3, 3)
    found = HybridPropagate(**settings)(cam, captured())
    assert (found <= cam.amax((2, 3), keepdim=True) + 1e-4).all()
    assert (found >= cam.amin((2, 3), keepdim=True) - 1e-4).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_permuted_classes_are_aligned_alike(settings):
    cam, capture, order = torch.rand(2, 3, 3, 3), captured(), [2, 0, 1]
    align = HybridPropagate(**settings)
    torch.testing.assert_close(align(cam[:, order], capture), align(cam, capture)[:, order])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_three_steps_are_one_step_three_times(settings):
    cam, capture = torch.rand(2, 3, 3, 3), captured()
    one = HybridPropagate(**{**settings, "steps": 1})
    together = HybridPropagate(**{**settings, "steps": 3})(cam, capture)
    torch.testing.assert_close(together, one(one(one(cam, capture), capture), capture))
    assert not torch.allclose(together, one(cam, capture))


def test_without_a_colour_width_no_colours_are_needed():
    cam, capture = torch.rand(2, 3, 3, 3), captured()
    blind = Capture(
        capture.blocks, capture.names, capture.anatomy, capture.grid, tail=capture.tail, rgb=None
    )
    align = HybridPropagate(colour_width=None)
    assert torch.equal(align(cam, blind), align(cam, capture))


def test_missing_colours_are_an_error():
    with pytest.raises(CaptureError, match=r"watch with `rgb=`, or set `colour_width=None`"):
        HybridPropagate()(torch.rand(2, 1, 3, 3), captured(coloured=False))


@pytest.mark.parametrize("family", ["vit", "explicit softmax"])
def test_a_batch_is_aligned_as_its_images_one_by_one(family):
    model, pixels = tiny(family)
    rgb, cam, align = torch.rand(pixels.shape), torch.rand(2, 3, 4, 6), HybridPropagate(steps=2)

    def refined(chosen):
        with torch.no_grad(), watch(model, rgb=rgb[chosen]) as seen:
            model(pixels[chosen])
        return align(cam[chosen], seen.capture)

    alone = torch.cat([refined(slice(0, 1)), refined(slice(1, 2))])
    torch.testing.assert_close(refined(slice(0, 2)), alone, atol=1e-5, rtol=1e-4)


def test_a_host_in_half_precision_aligns_full_maps_about_as_well():
    model, pixels = tiny("vit")
    cam, rgb, found = torch.rand(2, 3, 4, 6), torch.rand(pixels.shape), []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), watch(model.to(dtype), rgb=rgb) as seen:
            model(pixels.to(dtype))
        found.append(HybridPropagate()(cam, seen.capture))
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"weight": -0.1}, "`weight` must be .*, got -0.1"),
        ({"weight": math.nan}, "`weight` must be .*, got nan"),
        ({"weight": math.inf}, "`weight` must be .*, got inf"),
        ({"temperature": 0.0}, "`temperature` must be positive.*, got 0.0"),
        ({"temperature": math.nan}, "`temperature` must be positive.*, got nan"),
        ({"colour_width": -1.0}, "`colour_width` must be positive.*, got -1.0"),
        ({"colour_width": math.inf}, "`colour_width` must be positive.*, got inf"),
        ({"blocks": 0}, "`blocks` must be at least 1, got 0"),
        ({"balance": -1}, "`balance` must be at least 0, got -1"),
    ],
    ids=str,
)
def test_settings_of_the_alignment_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        HybridPropagate(**settings)


def test_a_map_on_another_grid_is_refused():
    with pytest.raises(ValueError, match="3x3 patch grid, got 1x9; refine on the grid first"):
        HybridPropagate()(torch.rand(2, 1, 1, 9), captured())


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_embeddings_are_the_last_tokens_of_a_timm_host(family):
    model, pixels = tiny(family)
    with torch.no_grad(), watch(model, blocks=1) as seen:
        model(pixels)
        expected = model.forward_features(pixels)
    prefix = expected.shape[1] - seen.capture.grid.size
    torch.testing.assert_close(seen.capture.patch_embeddings(), expected[:, prefix:])


class WithoutNorm(HandMade):
    """Reads its scores off the tokens as the last block left them."""

    def __init__(self):
        super().__init__()
        self.norm = None

    def tokens(self, pixels):
        x = self.sequence(self.patch_embed(pixels).flatten(2).mT)
        for block in self.blocks:
            x = x + block(block.norm(x))
        return x


@pytest.mark.parametrize(
    ("model", "places"),
    [
        (HandMade(), slice(1, None)),
        (ClassTokenLast(), slice(None, -1)),
        (OneTokenPerClass(class_tokens=5), slice(5, None)),
    ],
    ids=["class token first", "class token last", "a token per class"],
)
def test_patch_embeddings_are_the_last_tokens_of_a_hand_made_host(model, places):
    pixels = torch.randn(2, 3, 16, 24)
    with torch.no_grad(), watch(model) as seen:
        model(pixels)
        expected = model.tokens(pixels)[:, places]
    torch.testing.assert_close(seen.capture.patch_embeddings(), expected)


@pytest.mark.parametrize("kind", ["torchvision", "transformers"])
def test_patch_embeddings_are_the_last_tokens_of_other_libraries(kind):
    pixels = torch.randn(2, 3, 64, 64)
    if kind == "torchvision":
        model = torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=7).eval()
        part = model.encoder
    else:
        config = transformers.ViTConfig(**SIDES, **PATCHES)
        model = transformers.ViTForImageClassification(config).eval()
        part = model.vit.layernorm
    kept = []
    part.register_forward_hook(lambda *call: kept.append(call[-1]))
    with torch.no_grad(), watch(model) as seen:
        model(pixels)
    torch.testing.assert_close(seen.capture.patch_embeddings(), kept[-1][:, 1:])


@pytest.mark.parametrize("wide", ["scores", "pooled"])
def test_as_many_numbers_as_tokens_are_not_taken_for_tokens(wide):
    pixels = torch.randn(2, 3, 16, 24)  # six patches, and seven tokens with the class token
    if wide == "scores":
        model = HandMade()
        model.head = nn.Linear(24, 7)
        model.eval()
        with torch.no_grad():
            expected = model.tokens(pixels)[:, 1:]
    else:
        model, _ = tiny("average pooled", embed_dim=18, num_heads=3, img_size=(48, 96))
        pixels = torch.randn(2, 3, 48, 96)  # eighteen patches of eighteen channels
        with torch.no_grad():
            expected = model.forward_features(pixels)
    with torch.no_grad(), watch(model) as seen:
        model(pixels)
    found = seen.capture.patch_embeddings()
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_keys_stand_in_where_no_norm_follows_the_last_block():
    model, pixels, kept = WithoutNorm(), torch.randn(2, 3, 16, 24), []
    model.blocks[-1].qkv.register_forward_hook(lambda *call: kept.append(call[-1]))
    with torch.no_grad(), watch(model) as seen:
        model(pixels)
    keys = kept[-1].chunk(3, dim=-1)[1]
    torch.testing.assert_close(seen.capture.patch_embeddings(), keys[:, 1:])


def test_a_host_that_shows_neither_tokens_nor_keys_is_refused():
    bare = Capture(
        (ExplicitAttention(torch.full((1, 1, 4, 4), 0.25)),), ("a",), Anatomy(), Grid(2, 2)
    )
    with pytest.raises(CaptureError, match="neither tokens behind the last block nor its keys"):
        bare.patch_embeddings()


RULES = [
    TanhAroundMean(),
    TanhAroundMean(shift=0.5, temperature=0.2),
    MeanSplit(),
    TwoMeans(),
    TopShare(),
]


def dim(images=2):
    """Maps so dark that no amplified score reaches one."""
    return 0.05 * torch.rand(images, 3, 4, 5)


@pytest.mark.parametrize("strength", [0.5, 0.9])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_amplified_maps_keep_their_mass(rule, strength):
    cam = dim()
    found = Amplify(strength=strength, rule=rule)(cam, captured())
    torch.testing.assert_close(found.sum((2, 3)), cam.sum((2, 3)))
    assert not torch.allclose(found, cam)


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("rule", RULES[:2], ids=repr)
def test_smooth_rules_keep_the_order_within_a_map(rule, strength):
    cam = dim()
    found = Amplify(strength=strength, rule=rule)(cam, captured())
    order = cam.flatten(2).argsort(-1)
    assert (found.flatten(2).gather(2, order).diff(dim=-1) >= 0).all()


def test_amplification_worked_by_hand():
    cam = torch.tensor([[[[0.1, 0.2, 0.5]], [[0.3, 0.3, 0.3]], [[0.0, 0.0, 0.0]]]])
    found = Amplify(strength=0.5, rule=MeanSplit())(cam, captured())
    # halves below the mean of 4/15 and once and a half above it, 0.9 in all where there was 0.8
    first = torch.tensor([0.05, 0.1, 0.75]) * 0.8 / 0.9
    torch.testing.assert_close(found[0, 0, 0], first)
    torch.testing.assert_close(found[0, 1:], cam[0, 1:])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_amplification_of_zero_strength_changes_no_bit(rule):
    cam = torch.rand(2, 6, 4, 5)[:, ::2]
    assert torch.equal(Amplify(strength=0.0, rule=rule)(cam, captured()), cam)


def test_a_score_amplified_beyond_one_becomes_one():
    cam = torch.tensor([[[[0.2, 0.2, 1.0]]]])
    found = Amplify(strength=0.5, rule=MeanSplit())(cam, captured())
    expected = torch.tensor([0.1 * 1.4 / 1.7, 0.1 * 1.4 / 1.7, 1.0])
    torch.testing.assert_close(found.flatten(), expected)


def test_every_map_is_amplified_alone():
    cam = dim()
    found = Amplify()(cam, captured())
    for image in range(2):
        for slot in range(3):
            one = cam[image : image + 1, slot : slot + 1]
            torch.testing.assert_close(
                Amplify()(one, captured())[0, 0], found[image, slot], atol=1e-7, rtol=1e-5
            )


@pytest.mark.parametrize("strength", [-0.1, 1.0, math.nan])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=rf"`strength` must lie in \[0, 1\), got {strength}"):
        Amplify(strength=strength)
