"""Refiners: class maps improved after the forward."""

from camkit.refiners.crf import DenseCRF as DenseCRF
from camkit.refiners.edge_aware import (
    AtReducedSize as AtReducedSize,
    FastGlobalSmooth as FastGlobalSmooth,
    GuidedFilter as GuidedFilter,
    PixelAdaptive as PixelAdaptive,
)
from camkit.refiners.flat import FlatMapWarning as FlatMapWarning
from camkit.refiners.normalize import (
    Amplify as Amplify,
    Blur as Blur,
    Normalize as Normalize,
    normalize_cam as normalize_cam,
)
from camkit.refiners.prompted import (
    PromptedRefine as PromptedRefine,
    SegmenterWarning as SegmenterWarning,
)
from camkit.refiners.propagate import (
    HybridPropagate as HybridPropagate,
    Propagate as Propagate,
    RandomWalk as RandomWalk,
)
from camkit.refiners.protocol import Chain as Chain, Refiner as Refiner, chain as chain
from camkit.refiners.regions import (
    PhotoProposals as PhotoProposals,
    Regions as Regions,
    Segments as Segments,
    Superpixels as Superpixels,
    UnusedRegionsWarning as UnusedRegionsWarning,
)
