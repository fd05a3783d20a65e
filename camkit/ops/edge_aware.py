"""Class maps smoothed along the edges of a picture: guided filter and pixel-adaptive averages."""

import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.ops.images import resize_cam, suits_opencv
from camkit.ops.similarity import check_positive, check_shape
from camkit.tensors import RGB

_MATCH = ("to match `maps`", "use camkit.resize_cam first")


def guided_filter(
    maps: Float[Tensor, "b k h w"],
    rgb: Float[Tensor, "b 3 h w"],
    target: RGB | None = None,
    *,
    radius: int,
    eps: float,
) -> Float[Tensor, "b k H W"]:
    """Fit each map by the colours within every window, then average the fits.

    The guided filter of He et al. (2013) with a colour guide. In a window a map is
    ``a . colour + b`` with the least squared error plus ``eps |a|^2``; a pixel's value is the mean
    over the windows that contain it. So maps get edges only where the picture has edges, and are
    flat elsewhere. Values may overshoot the range of the map.

    With a ``target``, this is the fast guided filter of He and Sun (2015): the linear functions are
    fitted on the small picture, resized by `camkit.resize_cam`, and applied to the colours of the
    large picture.

    A window is cut off at the border of the picture, as in the paper; OpenCV mirrors the picture.
    Time does not grow with the square of the radius. Everything is computed in at least float32 and
    returned in the dtype of the maps. Gradients flow to the maps, not to the colours.

    Args:
        maps: values of any range, at the size of the colours.
        rgb: colours in [0, 1].
        target: colours at the size of the result; None takes ``rgb``.
        radius: windows have 2 radius + 1 pixels of ``rgb`` on a side; may exceed the picture.
        eps: variance of a colour, in [0, 1], below which a window counts as flat.
    """
    check_guided_settings(radius, eps)
    check_shape("rgb", rgb, (len(maps), 3, *maps.shape[2:]), *_MATCH)
    target = rgb if target is None else target
    if maps.numel() == 0 or target.numel() == 0:
        return maps.new_zeros(*maps.shape[:2], *target.shape[-2:])
    dtype = torch.promote_types(maps.dtype, torch.float32)
    with torch.autocast(maps.device.type, enabled=False):
        small, large = rgb.detach().to(dtype), target.detach().to(dtype)
        slopes, offset = _fits(maps.to(dtype), small, radius, eps)
        size = (large.shape[-2], large.shape[-1])
        resizes = large.shape != small.shape
        filtered = resize_cam(offset, size) if resizes else offset
        for slope, channel in zip(slopes, large.split(1, dim=1), strict=True):
            filtered.addcmul_(resize_cam(slope, size) if resizes else slope, channel)
    return filtered.to(maps.dtype)


def check_guided_settings(radius: int, eps: float) -> None:
    """Raise a ValueError if a setting of `guided_filter` is out of range or NaN."""
    if not 1 <= radius < math.inf:
        raise ValueError(f"`radius` must be at least 1 pixel, got {radius}")
    check_positive("eps", eps)


def box_mean(planes: Float[Tensor, "b c H W"], radius: int) -> Float[Tensor, "b c H W"]:
    """Average over the pixels of a square window that lie within the picture.

    Planes of float32 on the CPU that need no gradient are summed by OpenCV.
    """
    if suits_opencv(planes):
        return _box_mean_opencv(planes, radius)
    return box_mean_torch(planes, radius)


def _box_mean_opencv(planes: Float[Tensor, "b c H W"], radius: int) -> Float[Tensor, "b c H W"]:
    rows, cols = planes.shape[-2:]
    reach = [min(radius, size - 1) for size in (cols, rows)]
    window = (2 * reach[0] + 1, 2 * reach[1] + 1)
    sums = torch.empty_like(planes, memory_format=torch.contiguous_format)
    pairs = zip(planes.detach().flatten(0, 1).numpy(), sums.flatten(0, 1).numpy(), strict=True)
    for plane, target in pairs:  # OpenCV sums in double precision
        cv2.boxFilter(plane, -1, window, target, normalize=False, borderType=cv2.BORDER_CONSTANT)
    return sums.div_(_window_areas(rows, cols, radius))


