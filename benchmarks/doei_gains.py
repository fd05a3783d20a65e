"""What DOEI gains without training, in the forward and as a class map, beside its controls.

    CAMKIT_DATA=folder python benchmarks/doei_gains.py
    CAMKIT_DATA=folder python benchmarks/doei_gains.py --voc
    CAMKIT_DATA=folder python benchmarks/doei_gains.py --every-seed

ViT-Ti with its ImageNet classifier, or (`--voc`) one trained on the six VOC classes; one class
token. Background scores are picked on 160 images of `train` of voc12_animals, figures come from its
`val`, both without the photos that boxes are drawn into. Edits act in the last three blocks.
Settings of the seeds were chosen on `train` (docs/doei.md). Gains are over class attention; the
lines of `RIVALS` are compared with their controls as well. `+ P` is balanced propagation, the
refinement of `camkit.wrap`.
"""

import math
from dataclasses import replace

from doei_controls import OtherLikeness, Power
from tables import CHAIN, found_data, measure, table_options, write

import camkit
from camkit.bench import Variant
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.contrib import ReadOnlyRefiner, ReadOnlySeed
from camkit.edits import KeepToSelf, OneMoreHop, SharpenLogits, StaticCalibration
from camkit.method import SEEDS
from camkit.seeds import (
    ClassWeightSeed,
    GatedProductSeed,
    HybridAttentionSeed,
    ProductSeed,
    PrototypeSeed,
)

TUNED = 160  # images of `train`
VOC_MODEL = "vit_tiny_patch16_224.voc20_animals_ft"
ATTENTION = HybridAttentionSeed(temperature=math.inf)  # class attention of the same blocks
HYBRID = HybridAttentionSeed()
BOTH = HybridAttentionSeed(("class tokens", "classifier"), temperature=0.3)
OWN = PrototypeSeed(HYBRID, features="tokens")
WEIGHT = ClassWeightSeed()
READ = {
    "class attention": ATTENTION,
    "hybrid": HYBRID,
    "hybrid, temperature 0.2": HybridAttentionSeed(temperature=0.2),
    "hybrid, both sides": BOTH,
    "attention x class weight": ProductSeed(ATTENTION, WEIGHT),
    "class weight": WEIGHT,
    "gradient": camkit.GradientSeed(),
}
DOEI = camkit.DOEI()
CONTROLS = {
    "control: identity": KeepToSelf(),
    "control: logits x1.5": SharpenLogits(1.5),
    "control: one more hop": OneMoreHop(),
}
LIKENESSES = ("another class", "another image", "shuffled", "class-agnostic")
CALIBRATION = StaticCalibration()
CALIBRATED = {
    "hybrid": HYBRID,
    "hybrid, both sides": BOTH,
    "hybrid, own prototype": HybridAttentionSeed(("classifier", OWN), temperature=0.15),
    "attention x class weight": ProductSeed(ATTENTION, WEIGHT),
    "gradient gated by class weight": GatedProductSeed(camkit.GradientSeed(), WEIGHT),
    "control: likeness class-agnostic": OtherLikeness(HYBRID, "class-agnostic"),
    "control: likeness shuffled": OtherLikeness(HYBRID, "shuffled"),
}


RIVALS = {
    "hybrid": ("control: likeness of class-agnostic",),
    "DOEI, class attention": (
        "read-only DOEI, class attention",
        *(f"{control}, class attention" for control in CONTROLS),
    ),
    "DOEI, hybrid": (
        "hybrid",
        "read-only DOEI, hybrid",
        *(f"{control}, hybrid" for control in CONTROLS),
    ),
    "calibrated, hybrid": (
        "calibrated, gradient gated by class weight",
        "calibrated, attention x class weight",
        "calibrated, control: likeness class-agnostic",
    ),
}


class Lines:
    """Rows of the table: each seed alone and behind propagation, over the plain attention."""

    def __init__(self) -> None:
        self.found: list[Variant] = []
        self.bases: dict[str, Variant] = {}

    def add(self, name: str, seed: object, *, chain: tuple = CHAIN, **method: object) -> None:
        for end, refine in (("", ()), (" + P", chain)):
            made = camkit.Method(seed, refine=refine, **method)
            self.found.append(Variant(name + end, made, base=self.bases.get(end)))
            self.bases.setdefault(end, self.found[-1])


def lines() -> list[Variant]:
    table = Lines()
    for name, seed in READ.items():
        table.add(name, seed)
    for name, seed in READ.items():
        table.add(f"DOEI, {name}", seed, edit=DOEI)
    add_controls(table)
    for name, seed in CALIBRATED.items():
        table.add(f"calibrated, {name}", seed, edit=CALIBRATION, edit_blocks=4)
    return with_rivals(table.found)


def with_rivals(table: list[Variant]) -> list[Variant]:
    """Compare some lines with their controls, seed with seed and refined with refined."""
    named = {line.name: line for line in table}
    for name, rivals in RIVALS.items():
        for end in ("", " + P"):
            controls = tuple(named[rival + end] for rival in rivals)
            named[name + end] = replace(named[name + end], controls=controls)
    return list(named.values())


def add_controls(table: Lines) -> None:
    chain = (ReadOnlyRefiner(CHAIN[0], DOEI), CHAIN[1])
    for name in ("class attention", "hybrid", "hybrid, both sides"):
        table.add(f"read-only DOEI, {name}", ReadOnlySeed(READ[name], DOEI), chain=chain)
    for forward, edit in {"DOEI as drawn": camkit.DOEI.as_drawn(), **CONTROLS}.items():
        for name in ("class attention", "hybrid"):
            table.add(f"{forward}, {name}", READ[name], edit=edit)
    for likeness in LIKENESSES:
        table.add(f"control: likeness of {likeness}", OtherLikeness(HYBRID, likeness))
    table.add("control: attention to the power 0.75", Power(ATTENTION, 0.75))


def every_seed() -> list[Variant]:
    """Each seed of the command line, read from the plain forward and from the edited one."""
    table = []
    for name, kind in SEEDS.items():
        if name == "contribution":  # of pooled patches only
            continue
        plain = Variant(name, camkit.Method(kind(), refine=()))
        spread = Variant(f"{name} + P", camkit.Method(kind(), refine=CHAIN))
        edited = camkit.Method(kind(), edit=DOEI, refine=())
        both = camkit.Method(kind(), edit=DOEI, refine=CHAIN)
        table += [plain, spread, Variant(f"DOEI, {name}", edited, base=plain)]
        table.append(Variant(f"DOEI, {name} + P", both, base=spread))
    return table


def main() -> None:
    parser = table_options(__doc__)
    parser.add_argument("--voc", action="store_true", help="the model trained on the VOC classes")
    parser.add_argument("--every-seed", action="store_true", help="all seeds, without controls")
    options = parser.parse_args()
    found_data()
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    variants = every_seed() if options.every_seed else lines()
    found = measure(variants, options, opened=opened, tuned=TUNED)
    name = "doei_seeds" if options.every_seed else "doei"
    write(found.report, options, f"{name}_voc" if options.voc else name)


if __name__ == "__main__":
    main()
