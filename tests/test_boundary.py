"""Boundary IoU against hand counts, scipy's erosion and what must hold of any pair of masks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.ndimage import binary_erosion

from camkit.score import (
    boundary_confusion,
    confusion_matrix,
    mean_iou,
    paired_gain,
)
from camkit.score.confusion import Overlap


def square(size: int, start: int, stop: int) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.int64)
    mask[start:stop, start:stop] = 1
    return mask


def by_erosion(truth: np.ndarray, predicted: np.ndarray, classes: int, pixels: int) -> np.ndarray:
    """Hit, true, predicted of each class: 3x3 erosions, one after another, class by class."""
    counts = []
    for value in range(classes):
        bands = []
        for mask in (truth == value, predicted == value):
            inside = binary_erosion(mask, np.ones((3, 3)), iterations=pixels, border_value=0)
            bands.append(mask & ~inside)
        counts.append([(bands[0] & bands[1]).sum(), bands[0].sum(), bands[1].sum()])
    return np.array(counts).T


def blobs(rng: np.random.Generator, classes: int, size: tuple[int, int]) -> np.ndarray:
    coarse = rng.integers(0, classes, (1 + size[0] // 9, 1 + size[1] // 9))
    return np.kron(coarse, np.ones((9, 9), np.int64))[: size[0], : size[1]]


def boundary_overlap(truth, predicted, *, num_classes, **settings) -> Overlap:
    """Hit, true and predicted pixels of every class, without the last one, "no outline"."""
    whole = Overlap.of(boundary_confusion(truth, predicted, num_classes=num_classes, **settings))
    return Overlap(whole.hit[:-1], whole.true[:-1], whole.predicted[:-1])


def counts(overlap: Overlap) -> np.ndarray:
    return torch.stack([overlap.hit, overlap.true, overlap.predicted]).numpy()


def test_a_square_moved_by_one_pixel_by_hand():
    # 2 % of 20x20 is one pixel: rings of 4 * 5 = 20; two of their sides lie on one another
    truth, predicted = square(20, 5, 11), square(20, 5, 11).roll(1, dims=1)
    overlap = boundary_overlap(truth, predicted, num_classes=2)
    assert (overlap.true[1], overlap.predicted[1]) == (20, 20)
    assert overlap.hit[1] == 10  # top and bottom rows, five columns each
    assert overlap.class_iou()[1] == pytest.approx(10 / 30)


def test_the_edge_of_the_image_is_an_outline():
    whole = torch.ones(30, 40, dtype=torch.int64)
    overlap = boundary_overlap(whole, whole, num_classes=2)
    assert overlap.true.tolist() == [0, 30 * 40 - 28 * 38]


@pytest.mark.parametrize(("width", "pixels"), [(0.02, 3), (0.001, 1), (0.1, 14), (1.0, 144)])
def test_counts_are_those_of_plain_erosions(width, pixels):
    size = (80, 120)  # its diagonal is 144.2
    rng = np.random.default_rng(pixels)
    truth, predicted = blobs(rng, 4, size), blobs(rng, 4, size)
    predicted[:40] = truth[:40]
    ours = boundary_overlap(
        torch.from_numpy(truth), torch.from_numpy(predicted), num_classes=5, width=width
    )
    np.testing.assert_array_equal(counts(ours), by_erosion(truth, predicted, 5, pixels))


def test_real_masks_count_as_by_plain_erosions(real_data):
    folder = real_data / "voc12_animals" / "SegmentationClass"
    for path in sorted(folder.glob("*.png"))[:3]:
        truth = np.array(Image.open(path)).astype(np.int64)
        truth[truth == 255] = 0
        predicted = np.roll(truth, (4, -9), (0, 1))
        pixels = round(0.02 * math.hypot(*truth.shape))
        ours = boundary_overlap(
            torch.from_numpy(truth), torch.from_numpy(predicted), num_classes=21
        )
        np.testing.assert_array_equal(counts(ours), by_erosion(truth, predicted, 21, pixels))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_what_is_predicted_under_ignored_pixels_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = blobs(rng, 3, (40, 50)), blobs(rng, 3, (40, 50))
    ignored = blobs(rng, 4, (40, 50)) == 0
    truth[ignored] = 255
    other = np.where(ignored, rng.integers(0, 3, ignored.shape), predicted)
    first, second = (
        counts(boundary_overlap(torch.from_numpy(truth), torch.from_numpy(one), num_classes=3))
        for one in (predicted, other)
    )
    np.testing.assert_array_equal(first, second)


def test_a_mask_right_wherever_it_counts_scores_one():
    truth = square(60, 20, 40)
    drawn = truth.clone()
    drawn[18:42, 18:42] = 255  # an ignored line around the object, as in VOC
    drawn[22:38, 22:38] = 1
    overlap = boundary_overlap(drawn, truth, num_classes=2)
    assert torch.equal(overlap.hit, overlap.true)
    assert torch.equal(overlap.hit, overlap.predicted)
    assert overlap.true.sum() > 0


def test_an_ignored_line_is_no_outline_that_a_mask_too_large_could_hit():
    drawn = torch.zeros(100, 100, dtype=torch.int64)
    drawn[28:72, 28:72] = 255
    drawn[32:68, 32:68] = 1
    everything = torch.ones(100, 100, dtype=torch.int64)
    overlap = boundary_overlap(drawn, everything, num_classes=2)
    assert overlap.true[1] > 0
    assert overlap.hit[1] == 0
    assert overlap.predicted[1] == 100 * 100 - 94 * 94  # three pixels along the edge


def test_an_ignored_prediction_is_background():
    truth, predicted = square(40, 10, 30), square(40, 10, 30)
    banded = predicted.clone()
    banded[predicted == 0] = 255
    np.testing.assert_array_equal(
        counts(boundary_overlap(truth, banded, num_classes=2)),
        counts(boundary_overlap(truth, predicted, num_classes=2)),
    )


def test_an_image_without_a_counted_pixel_counts_nothing():
    truth = torch.full((10, 12), 255)
    assert not boundary_confusion(truth, torch.zeros(10, 12).long(), num_classes=3).any()


def test_the_inside_of_large_objects_does_not_hide_a_rough_outline():
    truth = torch.zeros(200, 200, dtype=torch.int64)
    truth[20:180, 20:180] = 1
    rough = truth.clone()
    rough[20:28] = 0
    area = mean_iou(confusion_matrix(truth, rough, num_classes=2), classes=[1])
    outline = boundary_overlap(truth, rough, num_classes=2).mean_iou(classes=[1])
    assert float(area) == pytest.approx(152 / 160)
    assert float(outline) < 0.8


def test_the_matrix_has_rows_that_no_prediction_moves():
    rng = np.random.default_rng(3)
    truth = torch.from_numpy(blobs(rng, 4, (50, 60)))
    truth[:5] = 255
    matrices = []
    for _ in range(2):
        predicted = torch.from_numpy(blobs(rng, 4, (50, 60)))
        matrix = boundary_confusion(truth, predicted, num_classes=4)
        overlap = boundary_overlap(truth, predicted, num_classes=4)
        assert mean_iou(matrix, classes=range(4)) == overlap.mean_iou()
        assert matrix.sum() == truth.ne(255).sum() + overlap.true.sum()
        assert matrix.min() >= 0
        matrices.append(matrix)
    assert torch.equal(matrices[0].sum(1), matrices[1].sum(1))
    assert not torch.equal(matrices[0], matrices[1])


def test_gains_in_boundary_iou_are_resampled_like_any_other():
    rng = np.random.default_rng(4)
    sides = {"base": [], "other": []}
    for _ in range(6):
        truth = blobs(rng, 3, (40, 40))
        better = np.where(rng.random(truth.shape) < 0.02, 0, truth)
        for name, mask in (("base", blobs(rng, 3, (40, 40))), ("other", better)):
            matrix = boundary_confusion(
                torch.from_numpy(truth), torch.from_numpy(mask), num_classes=3
            )
            sides[name].append(matrix)
    gain = paired_gain(
        torch.stack(sides["base"]), torch.stack(sides["other"]), classes=range(3), resamples=500
    )
    summed = [mean_iou(torch.stack(side).sum(0), classes=range(3)) for side in sides.values()]
    assert gain.gain == pytest.approx(float(summed[1] - summed[0]))
    assert gain.low > 0


@pytest.mark.usefixtures("no_shape_checks")
def test_masks_of_different_size_are_refused():
    with pytest.raises(ValueError, match="must have one size, got 4x4 and 5x5"):
        boundary_overlap(square(4, 1, 2), square(5, 1, 2), num_classes=2)


@pytest.mark.parametrize("width", [0.0, -0.1, 1.5, float("nan")])
def test_an_impossible_width_is_refused(width):
    with pytest.raises(ValueError, match=r"share of the image diagonal in \(0, 1\], got"):
        boundary_overlap(square(4, 1, 2), square(4, 1, 2), num_classes=2, width=width)


def test_values_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match="`predicted` must hold 0 to 1, or 255"):
        boundary_overlap(square(4, 1, 2), square(4, 1, 2) * 2, num_classes=2)
