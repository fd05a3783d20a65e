"""Edits that calibrate attention without training, against the same written out by hand."""

import copy
import math

import pytest
import torch
import zoo
from helpers import hooks_on, modes_on
from hosts import HandMade, shaken, tiny
from torch import nn

from camkit import attach, watch
from camkit.edits import FuzzyKeyPruning, StaticCalibration, SuppressOutliers
from camkit.edits.calibrate import outlying
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import ModelRunner
from camkit.seeds.text import last_tokens

VARIANTS = [
    StaticCalibration(),
    StaticCalibration(of="v", heads="own"),
    StaticCalibration(of="qk", heads="mean"),
]


def by_hand(model, pixels, edit, blocks):
    """The second stream of a timm model block by block, with whole maps; tokens before the norm."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    side = None
    for index, block in enumerate(model.blocks):
        if index in blocks:
            side = x if side is None else side
            attn, given = block.attn, block.norm1(x)
            joined = attn.qkv(given).unflatten(-1, (3, attn.num_heads, -1))
            q, k, v = joined.permute(2, 0, 3, 1, 4)
            named = {"q": attn.q_norm(q), "k": attn.k_norm(k), "v": v}
            maps = [(named[n] @ named[n].mT * attn.scale).softmax(-1) for n in edit.of]
            weights = sum(maps) / len(maps)
            if edit.heads != "own":
                weights = weights.sum(1, keepdim=True).expand_as(weights)
                weights = weights / attn.num_heads if edit.heads == "mean" else weights
            gathered = (weights @ v).transpose(1, 2).flatten(2)
            side = side + block.ls1(attn.proj(gathered))
        x = block(x)
    n = model.num_prefix_tokens
    return torch.cat([x[:, :n], side[:, n:]], 1)


def tokens_under(model, pixels, edit, **options):
    with attach(model, edit, **options), watch(model) as seen, torch.no_grad():
        logits = model(pixels)
    return last_tokens(seen.capture), logits


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        *(("vit", edit) for edit in VARIANTS),
        ("qk norm", VARIANTS[0]),
        ("dinov2 registers", VARIANTS[0]),
    ],
)
@torch.no_grad()
def test_the_second_stream_is_that_of_whole_maps(family, edit):
    model, pixels = tiny(family)
    found, _ = tokens_under(model, pixels, edit, blocks=2)
    expected = by_hand(model, pixels, edit, {1, 2})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edit", VARIANTS[:2], ids=repr)
@pytest.mark.parametrize("family", ["vit", "deit distilled", "dinov2 registers"])
def test_scores_of_a_class_token_do_not_move_by_a_bit(family, edit):
    model, pixels = tiny(family)
    expected = model(pixels)
    _, logits = tokens_under(model, pixels, edit)
    assert torch.equal(logits, expected)


class MeanOfTokens(nn.Module):
    """Lets every token see the others behind the attention, too."""

    def forward(self, tokens):
        return tokens + tokens.mean(1, keepdim=True)


def given_to(model, name):
    """Record the shapes that a module is given; no hook, which would have all tokens computed."""
    module, shapes = model.get_submodule(name), []
    forward = module.forward
    module.forward = lambda tokens: shapes.append(tuple(tokens.shape)) or forward(tokens)
    return shapes


@pytest.mark.parametrize("family", ["vit", "deit distilled", "dinov2 registers", "mixed"])
def test_a_pipeline_leaves_out_patches_that_the_second_stream_replaces(family):
    """Only where nothing else reads them: one class token, no foreign hook, no further mixing."""
    model, pixels = tiny("vit" if family == "mixed" else family)
    if family == "mixed":
        model.blocks[-1].norm2 = nn.Sequential(model.blocks[-1].norm2, MeanOfTokens())
    runner = ModelRunner(model, edit=StaticCalibration(), edit_blocks=2)
    expected, logits = tokens_under(model, pixels, StaticCalibration(), blocks=2)
    shapes = given_to(model, "blocks.2.mlp.fc1")
    for _ in range(2):  # the first run finds out that it may, the second does
        found = runner(pixels)
        torch.testing.assert_close(last_tokens(found), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.outputs, logits, rtol=1e-5, atol=1e-5)
    assert (shapes[-1][1] == 1) is (family == "vit")
    model.blocks[2].norm2.register_forward_hook(lambda *_: None)  # somebody may read all patches
    runner(pixels)
    assert shapes[-1][1] > 1
    shapes.clear()
    model(pixels)
    assert shapes == [expected.shape]


def test_a_block_in_the_middle_hands_its_calibrated_patches_on():
    model, pixels = tiny("vit")
    edit = StaticCalibration(of="v", heads="own")
    with torch.no_grad():
        twin = copy.deepcopy(model)
        last, twin.blocks = twin.blocks[2], twin.blocks[:2]
        expected = last(by_hand(twin, pixels, edit, {0, 1}))
    found, _ = tokens_under(model, pixels, edit, blocks=[0, 1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Same(StaticCalibration):
    """Gathers as the host does, so that the second stream is the host's without its MLPs."""

    def gathered(self, attention):
        return attention.rows(range(attention.shape[2])) @ attention.v


