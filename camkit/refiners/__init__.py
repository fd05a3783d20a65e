"""Class maps made better after the forward."""

from camkit.refiners.crf import DenseCRF as DenseCRF
from camkit.refiners.edge_aware import (
    FastGlobalSmooth as FastGlobalSmooth,
    GuidedFilter as GuidedFilter,
    PixelAdaptive as PixelAdaptive,
)
from camkit.refiners.normalize import (
    Amplify as Amplify,
    Blur as Blur,
    Normalize as Normalize,
    normalize_cam as normalize_cam,
)
from camkit.refiners.propagate import (
    HybridPropagate as HybridPropagate,
    Propagate as Propagate,
    RandomWalk as RandomWalk,
)
from camkit.refiners.protocol import Chain as Chain, Refiner as Refiner, chain as chain
from camkit.refiners.reduced import AtReducedSize as AtReducedSize
from camkit.refiners.superpixels import Superpixels as Superpixels
