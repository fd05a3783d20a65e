"""How the default of `camkit.wrap` was chosen: seeds, calibrated blocks and propagation.

    CAMKIT_DATA=folder python benchmarks/preset.py --limit 60
    CAMKIT_DATA=folder python benchmarks/preset.py --limit 60 --voc

All on the same images of `train`, background scores as well, which the table says: it serves to
choose, not to report. What the choice is worth elsewhere is in gains.py.
"""

from dataclasses import replace

import torch
from tables import CLASSES, KEPT, found_data, table_options, write

import camkit
from camkit.bench import Variant, run
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import open_dataset
from camkit.method import DEFAULT_REFINE
from camkit.refiners import Refiner
from camkit.seeds import FusedSeed

VOC_MODEL = "vit_tiny_patch16_224.voc20_animals_ft"
GRADIENT, WEIGHT = camkit.GradientSeed(), camkit.seeds.ClassWeightSeed()
PRODUCT = FusedSeed((GRADIENT, WEIGHT), join="product")
AGREED = camkit.seeds.GatedProductSeed(GRADIENT, WEIGHT)
SEEDS = {
    "class weight": WEIGHT,
    "product": PRODUCT,
    "mean": FusedSeed((GRADIENT, WEIGHT)),
    "as far as they agree": AGREED,
}
EDIT = camkit.edits.StaticCalibration()
MINMAX = camkit.refiners.Normalize("minmax")
PAR = camkit.refiners.PixelAdaptive(scale=0.5)


def spread(steps: int, blocks: int) -> tuple[Refiner, ...]:
    return camkit.Propagate(steps=steps, blocks=blocks, balance=3), MINMAX


CHAINS = {
    **{f"{s} steps, {b} blocks": spread(s, b) for s, b in ((1, 6), (1, 12), (2, 4), (2, 8))},
    "3 steps, 6 blocks": spread(3, 6),
    "1 step, 6 blocks + PixelAdaptive, half size": (*spread(1, 6), PAR),
    "default + PixelAdaptive, half size": (*DEFAULT_REFINE, PAR),
    "default + DenseCRF, half size": (
        *DEFAULT_REFINE,
        camkit.refiners.AtReducedSize(camkit.DenseCRF(background_score=0.5), scale=0.5),
    ),
}


def variants() -> list[Variant]:
    plain = Variant("gradient", camkit.Method(GRADIENT, refine=()))
    found = [plain, Variant("gradient, refined", camkit.Method(GRADIENT), base=plain)]
    read = [(name, seed, 4) for name, seed in SEEDS.items()]
    read += [("as far as they agree", AGREED, blocks) for blocks in (5, 6)]
    for name, seed, blocks in read:
        method = camkit.Method(seed, edit=EDIT, edit_blocks=blocks)
        title = f"{name}, {blocks} blocks calibrated"
        found.append(Variant(title, replace(method, refine=()), base=plain))
        found.append(Variant(f"{title}, refined", method, base=plain))
    agreed = camkit.Method(AGREED, edit=EDIT, edit_blocks=4)
    for name, chain in CHAINS.items():
        found.append(Variant(f"agreed, 4: {name}", replace(agreed, refine=chain), base=plain))
    return found


def main() -> None:
    parser = table_options(__doc__)
    parser.add_argument("--voc", action="store_true", help="the model trained on VOC")
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    report = run(
        opened.model,
        open_dataset(found_data() / "voc12_animals"),
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
