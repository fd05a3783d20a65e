"""Curves over background scores, and pixel average precision against torchmetrics."""

import pytest
import torch
from optional import torchmetrics

from camkit.mask import to_mask
from camkit.score import (
    THRESHOLDS,
    average_precision,
    best_threshold,
    confusion_matrix,
    mean_iou,
    sweep_confusions,
    threshold_curve,
)


def exact(cams: torch.Tensor, truths: torch.Tensor) -> list[float]:
    """Average precision of each class by torchmetrics; a lost pixel scores 0."""
    average_precision = torchmetrics.BinaryAveragePrecision()
    winner = cams.argmax(1)
    known = []
    for index in range(cams.shape[1]):
        counted = truths != 255
        score = cams[:, index] * (winner == index)
        target = (truths == index + 1)[counted].long()
        known.append(float(average_precision(score[counted], target)))
    return known


def swept(cams: torch.Tensor, truths: torch.Tensor, **settings: object) -> torch.Tensor:
    classes = torch.arange(cams.shape[1])
    return sum(
        sweep_confusions(cam, classes, truth, num_classes=cams.shape[1] + 1, **settings)
        for cam, truth in zip(cams, truths, strict=True)
    )


def informed(steps: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps that know something of their truth, on a grid of ``steps`` scores or on none."""
    truths = torch.randint(0, 4, (5, 25, 30))
    cams = torch.rand(5, 3, 25, 30, dtype=torch.float64)
    for index in range(3):
        cams[:, index] = (cams[:, index] + 0.4 * (truths == index + 1)) / 1.4
    if steps is not None:
        cams = (cams * steps).round() / steps
    return cams, truths.masked_fill(torch.rand(truths.shape) < 0.1, 255)


def test_average_precision_by_hand():
    # by score: hit, miss, hit, then the rest at once: precision 1, 1/2, 2/3, 3/6
    cam = torch.tensor([[[0.85, 0.65, 0.45, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    truth = torch.tensor([[1, 0, 1, 1, 0, 0]])
    found = average_precision(sweep_confusions(cam, torch.tensor([0]), truth, num_classes=2))
    assert found.tolist() == pytest.approx([(1 + 2 / 3 + 3 / 6) / 3])


def test_scores_on_the_thresholds_have_the_exact_average_precision():
    cams, truths = informed(steps=20)
    # a score counts as above the threshold just below it
    thresholds = (torch.arange(21, dtype=torch.float64) / 20 - 0.01).clamp_min(0)
    found = average_precision(swept(cams, truths, thresholds=thresholds), thresholds)
    assert found.tolist() == pytest.approx(exact(cams, truths), abs=1e-6)


def test_scores_between_thresholds_are_off_by_less_than_a_step():
    cams, truths = informed(steps=None)
    known = exact(cams, truths)
    assert average_precision(swept(cams, truths)).tolist() == pytest.approx(known, abs=0.01)


def test_average_precision_of_maps_that_know_nothing_is_the_share_of_the_class():
    truths = torch.zeros(1, 10, 10, dtype=torch.int64)
    truths[0, :3] = 1
    blank = torch.zeros(1, 1, 10, 10)
    assert average_precision(swept(blank, truths)).tolist() == pytest.approx([0.3])


def test_a_perfect_map_has_average_precision_one_and_an_absent_class_none():
    truths = torch.zeros(1, 10, 10, dtype=torch.int64)
    truths[0, :3] = 1
    cams = torch.stack([(truths == 1) * 1.0, (truths == 2) * 1.0], dim=1)
    first, second = average_precision(swept(cams, truths)).tolist()
    assert first == pytest.approx(1.0)
    assert second != second  # NaN


def test_the_curve_is_the_mean_iou_at_each_background_score():
    cams, truths = informed(steps=None)
    curve = threshold_curve(swept(cams, truths))
    assert curve.thresholds == tuple(THRESHOLDS.tolist())
    for step in (0, 31, 95):
        masks = to_mask(cams, background_score=float(THRESHOLDS[step]))
        known = mean_iou(confusion_matrix(truths, masks, num_classes=4))
        assert curve.mean_iou[step] == pytest.approx(float(known), abs=1e-12)
    assert max(curve.mean_iou) == best_threshold(swept(cams, truths)).mean_iou


def test_the_area_is_the_mean_height_of_the_curve():
    # half the pixels are the object; its map is 0.5 there, so IoU is 1 below and 1/2 * 1/2 above
    truth = torch.tensor([[0, 1]])
    cam = torch.tensor([[[0.0, 0.5]]], dtype=torch.float64)
    thresholds = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    confusions = sweep_confusions(
        cam, torch.tensor([0]), truth, thresholds=thresholds, num_classes=2
    )
    curve = threshold_curve(confusions, thresholds)
    assert curve.mean_iou == (1.0, 1.0, 0.25, 0.25)
    assert curve.area == pytest.approx(0.25 + 0.25 * 0.625 + 0.5 * 0.25)


def test_a_curve_of_one_score_is_its_own_mean():
    one = torch.tensor([[[3, 1], [1, 3]]])
    curve = threshold_curve(one, torch.tensor([0.4], dtype=torch.float64))
    assert curve.area == pytest.approx(3 / 5)


def test_definition_and_classes_reach_the_mean():
    cams, truths = informed(steps=None)
    confusions = swept(cams, truths.masked_fill(truths == 2, 255))
    curves = {
        (definition, classes): threshold_curve(confusions, definition=definition, classes=classes)
        for definition in ("present", "psa")
        for classes in (None, (1, 3))
    }
    known = mean_iou(confusions[40], definition="psa", classes=(1, 3))
    assert curves["psa", (1, 3)].mean_iou[40] == pytest.approx(float(known))
    assert curves["psa", None].mean_iou[40] < curves["present", None].mean_iou[40]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("function", [threshold_curve, average_precision])
def test_thresholds_of_another_sweep_are_refused(function):
    cams, truths = informed(steps=None)
    with pytest.raises(ValueError, match="each of the 96 matrices, got 5"):
        function(swept(cams, truths), THRESHOLDS[:5])
