"""Which settings of HybridAttentionSeed to take: looked for on `train` only.

    CAMKIT_DATA=folder python benchmarks/hybrid_search.py
    CAMKIT_DATA=folder python benchmarks/hybrid_search.py --voc

Background scores are picked on the first images of `train`, figures come from the next ones; `val`
is not read. Gains are over class attention, alone and behind the default refiners.
"""

import argparse
from pathlib import Path

import torch
from doei_search import Halves
from preset import VOC_MODEL
from tables import CLASSES, KEPT, RESULTS, found_data, write

import camkit
from camkit.bench import Variant, run
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import open_dataset
from camkit.method import CALIBRATED
from camkit.seeds import ClassAttentionSeed, ClassWeightSeed, HybridAttentionSeed, PrototypeSeed

BOTH = ("classifier", "class tokens")
AGAIN = ("classifier", PrototypeSeed(HybridAttentionSeed(), features="tokens"))
PLAIN = {
    "hybrid, temperature 0.1": HybridAttentionSeed(),
    "hybrid, temperature 0.2": HybridAttentionSeed(temperature=0.2),
    "hybrid, classifier + class token, 0.2": HybridAttentionSeed(BOTH, temperature=0.2),
}
CALIBRATED_SEEDS = {
    "class weight": ClassWeightSeed(),
    "gradient gated by class weight (default of wrap)": CALIBRATED.method.seed,
    "hybrid, temperature 0.1": HybridAttentionSeed(),
    "hybrid, temperature 0.05": HybridAttentionSeed(temperature=0.05),
    "hybrid, temperature 0.2": HybridAttentionSeed(temperature=0.2),
    "hybrid, 2 blocks": HybridAttentionSeed(blocks=2),
    "hybrid, 8 blocks": HybridAttentionSeed(blocks=8),
    "hybrid, not centred": HybridAttentionSeed(centred=False),
    "hybrid, symmetric sum": HybridAttentionSeed(interaction="sum"),
    "hybrid, classifier + class token, 0.2": HybridAttentionSeed(BOTH, temperature=0.2),
    "hybrid, classifier + own prototype, 0.15": HybridAttentionSeed(AGAIN, temperature=0.15),
}


def variants() -> list[Variant]:
    attention = camkit.contrib.BlockSeed(ClassAttentionSeed(), (-4, -3, -2, -1))
    seed = Variant("class attention", camkit.Method(attention, refine=()))
    refined = Variant("class attention, refined", camkit.Method(attention))
    found = [seed, refined]

    def add(name: str, maps: camkit.seeds.Seed, blocks: int | None) -> None:
        edit = None if blocks is None else camkit.edits.StaticCalibration()
        title = name if blocks is None else f"{name}, {blocks} blocks calibrated"
        method = {"edit": edit, "edit_blocks": blocks or 3}
        found.append(Variant(title, camkit.Method(maps, refine=(), **method), base=seed))
        found.append(Variant(f"{title}, refined", camkit.Method(maps, **method), base=refined))

    for name, maps in PLAIN.items():
        add(name, maps, None)
    for name, maps in CALIBRATED_SEEDS.items():
        add(name, maps, 4)
    for blocks in (3, 5):
        add("hybrid, temperature 0.1", HybridAttentionSeed(), blocks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=60, help="in each half")
    parser.add_argument("--voc", action="store_true", help="the model trained on VOC")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    torch.set_num_threads(1)
    report = run(
        opened.model,
        Halves(open_dataset(found_data() / "voc12_animals"), "train", options.images),
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=variants(),
        split="next",
        tune_split="first",
        photos=opened.photos,
        cache=KEPT,
    )
    write(report, options, "hybrid_search_voc" if options.voc else "hybrid_search")


if __name__ == "__main__":
    main()
