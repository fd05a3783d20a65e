"""The first class maps, read from a capture."""

from camkit.seed.class_attention import ClassAttentionSeed as ClassAttentionSeed
from camkit.seed.class_weight import ClassWeightSeed as ClassWeightSeed
from camkit.seed.gradient import GradientSeed as GradientSeed, RolloutSeed as RolloutSeed
from camkit.seed.protocol import Seed as Seed
