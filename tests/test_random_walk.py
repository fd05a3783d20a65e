"""Random walks against powers of the whole matrix, boxes by hand, and the laws of both."""

import math

import pytest
import torch
from hosts import tiny
from oracles import PRECISIONS, propagate as plain_propagate

from camkit import Propagate, watch
from camkit.capture import Anatomy, Capture
from camkit.capture.attention import ExplicitAttention
from camkit.grid import Grid
from camkit.ops.propagation import balance, component_boxes, random_walk
from camkit.refiners import RandomWalk


def dense(scores, affinity, beta, steps):
    """The power of the whole transition matrix, in float64."""
    power = affinity.double() ** beta
    transition = power / power.sum(-1, keepdim=True)
    return scores.double() @ torch.linalg.matrix_power(transition, steps).mT


@pytest.mark.parametrize("places", [1, 17, 196])
@pytest.mark.parametrize(("beta", "steps"), [(1.0, 1), (8.0, 64), (0.5, 4), (3.0, 0)])
@pytest.mark.parametrize(("dtype", "error"), PRECISIONS.items(), ids=str)
def test_it_equals_the_power_of_the_whole_matrix(places, beta, steps, dtype, error):
    scores = torch.rand(2, 3, places, dtype=torch.float64).to(dtype)
    affinity = torch.rand(2, places, places, dtype=torch.float64)
    found = random_walk(scores, affinity, beta=beta, steps=steps)
    assert found.dtype == dtype
    expected = dense(scores, affinity, beta, steps)
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


def test_two_patches_by_hand():
    affinity = torch.tensor([[[1.0, 1.0], [1.0, 3.0]]])
    found = random_walk(torch.tensor([[[1.0, 0.0]]]), affinity, beta=2.0, steps=1)
    torch.testing.assert_close(found, torch.tensor([[[0.5, 0.1]]]))


def test_rows_sum_to_one_so_constant_maps_are_kept_and_others_keep_their_range():
    affinity = torch.rand(1, 50, 50) ** 4
    ones = random_walk(torch.ones(1, 1, 50), affinity, beta=2.0, steps=256)
    torch.testing.assert_close(ones, torch.ones(1, 1, 50), rtol=0, atol=1e-4)
    scores = torch.rand(1, 3, 50)
    found = random_walk(scores, affinity, beta=2.0, steps=3)
    assert (found >= scores.amin(-1, keepdim=True)).all()
    assert (found <= scores.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("steps", [1, 16])
def test_a_symmetric_affinity_keeps_the_sum_weighted_by_its_row_sums(steps):
    affinity = torch.rand(1, 30, 30, dtype=torch.float64)
    affinity = affinity + affinity.mT
    weight = (affinity**2).sum(-1)
    scores = torch.rand(1, 2, 30, dtype=torch.float64)
    found = random_walk(scores, affinity, beta=2.0, steps=steps)
    torch.testing.assert_close(
        (found * weight[:, None]).sum(-1), (scores * weight[:, None]).sum(-1)
    )


def test_long_walks_end_at_the_weighted_mean():
    affinity = torch.rand(1, 30, 30, dtype=torch.float64)
    affinity = affinity + affinity.mT
    weight = affinity.sum(-1) / affinity.sum()
    scores = torch.rand(1, 1, 30, dtype=torch.float64)
    found = random_walk(scores, affinity, beta=1.0, steps=256)
    mean = (scores * weight[:, None]).sum(-1, keepdim=True)
    torch.testing.assert_close(found, mean.expand_as(found))


def test_scores_stay_within_parts_that_nothing_joins():
    affinity = torch.block_diag(torch.rand(4, 4), torch.rand(5, 5))[None]
    scores = torch.zeros(1, 1, 9)
    scores[..., 1] = 1.0
    found = random_walk(scores, affinity, beta=1.0, steps=8)
    assert (found[..., :4] > 0).all()
    assert not found[..., 4:].any()


def test_high_powers_of_small_affinities_do_not_vanish():
    affinity = 1e-9 * torch.rand(1, 20, 20)
    scores = torch.rand(1, 1, 20)
    found = random_walk(scores, affinity, beta=8.0, steps=2)
    expected = dense(scores, 1e9 * affinity.double(), 8.0, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_it_is_differentiable_in_scores_and_affinity_also_under_autocast():
    scores = torch.rand(1, 2, 5, dtype=torch.float64, requires_grad=True)
    affinity = (0.1 + torch.rand(1, 5, 5, dtype=torch.float64)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.autograd.gradcheck(
            lambda s, a: random_walk(s, a, beta=2.0, steps=3), (scores, affinity)
        )


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a[:, :2], r"must be 1x3x3 for 1 images of 3 scores a map, got 1x2x3"),
        (lambda a: a.expand(2, 3, 3), r"must be 1x3x3 for .*, got 2x3x3"),
        (lambda a: -a, "must be finite and at least 0, got NaN, inf or less"),
        (lambda a: a * math.nan, "must be finite and at least 0"),
        (lambda a: a / 0, "must be finite and at least 0"),
        (lambda a: a * torch.tensor([1.0, 0.0, 1.0])[:, None], "has a row of zeros"),
    ],
    ids=["shape", "images", "negative", "NaN", "inf", "zeros"],
)
def test_affinities_that_are_none_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        random_walk(torch.rand(1, 1, 3), change(torch.ones(1, 3, 3)), beta=1.0, steps=1)


