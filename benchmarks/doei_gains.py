"""What DOEI gains without training, beside the controls it has to beat.

    CAMKIT_DATA=folder python benchmarks/doei_gains.py
    CAMKIT_DATA=folder python benchmarks/doei_gains.py --coco

ViT-Ti with its ImageNet classifier, one class token. Background scores are picked on `train` of
voc12_animals, figures come from its `val`, or from photos of COCO. The settings are the defaults of
docs/doei.md, chosen on neither; edits act in the last three blocks.
"""

from tables import CHAIN, SEED, found_data, measure, table_options, write

import camkit
from camkit.bench import Variant
from camkit.cli.models import DEFAULT_MODEL, open_model

ATTENDED = camkit.seeds.ClassAttentionSeed()


def edits(virtual: camkit.edits.VirtualClassTokens) -> dict[str, object]:
    doei = camkit.DOEI.as_drawn()
    return {
        "DOEI": doei,
        "DOEI without alignment": camkit.DOEI.as_drawn(alignment=None),
        "DOEI without decoupling": camkit.DOEI.as_drawn(classes=None, patches=None),
        "DOEI, affinity reading": camkit.DOEI.as_drawn(reading="affinity"),
        "DOEI, virtual class tokens": camkit.DOEI.as_drawn(virtual=virtual),
        "control: output x2": camkit.edits.ScaleOutput(2.0),
        "control: one more hop": camkit.edits.OneMoreHop(),
        **{
            f"control: random gates {s}": camkit.edits.RandomGates(doei, rng_seed=s)
            for s in range(3)
        },
    }


def variants(virtual: camkit.edits.VirtualClassTokens) -> list[Variant]:
    seed, refined = (
        Variant("gradient", camkit.Method(SEED, refine=())),
        Variant("gradient + balanced", camkit.Method(SEED, refine=CHAIN)),
    )
    attended = Variant("class attention", camkit.Method(ATTENDED, refine=()))
    aligned = (camkit.refiners.HybridPropagate(steps=2), CHAIN[1])
    found = [
        attended,
        seed,
        Variant(
            "gradient, blur", camkit.Method(SEED, refine=(camkit.refiners.Blur(1.0),)), base=seed
        ),
        Variant(
            "gradient, Amplify", camkit.Method(SEED, refine=(camkit.refiners.Amplify(),)), base=seed
        ),
        refined,
        Variant("gradient + HybridPropagate", camkit.Method(SEED, refine=aligned), base=refined),
        Variant(
            "gradient + balanced + Amplify",
            camkit.Method(SEED, refine=(*CHAIN, camkit.refiners.Amplify())),
            base=refined,
        ),
    ]
    for name, edit in edits(virtual).items():
        found.append(
            Variant(
                f"{name}, class attention",
                camkit.Method(ATTENDED, edit=edit, refine=()),
                base=attended,
            )
        )
        found.append(Variant(name, camkit.Method(SEED, edit=edit, refine=()), base=seed))
        found.append(
            Variant(
                f"{name} + balanced", camkit.Method(SEED, edit=edit, refine=CHAIN), base=refined
            )
        )
    return found


def main() -> None:
    options = table_options(__doc__, coco=True).parse_args()
    found_data()
    opened = open_model(DEFAULT_MODEL)
    virtual = camkit.edits.VirtualClassTokens.from_classifier(opened.model)
    found = measure(variants(virtual), options, opened=opened)
    write(found.report, options, "doei_coco" if options.coco else "doei")


if __name__ == "__main__":
    main()
