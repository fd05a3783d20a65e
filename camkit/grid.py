"""The grid of patches, and maps on it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from camkit.tensors import Cam


@dataclass(frozen=True)
class Grid:
    """Rows and columns of patches.

    >>> Grid(14, 21).size
    294
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a grid has at least one row and column, got {self.rows}x{self.cols}")

    @property
    def size(self) -> int:
        """Number of patches."""
        return self.rows * self.cols

    def fold(self, scores: Float[Tensor, "b k n"]) -> Cam:
        """Arrange one value per patch on the grid, row by row."""
        if scores.shape[-1] != self.size:
            raise ValueError(
                f"a {self.rows}x{self.cols} grid holds {self.size} patches, got {scores.shape[-1]}"
            )
        return scores.unflatten(-1, (self.rows, self.cols))

    def flatten(self, cam: Cam) -> Float[Tensor, "b k n"]:
        """Return the values of a map, row by row."""
        rows, cols = cam.shape[-2:]
        if (rows, cols) != (self.rows, self.cols):
            raise ValueError(
                f"`cam` must lie on the {self.rows}x{self.cols} patch grid, got {rows}x{cols}; "
                "refine on the grid first, then use camkit.resize_cam; if Views join maps at the "
                "size of the image, refine each view with camkit.seeds.RefinedSeed"
            )
        return cam.flatten(-2)