def test_steps_backwards_are_refused():
    with pytest.raises(ValueError, match="`steps` must be at least 0, got -1"):
        random_walk(torch.rand(1, 1, 3), torch.ones(1, 3, 3), beta=1.0, steps=-1)


@pytest.fixture(scope="module")
def seen():
    model, pixels = tiny("vit")
    with torch.no_grad(), watch(model) as watched:
        model(pixels)
    return watched.capture


def attention(capture, blocks):
    """Patch-to-patch maps of the last blocks, heads averaged, one after the other."""
    maps = [block.head_mean() for block in capture.blocks[-blocks:]]
    return sum(maps)[:, capture.patches][:, :, capture.patches]


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_refiner_walks_over_the_attention(seen, blocks, rounds):
    cam = torch.rand(2, 3, 4, 6)
    refiner = RandomWalk(beta=2.0, logt=3, blocks=blocks, balance=rounds)
    affinity = attention(seen, blocks)
    if rounds:
        affinity = balance(affinity, rounds=rounds)
    expected = dense(cam.flatten(2), affinity, 2.0, 8).view_as(cam)
    torch.testing.assert_close(refiner(cam, seen).double(), expected, rtol=1e-4, atol=1e-5)


def test_one_step_without_a_power_is_plain_propagation(seen):
    cam = torch.rand(2, 3, 4, 6)
    found = RandomWalk(beta=1.0, logt=0, blocks=1, balance=0)(cam, seen)
    block = seen.blocks[-1]
    expected = plain_propagate(block.q, block.k, cam.flatten(2), seen.patches, block.scale)
    torch.testing.assert_close(found.double(), expected.view_as(cam), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, Propagate(blocks=1)(cam, seen), rtol=1e-5, atol=1e-5)


def test_an_affinity_of_ones_own_may_be_given_or_taken_from_the_capture(seen):
    cam, affinity = torch.rand(2, 1, 4, 6), torch.rand(2, 24, 24)
    given = RandomWalk(affinity=affinity, logt=2)(cam, seen)
    taken = RandomWalk(affinity=lambda capture: affinity[: capture.images], logt=2)(cam, seen)
    expected = dense(cam.flatten(2), affinity, 1.0, 4).view_as(cam)
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(given, taken)


def test_maps_may_be_of_another_size_than_the_grid_where_the_affinity_is(seen):
    cam, affinity = torch.rand(2, 1, 8, 5), torch.rand(2, 40, 40)
    found = RandomWalk(affinity=affinity)(cam, seen)
    expected = dense(cam.flatten(2), affinity, 1.0, 2).view_as(cam)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_maps_off_the_grid_are_refused_where_attention_is_walked_over(seen):
    with pytest.raises(ValueError, match="must lie on the 4x6 patch grid, got 8x5"):
        RandomWalk()(torch.rand(2, 1, 8, 5), seen)


def test_boxes_by_hand():
    cam = torch.zeros(1, 1, 6, 8)
    cam[0, 0, 0, 0] = 0.5  # alone, above 0.4 of the maximum
    cam[0, 0, 2, 2] = cam[0, 0, 3, 3] = 1.0  # corner to corner: one part
    cam[0, 0, 4, 2] = 0.41
    cam[0, 0, 5, 6] = 0.4  # not above it
    cam[0, 0, 2:4, 7] = 0.8  # at the rim
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[0, 0] = expected[2:4, 7] = True
    expected[2:5, 2:4] = True
    assert torch.equal(component_boxes(cam, 0.4)[0, 0], expected)


def test_every_map_has_boxes_of_its_own_and_an_empty_one_has_none():
    cam = torch.zeros(2, 2, 3, 3)
    cam[0, 0, 0, 0], cam[1, 1, 2, 1] = 0.2, 0.9
    assert torch.equal(component_boxes(cam, 0.4), cam > 0)
    assert not component_boxes(-torch.rand(1, 1, 3, 3), 0.4).any()
    assert component_boxes(torch.rand(0, 2, 3, 3), 0.4).shape == (0, 2, 3, 3)


