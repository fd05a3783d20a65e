"""Refuse NaN and infinity where a tensor enters, and say where they are."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAPS = ("image", "map")
"""The leading axes of class maps, in the words of an error."""


def check_finite(name: str, values: Tensor, axes: Sequence[str] = MAPS) -> None:
    """Refuse NaN and infinity; see `finite_range`."""
    finite_range(name, values, axes)


def finite_range(
    name: str, values: Tensor, axes: Sequence[str] = MAPS
) -> tuple[float, float] | None:
    """Return the smallest and the largest value, both finite.

    One reduction, without a copy of the tensor. Under ``torch.compile`` nothing is checked, as a
    value that decides what to run would break the graph.

    Args:
        name: of the argument, for the error.
        values: floating-point numbers.
        axes: what the leading axes count, for the error; later axes are not told.

    Returns:
        None without values, or under ``torch.compile``.

    Raises:
        ValueError: a value is NaN or infinite; the error names the first place.
    """
    if not values.numel() or torch.compiler.is_compiling():
        return None
    low, high = (float(value) for value in values.detach().aminmax())  # NaN passes through
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    raise ValueError(not_finite(name, values, axes))


def not_finite(name: str, values: Tensor, axes: Sequence[str] = MAPS) -> str:
    """Describe the first NaN or infinity of a tensor that has one."""
    wrong = ~values.detach().isfinite()
    first = tuple(wrong.nonzero()[0].tolist())
    kind = "NaN" if values.detach()[first].isnan() else "infinity"
    place = ", ".join(f"{axis} {index}" for axis, index in zip(axes, first, strict=False))
    return (
        f"`{name}` must be finite, got {kind}{' in ' * bool(place)}{place} "
        f"({int(wrong.sum())} of {values.numel()} values); look for an overflow of half precision, "
        "a division by zero or weights that diverged"
    )
