"""Gaussian filters over many dimensions on the permutohedral lattice (Adams et al. 2010)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from camkit.printing import short_repr

_LIMIT = 2**62  # of one packed coordinate, so that a neighbour's still fits 64 bits


@dataclass(frozen=True)
class Lattice:
    """A Gaussian of standard deviation one over n points in d dimensions, up to a constant.

    Every point lies in a simplex of d + 1 vertices. `filter` spreads values onto them by
    barycentric weights, blurs by 1/2, 1, 1/2 along each of the d + 1 axes, and interpolates.
    Vertices that no point touches do not exist, as in the paper: the blur stops there.

    Attributes:
        corners: vertices of each point's simplex.
        weights: barycentric weights of each point.
        points: points in order of the vertices they touch, one entry for each pair of the two.
        point_weights: weights of these pairs.
        starts: where each vertex begins in ``points``.
        chains: for each axis, every vertex and its two neighbours. The last vertex is touched by no
            point, stays zero, and represents neighbours that do not exist.
        blur: weights of a vertex and its two neighbours.
    """

    corners: Int[Tensor, "n corners"]
    weights: Float[Tensor, "n corners"]
    points: Int[Tensor, " pairs"]
    point_weights: Float[Tensor, " pairs"]
    starts: Int[Tensor, " vertices"]
    chains: tuple[Int[Tensor, "vertices 3"], ...]
    blur: Float[Tensor, "vertices 3"]

    __repr__ = short_repr

    def filter(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return sums of values over all points, weighted by the Gaussian of their distance."""
        rows = _weighted_sums(values, self.points, self.point_weights, self.starts)
        for chain in self.chains:
            rows = _weighted_sums(rows, chain, self.blur)
        return _weighted_sums(rows, self.corners, self.weights)

    def normalised(self, weight: float) -> "Lattice":
        """Return the filter normalised symmetrically by its response to ones, times a weight."""
        ones = torch.ones_like(self.weights[:, :1])
        scale = (self.filter(ones) + 1e-20).rsqrt() * math.sqrt(weight)
        return replace(
            self,
            weights=self.weights * scale,
            point_weights=self.point_weights * scale[self.points, 0],
        )


def lattice(features: Float[Tensor, "d n"], largest: Sequence[float]) -> Lattice:
    """Build the lattice of some points.

    Args:
        features: coordinates of each point in standard deviations, at least 0.
        largest: a bound for each coordinate.
    """
    strides = torch.tensor([*packing(largest), 0], device=features.device)
    key, rank, weights = _locate(features, strides)
    # points of one simplex share their corners, so these are computed once per simplex
    simplex_key, order, first = _sorted_groups(key)
    corner_keys = _corner_keys(simplex_key[first], rank[:, order[first]], strides)
    vertex_key, pair, new = _sorted_groups(corner_keys.flatten())
    chains = _chains(vertex_key[new], strides)
    corners = _numbers(pair, new).int().view(len(strides), -1)[:, _numbers(order, first)]
    touched, entry = corners.flatten().sort(stable=True)
    counts = touched.bincount(minlength=len(chains[0]))
    points = torch.arange(len(key), dtype=torch.int32, device=key.device).repeat(len(strides))
    return Lattice(
        corners=corners.T.contiguous(),
        weights=weights.T.contiguous(),
        points=points[entry],
        point_weights=weights.flatten()[entry],
        starts=(counts.cumsum(0) - counts).int(),
        chains=chains,
        blur=weights.new_tensor([1.0, 0.5, 0.5]).repeat(len(counts), 1),
    )


def packing(largest: Sequence[float]) -> list[int]:
    """Return the strides that pack lattice coordinates into one integer of 64 bits.

    Raises:
        ValueError: the lattice is too fine for that.
    """
    scaled = [width * scale for width, scale in zip(largest, _scales(len(largest)), strict=True)]
    # coordinate j is the sum of features from j on, less j times feature j - 1; the margin is for
    # rounding, for the corners of a simplex and for their neighbours
    extents = [sum(scaled[j:]) + j * scaled[j - 1] for j in range(len(scaled))]
    steps = [int(extent) + 8 * (len(scaled) + 1) for extent in extents]
    *strides, total = itertools.accumulate(steps, lambda a, b: a * b, initial=1)
    if total > _LIMIT:
        raise ValueError("lattice too fine to be packed into 64 bits")
    return strides


