"""Class maps averaged over neighbouring pixels of like colour, without a stack of neighbours."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.tensors import RGB

DILATIONS = (1, 2, 4, 8, 12, 24)  # of the paper: near and far neighbours, 48 in all
_POSITION_WIDTH = 0.3  # of the paper, which fades colours by the same number
_TINY = 1e-8  # of the paper: neighbours of one value divide by this


def adapt_to_colours(
    maps: Float[Tensor, "b k H W"],
    rgb: RGB,
    *,
    steps: int,
    dilations: Sequence[int] = DILATIONS,
    colour_width: float = 0.3,
    position_weight: float = 0.01,
) -> Float[Tensor, "b k H W"]:
    """Replace every value by a weighted sum over its neighbours, ``steps`` times.

    The pixel-adaptive refinement of AFA (Ru et al. 2022); formula and defaults are the paper's. A
    pixel has 8 neighbours per dilation, those beyond the rim being the pixels on it, and is not its
    own neighbour. Neighbour j of pixel i weighs ::

        softmax_j(-mean_c (|I_j - I_i| / s_i / colour_width)^2)
            + position_weight * softmax_j(-(d_j / s / 0.3)^2)

    with s_i the standard deviation of the neighbours' values in a channel, d_j the distance and s
    the standard deviation of the distances. Weights sum to ``1 + position_weight``, so every step
    makes the maps that much larger. They are built once, 48 planes an image; steps add a few.

    Everything is computed in at least float32 and comes back in the dtype of the maps. Gradients
    flow to the maps, not to the colours.

    Args:
        maps: values of any range, at the size of the colours.
        rgb: colours in [0, 1]. A channel's own shift and scale cancel out; values that were clipped
            or wrapped around do not come back.
        steps: at least 1; 10 in the paper.
        dilations: distances of the neighbours in rows and columns, each at least 1; may exceed the
            image.
        colour_width: difference in colour, in standard deviations of the neighbours, at which
            likeness fades.
        position_weight: of nearness beside likeness, at least 0.
    """
    check_settings(steps, dilations, colour_width, position_weight)
    images, _, rows, cols = maps.shape
    if rgb.shape != (images, 3, rows, cols):
        raise ValueError(
            f"`rgb` must be {images}x3x{rows}x{cols} to match `maps`, got "
            f"{'x'.join(map(str, rgb.shape))}; use camkit.resize_cam first"
        )
    if maps.numel() == 0:
        return maps.clone()
    dtype = torch.promote_types(maps.dtype, torch.float32)
    with torch.autocast(maps.device.type, enabled=False):
        affinity = _colour_affinity(rgb.detach().to(dtype), dilations, colour_width)
        affinity += position_weight * _position_affinity(dilations).to(affinity)[:, None, None]
        weights = affinity[:, :, None].unbind(1)
        refined = maps.to(dtype)
        for _ in range(steps):
            spread = torch.zeros_like(refined)
            for weight, neighbour in zip(weights, _neighbours(refined, dilations), strict=True):
                spread.addcmul_(weight, neighbour)
            refined = spread
    return refined.to(maps.dtype)


def check_settings(
    steps: int, dilations: Sequence[int], colour_width: float, position_weight: float
) -> None:
    """Refuse settings that `adapt_to_colours` cannot use.

    Raises:
        ValueError: one is out of range, or NaN.
    """
    if not steps >= 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    if not dilations:
        raise ValueError("`dilations` must name at least one distance, got none")
    if not all(dilation >= 1 for dilation in dilations):
        raise ValueError(f"`dilations` must be at least 1 each, got {tuple(dilations)}")
    if not 0.0 < colour_width < math.inf:
        raise ValueError(f"`colour_width` must be positive and finite, got {colour_width}")
    if not 0.0 <= position_weight < math.inf:
        raise ValueError(f"`position_weight` must be at least 0 and finite, got {position_weight}")


def _colour_affinity(
    rgb: RGB, dilations: Sequence[int], width: float
) -> Float[Tensor, "b neighbours H W"]:
    neighbours = _neighbours(rgb, dilations)
    count = len(neighbours)
    mean, variance = torch.zeros_like(rgb), torch.zeros_like(rgb)
    for neighbour in neighbours:
        mean += neighbour
    mean /= count
    for neighbour in neighbours:  # a second look: sums of squares alone lose the digits
        variance += (neighbour - mean).square_()
    unit = variance.div_(count - 1).sqrt_().add_(_TINY).mul_(width)
    affinity = rgb.new_empty(rgb.shape[0], count, *rgb.shape[2:])
    for row, neighbour in zip(affinity.unbind(1), neighbours, strict=True):
        row.copy_((neighbour - rgb).div_(unit).square_().mean(1).neg_())
    # softmax in place: torch's own makes a second stack of planes
    affinity.sub_(affinity.amax(1, keepdim=True)).exp_()
    return affinity.div_(affinity.sum(1, keepdim=True))


def _position_affinity(dilations: Sequence[int]) -> Float[Tensor, " neighbours"]:
    distances = torch.tensor([math.hypot(*o) for o in _offsets(dilations)], dtype=torch.float64)
    return (-((distances / (distances.std() + _TINY) / _POSITION_WIDTH) ** 2)).softmax(0)


def _neighbours(planes: Float[Tensor, "b c H W"], dilations: Sequence[int]) -> list[Tensor]:
    """Every pixel's neighbours, plane by plane: views of one copy with its rim repeated."""
    rows, cols = planes.shape[2:]
    reach = max(dilations)
    # all pixels past the rim are alike: one image's length of them is enough
    below, beside = min(reach, rows - 1), min(reach, cols - 1)
    padded = F.pad(planes, (beside, beside, below, below), mode="replicate")
    views = []
    for down, right in _offsets(dilations):
        top = below + max(-below, min(down, below))
        left = beside + max(-beside, min(right, beside))
        views.append(padded[:, :, top : top + rows, left : left + cols])
    return views


def _offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    return [(y * dilation, x * dilation) for dilation in dilations for y, x in around]