def clip_es(scoremap, share):
    """Boxes as CLIP-ES finds them, by contours of bytes, but up to the last row and column."""
    cv2 = pytest.importorskip("cv2")
    levels = (scoremap * 255).byte().numpy()
    _, strong = cv2.threshold(levels, int(share * levels.max()), 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(strong, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    inside = torch.zeros(scoremap.shape, dtype=torch.bool)
    for x, y, width, height in map(cv2.boundingRect, contours):
        inside[y : y + height, x : x + width] = True
    return inside


@pytest.mark.parametrize("share", [0.2, 0.4, 0.79])
def test_boxes_are_those_of_contours(share):
    maps = torch.rand(1, 20, 9, 14) ** 3  # few are strong
    maps = (maps / maps.amax((2, 3), keepdim=True) * 255).round() / 255
    found = component_boxes(maps, math.floor(share * 255) / 255 + 1e-4)  # as there, in bytes
    for plane, inside in zip(maps[0], found[0], strict=True):
        assert torch.equal(inside, clip_es(plane + 1e-4, share))  # bytes are rounded down there


@pytest.mark.parametrize("share", [0.0, 0.4, 0.79])
def test_boxes_of_the_rule_clip_es_are_those_of_its_code(share):
    maps = torch.rand(1, 60, 9, 14) ** 3
    maps[:, :20] = maps[:, :20] / maps[:, :20].amax((2, 3), keepdim=True)
    maps[:, 20:25] = 0.0
    maps[:, 25:30] /= 300.0  # fewer levels than one
    found = component_boxes(maps, share, rule="clip-es")
    for plane, inside in zip(maps[0], found[0], strict=True):
        expected = clip_es(plane, share)
        expected[-1], expected[:, -1] = False, False  # its boxes end one before the border
        assert torch.equal(inside, expected)
    assert found.any()


def test_a_region_at_the_border_is_cut_or_lost_by_the_rule_clip_es():
    cam = torch.zeros(1, 2, 3, 4)
    cam[0, 0, 1:, 2:] = 1.0
    cam[0, 1, 2, 3] = 1.0
    expected = torch.zeros(2, 3, 4, dtype=torch.bool)
    expected[0, 1, 2] = True
    assert torch.equal(component_boxes(cam, 0.4, rule="clip-es")[0], expected)
    assert torch.equal(component_boxes(cam, 0.4), cam > 0)


@pytest.mark.parametrize("value", [1.5, -0.1, torch.nan])
def test_the_rule_clip_es_needs_maps_that_fit_bytes(value):
    cam = torch.rand(1, 1, 3, 3)
    cam[..., 1, 1] = value
    with pytest.raises(ValueError, match=r"`cam` must lie in \[0, 1\]"):
        component_boxes(cam, 0.4, rule="clip-es")


@pytest.mark.parametrize("refiner", [RandomWalk, Propagate])
def test_scores_outside_the_boxes_are_not_spread(seen, refiner):
    cam = torch.zeros(2, 1, 4, 6)
    cam[..., 1, 1], cam[..., 3, 5] = 1.0, 0.3
    only = torch.zeros_like(cam)
    only[..., 1, 1] = 1.0
    boxed = refiner(blocks=2, balance=3, boxes=0.4)(cam, seen)
    torch.testing.assert_close(boxed, refiner(blocks=2, balance=3)(only, seen))
    assert boxed[..., 3, 5].all()  # what is spread reaches everywhere
    cam[..., 3, 5] = 1.0  # in the last row and column
    boxed = refiner(blocks=2, balance=3, boxes=0.4, box_rule="clip-es")(cam, seen)
    torch.testing.assert_close(boxed, refiner(blocks=2, balance=3)(only, seen))


@pytest.mark.parametrize("rule", ["whole", "clip-es"])
def test_a_squared_affinity_with_masked_columns_is_clip_es(rule):
    """T @ T, columns of patches outside the boxes zeroed, times the map, as there."""
    attention = torch.rand(1, 1, 12, 12).softmax(-1)
    capture = Capture((ExplicitAttention(attention),), ("a",), Anatomy(), Grid(3, 4))
    cam = torch.rand(1, 1, 3, 4)
    found = Propagate(steps=2, balance=3, boxes=0.4, box_rule=rule)(cam, capture)
    affinity = attention[0, 0]
    for _ in range(3):
        affinity = affinity / affinity.sum(0, keepdim=True)
        affinity = affinity / affinity.sum(1, keepdim=True)
    affinity = (affinity + affinity.T) / 2
    mask = clip_es(cam[0, 0], 0.4)
    if rule == "clip-es":
        mask[-1], mask[:, -1] = False, False
    mask = mask.view(1, 12)
    expected = ((affinity @ affinity) * mask) @ cam.view(12, 1)
    torch.testing.assert_close(found.view(12, 1), expected)
