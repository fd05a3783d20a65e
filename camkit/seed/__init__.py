"""The first class maps, read from a capture."""

from camkit.seed.attention.attention_rollout import AttentionRolloutSeed as AttentionRolloutSeed
from camkit.seed.attention.class_attention import ClassAttentionSeed as ClassAttentionSeed
from camkit.seed.attention.gradient import GradientSeed as GradientSeed, RolloutSeed as RolloutSeed
from camkit.seed.attention.legrad import LeGradSeed as LeGradSeed
from camkit.seed.layers import (
    AgreedProductSeed as AgreedProductSeed,
    AgreeingSeed as AgreeingSeed,
    BlockSeed as BlockSeed,
    FusedSeed as FusedSeed,
)
from camkit.seed.looking.look import Look as Look
from camkit.seed.looking.looked import Looked as Looked
from camkit.seed.looking.views import Views as Views
from camkit.seed.needs import needs as needs
from camkit.seed.pooled.class_weight import ClassWeightSeed as ClassWeightSeed
from camkit.seed.pooled.contribution import ContributionSeed as ContributionSeed
from camkit.seed.pooled.patch_head import PatchHeadSeed as PatchHeadSeed, ProductSeed as ProductSeed
from camkit.seed.pooled.pooling import (
    GroupedGeM as GroupedGeM,
    MaxPooling as MaxPooling,
    MeanPooling as MeanPooling,
    Pooling as Pooling,
    RankPooling as RankPooling,
)
from camkit.seed.present import Present as Present
from camkit.seed.protocol import Seed as Seed
from camkit.seed.targets import Targets as Targets, read_targets as read_targets
from camkit.seed.text.joint_space import JointSpace as JointSpace
from camkit.seed.text.text_classes import TextClasses as TextClasses
from camkit.seed.text.text_legrad import TextLeGradSeed as TextLeGradSeed
from camkit.seed.text.text_similarity import TextSimilaritySeed as TextSimilaritySeed
from camkit.seed.tokens.concepts import Concepts as Concepts, ConceptSeed as ConceptSeed
from camkit.seed.tokens.contrast import Contrast as Contrast
from camkit.seed.tokens.foreground import FiedlerSeed as FiedlerSeed, LonelySeed as LonelySeed
from camkit.seed.tokens.logit_lens import LogitLensSeed as LogitLensSeed
from camkit.seed.tokens.patch_similarity import PrototypeSeed as PrototypeSeed
from camkit.seed.tokens.token_gradients import (
    EigenSeed as EigenSeed,
    TokenGradientSeed as TokenGradientSeed,
)
