"""Scores of regions: means of maps within masks, votes, claims, and their way back to pixels."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from camkit.ops.mask_runs import MaskRuns

HALF, COVERED = 0.5, 0.85
"""SEPL: a class takes a mask of which its label fills more than half, or which covers 85% of it."""


def segment_means(
    maps: Float[Tensor, "b k H W"], segments: Int[Tensor, "b H W"]
) -> Float[Tensor, "b k H W"]:
    """Replace every value by the mean of its segment.

    Args:
        maps: values of each pixel.
        segments: number of the segment of each pixel; where it is negative, the value stays.
    """
    if maps.numel() == 0:
        return maps.clone()
    index = segments.clamp_min(-1).flatten(1)[:, None].expand(-1, maps.shape[1], -1) + 1
    means = maps.new_zeros(*maps.shape[:2], int(index.max()) + 1)
    means = means.scatter_reduce(2, index, maps.flatten(2), "mean", include_self=False)
    return torch.where(segments[:, None] < 0, maps, means.gather(2, index).view_as(maps))


def shared_votes(
    maps: Float[Tensor, "b k H W"], background_score: float
) -> Float[Tensor, "b k H W"]:
    """Return 1 where a map is the strongest and beats the background; equal maps share the 1."""
    best = maps.amax(1, keepdim=True)
    wins = (maps == best) & (best > background_score)
    return wins / wins.sum(1, keepdim=True).clamp_min(1).to(maps.dtype)


def mask_sums(maps: Float[Tensor, "k H W"], masks: MaskRuns) -> Float[Tensor, "k n"]:
    """Add up each map within each mask, in float64; the cost grows with the runs, not the areas."""
    starts, ends, owners = _runs(masks, maps.device)
    sums = [maps.new_zeros(0, masks.count, dtype=torch.float64)]
    for plane in maps:  # one after another, because float64 at the size of a photo is large
        total = plane.T.flatten().cumsum(0, dtype=torch.float64)
        before = torch.cat([total.new_zeros(1), total])
        empty = total.new_zeros(masks.count)
        sums.append(empty.index_add(0, owners, before[ends] - before[starts])[None])
    return torch.cat(sums)


def mask_areas(masks: MaskRuns, device: torch.device) -> Float[Tensor, " n"]:
    """Return the pixels of each mask, in float64."""
    return torch.from_numpy(masks.areas).to(device).double()


def claims(
    votes: Float[Tensor, "k H W"], means: Float[Tensor, "k n"], masks: MaskRuns
) -> tuple[Float[Tensor, "k n"], Float[Tensor, " n"]]:
    """Give masks to classes by the rule of SEPL.

    Of several classes that may take a mask, the class with the highest mean gets it; equal ones
    share it.

    Args:
        votes: of each pixel for its class, see `shared_votes`.
        means: of the scores of each class within each mask.
        masks: of which none is empty.

    Returns:
        The share of each class in each mask, 0 or 1 unless means are equal; and the mean of its
        class in each mask, -1 where no class takes the mask.
    """
    inside, areas = mask_sums(votes, masks), mask_areas(masks, votes.device)
    totals = votes.sum((1, 2), dtype=torch.float64)[:, None]
    taken = inside / areas > HALF
    taken |= (inside >= COVERED * totals) & (inside > 0)  # a class without label takes nothing
    scores = torch.where(taken, means.detach().round(decimals=9), -1.0)  # sums are rounded
    best = scores.amax(0)
    winners = taken & (scores == best)
    return winners / winners.sum(0).clamp_min(1).double(), best


def mean_over_masks(
    scores: Float[Tensor, "k n"], masks: MaskRuns, dtype: torch.dtype
) -> tuple[Float[Tensor, "k H W"], Bool[Tensor, "H W"]]:
    """Give each pixel the mean score of the masks that cover it; also return where one does.

    Args:
        scores: of each class in each mask, in float64.
        masks: which may overlap.
        dtype: of the means.
    """
    starts, ends, owners = _runs(masks, scores.device)
    rows, cols = masks.size
    changes = torch.zeros(rows * cols + 1, dtype=torch.int64, device=scores.device)
    one = torch.ones_like(starts)
    covering = changes.index_add(0, starts, one).index_add(0, ends, -one).cumsum(0)[:-1]
    count = covering.clamp_min(1)
    means = [scores.new_zeros(0, rows * cols, dtype=dtype)]
    for gained in scores[:, owners]:  # one after another, as in `mask_sums`
        steps = scores.new_zeros(rows * cols + 1)
        sums = steps.index_add(0, starts, gained).index_add(0, ends, -gained).cumsum(0)[:-1]
        means.append((sums / count).to(dtype)[None])
    return torch.cat(means).unflatten(1, (cols, rows)).mT, (covering > 0).view(cols, rows).T


def _runs(masks: MaskRuns, device: torch.device) -> list[Int[Tensor, " r"]]:
    columns = (masks.starts, masks.ends, masks.owners)
    return [torch.from_numpy(column.astype(np.int64)).to(device) for column in columns]
