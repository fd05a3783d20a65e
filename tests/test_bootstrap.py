"""How sure a gain in mean IoU is."""

import pytest
import torch

from camkit.score import FEW_IMAGES, holm, mean_iou, paired_gain


def population(images: int, *, better: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Confusions of two methods on images of unequal difficulty; ``other`` is right more often."""
    truth = torch.randint(0, 3, (images, 60))
    luck = torch.rand(images, 60)
    hard = torch.rand(images, 1) * 0.5
    sides = []
    for error in (hard, hard * (1 - better)):
        predicted = torch.where(luck < error, (truth + 1) % 3, truth)
        cells = (torch.arange(images)[:, None] * 3 + truth) * 3 + predicted
        counts = torch.bincount(cells.flatten(), minlength=images * 9)
        sides.append(counts.view(images, 3, 3))
    return sides[0], sides[1]


def test_a_method_gains_nothing_over_itself():
    base, _ = population(20, better=0.1)
    gain = paired_gain(base, base.clone(), resamples=200)
    assert (gain.gain, gain.low, gain.high, gain.chance_below_zero) == (0.0, 0.0, 0.0, 0.0)
    assert (gain.chance_above_zero, gain.p_value) == (0.0, 1.0)


def test_the_gain_is_that_of_the_whole_set():
    base, other = population(40, better=0.2)
    gain = paired_gain(base, other, resamples=200)
    known = mean_iou(base.sum(0)).item(), mean_iou(other.sum(0)).item()
    assert (gain.mean_iou_base, gain.mean_iou_other) == known
    assert gain.low < known[1] - known[0] < gain.high


def test_two_images_give_the_three_outcomes_worked_by_hand():
    # drawn sets: twice the first (gain 0), one of each (both IoUs 4 / 12), twice the second (0)
    base = torch.tensor([[[4, 0], [0, 4]], [[4, 0], [0, 4]]])
    other = torch.tensor([[[4, 0], [0, 4]], [[0, 4], [4, 0]]])
    gain = paired_gain(base, other, resamples=20_000)
    assert (gain.low, gain.high) == (-1.0, 0.0)
    assert gain.gain == pytest.approx(4 / 12 - 1)
    assert gain.chance_below_zero == pytest.approx(0.75, abs=0.015)
    assert gain.p_value == pytest.approx(0.5, abs=0.03)  # a quarter of the sets lose nothing


def test_swapping_the_methods_mirrors_the_interval():
    base, other = population(30, better=0.05)
    forth, back = (paired_gain(a, b, resamples=500) for a, b in ((base, other), (other, base)))
    assert forth.low == pytest.approx(-back.high)
    assert forth.high == pytest.approx(-back.low)
    assert forth.chance_above_zero == back.chance_below_zero
    assert forth.p_value == back.p_value


def test_a_sure_gain_has_the_p_value_of_one_draw():
    base, other = population(100, better=0.9)
    gain = paired_gain(base, other, resamples=199)
    assert (gain.chance_above_zero, gain.p_value) == (1.0, 2 / 200)


def test_holm_multiplies_by_how_many_are_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("wrong", [float("nan"), -0.1, 1.5])
def test_holm_takes_probabilities(wrong):
    with pytest.raises(ValueError, match=rf"must lie in \[0, 1\], got {wrong}"):
        holm([0.01, wrong])


def test_working_in_chunks_changes_no_result(monkeypatch):
    base, other = population(30, better=0.05)
    whole = paired_gain(base, other, resamples=100)
    monkeypatch.setattr("camkit.score.bootstrap._CHUNK_BYTES", 8 * (4 * 30 + 24 * 3) * 7)
    assert paired_gain(base, other, resamples=100) == whole


def test_drawn_sets_without_the_chosen_class_are_left_out():
    base = torch.zeros(3, 2, 2, dtype=torch.int64)
    base[:, 0, 0] = 5
    base[0, 1] = torch.tensor([1, 1])  # only this image shows class 1
    other = base.clone()
    other[0, 1] = torch.tensor([0, 2])
    gain = paired_gain(base, other, classes=[1], resamples=200)
    assert (gain.low, gain.high) == (0.5, 0.5)


@pytest.mark.slow
def test_95_percent_intervals_hold_the_true_gain_about_that_often():
    base, other = population(4000, better=0.1)
    true_gain = (mean_iou(other.sum(0)) - mean_iou(base.sum(0))).item()
    held = 0
    for data_set in range(200):
        drawn = torch.randint(4000, (60,))
        gain = paired_gain(base[drawn], other[drawn], resamples=500, rng_seed=data_set)
        held += gain.low <= true_gain <= gain.high
    assert 0.90 <= held / 200 <= 0.99


def test_methods_scored_on_different_truths_are_refused():
    base, other = population(5, better=0.1)
    with pytest.raises(ValueError, match="same truth, image by image; image 0 differs"):
        paired_gain(base, other.roll(1, dims=0))


def test_one_image_is_no_sample():
    base, other = population(1, better=0.1)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        paired_gain(base, other)


@pytest.mark.usefixtures("no_shape_checks")
def test_unequal_numbers_of_images_are_refused():
    base, other = population(3, better=0.1)
    with pytest.raises(ValueError, match=r"same images and classes, got \(3, 3, 3\) and \(2, 3"):
        paired_gain(base, other[:2])


@pytest.mark.parametrize(("resamples", "level"), [(0, 0.95), (10, 1.0), (10, 0.0)])
def test_settings_of_the_bootstrap_out_of_range_are_refused(resamples, level):
    base, other = population(3, better=0.1)
    with pytest.raises(ValueError, match=rf"lie in \(0, 1\), got {resamples} and {level}"):
        paired_gain(base, other, resamples=resamples, level=level)


def test_a_bootstrap_needs_a_pixel_of_the_chosen_classes():
    base = torch.tensor([[[4, 0], [0, 0]], [[4, 0], [0, 0]]])
    with pytest.raises(ValueError, match=r"none of the classes \[1\] has a true pixel"):
        paired_gain(base, base, classes=[1])
    with pytest.raises(ValueError, match=r"empty mask would score 100 %; .* with 255"):
        paired_gain(base, base)
    assert paired_gain(base, base, classes=[0]).mean_iou_base == 1.0


@pytest.mark.parametrize(("images", "few"), [(FEW_IMAGES - 1, True), (FEW_IMAGES, False)])
def test_a_gain_says_that_it_rests_on_few_images(images, few):
    base, other = population(images, better=0.2)
    gain = paired_gain(base, other, resamples=10)
    assert (gain.images, gain.few_images) == (images, few)
