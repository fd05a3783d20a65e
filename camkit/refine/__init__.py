"""Class maps made better after the forward."""

from camkit.refine.align import HybridAlign as HybridAlign
from camkit.refine.amplify import Amplify as Amplify
from camkit.refine.controls import Blur as Blur
from camkit.refine.crf import DenseCRF as DenseCRF
from camkit.refine.normalize import Normalize as Normalize, normalize_cam as normalize_cam
from camkit.refine.pixel_adaptive import PixelAdaptive as PixelAdaptive
from camkit.refine.propagate import Propagate as Propagate
from camkit.refine.protocol import Chain as Chain, Refiner as Refiner, chain as chain
