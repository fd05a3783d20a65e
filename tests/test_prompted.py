"""Class maps refined by a promptable segmenter: planted ones, whose answers are known."""

import dataclasses
import math
import pickle
import warnings

import cv2
import numpy as np
import pytest
import torch
from coarse import captured, coarse_iou, coarse_objects
from scipy import ndimage
from tiny_segmenters import Planted, by_colour, tiny_segmenter

import camkit
from camkit.data import read_mask, write_shapes
from camkit.method import split_refine
from camkit.refiners import PromptedRefine, SegmenterWarning, chain
from camkit.refiners.prompted import segmenters_in
from camkit.segmenters import Part, Peaks, SamRefinerPrompts
from camkit.segmenters.parts import parts_of
from camkit.segmenters.rules import moved_box

SIZE = (24, 36)
ANY = {"min_agreement": 0.0}
RULES = {"peaks": "peaks", "samrefiner": "samrefiner", "two rounds": SamRefinerPrompts(gamma=2.0)}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def blank(images=1, size=SIZE):
    return captured(torch.rand(images, 3, *size))


def boxes(*rectangles, size=SIZE):
    """A mask of rectangles, each as first row, first column, behind the last row and column."""
    mask = np.zeros(size, bool)
    for top, left, bottom, right in rectangles:
        mask[top:bottom, left:right] = True
    return mask


def maps(*planes):
    return torch.from_numpy(np.stack(planes)[None].astype(np.float32))


class Fixed:
    """Answers every prompt with the same masks, and keeps what it was asked."""

    def __init__(self, *masks, ious=None):
        self.answer, self.ious = np.stack(masks), ious or [0.5] * len(masks)
        self.prompts = []

    def embed(self, picture):
        return picture.shape[:2]

    def masks(self, _embedding, prompts):
        self.prompts += prompts
        count = len(prompts)
        return np.stack([self.answer] * count), np.stack([np.array(self.ious)] * count)


def drawn(cam, classes=None, score=0.5):
    return camkit.to_mask(cam, classes, background_score=score)


# -- a segmenter that knows the truth


def coarse(truth, classes, patch=8):
    planes = torch.stack([(truth == index + 1).float() for index in classes])[None]
    pooled = torch.nn.functional.avg_pool2d(planes, patch, ceil_mode=True)
    return pooled / pooled.amax((2, 3), keepdim=True).clamp_min(1e-6)


def segments_of(truth):
    """Connected pieces of each value of a mask, the background included."""
    segments, count = np.zeros(truth.shape, np.int64), 0
    for value in np.unique(truth):
        found, labels = cv2.connectedComponents((truth == value).astype(np.uint8))
        segments += np.where(labels > 0, labels + count, 0)
        count += found
    return segments


@every_rule
def test_true_segments_give_true_masks_of_drawn_scenes(tmp_path, rule):
    shapes, right, known = write_shapes(tmp_path, 12, size=(96, 128)), 0, 0
    for sample in (*shapes.split("train"), *shapes.split("val")):
        truth = read_mask(sample.mask, size=(96, 128), num_classes=len(shapes.classes))
        segmenter = Planted(segments_of(truth.numpy()))
        refine = PromptedRefine(segmenter, rule=rule, rounds=2, min_area=0.0)
        rgb = camkit.load_photo(sample.photo, size=128).rgb
        cam = refine(coarse(truth, sample.classes), captured(rgb))
        mask = drawn(cam, torch.tensor([sample.classes]))[0]
        before = drawn(
            camkit.resize_cam(coarse(truth, sample.classes), (96, 128)),
            torch.tensor([sample.classes]),
        )[0]
        assert (mask == truth).float().mean() >= (before == truth).float().mean()
        right, known = right + int((mask == truth).sum()), known + truth.numel()
    assert right / known > 0.995  # what an object covers may cut another into pieces


