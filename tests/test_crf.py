"""DenseCRF moves maps to the edges of the picture, as pydensecrf called directly does."""

import sys

import numpy as np
import pytest
import torch
from coarse import captured

from camkit import CamkitError, DenseCRF, to_mask
from camkit.native import load
from camkit.ops.mean_field import Kernels
from camkit.refiners.crf import PRESETS

EDGE = 20  # the column where the colour of the picture changes


@pytest.fixture
def two_colours():
    """32 x 48 pixels, red up to column 20, blue from there."""
    rgb = torch.zeros(1, 3, 32, 48)
    rgb[:, 0, :, :EDGE] = 0.8
    rgb[:, 2, :, EDGE:] = 0.8
    return captured(rgb)


def up_to(column):
    cam = torch.zeros(1, 1, 32, 48)
    cam[..., :column] = 1.0
    return cam


def test_a_missing_library_is_told_with_the_way_to_get_it(monkeypatch, two_colours):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(CamkitError, match=r"pip install 'camkit\[crf\]'"):
        DenseCRF(backend="pydensecrf")(up_to(16), two_colours)


@pytest.mark.parametrize("backend", ["auto", "pydensecrf"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_mean_field_equals_pydensecrf_called_directly(pydensecrf, preset, backend):
    scores = torch.rand(1, 3, 24, 32).softmax(1)
    rgb = torch.randint(0, 256, (1, 24, 32, 3), dtype=torch.uint8)
    kernels = PRESETS[preset]
    field = pydensecrf.DenseCRF2D(32, 24, 3)  # width, height, labels
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(scores[0].numpy()).reshape(3, -1)))
    field.addPairwiseGaussian(sxy=kernels.gauss_sxy, compat=kernels.gauss_weight)
    field.addPairwiseBilateral(
        sxy=kernels.bilateral_sxy,
        srgb=kernels.bilateral_srgb,
        rgbim=rgb[0].numpy().copy(),
        compat=kernels.bilateral_weight,
    )
    expected = torch.from_numpy(np.array(field.inference(5)).reshape(3, 24, 32))
    found = DenseCRF(preset=preset, steps=5, backend=backend).probabilities(scores, rgb)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)
    own = DenseCRF(preset=Kernels(*kernels), steps=5, backend=backend).probabilities(scores, rgb)
    assert torch.equal(own, found)


@pytest.mark.parametrize("column", [EDGE - 4, EDGE - 2, EDGE + 2, EDGE + 4])
def test_a_map_a_few_pixels_off_moves_to_the_edge_of_the_colours(two_colours, column):
    refined = DenseCRF()(up_to(column), two_colours)
    mask = to_mask(refined, background_score=0.5)[0]
    assert mask[:, :EDGE].all()
    assert not mask[:, EDGE:].any()


def test_one_half_is_where_class_and_background_are_equally_probable(two_colours):
    cam = torch.rand(1, 2, 32, 48)
    rgb = (two_colours.rgb * 255).round().byte().permute(0, 2, 3, 1)
    logits = torch.cat([torch.full_like(cam[:, :1], 0.3), cam], 1) / 0.25
    likely = DenseCRF(steps=1).probabilities(logits.softmax(1), rgb)
    refined = DenseCRF(steps=1, background_score=0.3)(cam, two_colours)
    assert torch.equal(refined > 0.5, likely[:, 1:] > likely[:, :1])


def test_a_map_on_the_grid_comes_back_at_the_size_of_the_picture(two_colours):
    refined = DenseCRF()(torch.rand(1, 2, 4, 6, dtype=torch.float64), two_colours)
    assert refined.shape == (1, 2, 32, 48)
    assert refined.dtype == torch.float64
    assert refined.min() >= 0.0
    assert refined.max() <= 1.0


