"""Views: the sizes, mirror images and tiles a photo is looked at in, and how maps are joined."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch

from camkit.tensors import Cam

Join: TypeAlias = Literal["sum", "max"]
Size: TypeAlias = tuple[int, int]

_TINY = 1e-8  # a map without evidence stays zero


@dataclass(frozen=True)
class Views:
    """Which views of a photo a seed is read from, and how their maps are joined.

    Multi-scale and mirrored inference as the field does it; docs/views.md lists who does what. The
    photo as it is given is always among the views, and it is its capture that refiners see: its
    attention lies on the grid of the joined map and its colours are those of the picture. Views
    are made from the pixels that the model gets, as ToCo does, not read again from the file.

    Attributes:
        scales: of rows and columns, 1.0 among them. Sizes are rounded to whole patches of the host,
            and scales that round to one size count once.
        flip: look at each size mirrored as well.
        tiles: above 1, the photo is also cut into so many rows and columns of tiles, each looked at
            alone, and their maps laid side by side, so that no tile knows of the others. After PPL
            (Li et al. 2022), which cuts inner feature maps and trains for it; cutting the photo
            itself, without training, is ours.
        join: how the maps of sizes are joined, and of tiles with them.
        join_flip: how a map and its mirrored twin are; None is as ``join``.
        normalize: "after" joins maps as the seed makes them, so that strong views count more, as
            MCTformer, ToCo and IRN do; "before" scales each map of each view to a maximum of 1
            first, which is ours.
        paired: look at a size and its mirror image in one forward; faster where a device is not
            filled by one image, at twice the memory. The photo as it is given is always looked at
            alone.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    tiles: int = 1
    join: Join = "sum"
    join_flip: Join | None = None
    normalize: Literal["after", "before"] = "after"
    paired: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if 1.0 not in self.scales or not all(0.0 < scale < float("inf") for scale in self.scales):
            raise ValueError(
                "`scales` must be positive and hold 1.0, as refiners see the photo as it is given, "
                f"got {self.scales}"
            )
        if self.tiles < 1:
            raise ValueError(f"`tiles` must be at least 1, got {self.tiles}")
        if self.join not in ("sum", "max") or self.join_flip not in ("sum", "max", None):
            raise ValueError(
                '`join` must be "sum" or "max" (and `join_flip`, which may be None), got '
                f"{self.join!r} and {self.join_flip!r}"
            )
        if self.normalize not in ("after", "before"):
            raise ValueError(f'`normalize` must be "after" or "before", got {self.normalize!r}')

    @property
    def single(self) -> bool:
        """Whether there is nothing to look at but the photo as it is given."""
        return self.scales == (1.0,) and not self.flip and self.tiles == 1

    def sizes(self, size: Size, patch: Size) -> tuple[Size, ...]:
        """Rows and columns of every view, each once, those of the photo first.

        >>> Views(scales=(0.5, 1.0, 1.01)).sizes((64, 96), (16, 16))
        ((64, 96), (32, 48))
        """
        others = (
            tuple(
                max(1, round(side * scale / step)) * step
                for side, step in zip(size, patch, strict=True)
            )
            for scale in self.scales
            if scale != 1.0
        )
        return tuple(dict.fromkeys((size, *((rows, cols) for rows, cols in others))))

    def levelled(self, cam: Cam) -> Cam:
        """The map of one view as it takes part in the join."""
        if self.normalize == "after":
            return cam
        top = cam.amax((-2, -1), keepdim=True)
        return cam / top.clamp_min(_TINY) * (top > _TINY)


def join_maps(how: Join, one: Cam, other: Cam) -> Cam:
    """The sum or the maximum of two maps."""
    return one + other if how == "sum" else torch.maximum(one, other)


def tile_spans(patches: int, tiles: int) -> list[tuple[int, int]]:
    """First and last row (or column) of patches of each tile; as equal as they can be.

    >>> tile_spans(7, 2)
    [(0, 4), (4, 7)]
    """
    edges = [-(-patches * place // tiles) for place in range(tiles + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]
