"""What DOEI gains without training, beside the controls it has to beat.

    CAMKIT_DATA=folder python benchmarks/doei_gains.py
    CAMKIT_DATA=folder python benchmarks/doei_gains.py --coco

ViT-Ti with its ImageNet classifier, one class token. Background scores are picked on `train` of
voc12_animals, figures come from its `val`, or from photos of COCO. The settings are the defaults of
docs/doei.md, chosen on neither; edits act in the last three blocks.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import camkit
from camkit.bench import Variant, run, to_json, to_markdown
from camkit.cli.models import DEFAULT_MODEL, data_folder, open_model
from camkit.data import DataSet, Sample, open_dataset

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parent.parent / "out" / "measured.sqlite"  # so that a run can go on
CLASSES = ["cat", "dog", "horse", "cow", "sheep", "person"]
CHAIN = (camkit.Propagate(steps=2, blocks=6, balance=3), camkit.Normalize(mode="minmax"))
SEED = camkit.GradientSeed()
ATTENDED = camkit.ClassAttentionSeed()


@dataclass(frozen=True)
class Across:
    """Tuned on one data set, measured on another of the same classes."""

    tuned: DataSet
    measured: DataSet

    @property
    def root(self) -> Path:
        return self.measured.root

    @property
    def classes(self) -> tuple[str, ...]:
        return self.measured.classes

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train of voc12_animals", "all")

    def split(self, name: str) -> tuple[Sample, ...]:
        return (self.tuned if name != "all" else self.measured).split("train")


def edits(virtual: camkit.VirtualClassTokens) -> dict[str, object]:
    doei = camkit.DOEI()
    return {
        "DOEI": doei,
        "DOEI without alignment": camkit.DOEI(alignment=None),
        "DOEI without decoupling": camkit.DOEI(classes=None, patches=None),
        "DOEI, affinity reading": camkit.DOEI(reading="affinity"),
        "DOEI, virtual class tokens": camkit.DOEI(virtual=virtual),
        "control: output x2": camkit.ScaleOutput(2.0),
        "control: one more hop": camkit.OneMoreHop(),
        **{f"control: random gates {s}": camkit.RandomGates(doei, rng_seed=s) for s in range(3)},
    }


def variants(virtual: camkit.VirtualClassTokens) -> list[Variant]:
    seed, refined = Variant("gradient", SEED), Variant("gradient + balanced", SEED, CHAIN)
    attended = Variant("class attention", ATTENDED)
    aligned = (camkit.HybridAlign(steps=2), CHAIN[1])
    found = [
        attended,
        seed,
        Variant("gradient, blur", SEED, (camkit.Blur(1.0),), base=seed),
        Variant("gradient, Amplify", SEED, (camkit.Amplify(),), base=seed),
        refined,
        Variant("gradient + HybridAlign", SEED, aligned, base=refined),
        Variant("gradient + balanced + Amplify", SEED, (*CHAIN, camkit.Amplify()), base=refined),
    ]
    for name, edit in edits(virtual).items():
        found.append(Variant(f"{name}, class attention", ATTENDED, base=attended, edit=edit))
        found.append(Variant(name, SEED, base=seed, edit=edit))
        found.append(Variant(f"{name} + balanced", SEED, CHAIN, base=refined, edit=edit))
    return found


def main() -> None:
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/ and weights/")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="only the first images of each split")
    parser.add_argument("--coco", action="store_true", help="measure on coco100_voc")
    options = parser.parse_args()
    data = open_dataset(folder / "voc12_animals")
    tune_split, split, name = "train", "val", "doei"
    if options.coco:
        data = Across(data, open_dataset(folder / "coco100_voc"))
        tune_split, split, name = *data.splits, "doei_coco"
    opened = open_model(DEFAULT_MODEL)
    torch.set_num_threads(1)
    report = run(
        opened.model,
        data,
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=variants(camkit.VirtualClassTokens.from_classifier(opened.model)),
        split=split,
        tune_split=tune_split,
        photos=opened.photos,
        cache=KEPT,
        limit=options.limit,
    )
    (RESULTS / f"{name}.json").write_text(to_json(report))
    (RESULTS / f"{name}.md").write_text(to_markdown(report))
    print(to_markdown(report))


if __name__ == "__main__":
    main()
