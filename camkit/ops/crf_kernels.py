"""The two kernels of a dense CRF over the pixels of a picture."""

import math
from typing import NamedTuple

from camkit.ops.permutohedral import packing


class Kernels(NamedTuple):
    """Widths (standard deviations, pixels and grey levels) and weights of the two kernels.

    The Gaussian kernel joins pixels that are near, the bilateral one pixels that are near and of
    like colour.
    """

    gauss_sxy: float
    gauss_weight: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_weight: float


def check_kernels(kernels: Kernels) -> None:
    """Refuse widths and weights of no meaning."""
    for name, value in kernels._asdict().items():
        if name.endswith("weight"):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {value}")
        elif not 0.0 < value < math.inf:
            raise ValueError(f"`{name}` must be above 0 and finite, got {value}")


def largest_features(kernels: Kernels, rows: int, cols: int) -> tuple[list[float], list[float]]:
    """Bounds of the features of the Gaussian and of the bilateral kernel: x, y, red, green, blue.

    Raises:
        ValueError: a width is too small for a lattice over pictures of this size.
    """
    gauss = [(cols - 1) / kernels.gauss_sxy, (rows - 1) / kernels.gauss_sxy]
    bilateral = [(cols - 1) / kernels.bilateral_sxy, (rows - 1) / kernels.bilateral_sxy]
    bilateral += 3 * [255 / kernels.bilateral_srgb]
    for names, bounds in (("gauss_sxy", gauss), ("bilateral_sxy` or `bilateral_srgb", bilateral)):
        try:
            if max(bounds) > _LARGEST:
                raise ValueError(f"{max(bounds):.0f} widths across")  # noqa: TRY301
            packing(bounds)
        except ValueError as error:
            raise ValueError(
                f"`{names}` is too small for a lattice over {rows}x{cols} pixels ({error}); "
                "widths below a pixel or a grey level keep every pixel to itself"
            ) from error
    return gauss, bilateral


_LARGEST = (
    2.0**18
)  # further out, float32 coordinates no longer tell where in a simplex a point lies
