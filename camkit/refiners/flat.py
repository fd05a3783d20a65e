"""A warning for class maps that say nothing about where their class is."""

import warnings
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from camkit.ops.scaling import flat_maps
from camkit.tensors import Cam, Classes


class FlatMapWarning(UserWarning):
    """A class map is zero, or the same everywhere up to rounding."""


def warn_of_flat_maps(
    seed: Cam,
    cam: Float[Tensor, "b k H W"],
    classes: Classes,
    names: Sequence[Sequence[str]],
) -> None:
    """Warn of classes whose map is flat, each set of names once (`warnings` keeps the count).

    Args:
        seed: the first maps. Flat ones locate nothing, whatever their height.
        cam: the refined maps, of which only those that are zero count: a refiner may rightly give
            the whole picture to one class.
        classes: class of each map, -1 where a slot is padding.
        names: names of the classes of each image, without padding.
    """
    empty = ~cam.detach().flatten(2).any(2) if cam.numel() else flat_maps(seed)
    flat = ((flat_maps(seed) | empty) & (classes >= 0)).tolist()
    found: dict[str, None] = {}
    for row, present, of_image in zip(flat, (classes >= 0).tolist(), names, strict=True):
        kept = [wrong for wrong, there in zip(row, present, strict=True) if there]
        found |= {name: None for name, wrong in zip(of_image, kept, strict=True) if wrong}
    if found:
        shown = ", ".join(list(found)[:3]) + ", ..." * (len(found) > 3)
        warnings.warn(
            f"the map of {shown} is flat, so its mask means nothing: every patch has the same "
            "score, up to rounding. Check that the weights are loaded and that the class scores "
            "depend on the picture (a new head is often all zeros, a saturated softmax has no "
            "gradient), or use another seed",
            FlatMapWarning,
            stacklevel=3,
        )
