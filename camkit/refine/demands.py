"""What refiners read of a capture."""

from camkit.refine.controls import Blur
from camkit.refine.crf import DenseCRF
from camkit.refine.guided import GuidedFilter
from camkit.refine.normalize import Normalize
from camkit.refine.pixel_adaptive import PixelAdaptive
from camkit.refine.propagate import Propagate
from camkit.refine.protocol import Refiner
from camkit.refine.smooth import FastGlobalSmooth
from camkit.refine.superpixels import Superpixels

_CONTENT = (
    Blur, DenseCRF, FastGlobalSmooth, GuidedFilter, Normalize, PixelAdaptive, Propagate, Superpixels
)  # fmt: skip


def reads_patches(refiner: Refiner) -> bool:
    """Whether a refiner may read patches behind the last block; unknown ones may.

    Those that read colours, queries and keys do not, so that the last block can be evaluated for
    the class token alone.
    """
    return type(refiner) not in _CONTENT
