"""What DOEI gains without training, beside the controls it has to beat.

    CAMKIT_DATA=folder python benchmarks/doei_gains.py

ViT-Ti with its ImageNet classifier, one class token. Background scores are picked on `train`,
figures come from `val`. The settings are the defaults of docs/doei.md, chosen on neither; edits act
in the last three blocks.
"""

import argparse
import sys
from pathlib import Path

import torch

import camkit
from camkit.bench import Variant, run, to_json, to_markdown
from camkit.cli.models import DEFAULT_MODEL, data_folder, open_model
from camkit.data import open_dataset

RESULTS = Path(__file__).parent / "results"
CLASSES = ["cat", "dog", "horse", "cow", "sheep", "person"]
CHAIN = (camkit.Propagate(steps=2, blocks=6, balance=3), camkit.Normalize(mode="minmax"))
SEED = camkit.GradientSeed()


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
    aligned = (camkit.HybridAlign(steps=2), CHAIN[1])
    found = [
        seed,
        Variant("gradient, blur", SEED, (camkit.Blur(1.0),), base=seed),
        Variant("gradient, Amplify", SEED, (camkit.Amplify(),), base=seed),
        refined,
        Variant("gradient + HybridAlign", SEED, aligned, base=refined),
        Variant("gradient + balanced + Amplify", SEED, (*CHAIN, camkit.Amplify()), base=refined),
    ]
    for name, edit in edits(virtual).items():
        found.append(Variant(name, SEED, base=seed, edit=edit))
        found.append(Variant(f"{name} + balanced", SEED, CHAIN, base=refined, edit=edit))
    return found


def main() -> None:
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/ and weights/")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="only the first images of each split")
    limit = parser.parse_args().limit
    opened = open_model(DEFAULT_MODEL)
    torch.set_num_threads(1)
    report = run(
        opened.model,
        open_dataset(folder / "voc12_animals"),
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=variants(camkit.VirtualClassTokens.from_classifier(opened.model)),
        split="val",
        tune_split="train",
        photos=opened.photos,
        limit=limit,
    )
    (RESULTS / "doei.json").write_text(to_json(report))
    (RESULTS / "doei.md").write_text(to_markdown(report))
    print(to_markdown(report))


if __name__ == "__main__":
    main()