@lru_cache(maxsize=8)
def _window_areas(rows: int, cols: int, radius: int) -> Float[Tensor, "H W"]:
    plane = torch.empty(rows, cols)
    return _window_sizes(plane, -2, radius)[:, None] * _window_sizes(plane, -1, radius)


def _window_sizes(planes: Tensor, dim: int, radius: int) -> Float[Tensor, " n"]:
    """Return how many pixels of each window along a dimension lie within the picture."""
    size = planes.shape[dim]
    places = torch.arange(size, device=planes.device)
    reach = min(radius, size - 1)
    return ((places + reach + 1).clamp_max(size) - (places - reach).clamp_min(0)).to(planes)


def box_mean_torch(planes: Float[Tensor, "b c H W"], radius: int) -> Float[Tensor, "b c H W"]:
    """Compute `box_mean` in plain torch, its specification: any device, differentiable."""
    # Sums of 1, 2, 4, ... neighbours add up to sums of 2 radius + 1. Differences of running sums
    # are simpler, but lose digits with the length of the picture.
    for dim in (-1, -2):
        size = planes.shape[dim]
        reach = min(radius, size - 1)
        padded = F.pad(planes, (reach, reach) if dim == -1 else (0, 0, reach, reach))
        total, start, length, left = torch.zeros_like(planes), 0, 1, 2 * reach + 1
        while left:
            if left & 1:
                total = total + padded.narrow(dim, start, size)
                start += length
            left >>= 1
            if left:
                kept = padded.shape[dim] - length
                padded = padded.narrow(dim, 0, kept) + padded.narrow(dim, length, kept)
                length *= 2
        planes = total / _window_sizes(planes, dim, radius).view(-1, *[1] * (-1 - dim))
    return planes


def _fits(maps: Tensor, rgb: Tensor, radius: int, eps: float) -> tuple[list[Tensor], Tensor]:
    """Compute slopes of the three channels and offset at each pixel, averaged over its windows."""
    centre = rgb.mean((-2, -1), keepdim=True)  # small numbers lose fewer digits
    colours = (rgb - centre).split(1, dim=1)
    means = [box_mean(colour, radius) for colour in colours]
    level = box_mean(maps, radius)
    pairs = list(zip(colours, means, strict=True))
    right = [box_mean(colour * maps, radius) - mean * level for colour, mean in pairs]

    def covariance(i: int, j: int) -> Tensor:
        return box_mean(colours[i] * colours[j], radius) - means[i] * means[j]

    # (covariance + eps) = L D L^T, ones on the diagonal of L; no pivot is below eps but by rounding
    d0 = (covariance(0, 0) + eps).clamp_min(eps)
    l10, l20 = covariance(1, 0) / d0, covariance(2, 0) / d0
    d1 = (covariance(1, 1) + eps - l10 * l10 * d0).clamp_min(eps)
    l21 = (covariance(2, 1) - l20 * l10 * d0) / d1
    d2 = (covariance(2, 2) + eps - l20 * l20 * d0 - l21 * l21 * d1).clamp_min(eps)
    y0 = right[0]
    y1 = right[1] - l10 * y0
    x2 = (right[2] - l20 * y0 - l21 * y1) / d2
    x1 = y1 / d1 - l21 * x2
    slopes = [y0 / d0 - l10 * x1 - l20 * x2, x1, x2]

    offset = level
    for slope, mean in zip(slopes, means, strict=True):
        offset = offset - slope * mean
    slopes, offset = [box_mean(slope, radius) for slope in slopes], box_mean(offset, radius)
    for slope, middle in zip(slopes, centre.split(1, dim=1), strict=True):
        offset = offset - slope * middle
    return slopes, offset


