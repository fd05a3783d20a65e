"""DOEI against a plain version with whole maps, and the laws it has to keep."""

import copy

import oracles
import pytest
import torch
from hosts import HandMade, OneTokenPerClass, tiny

import camkit
from camkit import DOEI, attach
from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import ExplicitAttention, FusedAttention
from camkit.edits import (
    BlockContext,
    ClassDecoupling,
    HybridAlignment,
    PatchDecoupling,
    VirtualClassTokens,
)
from camkit.edits.doei import READINGS, affinity, gate, prototypes
from camkit.edits.protocol import Picture
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.ops.confidence import MeanSplit, TwoMeans

IMAGES, HEADS, GRID, DIM = 2, 3, Grid(3, 4), 12
DRAWN = DOEI.as_drawn()
BARE = DOEI.as_drawn(alignment=None, classes=None, patches=None)


def block(classes, *, dtype=torch.float64, grad=False):
    """A block's tokens, output and attention, and the site it is edited at."""
    tokens = classes + GRID.size
    x, o = torch.randn(2, IMAGES, tokens, DIM, dtype=dtype).unbind(0)
    q, k = torch.randn(2, IMAGES, HEADS, tokens, 4, dtype=dtype).unbind(0)
    tensors = [t.requires_grad_(grad) for t in (x, o, q, k)]
    site = BlockContext(
        Anatomy(class_tokens=tuple(range(classes))),
        index=7,
        count=12,
        picture=Picture(pixels=torch.rand(IMAGES, 3, 24, 32), grid=GRID),
    )
    return *tensors, site


def seen(q, k):
    return FusedAttention(q, k, 0.5)


@pytest.mark.parametrize("coloured", [True, False], ids=["colours", "no colours"])
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_output_is_that_of_whole_maps(classes, coloured, dtype, atol):
    x, o, q, k, site = block(classes, dtype=dtype)
    edit = DOEI.as_drawn(alignment=HybridAlignment("mean", colour_width=0.15 if coloured else None))
    colours = site.picture.colours(GRID.size).double()
    expected = oracles.doei(
        x.double(),
        o.double(),
        oracles.full_attention(q, k, 0.5),
        classes,
        colours if coloured else None,
        layer=8,
        depth=12,
    )
    found = edit(x, o, seen(q, k), site)
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0.0)


@pytest.mark.parametrize("reading", READINGS)
def test_each_reading_is_its_formula(reading):
    weights, patches, classes = torch.rand(2, 6, 3), torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    to_classes = weights / weights.sum(-1, keepdim=True)
    to_patches = weights / weights.sum(1, keepdim=True)
    pairs = weights @ weights.mT
    sure = weights.max(-1, keepdim=True).values
    expected = {
        "proto": torch.einsum("bnc,bmc,bmd->bnd", to_classes, to_patches, patches),
        "class": to_classes @ classes,
        "affinity": pairs / pairs.sum(-1, keepdim=True) @ patches,
        "gate": sure / sure.mean(1, keepdim=True) * patches,
    }
    found = READINGS[reading](weights, patches, classes)
    torch.testing.assert_close(found, expected[reading])


def test_a_worked_example_of_prototypes():
    weights = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]]])
    patches = torch.tensor([[[2.0], [4.0], [8.0]]])
    found = prototypes(weights, patches, torch.zeros(1, 2, 1))
    torch.testing.assert_close(found, torch.tensor([[[2.0], [5.0], [5.0]]]))


@pytest.mark.parametrize("classes", [1, 5])
def test_zero_strength_changes_no_bit(classes):
    x, o, q, k, site = block(classes)
    assert DOEI.as_drawn(strength=0.0)(x, o, seen(q, k), site) is o


def test_parts_of_zero_strength_are_as_left_out():
    x, o, q, k, site = block(5)
    zero = DOEI.as_drawn(
        alignment=HybridAlignment(join="mean", weight=0.0),
        classes=ClassDecoupling(strength=0.0),
        patches=PatchDecoupling(strength=0.0),
    )
    assert torch.equal(zero(x, o, seen(q, k), site), BARE(x, o, seen(q, k), site))


