"""How the default of `camkit.wrap` was chosen: seeds, calibrated blocks, propagation and edges.

    CAMKIT_DATA=folder python benchmarks/preset.py
    CAMKIT_DATA=folder python benchmarks/preset.py --voc

All on the same images of `train`, background scores as well, which the table says: it serves to
choose, not to report. Photos with drawn boxes are left out. What the choice is worth elsewhere is
in gains.py, what it costs in chain_cost.py.
"""

from dataclasses import replace

import torch
from tables import CLASSES, KEPT, Clean, found_data, table_options, write

import camkit
from camkit.bench import Variant, run
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import open_dataset
from camkit.refiners import Refiner
from camkit.seeds import ClassAttentionSeed, FusedSeed, HybridAttentionSeed

VOC_MODEL = "vit_tiny_patch16_224.voc20_animals_ft"
GRADIENT, WEIGHT = camkit.GradientSeed(), camkit.seeds.ClassWeightSeed()
HYBRID = HybridAttentionSeed()
SEEDS = {
    "class weight": WEIGHT,
    "gradient and class weight, as far as they agree": camkit.seeds.GatedProductSeed(
        GRADIENT, WEIGHT
    ),
    "attention of 6 blocks times class weight": FusedSeed(
        (ClassAttentionSeed(blocks=6), WEIGHT), join="product"
    ),
    "hybrid attention": HYBRID,
    "hybrid attention, temperature 0.07": replace(HYBRID, temperature=0.07),
    "hybrid attention, temperature 0.15": replace(HYBRID, temperature=0.15),
    "hybrid attention of 6 blocks": replace(HYBRID, blocks=6),
    "hybrid attention times class weight": FusedSeed((HYBRID, WEIGHT), join="product"),
    "hybrid attention and class weight, as far as they agree": camkit.seeds.GatedProductSeed(
        HYBRID, WEIGHT
    ),
}
EDIT = camkit.edits.StaticCalibration(of="k")
MINMAX = camkit.refiners.Normalize("minmax")
CRF = camkit.DenseCRF(background_score=0.5)


def spread(steps: int, blocks: int, balance: int) -> tuple[Refiner, ...]:
    return camkit.Propagate(steps=steps, blocks=blocks, balance=balance), MINMAX


def half(refiner: Refiner) -> Refiner:
    return camkit.refiners.AtReducedSize(refiner, scale=0.5)


SPREAD = spread(2, 6, 3)
SPREADS = [(1, 6, 3), (3, 6, 3), (2, 4, 3), (2, 8, 3), (2, 6, 1)]
EDGES = {
    "GuidedFilter": camkit.refiners.GuidedFilter(),
    "FastGlobalSmooth": camkit.refiners.FastGlobalSmooth(),
    "PixelAdaptive, half size": camkit.refiners.PixelAdaptive(scale=0.5),
    "DenseCRF, half size": half(CRF),
    "DenseCRF at temperature 0.1, half size": half(replace(CRF, temperature=0.1)),
}


def variants() -> list[Variant]:
    plain = Variant("gradient", camkit.Method(GRADIENT, refine=()))
    spreading = Variant("gradient, propagated", camkit.Method(GRADIENT, refine=SPREAD), base=plain)
    found = [plain, spreading]
    for name, seed in SEEDS.items():
        method = camkit.Method(seed, edit=EDIT, edit_blocks=4, refine=SPREAD)
        found.append(Variant(f"{name}, propagated", method, base=spreading))
    for blocks in (3, 5):
        method = camkit.Method(HYBRID, edit=EDIT, edit_blocks=blocks, refine=SPREAD)
        title = f"hybrid attention, {blocks} blocks calibrated, propagated"
        found.append(Variant(title, method, base=spreading))
    for of in ("qkv", "qk"):
        edit = camkit.edits.StaticCalibration(of=of)
        method = camkit.Method(HYBRID, edit=edit, edit_blocks=4, refine=SPREAD)
        title = f"hybrid attention, calibrated by {', '.join(of)}, propagated"
        found.append(Variant(title, method, base=spreading))
    hybrid = camkit.Method(HYBRID, edit=EDIT, edit_blocks=4, refine=SPREAD)
    base = next(each for each in found if each.name == "hybrid attention, propagated")
    found.append(Variant("hybrid attention", replace(hybrid, refine=()), base=plain))
    for steps, blocks, balance in SPREADS:
        title = f"hybrid attention: {steps} steps, {blocks} blocks, balance {balance}"
        method = replace(hybrid, refine=spread(steps, blocks, balance))
        found.append(Variant(title, method, base=base))
    for name, refiner in EDGES.items():
        method = replace(hybrid, refine=(*SPREAD, refiner))
        found.append(Variant(f"hybrid attention, propagated + {name}", method, base=base))
    return found


def main() -> None:
    parser = table_options(__doc__)
    parser.add_argument("--voc", action="store_true", help="the model trained on VOC")
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    report = run(
        opened.model,
        Clean(open_dataset(found_data() / "voc12_animals")),
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=variants(),
        split="train",
        tune_split="train",
        photos=opened.photos,
        cache=KEPT,
        limit=options.limit,
        oracle_threshold=True,
    )
    write(report, options, "preset_voc" if options.voc else "preset")


if __name__ == "__main__":
    main()
