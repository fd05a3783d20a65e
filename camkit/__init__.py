"""Any pretrained Vision Transformer and image-level labels become pixel masks to trust."""

from camkit.capture import (
    Capture as Capture,
    Noise as Noise,
    TokenWatch as TokenWatch,
    torch_kernels as torch_kernels,
    watch as watch,
)
from camkit.diagnosis import Diagnosis as Diagnosis, diagnose as diagnose
from camkit.edit import (
    DOEI as DOEI,
    ClassDecoupling as ClassDecoupling,
    FuzzyKeyPruning as FuzzyKeyPruning,
    HybridAlignment as HybridAlignment,
    OneMoreHop as OneMoreHop,
    PatchDecoupling as PatchDecoupling,
    RandomGates as RandomGates,
    ScaleOutput as ScaleOutput,
    StaticCalibration as StaticCalibration,
    SuppressOutliers as SuppressOutliers,
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
    AgreedProductSeed as AgreedProductSeed,
    AgreeingSeed as AgreeingSeed,
    AttentionRolloutSeed as AttentionRolloutSeed,
    BlockSeed as BlockSeed,
    ClassAttentionSeed as ClassAttentionSeed,
    ClassWeightSeed as ClassWeightSeed,
    Concepts as Concepts,
    ConceptSeed as ConceptSeed,
    Contrast as Contrast,
    ContributionSeed as ContributionSeed,
    EigenSeed as EigenSeed,
    FiedlerSeed as FiedlerSeed,
    FusedSeed as FusedSeed,
    GradientSeed as GradientSeed,
    GroupedGeM as GroupedGeM,
    JointSpace as JointSpace,
    LeGradSeed as LeGradSeed,
    LogitLensSeed as LogitLensSeed,
    LonelySeed as LonelySeed,
    PatchHeadSeed as PatchHeadSeed,
    Present as Present,
    ProductSeed as ProductSeed,
    PrototypeSeed as PrototypeSeed,
    RankPooling as RankPooling,
    RolloutSeed as RolloutSeed,
    TextClasses as TextClasses,
    TextLeGradSeed as TextLeGradSeed,
    TextSimilaritySeed as TextSimilaritySeed,
    TokenGradientSeed as TokenGradientSeed,
    Views as Views,
    needs as needs,
)
from camkit.vocabulary import Vocabulary as Vocabulary
