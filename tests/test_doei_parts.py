"""DOEI's own parts: suppression that suppresses, decoupling that decouples, by hand and by law."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hosts import tiny

from camkit import DOEI, attach, watch
from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import ExplicitAttention
from camkit.edits import BlockContext, ClassDecoupling, HybridAlignment, PatchDecoupling
from camkit.edits.doei import tell_apart

PATCHES, DIM = 12, 6
BARE = DOEI(alignment=None, strength=1.0)


def site(classes, **told):
    return BlockContext(Anatomy(class_tokens=tuple(range(classes))), **told)


def random_block(classes, images=2):
    """Tokens, output and attention of a block."""
    tokens = classes + PATCHES
    x, o = torch.randn(2, images, tokens, DIM, dtype=torch.float64).unbind(0)
    logits = torch.randn(images, 2, tokens, tokens, dtype=torch.float64)
    return x, o, ExplicitAttention(logits.softmax(-1))


def uniform(classes):
    tokens = classes + PATCHES
    return ExplicitAttention(torch.full((2, 1, tokens, tokens), 1 / tokens, dtype=torch.float64))


def planted(classes):
    """Attention of patches to classes: the first half belongs to class 0, the rest to the others.

    All other attention is uniform.
    """
    weights = uniform(classes).weights.clone()
    weights[:, :, classes : classes + PATCHES // 2, 0] *= 8.0
    weights[:, :, classes + PATCHES // 2 :, 1:classes] *= 8.0
    return ExplicitAttention(weights / weights.sum(-1, keepdim=True))


def likeness(output, classes):
    """Cosine between the mean token of the first half of patches and that of the rest."""
    halves = output[:, classes:].unflatten(1, (2, -1)).mean(2)
    return F.cosine_similarity(halves[:, 0], halves[:, 1], dim=-1)


def class_likeness(tokens):
    """Mean cosine between different class tokens."""
    directions = F.normalize(tokens, dim=-1)
    cosines = directions @ directions.mT
    count = tokens.shape[1]
    return (cosines.sum((1, 2)) - count) / (count * (count - 1))


# -- Suppression.


def test_gates_lower_the_patch_below_the_average_and_raise_the_other():
    weights = torch.zeros(1, 1, 3, 3)
    weights[..., 0, 1:] = weights[..., 1:, 0] = torch.tensor([0.1, 0.3])  # gates 0.5 and 1.5
    output = torch.tensor([[[5.0, 5.0], [4.0, 8.0], [4.0, 8.0]]])
    found = replace(BARE, strength=0.5)(output, output, ExplicitAttention(weights), site(1))
    expected = torch.tensor([[[5.0, 5.0], [3.0, 6.0], [5.0, 10.0]]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("decoupled", [None, PatchDecoupling()])
def test_gates_multiply_by_one_on_average_and_keep_what_is_above_it_above(decoupled, strength):
    x, o, attention = random_block(1)
    edit = replace(BARE, strength=strength, patches=decoupled)
    gates = (edit(x, o, attention, site(1)) / o)[:, 1:, 0]
    torch.testing.assert_close(gates.mean(1), torch.ones_like(gates[:, 0]))
    rows = attention.weights.mean(1)
    confidence = rows[:, 1:, 0] + rows[:, 0, 1:]
    assert torch.equal(gates > 1, confidence * len(confidence[0]) > confidence.sum(1, keepdim=True))
    assert (gates >= 0).all()


def test_a_stronger_decoupling_suppresses_the_least_confident_patch_further():
    x, o, attention = random_block(1)
    least = []
    for strength in (0.0, 0.5, 0.9):
        edit = replace(BARE, patches=PatchDecoupling(strength))
        least.append((edit(x, o, attention, site(1)) / o)[:, 1:, 0].amin(1))
    assert (least[0] > least[1]).all()
    assert (least[1] > least[2]).all()


# -- What all patches would get alike.


@pytest.mark.parametrize("reading", ["proto", "class", "affinity", "gate"])
def test_flat_confidences_add_nothing(reading):
    x, o, _ = random_block(4)
    edit = replace(BARE, reading=reading, class_reading="none", patches=PatchDecoupling())
    torch.testing.assert_close(edit(x, o, uniform(4), site(4)), o)


@pytest.mark.parametrize("reading", ["proto", "class", "affinity"])
def test_what_is_added_leaves_the_mean_patch_where_it_is(reading):
    x, o, attention = random_block(4)
    found = replace(BARE, reading=reading)(x, o, attention, site(4))
    torch.testing.assert_close(found[:, 4:].mean(1), o[:, 4:].mean(1))
    drawn = replace(BARE, reading=reading, centred=False)(x, o, attention, site(4))
    moved = drawn - found  # by one vector, the same for all patches
    torch.testing.assert_close(moved[:, 4:], moved[:, 4:5].expand(-1, PATCHES, -1))
    torch.testing.assert_close(moved[:, :4], torch.zeros_like(moved[:, :4]))


@pytest.mark.parametrize("reading", ["proto", "affinity"])
def test_planted_confidences_part_object_and_rest_only_if_centred(reading):
    _, o, _ = random_block(3)
    mean = torch.randn(1, 1, DIM, dtype=torch.float64)
    half = torch.cat([torch.ones(PATCHES // 2), -torch.ones(PATCHES // 2)])[None, :, None]
    way = torch.randn(1, 1, DIM, dtype=torch.float64)
    way = way - (way * mean).sum() / mean.square().sum() * mean  # the halves are mean +- 0.4 way
    o[:, 3:] = 0.1 * o[:, 3:] + mean + 0.4 * half * way
    plain = likeness(o, 3)
    edit = replace(BARE, reading=reading)
    assert (likeness(edit(o, o, planted(3), site(3)), 3) < plain).all()
    drawn = replace(edit, centred=False)
    assert (likeness(drawn(o, o, planted(3), site(3)), 3) > plain).all()


# -- Class tokens.


def test_class_tokens_told_apart_worked_by_hand():
    classes = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    added = tell_apart(torch.tensor([[[9.0, 0.5], [0.5, 7.0]]]), classes)
    torch.testing.assert_close(added, torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]))
    torch.testing.assert_close(class_likeness(classes), torch.tensor([0.8]))
    torch.testing.assert_close(class_likeness(classes + added), torch.tensor([0.0]))


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_equal_interactions_part_class_tokens_about_their_mean(strength):
    x, o, _ = random_block(5)
    o[:, :5] += 2.0  # what they share
    edit = replace(BARE, strength=strength, class_reading="apart", classes=ClassDecoupling())
    found, mean = edit(x, o, uniform(5), site(5))[:, :5], o[:, :5].mean(1, keepdim=True)
    torch.testing.assert_close(found, mean + (1 + strength * 5 / 4) * (o[:, :5] - mean))
    assert (class_likeness(found) < class_likeness(o[:, :5])).all()


def test_rebuilt_class_tokens_come_nearer_to_each_other():
    x, o, _ = random_block(5)
    o[:, :5] += 2.0
    found = replace(BARE, class_reading="rebuild")(x, o, uniform(5), site(5))
    assert (class_likeness(found[:, :5]) > class_likeness(o[:, :5])).all()


@pytest.mark.parametrize("class_reading", ["apart", "none"])
def test_one_class_token_is_left_as_it_is(class_reading):
    x, o, attention = random_block(1)
    found = replace(BARE, class_reading=class_reading)(x, o, attention, site(1))
    assert torch.equal(found[:, :1], o[:, :1])
    assert not torch.allclose(found[:, 1:], o[:, 1:])


def test_a_class_that_is_alone_in_its_image_is_left_as_it_is():
    x, o, attention = random_block(3)
    labels = torch.tensor([[False, True, False], [True, False, True]])
    found = replace(BARE, class_reading="apart")(x, o, attention, site(3, labels=labels))
    assert torch.equal(found[0, :3], o[0, :3])
    torch.testing.assert_close(found[1, 0], 2 * o[1, 0] - o[1, 2])
    torch.testing.assert_close(found[1, 2], 2 * o[1, 2] - o[1, 0])
    assert torch.equal(found[1, 1], o[1, 1])


# -- What acts by default.


def test_the_default_changes_no_output():
    x, o, attention = random_block(3)
    assert DOEI()(x, o, attention, site(3)) is o
    assert not DOEI().changes_output
    assert DOEI.as_drawn().changes_output


def test_a_ramp_at_its_start_changes_no_bit():
    x, o, attention = random_block(3)
    assert DOEI.as_drawn(alignment=None)(x, o, attention, site(3, strength=0.0)) is o


def test_the_default_adds_four_times_the_cosine_of_tokens_to_the_logits():
    x, _, attention = random_block(3)
    bias = DOEI().pair_bias(x, attention, site(3))
    cosines = F.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
    torch.testing.assert_close(bias.rows()[:, 0].double(), 3.0 * cosines, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "edit",
    [
        DOEI(alignment=None),
        DOEI(alignment=HybridAlignment(weight=0.0)),
        DOEI(alignment=HybridAlignment("mean")),
        DOEI.as_drawn(),
    ],
)
def test_logits_stay_as_they_are_without_a_product(edit):
    x, _, attention = random_block(3)
    assert edit.pair_bias(x, attention, site(3)) is None


def test_cues_in_the_logits_are_not_averaged_in_once_more():
    x, o, attention = random_block(3)
    product = DOEI(strength=1.0, patches=PatchDecoupling(), classes=ClassDecoupling())
    found = product(x, o, attention, site(3))
    torch.testing.assert_close(found, replace(product, alignment=None)(x, o, attention, site(3)))


def test_the_drawing_takes_changes():
    edit = DOEI.as_drawn(strength=0.5, classes=None)
    assert edit == replace(DOEI.as_drawn(), strength=0.5, classes=None)
    assert (DOEI.as_drawn().strength, DOEI.as_drawn().class_reading) == (1.0, "rebuild")


def test_an_attached_default_multiplies_the_maps_of_the_last_three_blocks_by_the_likeness():
    model, pixels = tiny("vit", depth=4)
    twin, maps = copy.deepcopy(model), []
    for layer in twin.blocks:
        layer.attn.fused_attn = False
    for layer in twin.blocks[1:]:
        entered = {}

        def joined(_, __, weights, entered=entered):
            directions = F.normalize(entered["tokens"], dim=-1)
            product = weights * (3.0 * directions @ directions.mT).exp()[:, None]
            maps.append(product / product.sum(-1, keepdim=True))
            return maps[-1]

        layer.attn.register_forward_pre_hook(
            lambda _, args, entered=entered: entered.update(tokens=args[0])
        )
        layer.attn.attn_drop.register_forward_hook(joined)
    before, expected = model(pixels), twin(pixels)
    with attach(model, DOEI()) as handle:
        with watch(model) as seen:
            torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=1e-4)
        handle.strength = 0.0
        assert torch.equal(model(pixels), before)
    assert torch.equal(model(pixels), before)
    for block, weights in zip(seen.capture.blocks[-3:], maps, strict=True):
        torch.testing.assert_close(block.head_mean(), weights.mean(1), atol=1e-5, rtol=1e-4)
