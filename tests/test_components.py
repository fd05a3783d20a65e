"""Maps from the tokens alone: grad-cam's on the grid, and laws."""

import numpy as np
import pytest
import torch
from helpers import capture_of
from hosts import tiny

from camkit.contrib import FEMSeed, KernelPCASeed
from camkit.contrib.components import above_sigma, kernel_component
from camkit.seeds.token_gradients import principal_component

SEEDS = {"KPCA_CAM": KernelPCASeed(), "FEM": FEMSeed()}
CLASSES = torch.tensor([[1, 4], [3, -1]])


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "average pooled"])
@pytest.mark.parametrize("name", SEEDS)
def test_maps_are_those_of_grad_cam_before_it_scales_them(name, family):
    theirs = pytest.importorskip("pytorch_grad_cam")
    model, pixels = tiny(family)
    capture = capture_of(model, pixels, SEEDS[name])
    rows, cols, prefix = capture.grid.rows, capture.grid.cols, model.num_prefix_tokens
    kept = []

    class Kept(getattr(theirs, name)):
        def get_cam_image(self, *given):
            kept.append(super().get_cam_image(*given))
            return kept[-1]

    def reshape(tokens):
        return tokens[:, prefix:].mT.unflatten(-1, (rows, cols))

    Kept(model, [model.blocks[-1].norm1], reshape)(pixels, None)
    cam = SEEDS[name](capture, CLASSES)
    expected = np.maximum(kept[0], 0)
    np.testing.assert_allclose(cam[:, 0], expected, atol=1e-4 * expected.max())
    assert torch.equal(cam[0, 0], cam[0, 1])
    assert not cam[1, 1].any()


def test_the_linear_kernel_is_the_principal_component():
    tokens = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    expected = principal_component(tokens)
    torch.testing.assert_close(kernel_component(tokens, "linear"), expected, rtol=1e-4, atol=1e-4)


def test_a_channel_counts_by_the_share_of_tokens_above_k_sigma():
    tokens = torch.zeros(1, 8, 2)
    tokens[0, 0] = torch.tensor([8.0, 8.0])  # mean 1, deviation 7 ** 0.5
    tokens[0, 1:, 1] = torch.tensor([8.0, 8, 8, 0, 0, 0, 0])  # half of the places: none above
    expected = torch.zeros(1, 8, 2)
    expected[0, 0, 0] = 8 / 8
    torch.testing.assert_close(above_sigma(tokens), expected)


def test_an_unknown_kernel_is_refused(no_shape_checks):
    with pytest.raises(ValueError, match=r"must be one of linear, poly, .*; got 'gauss'"):
        KernelPCASeed("gauss")
