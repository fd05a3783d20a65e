"""Class maps made better after the forward."""

from camkit.refine.align import HybridAlign as HybridAlign
from camkit.refine.amplify import Amplify as Amplify
from camkit.refine.controls import Blur as Blur
from camkit.refine.crf import DenseCRF as DenseCRF
from camkit.refine.guided import GuidedFilter as GuidedFilter
from camkit.refine.normalize import Normalize as Normalize, normalize_cam as normalize_cam
from camkit.refine.pixel_adaptive import PixelAdaptive as PixelAdaptive
from camkit.refine.propagate import Propagate as Propagate
from camkit.refine.protocol import Chain as Chain, Refiner as Refiner, chain as chain
from camkit.refine.random_walk import RandomWalk as RandomWalk
from camkit.refine.reduced import Reduced as Reduced
from camkit.refine.smooth import FastGlobalSmooth as FastGlobalSmooth
from camkit.refine.superpixels import Superpixels as Superpixels
