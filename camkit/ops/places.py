"""Positions along an axis, read without a copy where they follow each other."""

from collections.abc import Sequence

import torch
from torch import Tensor


def take(tensor: Tensor, places: Sequence[int], axis: int) -> Tensor:
    """The chosen positions of one axis: a view of a run of them, else a copy.

    An index made of a list would be sent to the device each time, which waits, and which no CUDA
    graph can hold.

    Args:
        tensor: to be read.
        places: positions, negative from the end.
        axis: which they are along.
    """
    run = run_of(places, tensor.shape[axis])
    if run is not None:
        return tensor.narrow(axis, run.start, len(run))
    size = tensor.shape[axis]
    outside = [place for place in places if not -size <= place < size]
    if outside:
        raise IndexError(f"positions must lie within the {size} tokens, got {outside}")
    index = torch.tensor([place % size for place in places], device=tensor.device)
    return tensor.index_select(axis, index)


def run_of(places: Sequence[int], size: int) -> range | None:
    """The places as a range without gaps; None where they are none."""
    if not places:
        return range(0)
    first = places[0] + size if places[0] < 0 else places[0]
    run = range(first, first + len(places))
    found = [place + size if place < 0 else place for place in places]
    return run if first >= 0 and run.stop <= size and found == list(run) else None
