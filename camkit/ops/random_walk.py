"""Scores carried along by a random walk, step by step."""

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.ops.similarity import check_positive


def random_walk(
    scores: Float[Tensor, "b k n"], affinity: Float[Tensor, "b n n"], *, beta: float, steps: int
) -> Float[Tensor, "b k n"]:
    """Replace each score by its expectation after a walk from its place.

    Equals ``T^steps`` applied to each map, with T the affinity to the power ``beta`` whose rows are
    scaled to sum to one. Powers of T are never built: each step is one product with the scores, so
    that memory is that of one ``(b, n, n)``. Scores keep their range, and constant ones their
    value. Where the affinity is symmetric, the sum of scores weighted by the row sums of
    ``affinity ** beta`` is kept.

    Args:
        scores: one per place, for each of k maps.
        affinity: from each place (row) to each other, at least 0, more than 0 somewhere in a row.
        beta: larger values let only the strongest affinities count.
        steps: of the walk; 0 leaves the scores as they are.
    """
    check_positive("beta", beta)
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, got {steps}")
    _check_affinity(affinity, scores)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        values = scores.to(dtype)
        transition = affinity.to(dtype)
        # a row's scale goes out when it is made to sum to one; high powers of small numbers vanish
        transition = (transition / transition.amax(-1, keepdim=True)) ** beta
        transition = transition / transition.sum(-1, keepdim=True)
        for _ in range(steps):
            values = values @ transition.mT
    return values.to(scores.dtype)


def _check_affinity(affinity: Tensor, scores: Tensor) -> None:
    images, _, places = scores.shape
    if affinity.shape != (images, places, places):
        raise ValueError(
            f"`affinity` must be {images}x{places}x{places} for {images} images of {places} "
            f"scores a map, got {'x'.join(map(str, affinity.shape))}"
        )
    if not (affinity.isfinite() & (affinity >= 0)).all():
        raise ValueError("`affinity` must be finite and at least 0, got NaN, inf or less")
    if not (affinity.sum(-1) > 0).all():
        raise ValueError("`affinity` has a row of zeros: a walk from there leads nowhere")
