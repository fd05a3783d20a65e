"""Localisation by boxes: hand-made maps, and a slow version by connected components."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from camkit.score import box_accuracy, box_hits, resize_boxes

TWO_PARTS = torch.zeros(40, 40, dtype=torch.float64)
TWO_PARTS[5:15, 5:15] = 1.0  # the strong part is small
TWO_PARTS[20:36, 18:38] = 0.5
SMALL, LARGE = [5, 5, 15, 15], [18, 20, 38, 36]  # one pixel wider and higher, as the paper has it
HALVES = torch.tensor([0.25, 0.75], dtype=torch.float64)


def found(boxes: list[list[int]], **settings: object) -> list[list[bool]]:
    truth = torch.tensor(boxes)
    return box_hits(TWO_PARTS, truth, thresholds=HALVES, **settings).tolist()


def test_every_part_is_tried_as_a_box():
    assert found([SMALL], ious=(1.0,)) == [[True, True]]
    assert found([LARGE], ious=(1.0,)) == [[True, False]]


def test_the_largest_part_alone_is_tried_when_asked():
    assert found([SMALL], ious=(1.0,), components="largest") == [[False, True]]
    assert found([LARGE], ious=(1.0,), components="largest") == [[True, False]]


def test_one_of_several_true_boxes_is_enough():
    assert found([[0, 0, 1, 1], LARGE], ious=(1.0,), components="largest") == [[True, False]]


def test_overlaps_count_from_the_asked_iou_on():
    half = [5, 5, 15, 26]  # 11 x 22 pixels, half of them in the 11 x 11 of the small part
    assert found([half], ious=(0.5, 0.51)) == [[True, True], [False, False]]


def test_a_box_ends_where_the_image_ends():
    cam = torch.zeros(20, 30, dtype=torch.float64)
    cam[12:, 25:] = 1.0
    hits = box_hits(cam, torch.tensor([[25, 12, 29, 19]]), thresholds=HALVES, ious=(1.0,))
    assert hits.all()


def test_an_empty_map_finds_nothing():
    hits = box_hits(torch.zeros(20, 20), torch.tensor([[3, 3, 9, 9]]), ious=(0.3,))
    assert hits.shape == (1, 1000)
    assert not hits.any()


def test_boxes_are_those_of_connected_components():
    rng = np.random.default_rng(0)
    cam = ndimage.gaussian_filter(rng.random((64, 80)), 5)
    cam = (cam - cam.min()) / (cam.max() - cam.min())
    truth = np.array([[10, 20, 40, 50], [60, 5, 70, 30]])
    thresholds = np.arange(0, 1, 0.05)
    best = []
    for threshold in thresholds:
        levels = np.floor(cam * 255)
        above = levels > int(threshold * levels.max())
        ious = [0.0]
        for rows, cols in ndimage.find_objects(ndimage.label(above, np.ones((3, 3)))[0]):
            box = np.zeros((64 + 1, 80 + 1), bool)
            box[rows.start : rows.stop + 1, cols.start : cols.stop + 1] = True
            box = box[:64, :80]
            for left, top, right, bottom in truth:
                other = np.zeros((64, 80), bool)
                other[top : bottom + 1, left : right + 1] = True
                ious.append((box & other).sum() / (box | other).sum())
        best.append(max(ious))
    hits = box_hits(
        torch.from_numpy(cam),
        torch.from_numpy(truth),
        ious=(0.1, 0.2, 0.3, 0.4, 0.5),
        thresholds=torch.from_numpy(thresholds),
    )
    known = np.array(best)[None] >= np.array([[0.1], [0.2], [0.3], [0.4], [0.5]])
    assert known.any()
    assert not known.all()
    np.testing.assert_array_equal(hits.numpy(), known)


def test_a_hole_has_an_outline_and_so_a_box_of_its_own():
    cam = torch.zeros(40, 40, dtype=torch.float64)
    cam[5:35, 5:35] = 1.0
    cam[15:25, 15:25] = 0.0
    hole = torch.tensor([[14, 14, 26, 26]])  # the pixels around it, and the one more
    assert box_hits(cam, hole, thresholds=HALVES, ious=(1.0,)).all()


def test_accuracy_takes_the_best_threshold_for_each_overlap():
    # three images, two overlaps, three thresholds
    hits = torch.tensor(
        [
            [[True, True, False], [False, False, False]],
            [[True, True, True], [True, False, False]],
            [[False, True, True], [False, False, True]],
        ]
    )
    thresholds = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    accuracy = box_accuracy(hits, thresholds)
    assert accuracy.by_iou == pytest.approx((1.0, 1 / 3))
    assert accuracy.mean == pytest.approx(2 / 3)
    assert accuracy.thresholds == pytest.approx((0.2, 0.1))


def test_boxes_move_with_their_image():
    boxes = torch.tensor([[0.0, 0.0, 449.0, 349.0], [45.0, 35.0, 90.0, 70.0]])
    moved = resize_boxes(boxes, size=(350, 450))
    assert moved.tolist() == [[0, 0, 223, 223], [22, 22, 44, 44]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cam": torch.full((4, 4), 1.5)}, r"`cam` must lie in \[0, 1\]"),
        ({"cam": torch.full((4, 4), float("nan"))}, "`cam` must be finite, got NaN"),
        ({"boxes": torch.tensor([[9, 9, 3, 3]])}, "pixels, not width and height"),
        ({"boxes": torch.zeros(0, 4).long()}, "at least one box"),
        ({"thresholds": torch.tensor([1.0])}, r"thresholds in \[0, 1\)"),
        ({"ious": ()}, "at least one value each"),
    ],
)
def test_what_cannot_be_scored_is_refused(changes, words):
    settings = {"cam": torch.rand(8, 8), "boxes": torch.tensor([[1, 1, 2, 2]])} | changes
    with pytest.raises(ValueError, match=words):
        box_hits(**settings)


@pytest.mark.usefixtures("no_shape_checks")
def test_unknown_components_are_refused():
    with pytest.raises(ValueError, match='"all" or "largest", got "biggest"'):
        box_hits(TWO_PARTS, torch.tensor([SMALL]), components="biggest")


@pytest.mark.usefixtures("no_shape_checks")
def test_hits_of_other_thresholds_are_refused():
    with pytest.raises(ValueError, match=r"at 1000 thresholds, got shape \(2, 3, 4\)"):
        box_accuracy(torch.zeros(2, 3, 4, dtype=torch.bool))
