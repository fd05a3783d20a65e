"""Which settings of HybridAttentionSeed to take: looked for on `train` only.

    CAMKIT_DATA=folder python benchmarks/hybrid_search.py
    CAMKIT_DATA=folder python benchmarks/hybrid_search.py --voc

Background scores are picked on the first images of `train`, figures come from the next ones; `val`
is not read, and photos that boxes are drawn into are left out. Gains are over class attention, and
for calibrated seeds over the gradient gated by the class weight, alone and behind balanced
propagation.
"""

import argparse
import math
from pathlib import Path

from preset import VOC_MODEL
from tables import CHAIN, KEPT, RESULTS, measure_halves, write

import camkit
from camkit.bench import Variant
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.seeds import ClassWeightSeed, HybridAttentionSeed, PrototypeSeed

BOTH = ("classifier", "class tokens")
FORMER = camkit.seeds.GatedProductSeed(camkit.GradientSeed(), ClassWeightSeed())
PLAIN = {
    "hybrid, temperature 0.1": HybridAttentionSeed(temperature=0.1),
    "hybrid, temperature 0.2": HybridAttentionSeed(temperature=0.2),
    "hybrid, classifier + class token, 0.2": HybridAttentionSeed(BOTH, temperature=0.2),
}
CALIBRATED = {
    "class weight": ClassWeightSeed(),
    "hybrid, temperature 0.05": HybridAttentionSeed(temperature=0.05),
    "hybrid, temperature 0.07": HybridAttentionSeed(temperature=0.07),
    "hybrid, temperature 0.1": HybridAttentionSeed(temperature=0.1),
    "hybrid, temperature 0.2": HybridAttentionSeed(temperature=0.2),
    "hybrid, temperature 0.07, 8 blocks": HybridAttentionSeed(temperature=0.07, blocks=8),
    "hybrid, not centred": HybridAttentionSeed(centred=False),
    "hybrid, symmetric sum": HybridAttentionSeed(interaction="sum"),
    **{
        f"hybrid, classifier + own prototype, {temperature}": HybridAttentionSeed(
            ("classifier", PrototypeSeed(HybridAttentionSeed(), features="tokens")),
            temperature=temperature,
        )
        for temperature in (0.1, 0.15)
    },
}


class Lines:
    """Each seed alone and behind propagation, over the same of a first seed."""

    def __init__(self, *, blocks: int | None = None) -> None:
        edit = None if blocks is None else camkit.edits.StaticCalibration()
        self.found: list[Variant] = []
        self._method = {"edit": edit, "edit_blocks": blocks or 3}

    def add(self, name: str, seed: camkit.seeds.Seed) -> None:
        bases = self.found[:2] or (None, None)
        alone = camkit.Method(seed, refine=(), **self._method)
        self.found.append(Variant(name, alone, base=bases[0]))
        refined = camkit.Method(seed, refine=CHAIN, **self._method)
        self.found.append(Variant(f"{name}, refined", refined, base=bases[1]))


def variants() -> list[Variant]:
    plain, calibrated = Lines(), Lines(blocks=4)
    plain.add("class attention", HybridAttentionSeed(temperature=math.inf))
    for name, seed in PLAIN.items():
        plain.add(name, seed)
    calibrated.add("calibrated: gradient gated by class weight", FORMER)
    for name, seed in CALIBRATED.items():
        calibrated.add(f"calibrated: {name}", seed)
    return [*plain.found, *calibrated.found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=120, help="in each half")
    parser.add_argument("--voc", action="store_true", help="the model trained on VOC")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    report = measure_halves(opened, variants(), options.images, cache=KEPT)
    write(report, options, "hybrid_search_voc" if options.voc else "hybrid_search")


if __name__ == "__main__":
    main()
