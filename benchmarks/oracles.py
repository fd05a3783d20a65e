"""Where the default loses its points: what oracles that read the masks reach, and kinds of errors.

    CAMKIT_DATA=folder python benchmarks/oracles.py

ViT-Ti with its ImageNet classifier. Background scores are picked on the first images of `train` of
voc12_animals, figures come from the next ones; `val` is not read, and photos with drawn boxes are
left out. Each row is analysed as by `camkit bench --oracles`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tables import CLASSES, RESULTS, Clean, Halves, found_data, write

import camkit
from camkit.bench import Variant, run
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import open_dataset
from camkit.method import CALIBRATED, DEFAULT_REFINE
from camkit.refiners import AtReducedSize
from camkit.seeds import HybridAttentionSeed


def variants() -> list[Variant]:
    seed = Variant("calibrated", replace(CALIBRATED.method, refine=()))
    refined = replace(seed.method, refine=DEFAULT_REFINE)
    sharp = replace(refined, refine=(*DEFAULT_REFINE, AtReducedSize(camkit.DenseCRF())))
    calibration = camkit.edits.StaticCalibration()
    hybrid = camkit.Method(HybridAttentionSeed(), edit=calibration, edit_blocks=4)
    default = Variant("calibrated + default refiners", refined, base=seed)
    return [
        seed,
        default,
        Variant("calibrated + default refiners + DenseCRF, half size", sharp, base=default),
        Variant("hybrid + default refiners", hybrid, base=default),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=120, help="in each part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    opened = open_model(DEFAULT_MODEL)
    torch.set_num_threads(1)
    report = run(
        opened.model,
        Halves(Clean(open_dataset(found_data() / "voc12_animals")), "train", options.images),
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=variants(),
        split="next",
        tune_split="first",
        photos=opened.photos,
        oracles=True,
    )
    write(report, options, "oracles")


if __name__ == "__main__":
    main()