def test_a_map_of_zeros_stays_zero_and_takes_nothing_from_the_others():
    capture, cam = captured(torch.rand(1, 3, 32, 48)), torch.rand(1, 1, 32, 48)
    alone = DenseCRF()(cam, capture)
    padded = DenseCRF()(torch.cat([torch.zeros_like(cam), cam, -cam], 1), capture)
    assert not padded[:, [0, 2]].any()
    torch.testing.assert_close(padded[:, 1:2], alone, rtol=0, atol=0)


def test_images_of_different_classes_in_a_batch_equal_themselves_alone():
    rgb, cam = torch.rand(4, 3, 16, 24), torch.rand(4, 3, 16, 24)
    cam[0, 1] = cam[1] = cam[3, 0] = 0  # two classes, none, three, two others
    together = DenseCRF(steps=3)(cam, captured(rgb))
    assert not together[1].any()
    for index in (0, 2, 3):
        kept = [k for k in range(3) if cam[index, k].any()]
        single = DenseCRF(steps=3)(cam[index, kept][None], captured(rgb[index][None]))
        torch.testing.assert_close(together[index, kept], single[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_backends_refine_alike(pydensecrf, two_colours, backend):
    if backend == "native":
        load("dense_crf") or pytest.skip("no compiler")
    cam = torch.rand(1, 2, 32, 48, dtype=torch.float16)
    found = DenseCRF(backend=backend, steps=2)(cam, two_colours)
    assert found.dtype == torch.float16
    expected = DenseCRF(backend="pydensecrf", steps=2)(cam.float(), two_colours)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


def test_masks_move_to_the_edge_as_unary_from_labels_does(pydensecrf):
    utils = pytest.importorskip("pydensecrf.utils")
    rng = np.random.default_rng(0)
    rgb = np.full((24, 36, 3), 40, np.uint8)
    rgb[:, 15:] = (200, 180, 30)
    rgb = (rgb + rng.integers(0, 20, rgb.shape)).astype(np.uint8)
    mask = np.zeros((24, 36), np.uint8)
    mask[4:20, 18:33] = 7  # three columns short of the edge
    mask[:, :3] = 12
    values = np.array([0, 7, 12])
    field = pydensecrf.DenseCRF2D(36, 24, 3)
    labels = np.searchsorted(values, mask)
    field.setUnaryEnergy(utils.unary_from_labels(labels, 3, gt_prob=0.7, zero_unsure=False))
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=50, srgb=5, rgbim=rgb, compat=10)
    expected = values[np.argmax(field.inference(10), 0).reshape(24, 36)]
    found = DenseCRF("irn").masks(torch.from_numpy(mask)[None], torch.from_numpy(rgb)[None])
    assert found.dtype == torch.uint8
    assert np.array_equal(found[0].numpy(), expected)
    assert (found[0].numpy() != mask).any()


def test_ignored_pixels_of_a_mask_take_the_label_of_their_colour():
    rgb = torch.zeros(1, 20, 30, 3, dtype=torch.uint8)
    rgb[:, :, 12:] = 200
    mask = torch.full((1, 20, 30), 255)
    mask[:, :, :6], mask[:, :, 24:] = 3, 9
    found = DenseCRF("irn").masks(mask, rgb)
    assert (found[..., :12] == 3).all()
    assert (found[..., 12:] == 9).all()


@pytest.mark.parametrize("value", [0, 5, 255])
def test_a_mask_of_one_label_stays_as_it_is(value):
    mask = torch.full((1, 6, 7), value)
    mask[0, 0, 0] = 255
    found = DenseCRF().masks(mask, torch.zeros(1, 6, 7, 3, dtype=torch.uint8))
    assert (found == value).all()


@pytest.mark.parametrize(
    ("size", "confidence", "words"),
    [((6, 7), 1.0, r"must lie in \(0, 1\), got 1.0"), ((7, 6), 0.7, "must have the size of `rgb`")],
)
def test_masks_that_do_not_fit_are_refused(no_shape_checks, size, confidence, words):
    rgb = torch.zeros(1, 6, 7, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=words):
        DenseCRF().masks(torch.zeros(1, *size, dtype=torch.int64), rgb, confidence=confidence)
