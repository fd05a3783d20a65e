"""The variants that are measured when nobody asks for others."""

from camkit.bench.protocol import Variant
from camkit.refine.normalize import Normalize
from camkit.refine.propagate import Propagate
from camkit.seed.attention.class_attention import ClassAttentionSeed
from camkit.seed.attention.gradient import GradientSeed, RolloutSeed
from camkit.seed.pooled.class_weight import ClassWeightSeed
from camkit.seed.protocol import Seed

SEEDS: dict[str, Seed] = {
    "class attention": ClassAttentionSeed(),
    "class weight": ClassWeightSeed(),
    "gradient": GradientSeed(),
    "rollout": RolloutSeed(),
}


def standard_variants() -> tuple[Variant, ...]:
    """Each seed alone, and after plain and balanced propagation."""
    minmax = Normalize(mode="minmax")
    variants = []
    for name, seed in SEEDS.items():
        base = Variant(name, seed)
        plain = (Propagate(steps=2, blocks=6), minmax)
        balanced = (Propagate(steps=2, blocks=6, balance=3), minmax)
        variants += [
            base,
            Variant(f"{name} + propagation", seed, plain, base),
            Variant(f"{name} + balanced propagation", seed, balanced, base),
        ]
    return tuple(variants)
