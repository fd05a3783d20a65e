"""Semi-non-negative factorisation: signed data as non-negative amounts of signed directions."""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Data: TypeAlias = Float[Tensor, "b n d"]
Amounts: TypeAlias = Float[Tensor, "b n r"]
Directions: TypeAlias = Float[Tensor, "b r d"]

_TINY = 1e-9
_RIDGE = 1e-6  # a direction that no row holds, or two that are one, still have a solution


def semi_nmf(
    data: Data, rank: int, *, steps: int = 50, rng_seed: int = 0
) -> tuple[Amounts, Directions]:
    """Find ``amounts @ directions`` close to ``data``, with amounts of at least 0.

    The alternating rule of Ding, Li and Jordan (2010): directions by least squares, amounts by
    their multiplicative update, which never raises the squared error. It starts from the nearest of
    some rows drawn far from each other, plus 0.2, as there from k-means; to draw instead of
    running k-means is ours.

    Args:
        data: rows to be explained, signed.
        rank: how many directions.
        steps: how often both are updated.
        rng_seed: decides the first row drawn.
    """
    if not 1 <= rank <= data.shape[1]:
        raise ValueError(f"`rank` must lie in 1 to the {data.shape[1]} rows, got {rank}")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    amounts = _start(data, rank, rng_seed)
    for _ in range(steps):
        amounts = _step(data, amounts, least_squares(data, amounts))
    return amounts, least_squares(data, amounts)


def amounts_of(data: Data, directions: Directions, *, steps: int = 50) -> Amounts:
    """How much of each known direction is in every row; at least 0.

    Args:
        data: rows to be explained.
        directions: of `semi_nmf`, perhaps of other data.
        steps: multiplicative updates, from equal amounts on.
    """
    amounts = data.new_ones(*data.shape[:2], directions.shape[1])
    for _ in range(steps):
        amounts = _step(data, amounts, directions)
    return amounts


def least_squares(data: Data, amounts: Amounts) -> Directions:
    """The directions that explain the data best, given the amounts."""
    gram = amounts.mT @ amounts
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)[:, None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * eye, amounts.mT @ data)


def _step(data: Data, amounts: Amounts, directions: Directions) -> Amounts:
    towards, gram = data @ directions.mT, directions @ directions.mT
    gain = towards.clamp_min(0.0) + amounts @ (-gram).clamp_min(0.0)
    loss = (-towards).clamp_min(0.0) + amounts @ gram.clamp_min(0.0)
    return amounts * (gain / loss.clamp_min(_TINY)).sqrt()


def _start(data: Data, rank: int, rng_seed: int) -> Amounts:
    """Each row belongs to the nearest of ``rank`` rows, each drawn farthest from those before."""
    draw = torch.Generator().manual_seed(rng_seed)
    first = int(torch.randint(data.shape[1], (1,), generator=draw))
    centre = data[:, first : first + 1]
    distances = [(data - centre).square().sum(-1)]
    for _ in range(rank - 1):
        farthest = torch.stack(distances).amin(0).argmax(1)
        centre = data.gather(1, farthest[:, None, None].expand(-1, 1, data.shape[2]))
        distances.append((data - centre).square().sum(-1))
    nearest = torch.stack(distances, -1).argmin(-1)
    return torch.nn.functional.one_hot(nearest, rank).to(data.dtype) + 0.2
