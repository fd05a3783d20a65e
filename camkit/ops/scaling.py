"""Maps divided by their maximum or stretched to their range, and maps that are flat."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_STORED = 4  # steps of the dtype that storing a result and a few operations on it may cost
_SUMMED = 64  # steps of float32 or float64, in which sums over patches, heads and blocks are taken


def rounding_of(
    values: Float[Tensor, "..."], dims: tuple[int, ...] = (-2, -1)
) -> Float[Tensor, "..."]:
    """Return the differences that rounding alone may leave between equal scores.

    Relative to the largest magnitude along ``dims``, which are kept with one place each. The
    factors are ours: constant maps of 49 to 2500 patches, spread by up to 8 steps of attention,
    come to differ by 12 steps of float32, 29 of float64 and 2 of half precision
    (benchmarks/flat.py); the limits are 68, 68 and 4 steps. In float32 that is 8e-6 of the largest
    score.
    """
    low, high = values.detach().amin(dims, keepdim=True), values.detach().amax(dims, keepdim=True)
    own = torch.finfo(values.dtype).eps
    wide = torch.finfo(torch.promote_types(values.dtype, torch.float32)).eps
    return torch.maximum(high, -low) * (_STORED * own + _SUMMED * wide)


def flat_maps(maps: Float[Tensor, "... h w"]) -> Bool[Tensor, "..."]:
    """Return which maps are zero, or constant up to `rounding_of` their scores."""
    span = maps.detach().amax((-2, -1)) - maps.detach().amin((-2, -1))
    return span <= rounding_of(maps)[..., 0, 0]


def scaled_to_max(
    maps: Float[Tensor, "..."],
    dims: tuple[int, ...] = (-2, -1),
    *,
    rounding: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Divide each map by its maximum.

    A map becomes zero if its maximum is not above ``rounding``: the rounding of the scores that the
    map is a part or a difference of, by default of the map itself. The size of the scores does not
    matter, as gradients of confident models are tiny.
    """
    top = maps.amax(dims, keepdim=True)
    least = torch.finfo(maps.dtype).tiny
    floor = (rounding_of(maps, dims) if rounding is None else rounding).clamp_min(least)
    return maps / top.clamp_min(least) * (top > floor)


def scaled_to_range(
    maps: Float[Tensor, "..."], dims: tuple[int, ...] = (-2, -1)
) -> Float[Tensor, "..."]:
    """Move the smallest score of each map to 0 and the largest to 1; flat maps become zero."""
    lowest = maps.amin(dims, keepdim=True)
    return scaled_to_max(maps - lowest, dims, rounding=rounding_of(maps, dims))