@pytest.mark.parametrize("width", [None, 0.15])
def test_aligned_rows_of_the_class_tokens_still_sum_to_one(width):
    x, _, q, k, site = block(5)
    edit = DOEI.as_drawn(alignment=HybridAlignment("mean", colour_width=width))
    found = edit.interaction(x, seen(q, k), site)
    rows = found.class_to_class.sum(-1) + found.class_to_patch.sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("rule", [MeanSplit(), TwoMeans()])
@pytest.mark.parametrize("axis", ["patches", "classes"])
def test_decoupling_keeps_the_mass_of_what_it_compares(rule, axis):
    weights = torch.rand(2, 9, 4, dtype=torch.float64)
    found = PatchDecoupling(rule=rule, axis=axis)(weights)
    dim = 1 if axis == "patches" else 2
    torch.testing.assert_close(found.sum(dim), weights.sum(dim))
    assert not torch.allclose(found, weights)


def test_decoupled_patches_keep_their_rank_in_each_class():
    weights = torch.rand(2, 9, 4)
    found = PatchDecoupling(strength=0.9)(weights)
    assert torch.equal(found.argsort(1), weights.argsort(1))


def test_decoupling_grows_with_depth():
    weights = torch.rand(1, 9, 4)
    spread = [PatchDecoupling()(weights, depth).std(1).mean() for depth in (0.0, 0.5, 1.0)]
    assert spread[0] < spread[1] < spread[2]


def test_permuted_classes_give_permuted_class_tokens_and_the_same_patches():
    x, o, q, k, site = block(5)
    order = [3, 1, 4, 0, 2, *range(5, 5 + GRID.size)]
    found = DRAWN(x, o, seen(q, k), site)
    turned = DRAWN(x[:, order], o[:, order], seen(q[:, :, order], k[:, :, order]), site)
    torch.testing.assert_close(turned, found[:, order])


def test_patch_to_patch_attention_is_not_read_without_alignment():
    _, o, _, _, site = block(5)
    x = torch.zeros_like(o)
    weights = torch.rand(IMAGES, HEADS, 17, 17, dtype=torch.float64)
    other = weights.clone()
    other[:, :, 5:, 5:] = torch.rand(IMAGES, HEADS, 12, 12, dtype=torch.float64)
    edit = DOEI.as_drawn(alignment=None)
    one, two = (edit(x, o, ExplicitAttention(w), site) for w in (weights, other))
    assert torch.equal(one, two)


def test_absent_classes_neither_give_nor_take():
    x, o, q, k, site = block(5)
    labels = torch.tensor([[True, False, True, False, False], [False, True, True, True, False]])
    told = BlockContext(site.anatomy, site.index, site.count, site.picture, labels)
    found = DRAWN(x, o, seen(q, k), told)
    moved = o.clone()
    for image, present in enumerate(labels):
        moved[image, :5][~present] += 100.0
    again = DRAWN(x, moved, seen(q, k), told)
    here = torch.cat([labels, torch.ones(IMAGES, GRID.size, dtype=torch.bool)], 1)
    torch.testing.assert_close(again[here], found[here])
    torch.testing.assert_close(found[~here], o[~here])


def test_labels_of_another_number_of_classes_are_refused():
    x, o, q, k, site = block(5)
    told = BlockContext(site.anatomy, site.index, site.count, site.picture, torch.ones(2, 4).bool())
    with pytest.raises(
        ValueError, match="must have a column for each of the 5 classes that have a token, got 4"
    ):
        DRAWN(x, o, seen(q, k), told)


@pytest.mark.parametrize("classes", [1, 5])
def test_gradients_of_the_smooth_parts_are_right(classes):
    x, o, q, k, site = block(classes, grad=True)
    edit = DOEI.as_drawn(alignment=HybridAlignment("mean"), classes=None, patches=None)
    small = [t.detach()[:1].requires_grad_() for t in (x, o, q, k)]
    site.picture.pixels = site.picture.pixels[:1]
    assert torch.autograd.gradcheck(
        lambda x, o, q, k: edit(x, o, seen(q, k), site), small, fast_mode=True
    )