DILATIONS = (1, 2, 4, 8, 12, 24)  # of the paper: near and far neighbours, 48 in all
_POSITION_WIDTH = 0.3  # of the paper, as for colours
_TINY = 1e-8  # of the paper: the divisor if all neighbours are equal


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
    pixel has 8 neighbours per dilation, and is not its own neighbour; beyond the border, pixels of
    the border are repeated. Neighbour j of pixel i has the weight ::

        softmax_j(-mean_c (|I_j - I_i| / s_i / colour_width)^2)
            + position_weight * softmax_j(-(d_j / s / 0.3)^2)

    with s_i the standard deviation of the neighbours' values in a channel, d_j the distance and s
    the standard deviation of the distances. Weights sum to ``1 + position_weight``, so every step
    scales the maps by that factor. They are computed once and take 48 planes an image; a step needs
    a few more.

    Everything is computed in at least float32 and returned in the dtype of the maps. Gradients flow
    to the maps, not to the colours.

    Args:
        maps: values of any range, at the size of the colours.
        rgb: colours in [0, 1]. Shift and scale of a channel cancel out; clipped values are lost.
        steps: at least 1; 10 in the paper.
        dilations: distances of the neighbours in rows and columns, each at least 1; may exceed the
            image.
        colour_width: difference in colour, in standard deviations of the neighbours, at which
            similarity fades.
        position_weight: of nearness relative to similarity, at least 0.
    """
    check_dilations(steps, dilations, colour_width, position_weight)
    check_shape("rgb", rgb, (len(maps), 3, *maps.shape[2:]), *_MATCH)
    if maps.numel() == 0:
        return maps.clone()
    dtype = torch.promote_types(maps.dtype, torch.float32)
    with torch.autocast(maps.device.type, enabled=False):
        affinity = _colour_affinity(rgb.detach().to(dtype), dilations, colour_width)
        offsets = [math.hypot(*offset) for offset in _offsets(dilations)]
        distances = torch.tensor(offsets, dtype=torch.float64)
        nearness = -((distances / (distances.std() + _TINY) / _POSITION_WIDTH) ** 2)
        affinity += position_weight * nearness.softmax(0).to(affinity)[:, None, None]
        weights = affinity[:, :, None].unbind(1)
        refined = maps.to(dtype)
        for _ in range(steps):
            spread = torch.zeros_like(refined)
            for weight, neighbour in zip(weights, _neighbours(refined, dilations), strict=True):
                spread.addcmul_(weight, neighbour)
            refined = spread
    return refined.to(maps.dtype)


def check_dilations(
    steps: int, dilations: Sequence[int], colour_width: float, position_weight: float
) -> None:
    """Raise a ValueError if a setting of `adapt_to_colours` is out of range or NaN."""
    if not steps >= 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    if not dilations:
        raise ValueError("`dilations` must name at least one distance, got none")
    if not all(dilation >= 1 for dilation in dilations):
        raise ValueError(f"`dilations` must be at least 1 each, got {tuple(dilations)}")
    check_positive("colour_width", colour_width)
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
    for neighbour in neighbours:  # a second pass: a sum of squares alone loses digits
        variance += (neighbour - mean).square_()
    unit = variance.div_(count - 1).sqrt_().add_(_TINY).mul_(width)
    affinity = rgb.new_empty(rgb.shape[0], count, *rgb.shape[2:])
    for row, neighbour in zip(affinity.unbind(1), neighbours, strict=True):
        row.copy_((neighbour - rgb).div_(unit).square_().mean(1).neg_())
    # softmax in place: torch's own would allocate a second stack of planes
    affinity.sub_(affinity.amax(1, keepdim=True)).exp_()
    return affinity.div_(affinity.sum(1, keepdim=True))


def _neighbours(planes: Float[Tensor, "b c H W"], dilations: Sequence[int]) -> list[Tensor]:
    """Return every pixel's neighbours, plane by plane, as views of one copy with a wider border."""
    rows, cols = planes.shape[2:]
    reach = max(dilations)
    # all pixels beyond the border are equal: one image's length of them is enough
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
