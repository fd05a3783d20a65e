"""Seeds: the first class maps, read from a capture."""

from camkit.capture.record import SmoothGrad as SmoothGrad, WatchSpec as WatchSpec
from camkit.seeds.attention import (
    AttentionRolloutSeed as AttentionRolloutSeed,
    ClassAttentionSeed as ClassAttentionSeed,
    GradientSeed as GradientSeed,
    RelevanceSeed as RelevanceSeed,
)
from camkit.seeds.combined import (
    FusedSeed as FusedSeed,
    GatedProductSeed as GatedProductSeed,
    ProductSeed as ProductSeed,
    RefinedSeed as RefinedSeed,
)
from camkit.seeds.fitted import FITTED_SCORE as FITTED_SCORE, FittedSeed as FittedSeed
from camkit.seeds.hybrid import HybridAttentionSeed as HybridAttentionSeed
from camkit.seeds.legrad import LeGradSeed as LeGradSeed
from camkit.seeds.patches import (
    LOSTSeed as LOSTSeed,
    PrototypeSeed as PrototypeSeed,
    TokenCutSeed as TokenCutSeed,
)
from camkit.seeds.pooled import (
    ClassWeightSeed as ClassWeightSeed,
    ContributionSeed as ContributionSeed,
    GroupedGeM as GroupedGeM,
    MaxPooling as MaxPooling,
    MeanPooling as MeanPooling,
    PatchHeadSeed as PatchHeadSeed,
    Pooling as Pooling,
    RankPooling as RankPooling,
)
from camkit.seeds.protocol import HeadWeights as HeadWeights, Seed as Seed
from camkit.seeds.targets import (
    ClassRequest as ClassRequest,
    PredictedClasses as PredictedClasses,
    Targets as Targets,
    read_targets as read_targets,
)
from camkit.seeds.text import (
    JointSpace as JointSpace,
    TextClasses as TextClasses,
    TextSimilaritySeed as TextSimilaritySeed,
)
from camkit.seeds.token_gradients import (
    EigenCAMSeed as EigenCAMSeed,
    FinerCAMContrast as FinerCAMContrast,
    GradCAMSeed as GradCAMSeed,
)
from camkit.seeds.views import (
    ModelRunner as ModelRunner,
    MultiViewReader as MultiViewReader,
    Views as Views,
)
