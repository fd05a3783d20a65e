"""The first class maps, read from a capture."""

from camkit.seed.attention_rollout import AttentionRolloutSeed as AttentionRolloutSeed
from camkit.seed.class_attention import ClassAttentionSeed as ClassAttentionSeed
from camkit.seed.class_weight import ClassWeightSeed as ClassWeightSeed
from camkit.seed.concepts import Concepts as Concepts, ConceptSeed as ConceptSeed
from camkit.seed.contrast import Contrast as Contrast
from camkit.seed.contribution import ContributionSeed as ContributionSeed
from camkit.seed.foreground import FiedlerSeed as FiedlerSeed, LonelySeed as LonelySeed
from camkit.seed.gradient import GradientSeed as GradientSeed, RolloutSeed as RolloutSeed
from camkit.seed.joint_space import JointSpace as JointSpace
from camkit.seed.layers import (
    AgreeingSeed as AgreeingSeed,
    BlockSeed as BlockSeed,
    FusedSeed as FusedSeed,
)
from camkit.seed.legrad import LeGradSeed as LeGradSeed
from camkit.seed.logit_lens import LogitLensSeed as LogitLensSeed
from camkit.seed.look import Look as Look
from camkit.seed.looked import Looked as Looked
from camkit.seed.needs import needs as needs
from camkit.seed.patch_head import PatchHeadSeed as PatchHeadSeed, ProductSeed as ProductSeed
from camkit.seed.patch_similarity import PrototypeSeed as PrototypeSeed
from camkit.seed.pooling import (
    GroupedGeM as GroupedGeM,
    MaxPooling as MaxPooling,
    MeanPooling as MeanPooling,
    Pooling as Pooling,
    RankPooling as RankPooling,
)
from camkit.seed.present import Present as Present
from camkit.seed.protocol import Seed as Seed
from camkit.seed.targets import Targets as Targets, read_targets as read_targets
from camkit.seed.text_classes import TextClasses as TextClasses
from camkit.seed.text_similarity import TextSimilaritySeed as TextSimilaritySeed
from camkit.seed.token_gradients import (
    EigenSeed as EigenSeed,
    TokenGradientSeed as TokenGradientSeed,
)
from camkit.seed.views import Views as Views