def test_gradients_flow_past_the_decoupling_without_its_factor():
    weights = torch.rand(1, 6, 2, dtype=torch.float64, requires_grad=True)
    factor = PatchDecoupling(rule=MeanSplit(), strength=0.5)
    up = torch.rand(1, 6, 2, dtype=torch.float64)
    (found,) = torch.autograd.grad(factor(weights), weights, up)
    fixed = 1 + 0.5 * MeanSplit()(weights.detach().mT).mT
    raised = weights * fixed
    kept = raised * (weights.sum(1, keepdim=True) / raised.sum(1, keepdim=True))
    (expected,) = torch.autograd.grad(kept, weights, up)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_full(dtype):
    x, o, q, k, site = block(5, dtype=torch.float32)
    expected = DRAWN(x, o, seen(q, k), site)
    found = DRAWN(x.to(dtype), o.to(dtype), seen(q.to(dtype), k.to(dtype)), site)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("reading", ["proto", "class", "affinity", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_stays_near_full_precision_in_the_dtype_of_the_host(reading, dtype):
    x, o, q, k, site = block(5, dtype=torch.float32)
    edit = DOEI.as_drawn(reading=reading)
    expected = edit(x, o, seen(q, k), site)
    with torch.autocast("cpu", torch.bfloat16):
        found = edit(x.to(dtype), o.to(dtype), seen(q.to(dtype), k.to(dtype)), site)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("reading", ["proto", "class"])
def test_readings_that_make_all_patches_one_are_refused_for_one_class_token(reading):
    x, o, q, k, site = block(1)
    with pytest.raises(UnsupportedModelError, match="gives every patch the same vector"):
        DOEI.as_drawn(reading=reading)(x, o, seen(q, k), site)


def test_a_host_without_class_token_is_told_of_virtual_ones():
    x, o, q, k, site = block(0)
    with pytest.raises(UnsupportedModelError, match=r"VirtualClassTokens\.from_classifier"):
        DRAWN(x, o, seen(q, k), site)


def test_virtual_class_tokens_are_compared_with_the_patches():
    x, o, q, k, site = block(1)
    embeddings = torch.randn(4, DIM, dtype=torch.float64)
    edit = DOEI.as_drawn(alignment=None, patches=None, virtual=VirtualClassTokens(embeddings, 0.2))
    cosines = torch.nn.functional.cosine_similarity(x[:, 1:, None], embeddings[None, None], dim=-1)
    weights = (cosines / 0.2).softmax(1) + (cosines / 0.2).softmax(2)
    expected = o.clone()
    expected[:, 1:] += prototypes(weights, o[:, 1:], o[:, :0])
    torch.testing.assert_close(edit(x, o, seen(q, k), site), expected)


def test_virtual_class_tokens_come_from_the_classifier():
    model, _ = tiny("vit")
    found = VirtualClassTokens.from_classifier(model).embeddings
    assert torch.equal(found, model.head.weight)


class Toco(HandMade):
    """A 1x1 convolution scores pooled patches, and MLPs lie beside the blocks."""

    def __init__(self):
        super().__init__()
        del self.head
        self.mlp = torch.nn.ModuleList(torch.nn.Linear(24, 24) for _ in range(2))
        self.classifier = torch.nn.Conv2d(24, 6, 1, bias=False)
        self.aux = torch.nn.Conv2d(24, 6, 1, bias=False)


def test_a_convolution_is_a_classifier_too_and_another_can_be_named():
    model = Toco()
    found = VirtualClassTokens.from_classifier(model)
    assert torch.equal(found.embeddings, model.classifier.weight[:, :, 0, 0])
    assert repr(found) == "VirtualClassTokens(temperature=0.1, source='classifier')"
    aux = VirtualClassTokens.from_classifier(model, module="aux")
    assert torch.equal(aux.embeddings, model.aux.weight[:, :, 0, 0])


def test_a_classifier_that_cannot_be_told_is_asked_for():
    model = Toco()
    del model.classifier
    with pytest.raises(UnsupportedModelError, match=r"mlp\.0, mlp\.1, aux.*name it with `module=`"):
        VirtualClassTokens.from_classifier(model)
    with pytest.raises(UnsupportedModelError, match="norm is a LayerNorm; expected a linear"):
        VirtualClassTokens.from_classifier(model, module="norm")


def test_what_a_handle_is_told_holds_inside_the_block_only():
    model, pixels = OneTokenPerClass(class_tokens=5), torch.rand(2, 3, 16, 24)
    some = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]]).bool()
    with attach(model, DRAWN) as handle:
        plain = model(pixels)[0]
        with handle.batch(labels=some):
            told = model(pixels)[0]
        assert torch.equal(model(pixels)[0], plain)
        handle.labels = some
        assert torch.equal(model(pixels)[0], told)
    assert not torch.allclose(told, plain)


