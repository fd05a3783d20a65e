"""Layer tools on real photos: the lens by depth, fusions, the layer that agrees best, concepts.

    CAMKIT_DATA=folder python benchmarks/layers.py [--limit 24]

Background scores are picked on `train`, figures come from `val`, as in gains.py.
"""

from tables import measure, table_options, write

import camkit
from camkit import bench

LENSES = tuple(camkit.contrib.LogitLensSeed(layer) for layer in range(-6, 0))
PAIR = (camkit.contrib.LogitLensSeed(-2), camkit.contrib.LogitLensSeed(-1))
SEEDS = {
    "class weight": camkit.seeds.ClassWeightSeed(),
    **{f"lens {lens.layer}": lens for lens in LENSES},
    "lenses -2 and -1, mean": camkit.seeds.FusedSeed(PAIR, "mean"),
    "lenses -2 and -1, maximum": camkit.seeds.FusedSeed(PAIR, "max"),
    "lenses -2 and -1, product": camkit.seeds.FusedSeed(PAIR, "product"),
    "lens that agrees best": camkit.contrib.BestAgreementSeed(LENSES),
    "lens that agrees with the gradient seed": camkit.contrib.BestAgreementSeed(
        LENSES, camkit.GradientSeed()
    ),
    "gradient": camkit.GradientSeed(),
    "gradient, last block": camkit.contrib.BlockSeed(camkit.GradientSeed(), (-1,)),
    "concepts": camkit.contrib.CRAFTSeed(),
}


def main() -> None:
    options = table_options(__doc__).parse_args()
    single = bench.Variant("class weight", camkit.Method(SEEDS["class weight"], refine=()))
    others = [
        bench.Variant(name, camkit.Method(seed, refine=()), base=single)
        for name, seed in SEEDS.items()
    ]
    found = measure([single, *others[1:]], options)
    write(found.report, options, "layers")


if __name__ == "__main__":
    main()
