"""The variants that are measured when nobody asks for others."""

from dataclasses import replace

from camkit.bench.protocol import Variant
from camkit.preset import CALIBRATED, DEFAULT_REFINE
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


def standard_variants(*, calibrated: bool = True) -> tuple[Variant, ...]:
    """Each seed alone, and after plain and balanced propagation.

    Args:
        calibrated: with the default of `camkit.wrap` as the last seed; a model may not bear it.
    """
    minmax = Normalize(mode="minmax")
    chains = {
        "propagation": (Propagate(steps=2, blocks=6), minmax),
        "balanced propagation": DEFAULT_REFINE,
    }
    bases = [Variant(name, seed) for name, seed in SEEDS.items()]
    if calibrated:
        preset = CALIBRATED
        bases.append(
            Variant("calibrated", preset.seed, edit=preset.edit, edit_blocks=preset.edit_blocks)
        )
    variants = []
    for base in bases:
        after = (
            replace(base, name=f"{base.name} + {name}", refine=chain, base=base)
            for name, chain in chains.items()
        )
        variants += [base, *after]
    return tuple(variants)
