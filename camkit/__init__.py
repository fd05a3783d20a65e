"""Any pretrained Vision Transformer and image-level labels become pixel masks to trust."""

from camkit.capture import (
    Capture as Capture,
    SmoothGrad as SmoothGrad,
    TokenWatch as TokenWatch,
    torch_kernels as torch_kernels,
    watch as watch,
)
from camkit.diagnosis import Diagnosis as Diagnosis, diagnose as diagnose
from camkit.edits import (
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
from camkit.ops.images import resize_cam as resize_cam
from camkit.photo import (
    Photo as Photo,
    load_photo as load_photo,
    photo_from_array as photo_from_array,
)
from camkit.pipeline import Pipeline as Pipeline, Result as Result, wrap as wrap
from camkit.refiners import (
    Amplify as Amplify,
    AtReducedSize as AtReducedSize,
    Blur as Blur,
    DenseCRF as DenseCRF,
    FastGlobalSmooth as FastGlobalSmooth,
    GuidedFilter as GuidedFilter,
    HybridPropagate as HybridPropagate,
    Normalize as Normalize,
    PixelAdaptive as PixelAdaptive,
    Propagate as Propagate,
    RandomWalk as RandomWalk,
    Superpixels as Superpixels,
    chain as chain,
    normalize_cam as normalize_cam,
)
from camkit.seeds import (
    AttentionRolloutSeed as AttentionRolloutSeed,
    BestAgreementSeed as BestAgreementSeed,
    BlockSeed as BlockSeed,
    ClassAttentionSeed as ClassAttentionSeed,
    ClassWeightSeed as ClassWeightSeed,
    ConceptBank as ConceptBank,
    ContributionSeed as ContributionSeed,
    CRAFTSeed as CRAFTSeed,
    EigenCAMSeed as EigenCAMSeed,
    FinerCAMContrast as FinerCAMContrast,
    FusedSeed as FusedSeed,
    GatedProductSeed as GatedProductSeed,
    GradCAMSeed as GradCAMSeed,
    GradientSeed as GradientSeed,
    GroupedGeM as GroupedGeM,
    JointSpace as JointSpace,
    LeGradSeed as LeGradSeed,
    LogitLensSeed as LogitLensSeed,
    LOSTSeed as LOSTSeed,
    PatchHeadSeed as PatchHeadSeed,
    PredictedClasses as PredictedClasses,
    ProductSeed as ProductSeed,
    PrototypeSeed as PrototypeSeed,
    RankPooling as RankPooling,
    RelevanceSeed as RelevanceSeed,
    TextClasses as TextClasses,
    TextLeGradSeed as TextLeGradSeed,
    TextSimilaritySeed as TextSimilaritySeed,
    TokenCutSeed as TokenCutSeed,
    Views as Views,
    needs as needs,
)
from camkit.vocabulary import Vocabulary as Vocabulary