def is_mlp(module):
    return "mlp" in type(module).__name__.lower() or hasattr(module, "c_proj")


FORMS = [
    "timm vit",
    "timm dinov3",
    "timm beit",
    "timm siglip",
    "open_clip",
    "torchvision",
    "transformers dinov2",
    "transformers clip",
]


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_projection_and_layer_scale_of_every_form_are_the_hosts(name):
    entry = zoo.ZOO[name]
    model, pixels = shaken(entry.build()), torch.randn(2, 3, *entry.shape)
    silent = copy.deepcopy(model)
    others = ("transformer.", "attn_pool")  # the text tower, the pooling head
    named = [(n, m) for n, m in silent.named_modules() if is_mlp(m)]
    last_mlp = [module for name, module in named if not name.startswith(others)][-1]
    last_mlp.register_forward_hook(lambda *call: call[-1] * 0)
    with watch(silent) as seen:
        entry.call(silent, pixels)
    patches, expected = seen.capture.patches, last_tokens(seen.capture)
    with attach(model, Same(), blocks=1), watch(model) as seen:
        entry.call(model, pixels)
    found = last_tokens(seen.capture)
    torch.testing.assert_close(found[:, patches], expected[:, patches], rtol=1e-3, atol=1e-4)


def test_hosts_whose_values_are_hidden_or_scattered_are_refused():
    model, pixels = tiny("explicit softmax")
    with (
        attach(model, StaticCalibration()),
        pytest.raises(UnsupportedModelError, match=r"attn\.fused_attn = True"),
    ):
        model(pixels)
    with pytest.raises(UnsupportedModelError, match="no second stream can go beside them"):
        attach(HandMade(), StaticCalibration())
    parallel = zoo.ZOO["timm parallel things"]
    model = parallel.build()
    with (
        attach(model, StaticCalibration()),
        pytest.raises(UnsupportedModelError, match="does not add its attention to its tokens"),
    ):
        model(torch.randn(1, 3, *parallel.shape))


def test_blocks_with_a_gap_are_refused():
    model, _ = tiny("vit")
    with pytest.raises(ValueError, match=r"must follow each other .*, got \[0, 2\]"):
        attach(model, StaticCalibration(), blocks=[0, 2])
    assert hooks_on(model) == 0


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt("stop")], ids=repr)
def test_a_calibration_leaves_nothing_also_after_an_error(error):
    model, pixels = tiny("vit")

    def stop(*_):
        raise error

    expected, _ = tokens_under(model, pixels, StaticCalibration(), blocks=2)
    with attach(model, StaticCalibration(), blocks=2) as handle:
        hook = model.blocks[2].mlp.register_forward_pre_hook(stop)
        with pytest.raises(type(error), match="stop"):
            model(pixels)
        hook.remove()
        with watch(model) as seen:
            model(pixels)
        torch.testing.assert_close(last_tokens(seen.capture), expected)
        handle.enabled = False
        with watch(model) as seen:
            model(pixels)
        assert not torch.allclose(last_tokens(seen.capture), expected, atol=1e-3)
    assert hooks_on(model) == modes_on() == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_flow_through_the_second_stream():
    model, pixels = tiny("average pooled")
    bias, step = model.blocks[2].attn.proj.bias, 1e-2
    with attach(model, StaticCalibration(heads="own"), blocks=1):
        model(pixels)[:, 0].sum().backward()
        with torch.no_grad():
            bias[0] += step
            above = model(pixels)[:, 0].sum()
            bias[0] -= 2 * step
            below = model(pixels)[:, 0].sum()
    torch.testing.assert_close(bias.grad[0], (above - below) / (2 * step), rtol=2e-2, atol=1e-3)