def _scales(dimensions: int) -> list[float]:
    """Return scales that give the blur a standard deviation of one, as in the paper."""
    width = torch.tensor(math.sqrt(2 / 3) * (dimensions + 1)).item()  # in single precision
    return [width / math.sqrt((i + 1) * (i + 2)) for i in range(dimensions)]


def _locate(features: Tensor, strides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each point's simplex, as one key, its coordinates' ranks and barycentric weights."""
    dimensions = len(features)
    # The order of operations is that of the compiled version: if a point lies on the border of two
    # simplices, the last digit decides between them.
    scaled = features * features.new_tensor(_scales(dimensions))[:, None]
    total = torch.zeros_like(scaled[0])
    elevated = features.new_empty(dimensions + 1, features.shape[1])
    for j in range(dimensions, 0, -1):
        elevated[j] = total - j * scaled[j - 1]
        total += scaled[j - 1]
    elevated[0] = total
    nearest = (elevated * (1 / (dimensions + 1))).round()
    excess = nearest.sum(0).to(torch.int8)
    coarse = nearest * (dimensions + 1)
    offset = elevated - coarse
    rank = torch.zeros_like(offset, dtype=torch.int8)
    for i in range(dimensions):
        less = offset[i] < offset[i + 1 :]
        rank[i] += less.sum(0, dtype=torch.int8)
        rank[i + 1 :] += ~less
    rank += excess
    turn = (rank < 0).to(torch.int8) - (rank > dimensions).to(torch.int8)
    rank += turn * (dimensions + 1)
    coarse += turn * (dimensions + 1)
    ordered = _by_rank(rank, (elevated - coarse) * (1 / (dimensions + 1)))
    weights = ordered.flip(0) - F.pad(ordered.flip(0), (0, 0, 1, 0))[:-1]
    weights[0] = ordered[-1] + (1 - ordered[0])
    key = torch.zeros_like(strides[:1])
    for i in range(dimensions):  # the last coordinate follows from the others
        key = key + (coarse[i].long() + rank[i]) * strides[i]
    return key, rank, weights


def _by_rank(rank: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format).scatter_(
        0, rank.long(), values
    )


def _sorted_groups(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort keys; also return the old position of each, and which are the first of their value."""
    ordered, order = keys.sort()
    return ordered, order, ordered.diff(prepend=ordered[:1] - 1) != 0


def _numbers(order: Tensor, first: Tensor) -> Tensor:
    """Return the number of each key's group, in the order before sorting."""
    return torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)


def _corner_keys(simplex_key: Tensor, rank: Tensor, strides: Tensor) -> Tensor:
    """Return the keys of the vertices of simplices; each lowers one coordinate, by rank."""
    origin = simplex_key - (rank * strides[:, None]).sum(0)
    dimensions = len(strides) - 1
    up = torch.arange(dimensions + 1, device=strides.device)[:, None] * strides.sum()
    by_rank = _by_rank(rank, strides[:, None].expand(-1, len(origin)))
    down = F.pad(by_rank.flip(0).cumsum(0)[:-1], (0, 0, 1, 0))
    return origin + up - (dimensions + 1) * down


def _chains(keys: Tensor, strides: Tensor) -> tuple[Tensor, ...]:
    none = len(keys)
    vertices = torch.arange(none + 1, device=keys.device)
    chains = []
    for step in strides.sum() - len(strides) * strides:
        wanted = keys + step
        at = torch.searchsorted(keys, wanted).clamp_max_(none - 1)
        after = F.pad(torch.where(keys[at] == wanted, at, none), (0, 1), value=none)
        before = torch.full_like(after, none).scatter_(0, after, vertices)
        before[none] = none
        chains.append(torch.stack([vertices, after, before], 1).int())
    return tuple(chains)


def _weighted_sums(
    rows: Tensor, indices: Tensor, weights: Tensor, starts: Tensor | None = None
) -> Tensor:
    return F.embedding_bag(
        indices, rows, starts, mode="sum", per_sample_weights=weights.to(rows.dtype)
    )
