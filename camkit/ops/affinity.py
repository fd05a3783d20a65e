"""Patch-to-patch affinity brought into balance."""

from jaxtyping import Float
from torch import Tensor


def balance(affinity: Float[Tensor, "b n n"], *, rounds: int = 3) -> Float[Tensor, "b n n"]:
    """Sinkhorn-normalise a positive affinity, then make it symmetric.

    Every round divides the columns, then the rows, by their sums, so that patches which everything
    attends to (sinks) stop swallowing the scores. Rounds followed by the mean with the transpose
    are the recipe of CLIP-ES (Lin et al. 2023).

    Args:
        affinity: how much each patch takes from each other patch.
        rounds: how many times columns and rows are scaled.
    """
    for _ in range(rounds):
        affinity = affinity / affinity.sum(-2, keepdim=True)
        affinity = affinity / affinity.sum(-1, keepdim=True)
    return (affinity + affinity.mT) / 2
