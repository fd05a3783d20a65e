"""Confusion matrices, mean IoU and sweeps."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from optional import torchmetrics

from camkit.mask import to_mask
from camkit.score import (
    THRESHOLDS,
    ScoreWarning,
    best_threshold,
    class_iou,
    confusion_matrix,
    mean_iou,
    sweep_confusions,
    threshold_curve,
)

# classes: background, a, b (predicted, never true), c (neither)
ABSENT_BUT_PREDICTED = torch.tensor([[6, 2, 2, 0], [1, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
IOU = [6 / 11, 4 / 7, 0.0, float("nan")]


def masks(num_classes: int, *shape: int) -> torch.Tensor:
    mask = torch.randint(0, num_classes, shape)
    return mask.masked_fill(torch.rand(shape) < 0.1, 255)


def test_rows_are_truth_and_columns_are_prediction():
    truth = torch.tensor([[0, 0, 1, 1, 2]])
    predicted = torch.tensor([[0, 1, 1, 2, 2]])
    confusion = confusion_matrix(truth, predicted, num_classes=3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert confusion.dtype == torch.int64


def test_ignored_truth_is_left_out():
    truth = torch.tensor([[255, 1]], dtype=torch.uint8)
    predicted = torch.tensor([[1, 1]], dtype=torch.uint8)
    assert confusion_matrix(truth, predicted, num_classes=2).tolist() == [[0, 0], [0, 1]]


def test_an_ignored_prediction_counts_as_background():
    truth = torch.tensor([[0, 1, 1]])
    predicted = torch.tensor([[255, 255, 1]])
    assert confusion_matrix(truth, predicted, num_classes=2).tolist() == [[1, 0], [1, 1]]


def test_an_ignore_band_moves_no_score():
    cam, truth = torch.rand(2, 3, 20, 20), masks(4, 2, 20, 20)
    plain = confusion_matrix(truth, to_mask(cam, background_score=0.7), num_classes=4)
    banded = to_mask(cam, background_score=0.7, ignore_below=0.3)
    assert (banded == 255).any()
    assert torch.equal(confusion_matrix(truth, banded, num_classes=4), plain)


def test_a_batch_counts_as_the_sum_of_its_images():
    truth, predicted = masks(5, 3, 8, 9), masks(5, 3, 8, 9)
    each = [confusion_matrix(t, p, num_classes=5) for t, p in zip(truth, predicted, strict=True)]
    assert torch.equal(confusion_matrix(truth, predicted, num_classes=5), sum(each))


def test_class_iou_by_hand():
    torch.testing.assert_close(
        class_iou(ABSENT_BUT_PREDICTED), torch.tensor(IOU, dtype=torch.float64), equal_nan=True
    )


@pytest.mark.parametrize(
    ("definition", "known"),
    [
        ("present", (IOU[0] + IOU[1]) / 2),
        ("union", (IOU[0] + IOU[1]) / 3),
        ("psa", (IOU[0] + IOU[1]) / 4),
    ],
)
def test_the_three_definitions_differ_on_an_absent_but_predicted_class(definition, known):
    assert mean_iou(ABSENT_BUT_PREDICTED, definition=definition).item() == pytest.approx(known)


def test_the_mean_can_be_restricted_to_some_classes():
    assert mean_iou(ABSENT_BUT_PREDICTED, classes=[1]).item() == pytest.approx(4 / 7)


def test_present_classes_score_as_in_torchmetrics():
    truth, predicted = masks(6, 2, 30, 30), torch.randint(0, 6, (2, 30, 30))
    predicted[truth == 3] = 4
    truth[truth == 5] = 0  # class 5 is predicted, never true
    ours = confusion_matrix(truth, predicted, num_classes=6)
    jaccard = torchmetrics.MulticlassJaccardIndex(num_classes=6, average="none", ignore_index=255)
    per_class = jaccard(predicted, truth).double()
    torch.testing.assert_close(mean_iou(ours), per_class[:5].mean(), rtol=1e-6, atol=0)


def test_union_is_the_macro_mean_of_torchmetrics():
    truth, predicted = masks(4, 2, 30, 30), torch.randint(0, 6, (2, 30, 30))
    ours = confusion_matrix(truth, predicted, num_classes=8)
    macro = torchmetrics.MulticlassJaccardIndex(num_classes=8, average="macro", ignore_index=255)
    known = macro(predicted, truth).double()
    torch.testing.assert_close(mean_iou(ours, definition="union"), known, rtol=1e-6, atol=0)


def test_leading_axes_are_scored_one_by_one():
    confusions = torch.randint(0, 50, (2, 3, 4, 4))
    known = torch.stack([mean_iou(one) for one in confusions.flatten(0, 1)]).view(2, 3)
    assert torch.equal(mean_iou(confusions), known)


def test_no_pixel_at_all_has_no_mean_iou():
    assert mean_iou(torch.zeros(3, 3, dtype=torch.int64)).isnan()


@pytest.mark.parametrize(("value", "name"), [(3, "truth"), (-1, "truth"), (3, "predicted")])
def test_mask_values_beyond_the_classes_are_refused(value, name):
    given_masks = {"truth": torch.zeros(1, 2).long(), "predicted": torch.zeros(1, 2).long()}
    given_masks[name][0, 1] = value
    words = f"`{name}` must hold 0 to 2, or 255 to ignore, got {value}"
    with pytest.raises(ValueError, match=words):
        confusion_matrix(**given_masks, num_classes=3)


@pytest.mark.parametrize("num_classes", [0, 256])
def test_an_impossible_number_of_classes_is_refused(num_classes):
    with pytest.raises(ValueError, match=f"lie in 1 to 255, got {num_classes}"):
        confusion_matrix(masks(1, 2, 2), masks(1, 2, 2), num_classes=num_classes)


@pytest.mark.usefixtures("no_shape_checks")
def test_masks_of_different_size_are_refused():
    with pytest.raises(ValueError, match="must have one size, got 2x2 and 2x3; resize"):
        confusion_matrix(masks(2, 2, 2), masks(2, 2, 3), num_classes=2)


@pytest.mark.usefixtures("no_shape_checks")
def test_an_unknown_definition_is_refused():
    with pytest.raises(ValueError, match='"present", "union" or "psa", got "macro"'):
        mean_iou(ABSENT_BUT_PREDICTED, definition="macro")


@pytest.mark.parametrize("classes", [[], [1, 1]])
def test_the_classes_of_a_mean_are_one_or_more_and_distinct(classes):
    with pytest.raises(ValueError, match="at least one class, none twice"):
        mean_iou(ABSENT_BUT_PREDICTED, classes=classes)


def test_the_classes_of_a_mean_must_exist():
    with pytest.raises(ValueError, match=r"from 0 \(background\) to 3, got \[4\]"):
        mean_iou(ABSENT_BUT_PREDICTED, classes=[4])


def slow_sweep(cam, classes, truth, thresholds, num_classes):
    drawn = [to_mask(cam[None], classes[None], background_score=float(t)) for t in thresholds]
    return torch.stack([confusion_matrix(truth, m[0], num_classes=num_classes) for m in drawn])


@settings(deadline=None, max_examples=30)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    classes=st.lists(st.integers(-1, 4), min_size=1, max_size=4),
    levels=st.sampled_from([2, 10, 25, 10**6]),
    rng_seed=st.integers(0, 10**6),
)
def test_a_sweep_equals_the_slow_loop_on_tied_values(dtype, classes, levels, rng_seed):
    torch.manual_seed(rng_seed)
    shape = (len(classes), 6, 7)
    cam = (torch.randint(0, levels + 1, shape, dtype=torch.float64) / levels).to(dtype)
    truth, asked, thresholds = masks(6, 6, 7), torch.tensor(classes), THRESHOLDS[::4]
    swept = sweep_confusions(cam, asked, truth, thresholds=thresholds, num_classes=6)
    assert torch.equal(swept, slow_sweep(cam, asked, truth, thresholds, 6))


def test_a_sweep_tries_every_hundredth_by_default():
    cam, classes, truth = (
        torch.randint(0, 101, (2, 20, 20)) / 100,
        torch.tensor([1, 0]),
        masks(3, 20, 20),
    )
    swept = sweep_confusions(cam, classes, truth, num_classes=3)
    assert torch.equal(swept, slow_sweep(cam, classes, truth, THRESHOLDS, 3))


def test_a_sweep_takes_uint8_truth_and_its_own_thresholds():
    cam, truth = torch.rand(2, 30, 40), masks(4, 30, 40).to(torch.uint8)
    classes, thresholds = torch.tensor([2, 0]), torch.tensor([0.0, 0.3, 1.0])
    swept = sweep_confusions(cam, classes, truth, thresholds=thresholds, num_classes=4)
    assert torch.equal(swept, slow_sweep(cam, classes, truth, thresholds, 4))


def test_the_default_thresholds_are_exact_hundredths():
    assert THRESHOLDS.tolist() == [step / 100 for step in range(96)]


def test_the_best_threshold_is_the_lowest_of_equals():
    worse, better = torch.tensor([[5, 5], [0, 5]]), torch.tensor([[9, 1], [0, 5]])
    best = best_threshold(torch.stack([worse, better, better]), torch.tensor([0.25, 0.5, 0.75]))
    assert best.threshold == 0.5
    assert best.mean_iou == pytest.approx((9 / 10 + 5 / 6) / 2)


def test_best_threshold_needs_a_pixel_of_the_chosen_classes():
    confusions = ABSENT_BUT_PREDICTED.expand(96, 4, 4)
    with pytest.raises(ValueError, match=r"none of the classes \[3\] has a true pixel"):
        best_threshold(confusions, classes=[3])


OBJECTS_AT_255 = {"truth": torch.tensor([[0, 255], [0, 255]])}


def test_masks_that_mark_objects_with_255_measure_nothing():
    counts = confusion_matrix(**OBJECTS_AT_255, predicted=torch.zeros(2, 2).long(), num_classes=2)
    words = "an empty mask would score 100 %; if the true masks mark objects with 255"
    for definition in ("present", "union", "psa"):
        with pytest.warns(ScoreWarning, match=words):
            mean_iou(counts, definition=definition)
    swept = counts.expand(2, 2, 2)
    for refuse in (best_threshold, threshold_curve):
        with pytest.raises(ValueError, match=words):
            refuse(swept, torch.tensor([0.25, 0.5]))
    assert mean_iou(counts, classes=[0]) == 1.0  # asked for, and measured
    assert mean_iou(counts[None]) == 1.0  # of one image among others


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_masks_and_counts_are_whole_numbers(dtype):
    masks = {name: torch.zeros(1, 2).long() for name in ("truth", "predicted")}
    for name in masks:
        wrong = masks | {name: masks[name].to(dtype)}
        with pytest.raises(TypeError, match=f"`{name}` must hold whole numbers .* got {dtype}"):
            confusion_matrix(**wrong, num_classes=2)
    with pytest.raises(TypeError, match=f"`confusion` must hold whole numbers .* got {dtype}"):
        mean_iou(torch.eye(2).to(dtype))


@pytest.mark.usefixtures("no_shape_checks")
def test_best_threshold_needs_the_thresholds_of_the_sweep():
    with pytest.raises(ValueError, match="each of the 3 matrices, got 96; pass those of sweep"):
        best_threshold(torch.ones(3, 2, 2).long())


@pytest.mark.parametrize("thresholds", [[0.5, 0.4], [0.5, 0.5], [-0.1, 0.5], [0.5, 1.1]])
def test_thresholds_must_ascend_within_the_range_of_a_cam(thresholds):
    with pytest.raises(ValueError, match=r"must ascend within \[0, 1\], each score once, got \["):
        sweep_confusions(
            torch.rand(1, 2, 2),
            torch.tensor([0]),
            masks(2, 2, 2),
            thresholds=torch.tensor(thresholds),
            num_classes=2,
        )


def test_a_sweep_needs_room_for_its_classes():
    with pytest.raises(ValueError, match="class 4 needs `num_classes` of 6 or more, got 5"):
        sweep_confusions(torch.rand(1, 2, 2), torch.tensor([4]), masks(2, 2, 2), num_classes=5)


@pytest.mark.usefixtures("no_shape_checks")
def test_a_sweep_needs_a_cam_at_the_size_of_the_truth():
    with pytest.raises(ValueError, match=r"size of `truth`, 4x4, got 2x2; use camkit.resize_cam"):
        sweep_confusions(torch.rand(1, 2, 2), torch.tensor([0]), masks(2, 4, 4), num_classes=2)
