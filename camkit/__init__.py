"""Any pretrained Vision Transformer and image-level labels become pixel masks to trust."""

from camkit.capture import (
    Capture as Capture,
    torch_kernels as torch_kernels,
    watch as watch,
)
from camkit.diagnosis import Diagnosis as Diagnosis, diagnose as diagnose
from camkit.edit import (
    DOEI as DOEI,
    ClassDecoupling as ClassDecoupling,
    HybridAlignment as HybridAlignment,
    OneMoreHop as OneMoreHop,
    PatchDecoupling as PatchDecoupling,
    RandomGates as RandomGates,
    ScaleOutput as ScaleOutput,
    VirtualClassTokens as VirtualClassTokens,
    attach as attach,
)
from camkit.errors import (
    CamkitError as CamkitError,
    CaptureError as CaptureError,
    DataError as DataError,
    UnsupportedModelError as UnsupportedModelError,
)
from camkit.grid import Grid as Grid
from camkit.mask import power_threshold as power_threshold, to_mask as to_mask
from camkit.ops.resampling import resize_cam as resize_cam
from camkit.photo import (
    Photo as Photo,
    load_photo as load_photo,
    photo_from_array as photo_from_array,
)
from camkit.pipeline import Pipeline as Pipeline, wrap as wrap
from camkit.refine import (
    Amplify as Amplify,
    Blur as Blur,
    DenseCRF as DenseCRF,
    FastGlobalSmooth as FastGlobalSmooth,
    GuidedFilter as GuidedFilter,
    HybridAlign as HybridAlign,
    Normalize as Normalize,
    PixelAdaptive as PixelAdaptive,
    Propagate as Propagate,
    RandomWalk as RandomWalk,
    Reduced as Reduced,
    Superpixels as Superpixels,
    chain as chain,
    normalize_cam as normalize_cam,
)
from camkit.result import Result as Result
from camkit.seed import (
    ClassAttentionSeed as ClassAttentionSeed,
    ClassWeightSeed as ClassWeightSeed,
    GradientSeed as GradientSeed,
    RolloutSeed as RolloutSeed,
)
from camkit.vocabulary import Vocabulary as Vocabulary