def test_a_handle_says_what_it_does_and_where():
    model, _ = tiny("vit")
    with attach(model, DRAWN, blocks=2) as handle:
        assert handle.settings == {
            "edit": repr(DRAWN),
            "blocks": ["blocks.1.attn", "blocks.2.attn"],
        }
        handle.enabled = False
        assert repr(handle) == f"Handle({DRAWN!r} in 2 blocks, paused)"


def test_embeddings_of_another_width_are_refused():
    x, o, q, k, site = block(1)
    edit = DOEI.as_drawn(virtual=VirtualClassTokens(torch.randn(4, 7, dtype=torch.float64)))
    with pytest.raises(ValueError, match="are 7 wide, but the tokens have 12 channels"):
        edit(x, o, seen(q, k), site)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DOEI(reading="mean"), "must be one of auto, proto, class, affinity, gate"),
        (lambda: DOEI(class_reading="mean"), "must be one of none, rebuild, apart, got 'mean'"),
        (lambda: DOEI(strength=-1.0), "at least 0, got -1.0"),
        (lambda: DOEI(progressive="epoch"), 'must be "depth" or "none"'),
        (lambda: HybridAlignment(weight=-0.1), "at least 0, got -0.1"),
        (lambda: HybridAlignment(temperature=0.0), "`temperature` must be positive"),
        (lambda: HybridAlignment(colour_width=0.0), "`colour_width` must be positive"),
        (lambda: ClassDecoupling(strength=1.0), r"must lie in \[0, 1\), got 1.0"),
        (lambda: PatchDecoupling(axis="rows"), 'must be "patches" or "classes"'),
        (
            lambda: DOEI(reading="class", virtual=VirtualClassTokens(torch.ones(2, 2))),
            "needs class tokens of the host",
        ),
    ],
)
def test_wrong_settings_are_refused(no_shape_checks, make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_an_attached_doei_acts_in_every_block_and_comes_off_bit_exact():
    model, pixels = tiny("vit")
    before = model(pixels)
    last = attach(model, DRAWN, blocks=1)
    one = model(pixels)
    last.remove()
    with attach(model, DRAWN) as handle:
        three = model(pixels)
        handle.enabled = False
        assert torch.equal(model(pixels), before)
    assert torch.equal(model(pixels), before)
    assert (one - before).abs().max() > 1e-3
    assert (three - one).abs().max() > 1e-3


def test_an_attached_doei_does_what_plain_hooks_do():
    model, pixels = tiny("vit", depth=2)
    twin, kept = copy.deepcopy(model), {}
    colours = torch.nn.functional.adaptive_avg_pool2d(pixels.sigmoid(), (4, 6)).flatten(2).mT
    for index, layer in enumerate(twin.blocks):
        layer.attn.fused_attn = False
        layer.attn.attn_drop.register_forward_hook(lambda *call: kept.update(map=call[2]))
        layer.attn.register_forward_hook(
            lambda _, args, out, layer=index + 1: oracles.doei(
                args[0], out, kept["map"], 1, colours, layer=layer, depth=2
            )
        )
    with attach(model, DRAWN) as handle:
        handle.rgb = pixels.sigmoid()
        torch.testing.assert_close(model(pixels), twin(pixels), atol=1e-5, rtol=1e-4)


def test_labels_and_colours_of_another_batch_are_refused():
    model, pixels = OneTokenPerClass(class_tokens=5), torch.rand(2, 3, 16, 24)
    with attach(model, DRAWN) as handle:
        handle.labels = torch.ones(3, 5, dtype=torch.bool)
        with pytest.raises(ValueError, match="one row for each of the 2 images, got 3"):
            model(pixels)


def test_colours_are_those_of_the_pixels_before_normalisation():
    rgb = torch.rand(2, 3, 16, 24)
    rgb[:, :, 0, 0], rgb[:, :, -1, -1] = 0.0, 1.0
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    expected = torch.nn.functional.adaptive_avg_pool2d(rgb, (2, 3)).flatten(2).mT
    for pixels in (rgb, rgb * 2 - 1, (rgb - mean) / std):
        found = Picture(pixels, grid=Grid(2, 3)).colours(6)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_training_with_doei_has_the_gradients_of_training_with_whole_maps():
    model, pixels = OneTokenPerClass(class_tokens=5).double(), torch.rand(2, 3, 16, 24).double()
    twin = copy.deepcopy(model)
    edit = DOEI.as_drawn(alignment=HybridAlignment("mean", colour_width=None))
    for index, layer in enumerate(twin.blocks):

        def rebuilt(module, args, out, layer=index + 1):
            q, k, _ = (
                part.unflatten(-1, (2, -1)).transpose(1, 2)
                for part in module.qkv(args[0]).chunk(3, dim=-1)
            )
            whole = (q @ k.mT * 12**-0.5).softmax(-1)
            return oracles.doei(args[0], out, whole, 5, None, layer=layer, depth=2)

        layer.register_forward_hook(rebuilt)
    with attach(model, edit):
        model(pixels)[0].square().sum().backward()
    twin(pixels)[0].square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-8, rtol=1e-6, msg=name)