# timm 1.0.9 lets torch choose how
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
def test_blocks_replayed_for_their_gradient_are_refused():
    model, pixels = tiny("vit")
    model.set_grad_checkpointing(True)
    model.train()
    with attach(model, StaticCalibration()):
        loss = model(pixels).sum()
        with pytest.raises(CaptureError, match="switch gradient checkpointing off"):
            loss.backward()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: StaticCalibration(of=""), "must name some of"),
        (lambda: StaticCalibration(of="qq"), "none twice"),
        (lambda: StaticCalibration(of="o"), "must name some of"),
        (lambda: StaticCalibration(heads="all"), 'must be "own", "mean" or "sum", got .all.'),
        (lambda: SuppressOutliers(threshold=0.0), "must be positive, got 0"),
        (lambda: SuppressOutliers(keep=0.0), r"must lie in \(0, 1\], got 0"),
        (lambda: FuzzyKeyPruning(low=0.4), "0 <= low < high <= 1, got 0.4 and 0.3"),
        (lambda: FuzzyKeyPruning(least=2.0), r"must lie in \(0, 1\], got 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words, no_shape_checks):
    with pytest.raises(ValueError, match=words):
        build()


def test_a_norm_stands_out_by_robust_deviations():
    norms = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 100.0, 9.0], [5.0] * 7])
    # median 4, absolute deviations 3 2 1 0 1 96 5: median 2, one deviation is 2.9652
    assert outlying(norms, 1.5).tolist()[0] == [False] * 5 + [True, True]
    assert outlying(norms, 1.7).tolist()[0] == [False] * 5 + [True, False]
    assert not outlying(norms, 1.5)[1].any()


def rows_of(model, pixels, edit=None, *, blocks=1):
    """The whole head maps of the last block."""
    if edit is None:
        with watch(model, blocks=1) as seen, torch.no_grad():
            model(pixels)
    else:
        with attach(model, edit, blocks=blocks), watch(model, blocks=1) as seen, torch.no_grad():
            model(pixels)
    block = seen.capture.blocks[0]
    return block.rows(range(block.shape[2]))


@pytest.mark.parametrize("family", ["vit", "explicit softmax", "dinov2 registers"])
def test_patches_of_outlying_norm_keep_a_share_of_their_attention(family):
    model, pixels = tiny(family)
    first = model.num_prefix_tokens

    def swell(*call):
        tokens = call[-1].clone()
        tokens[0, first + 2] *= 40  # a patch of the first image
        tokens[:, 0] *= 40  # class tokens may be as long as they like
        return tokens

    model.blocks[1].register_forward_hook(swell)
    before = rows_of(model, pixels)
    found = rows_of(model, pixels, SuppressOutliers(threshold=20.0, keep=0.25))
    weights = torch.ones(2, before.shape[-1])
    weights[0, first + 2] = 0.25
    expected = before * weights[:, None, None]
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


def test_outliers_of_a_host_whose_stream_is_not_seen_are_refused():
    model, pixels = HandMade(), torch.randn(2, 3, 16, 24)
    with (
        attach(model, SuppressOutliers()),
        pytest.raises(UnsupportedModelError, match="tokens between blocks were not seen"),
    ):
        model(pixels)


@pytest.mark.parametrize("family", ["vit", "explicit softmax", "average pooled"])
def test_keys_are_pruned_by_a_ramp_over_the_attention_they_get(family):
    model, pixels = tiny(family)
    before = rows_of(model, pixels)
    found = rows_of(model, pixels, FuzzyKeyPruning(low=0.2, high=0.6, least=0.01))
    first = model.num_prefix_tokens
    weights = torch.ones(2, before.shape[-1])
    for image in range(2):
        importance = before[image].mean((0, 1))[first:]
        low, high = (float(torch.quantile(importance, q)) for q in (0.2, 0.6))
        for patch, value in enumerate(importance.tolist()):
            ramp = (value - low) / (high - low)
            weights[image, first + patch] = min(max(ramp, 0.01), 1.0)
    expected = before * weights[:, None, None]
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert math.isclose(float(weights[:, first:].min()), 0.01, rel_tol=1e-6)


def test_attention_that_is_even_is_not_pruned():
    model, pixels = tiny("vit")
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight[:96].zero_()
        model.blocks[2].attn.qkv.bias[:96].zero_()
    expected = rows_of(model, pixels)
    torch.testing.assert_close(rows_of(model, pixels, FuzzyKeyPruning()), expected)