def test_true_segments_give_the_ceiling_on_photos(real_data):
    """Objects are drawn to the pixel, where the map of 32 x 32 pixels meets them by half."""
    shared = joined = 0
    for cam, capture, truth in coarse_objects(real_data):
        labels = truth[0, 0].numpy()
        objects = (labels > 0) & (labels != 255)
        segmenter = Planted(np.where(objects, 1, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SegmenterWarning)  # objects smaller than a patch
            refined = PromptedRefine(segmenter)(cam, capture)
        found, known = refined[0, 0].numpy() > 0.5, labels != 255
        shared += (found & objects & known).sum()
        joined += ((found | objects) & known).sum()
    assert shared / joined > coarse_iou(None, real_data) + 0.07
    assert shared / joined > 0.88  # a map that hardly meets its object stays as it is


# -- segmenters that are wrong


@pytest.mark.parametrize(
    "answer",
    [boxes((0, 0, *SIZE)), boxes(), boxes((20, 30, 24, 36))],
    ids=["the whole picture", "nothing", "something else"],
)
@every_rule
def test_an_unusable_answer_changes_nothing_and_says_so(answer, rule):
    cam, capture = torch.rand(1, 3, 4, 6), blank()
    cam[..., :2, :] += 0.5
    cam = (cam / 1.5).clamp(0, 1)
    cam[..., -1, -1] = 0.0
    refine = PromptedRefine(Fixed(answer), rule=rule)
    with pytest.warns(SegmenterWarning, match="drew nothing that can be used") as caught:
        refined = refine(cam, capture)
    assert len(caught) == 1
    assert torch.equal(refined, camkit.resize_cam(cam, SIZE))


def test_a_warning_is_given_once(recwarn):
    """Even where every warning is shown, as after others have changed the filters."""
    warnings.simplefilter("always")
    refine, cam = PromptedRefine(Fixed(boxes())), maps(boxes((2, 2, 9, 9)))
    for _ in range(3):
        refine(cam, blank())
    assert len([w for w in recwarn if w.category is SegmenterWarning]) == 1


def test_a_part_without_a_usable_answer_keeps_its_scores():
    first, second = boxes((2, 2, 10, 10)), boxes((2, 20, 10, 30))
    cam = maps(0.9 * first + 0.7 * second)
    refined = PromptedRefine(Fixed(first), mix=1.0)(cam, blank())[0, 0]
    np.testing.assert_allclose(refined, first + 0.7 * second, rtol=1e-6)


def test_parts_of_objects_and_whole_pictures_lose_against_what_agrees_with_the_map():
    object_, part = boxes((4, 4, 14, 24)), boxes((4, 4, 8, 8))
    segmenter = Fixed(part, object_, boxes((0, 0, *SIZE)), ious=[0.95, 0.9, 0.99])
    cam, capture = maps(0.8 * boxes((5, 5, 13, 22))), blank()
    both = PromptedRefine(segmenter, mix=1.0)(cam, capture)
    predicted = PromptedRefine(segmenter, mix=1.0, choose="predicted", **ANY)
    assert np.array_equal(both[0, 0], object_)
    assert np.array_equal(predicted(cam, capture)[0, 0], part)


# -- what is asked, and what is left alone


def test_maps_that_point_nowhere_are_returned_as_they_are():
    segmenter = Planted(by_colour)
    flat, weak = np.full(SIZE, 0.9), 0.4 * boxes((2, 2, 9, 9))
    cam = maps(np.zeros(SIZE), flat, weak)
    assert torch.equal(PromptedRefine(segmenter)(cam, blank()), cam)
    assert segmenter.embedded == segmenter.asked == 0


def test_a_flat_map_takes_no_pixel_from_others():
    object_ = boxes((4, 4, 14, 24))
    cam = maps(np.full(SIZE, 0.9), 0.6 * object_)
    refined = PromptedRefine(Fixed(object_), mix=1.0)(cam, blank())[0]
    assert torch.equal(refined[0], cam[0, 0])
    assert np.array_equal(refined[1], object_)


def test_a_map_is_mixed_with_its_mask():
    """By hand: (1 - 0.75) s + 0.75 m."""
    object_ = boxes((4, 4, 14, 24))
    score = np.where(boxes((6, 6, 12, 30)), 0.8, 0.2)
    refined = PromptedRefine(Fixed(object_), mix=0.75, **ANY)(maps(score), blank())[0, 0].numpy()
    np.testing.assert_allclose(np.unique(refined[object_].round(5)), [0.8, 0.95], atol=1e-6)
    np.testing.assert_allclose(np.unique(refined[~object_].round(5)), [0.05, 0.2], atol=1e-6)


def test_without_mixing_nothing_changes():
    cam = torch.rand(2, 3, 4, 6)
    refined = PromptedRefine(Planted(by_colour), mix=0.0, **ANY)(cam, blank(2))
    torch.testing.assert_close(refined, camkit.resize_cam(cam, SIZE), rtol=0, atol=1e-6)


def test_small_components_are_not_asked_for():
    speck, object_ = boxes((20, 30, 21, 31)), boxes((4, 4, 14, 24))
    segmenter, cam = Fixed(object_), maps(0.8 * (speck | object_))
    refined = PromptedRefine(segmenter, mix=1.0, min_area=2 / math.prod(SIZE))(cam, blank())
    assert len(segmenter.prompts) == 1
    np.testing.assert_allclose(refined[0, 0], object_ + 0.8 * speck, rtol=1e-6)


@every_rule
def test_a_picture_is_embedded_once_for_all_classes_parts_and_rounds(rule):
    segmenter = Planted(by_colour)
    cam, capture = torch.rand(2, 5, 4, 6), blank(2)
    refine = PromptedRefine(segmenter, rule=rule, rounds=3, min_area=0.0, **ANY)
    refine(cam, capture)
    assert segmenter.embedded == 2
    assert segmenter.asked > 10
    refine(cam.flip(1), capture)
    assert segmenter.embedded == 2  # kept from before
    refine = dataclasses.replace(refine, cache=0)
    refine(cam, capture)
    refine(cam, capture)
    assert segmenter.embedded == 6


def test_rounds_start_from_the_mask_of_the_round_before():
    object_ = boxes((4, 4, 14, 24))
    segmenter = Fixed(object_)
    PromptedRefine(segmenter, rounds=5)(maps(0.8 * boxes((5, 5, 13, 22))), blank())
    assert [prompt.box for prompt in segmenter.prompts] == [(5, 5, 21, 12), (4, 4, 23, 13)]


# -- several classes


def contested_maps():
    """Two classes beside each other, the first one higher on average and on the right."""
    left, right = boxes((4, 4, 14, 18)), boxes((4, 18, 14, 30))
    return maps(0.9 * right + 0.55 * left * 0, 0.6 * left)


def test_two_classes_that_get_one_mask_are_settled_by_their_maps():
    both = boxes((4, 4, 14, 30))
    for order in ([0, 1], [1, 0]):
        cam, capture = contested_maps()[:, order], blank()
        region = PromptedRefine(Fixed(both), mix=1.0, **ANY)(cam, capture)[0, order]
        assert np.array_equal(region[0], both)  # 0.9 on 12 columns outweighs 0.6 on 14
        assert not region[1].any()
        pixel = PromptedRefine(Fixed(both), mix=1.0, contested="pixel", **ANY)(cam, capture)[
            0, order
        ]
        assert np.array_equal(pixel[0], boxes((4, 18, 14, 30)))
        assert np.array_equal(pixel[1], boxes((4, 4, 14, 18)))


@pytest.mark.parametrize("contested", ["region", "pixel"])
@every_rule
def test_permuted_classes_give_permuted_maps_to_the_bit(rule, contested):
    segmenters = [
        Planted(by_colour),
        Fixed(boxes((2, 2, 20, 30))),
        lambda _, prompts: blobs(prompts),
    ]
    for segmenter in segmenters:
        settings = {"min_area": 0.0, **ANY, "contested": contested}
        refine = PromptedRefine(segmenter, rule=rule, rounds=2, background_score=0.3, **settings)
        cam, capture = torch.rand(2, 6, 4, 6), blank(2)
        cam[:, 5] = cam[:, 4]  # equal maps too
        refined = refine(cam, capture)
        assert not torch.equal(refined, camkit.resize_cam(cam, SIZE))
        for seed in range(3):
            order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(refine(cam[:, order], capture), refined[:, order])


def blobs(prompts):
    """Discs around the first point: masks of neighbours overlap."""
    rows, cols = np.indices(SIZE)
    discs = [(rows - p.points[0, 1]) ** 2 + (cols - p.points[0, 0]) ** 2 < 50 for p in prompts]
    return np.stack(discs)[:, None], np.ones((len(prompts), 1))


def test_a_real_model_gives_permuted_maps_too():
    refine = PromptedRefine(
        tiny_segmenter("SamModel"), rule="samrefiner", choose="agreement", **ANY
    )
    cam, capture = torch.rand(1, 5, 4, 6), blank()
    refined = refine(cam, capture)
    assert not torch.equal(refined, camkit.resize_cam(cam, SIZE))
    order = [3, 1, 4, 0, 2]
    assert torch.equal(refine(cam[:, order], capture), refined[:, order])


def test_a_crf_and_a_mask_can_follow():
    object_ = boxes((4, 4, 14, 24))
    refine = chain(PromptedRefine(Fixed(object_)), camkit.DenseCRF(steps=1))
    cam = refine(maps(0.8 * boxes((5, 5, 13, 22))), captured(torch.full((1, 3, *SIZE), 0.5)))
    assert (drawn(cam)[0].numpy() == object_).mean() > 0.9  # a CRF without edges rounds corners


# -- parts


def test_pieces_whose_boxes_overlap_are_one_part():
    """By hand: an L and a dot in its corner; a dot further away; a merged box that meets it."""
    angle = boxes((2, 2, 12, 4), (10, 4, 12, 14))
    dot, far, corner = boxes((4, 8, 6, 10)), boxes((2, 20, 4, 22)), boxes((13, 15, 14, 16))
    parts = parts_of(angle | dot | far | corner, 1.0)
    found = sorted([len(part.pieces), int(part.mask.sum()), *part.box] for part in parts)
    pixels = int((angle | dot).sum())
    assert found == [[1, 1, 15, 13, 15, 13], [1, 4, 20, 2, 21, 3], [2, pixels, 2, 2, 13, 11]]
    bridge = boxes((5, 13, 14, 16))  # its box meets the dot at neither, but that of the L
    assert sorted(len(part.pieces) for part in parts_of(angle | dot | far | bridge, 1.0)) == [1, 2]


def test_pixels_that_touch_at_corners_are_one_piece():
    (part,) = parts_of(np.eye(5, dtype=bool), 1.0)
    assert len(part.pieces) == 1


def test_each_piece_gets_the_middle_of_its_top_as_a_point():
    pieces = boxes((2, 2, 9, 9)), boxes((4, 20, 5, 23)), boxes((0, 30, 9, 36))
    scores = 0.8 * pieces[0] + 0.7 * pieces[1] + 0.6 * pieces[2]
    scores[2, 8], scores[4, 22] = 0.85, 0.9  # one is within 90 %, so its place does not count
    prompt = Peaks()(Part(pieces), scores)
    assert prompt.points.tolist() == [[5, 5], [22, 4], [32, 2]]  # not at the edge of the picture
    assert Peaks(top=1.0)(Part(pieces), scores).points[0].tolist() == [8, 2]
    assert prompt.positive.all()
    assert prompt.box == (2, 0, 35, 8)
    assert prompt.mask is None
    assert Peaks(box=False)(Part(pieces), scores).box is None


# -- the rules of SAMRefiner, against a slow plain version


def slow_distance(mask):
    """Distance of each pixel to the nearest pixel outside, by comparing all pairs."""
    outside = np.argwhere(~mask)
    distance = np.zeros(mask.shape)
    for row, col in np.argwhere(mask):
        distance[row, col] = math.sqrt(((outside - [row, col]) ** 2).sum(1).min())
    return distance


def slow_prompt(mask, gamma, strength):
    distance, away = slow_distance(mask), slow_distance(~mask)
    rows, cols = np.nonzero(mask)
    deepest, furthest = (-1.0, None), (0.0, None)
    for row in range(mask.shape[0]):
        for col in range(mask.shape[1]):
            if distance[row, col] > deepest[0] + 1e-6:
                deepest = distance[row, col], [col, row]
            in_box = rows.min() <= row <= rows.max() and cols.min() <= col <= cols.max()
            if in_box and away[row, col] > furthest[0] + 1e-6:
                furthest = away[row, col], [col, row]
    logits = np.full(mask.shape, -strength)
    for row, col in zip(rows, cols, strict=True):
        gap = distance[row, col] - deepest[0]
        logits[row, col] = strength * math.exp(-(gap**2) * gamma / mask.sum())
    box = (cols.min(), rows.min(), cols.max(), rows.max())
    return [point for _, point in (deepest, furthest) if point is not None], box, logits


MASKS = {
    "rectangle": boxes((3, 4, 10, 20)),
    "L": boxes((2, 2, 20, 8), (14, 8, 20, 30)),
    "ring": boxes((2, 2, 20, 24)) & ~boxes((6, 8, 15, 18)),
    "at the edge": boxes((0, 0, 9, 36)),
    "pixel": boxes((5, 5, 6, 6)),
    "noise": np.random.default_rng(0).random(SIZE) > 0.7,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("gamma", [4.0, 1.0])
def test_prompts_are_those_of_samrefiner(mask, gamma):
    rule = SamRefinerPrompts(gamma=gamma, strength=15.0)
    prompt = rule(Part((mask,)), np.zeros(SIZE))
    points, box, logits = slow_prompt(mask, gamma, 15.0)
    assert prompt.points.tolist() == points
    assert prompt.positive.tolist() == [True, False][: len(points)]
    assert prompt.box == box
    np.testing.assert_allclose(prompt.mask, logits, rtol=1e-5)
    np.testing.assert_allclose(slow_distance(mask), ndimage.distance_transform_edt(mask))


def test_a_mask_that_fills_the_picture_has_its_point_in_the_middle():
    prompt = SamRefinerPrompts()(Part((np.ones((9, 9), bool),)), np.zeros((9, 9)))
    assert prompt.points.tolist() == [[4, 4]]


def test_sides_of_a_box_move_where_the_strip_looks_like_the_object():
    """By hand: a box of 20 x 40 moves by 2 rows or 4 columns, on the sides that look alike."""
    size = (60, 90)
    part = Part((boxes((20, 30, 41, 71), size=size),))
    alike = boxes((20, 20, 30, 71), size=size)  # half of the left strip, nothing else outside
    assert moved_box(part, alike, 0.4) == (26, 20, 70, 40)
    assert moved_box(part, alike, 0.6) == (30, 20, 70, 40)
    assert moved_box(part, np.ones(size, bool), 0.5) == (26, 18, 74, 42)
    near = Part((boxes((1, 1, 41, 41), size=size),))
    assert moved_box(near, np.ones(size, bool), 0.5) == (1, 1, 43, 43)  # not out of the picture


def test_embeddings_decide_whether_sides_move_and_the_mask_prompt_weakens():
    """The right half of the picture has another embedding than the left one."""
    features = torch.zeros(2, 6, 9)
    features[0, :, :5], features[1, :, 5:] = 1.0, 1.0
    mask = boxes((10, 10, 30, 46), size=(60, 90))
    rule = SamRefinerPrompts(margin=0.5)
    prompt = rule(Part((mask,)), np.zeros((60, 90)), features)
    assert prompt.box == (6, 8, 48, 30)  # by 3.5 and 1.9 pixels, cut to whole ones
    assert prompt.mask.max() == 1.0
    assert SamRefinerPrompts()(Part((mask,)), np.zeros((60, 90)), features).box == (10, 10, 45, 29)


def test_a_margin_works_with_a_model_and_needs_features():
    rule = SamRefinerPrompts(margin=0.2)
    refine = PromptedRefine(tiny_segmenter("SamModel"), rule=rule, **ANY)
    assert refine(torch.rand(1, 2, 4, 6), blank()).shape == (1, 2, *SIZE)
    with pytest.raises(ValueError, match=r"has no method `features`; use margin=0"):
        PromptedRefine(Planted(by_colour), rule=rule)


def test_the_settings_of_the_paper():
    refine = PromptedRefine.samrefiner(Planted(by_colour), mix=1.0)
    shown = (refine.rule, refine.rounds, refine.choose, refine.mix)
    assert shown == (SamRefinerPrompts(0.0, 4.0, 30.0), 5, "predicted", 1.0)


# -- at the door


def test_a_plain_function_is_a_segmenter():
    object_ = boxes((4, 4, 14, 24))

    def ask(picture, prompts):
        assert picture.dtype == np.uint8
        count = len(prompts)
        return torch.from_numpy(object_).expand(count, 1, *SIZE), torch.ones(count, 1)

    refined = PromptedRefine(ask, mix=1.0)(maps(0.8 * boxes((5, 5, 13, 22))), blank())
    assert np.array_equal(refined[0, 0], object_)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((np.zeros((1, 3, 2, 2), bool), np.zeros((1, 3))), r"24 rows, 36 columns\), got \(1, 3, 2"),
        ((np.zeros((3, *SIZE), bool), np.zeros(3)), r"must return masks of shape \(1 prompts, ma"),
        (
            (np.full((1, 3, *SIZE), 0.4), np.zeros((1, 3))),
            "0 and 1, got float64 up to 0.4; compare",
        ),
        ((np.zeros((1, 3, *SIZE), bool), np.zeros((3,))), r"each of \(1, 3\) masks, got \(3,\)"),
    ],
    ids=["size", "axes", "logits", "ious"],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_answers_of_another_form_are_refused(answer, words):
    refine = PromptedRefine(lambda *_: answer)
    with pytest.raises(ValueError, match=words):
        refine(maps(0.8 * boxes((5, 5, 13, 22))), blank())


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (None, "NoneType"),
        (np.zeros((2, 1, *SIZE), bool), "ndarray"),
        ((np.zeros((1, 1, *SIZE), bool), np.zeros((1, 1)), None), "tuple of 3"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_answers_must_be_masks_and_their_predicted_iou(answer, got):
    refine = PromptedRefine(lambda *_: answer)
    with pytest.raises(TypeError, match=rf"predicted IoU, \(masks, ious\), got {got}$"):
        refine(maps(0.8 * boxes((5, 5, 13, 22))), blank())


def test_a_function_may_draw_on_its_picture_and_answer_in_half_precision():
    seen = []

    def ask(picture, prompts):
        seen.append(picture.copy())
        picture[:] = 0
        ious = torch.ones(len(prompts), 1, dtype=torch.bfloat16)
        return torch.from_numpy(boxes((4, 4, 14, 24))).expand(len(prompts), 1, *SIZE), ious

    PromptedRefine(ask, rounds=2)(maps(0.8 * boxes((5, 5, 13, 22))), blank())
    assert len(seen) == 2
    assert np.array_equal(*seen)


@pytest.mark.usefixtures("no_shape_checks")
def test_a_rule_says_whether_it_reads_the_embedding():
    with pytest.raises(TypeError, match="has no attribute `needs_features`; set it to False"):
        PromptedRefine(Planted(by_colour), rule=lambda *_: None)


@pytest.mark.usefixtures("no_shape_checks")
def test_a_rule_must_be_a_name_or_a_rule():
    with pytest.raises(ValueError, match="one of peaks, samrefiner, got 'points'"):
        PromptedRefine(Planted(by_colour), rule="points")
    with pytest.raises(TypeError, match="a rule such as Peaks"):
        PromptedRefine(Planted(by_colour), rule=Peaks)


def test_it_belongs_to_the_refiners_that_follow_edges():
    refine = PromptedRefine(Planted(by_colour))
    first, edges = split_refine([camkit.Propagate(), refine, camkit.DenseCRF()])
    assert first == (camkit.Propagate(),)
    assert edges == (refine, camkit.DenseCRF())
    method = camkit.Method(refine=(camkit.Propagate(), refine))
    assert "Planted()" in method.settings()["refine"][1]


def test_segmenters_are_found_inside_of_chains():
    refine = PromptedRefine(Planted(by_colour))
    small = camkit.refiners.AtReducedSize(chain(camkit.DenseCRF(), refine))
    assert segmenters_in([camkit.Propagate(), small]) == ("Planted()",)
    assert segmenters_in([camkit.Propagate(), lambda cam, _: cam]) == ()


def test_the_segmenter_of_a_refined_seed_is_among_the_settings():
    refine = PromptedRefine(Planted(by_colour))
    refined = camkit.seeds.RefinedSeed(camkit.seeds.GradientSeed(), (refine,))
    both = camkit.seeds.FusedSeed((camkit.seeds.GradientSeed(), refined))
    assert camkit.Method(both, refine=()).settings()["segmenters"] == ["Planted()"]


def test_a_refiner_can_be_sent_to_another_process():
    refine = PromptedRefine(tiny_segmenter("SamModel"), rule="samrefiner", **ANY)
    cam, capture = torch.rand(1, 2, 4, 6), blank()
    wanted = refine(cam, capture)
    sent = pickle.loads(pickle.dumps(refine))
    assert torch.equal(sent(cam, capture), wanted)
    assert repr(sent) == repr(refine)