def test_doubtful_images_of_a_recomputed_block_are_an_error_not_a_guess():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(HandMade):
        def tokens(self, pixels):
            x = self.sequence(self.patch_embed(pixels).flatten(2).mT)
            for layer in self.blocks:
                x = x + checkpoint(lambda x, b=layer: b(b.norm(x)), x, use_reentrant=False)
            return self.norm(x)

    model, one, two = Checkpointed(), *torch.rand(2, 2, 3, 16, 24).unbind(0)
    plain = HandMade()
    plain.load_state_dict(model.state_dict())
    with attach(model, DRAWN), attach(plain, DRAWN):
        model(one).sum().backward()
        plain(one).sum().backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)
        loss = model(one).sum() + model(two).sum()
        with pytest.raises(CaptureError, match="call backward after each forward"):
            loss.backward()


def test_the_repr_is_the_configuration():
    edit = DOEI.as_drawn(reading="gate", patches=PatchDecoupling(rule=TwoMeans(steps=3)))
    names = vars(camkit) | vars(camkit.edits) | vars(camkit.ops.confidence)
    assert eval(repr(edit), names) == edit


def test_a_flat_gate_leaves_patches_as_they_are():
    patches = torch.randn(1, 4, 3)
    torch.testing.assert_close(gate(torch.full((1, 4, 1), 0.3), patches, patches), patches)


def test_affinity_never_holds_the_map_of_pairs():
    weights = torch.rand(1, 4096, 2)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        affinity(weights, torch.randn(1, 4096, 8), torch.zeros(1, 2, 8))
    assert max(largest) <= 4096 * 8


@pytest.mark.parametrize("edit", [DRAWN, camkit.edits.OneMoreHop()], ids=["doei", "hop"])
def test_a_watcher_sees_the_blocks_of_an_edited_host_and_nothing_of_the_edit(edit):
    model, pixels = tiny("vit")
    kept = []
    with attach(model, edit), camkit.watch(model) as seen:
        hooks = [
            layer.attn.qkv.register_forward_hook(lambda *call: kept.append(call[2]))
            for layer in model.blocks
        ]
        model(pixels)
    for hook in hooks:
        hook.remove()
    assert len(seen.capture.blocks) == 3
    for layer, projected in zip(seen.capture.blocks, kept, strict=True):
        q, k, _ = projected.unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        expected = (q @ k.mT / 4).softmax(-1).mean(1)
        torch.testing.assert_close(layer.head_mean(), expected, atol=1e-5, rtol=1e-4)
