"""What refiners read of a capture."""

from camkit.refiners.crf import DenseCRF
from camkit.refiners.edge_aware import FastGlobalSmooth, GuidedFilter, PixelAdaptive
from camkit.refiners.normalize import Blur, Normalize
from camkit.refiners.propagate import Propagate
from camkit.refiners.protocol import Refiner
from camkit.refiners.superpixels import Superpixels

_CONTENT = (
    Blur, DenseCRF, FastGlobalSmooth, GuidedFilter, Normalize, PixelAdaptive, Propagate, Superpixels
)  # fmt: skip


def reads_patches(refiner: Refiner) -> bool:
    """Whether a refiner may read patches behind the last block; unknown ones may.

    Those that read colours, queries and keys do not, so that the last block can be evaluated for
    the class token alone.
    """
    return type(refiner) not in _CONTENT
