"""Every seed and every calibration on one table, and what choosing the best on `train` costs.

    CAMKIT_DATA=folder python benchmarks/seeds.py
    CAMKIT_DATA=folder python benchmarks/seeds.py --voc

ViT-Ti with its ImageNet classifier, or (`--voc`) one trained on the six VOC classes. Background
scores are picked on `train` of voc12_animals, figures come from its `val`. Gains are over the
gradient seed, for a calibrated seed over the same seed without. The seed of `camkit.wrap` is
"hybrid attention @ k, last 4"; the last lines are propagated as in `camkit.wrap`. views.py is
about several sizes, preset.py about how the default was chosen.
"""

from dataclasses import replace

from tables import BEFORE, CHAIN, found_data, measure, table_options, write

import camkit
from camkit.bench import Report, Row, Variant
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.contrib import BestAgreementSeed, BlockSeed, LogitLensSeed
from camkit.method import CALIBRATED
from camkit.seeds import (
    AttentionRolloutSeed,
    EigenCAMSeed,
    FusedSeed,
    GradCAMSeed,
    LeGradSeed,
    Seed,
)

VOC_MODEL = "vit_tiny_patch16_224.voc20_animals_ft"
METHODS = ("gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "elementwise")

GRADIENT, ATTENTION = camkit.GradientSeed(), camkit.seeds.ClassAttentionSeed()
WEIGHT = camkit.seeds.ClassWeightSeed()
LENSES = tuple(LogitLensSeed(layer) for layer in (-4, -3, -2))

SEEDS: dict[str, Seed] = {
    "gradient": GRADIENT,
    "gradient, last block": BlockSeed(GRADIENT, (-1,)),
    "gradient, last three": BlockSeed(GRADIENT, (-3, -2, -1)),
    "rollout of gradients": camkit.seeds.RelevanceSeed(),
    "class attention": ATTENTION,
    "class attention, last three": BlockSeed(ATTENTION, (-3, -2, -1)),
    "rollout of attention": AttentionRolloutSeed(),
    "legrad": LeGradSeed(),
    "legrad of the class token": LeGradSeed(token="class"),
    "class weight": WEIGHT,
    **{method: GradCAMSeed(method) for method in METHODS},
    "layercam, four blocks": GradCAMSeed("layercam", blocks=4),
    "eigen": EigenCAMSeed(),
    **{f"logit lens at {lens.layer}": lens for lens in LENSES},
    "logit lenses, mean": FusedSeed(LENSES),
    "logit lenses, the one that agrees": BestAgreementSeed(LENSES),
    "gradient and class weight, product": FusedSeed((GRADIENT, WEIGHT), join="product"),
    "gradient and class weight, mean": FusedSeed((GRADIENT, WEIGHT)),
    "both where they agree": BEFORE.seed,
    "hybrid attention": CALIBRATED.method.seed,
    "normalised cut (TokenCut)": camkit.seeds.TokenCutSeed(),
    "loneliest patches (LOST)": camkit.seeds.LOSTSeed(),
    "like what is attended to": camkit.seeds.PrototypeSeed(),
    "like what the gradient points at": camkit.seeds.PrototypeSeed(GRADIENT),
    "like what the gradient points at, tokens": camkit.seeds.PrototypeSeed(
        GRADIENT, features="tokens"
    ),
}
EXCEL = camkit.edits.StaticCalibration()
CALIBRATIONS = {
    "qkv, summed heads (ExCEL)": EXCEL,
    "qkv, mean head": camkit.edits.StaticCalibration(heads="mean"),
    "qkv, own heads": camkit.edits.StaticCalibration(heads="own"),
    "vv (CLIP Surgery)": camkit.edits.StaticCalibration(of="v", heads="own"),
    "qq": camkit.edits.StaticCalibration(of="q", heads="own"),
    "kk": camkit.edits.StaticCalibration(of="k", heads="own"),
}
KEY_EDITS = {
    "outliers suppressed": camkit.edits.SuppressOutliers(),
    "outliers from 3 deviations": camkit.edits.SuppressOutliers(threshold=3.0),
    "fuzzy key pruning": camkit.edits.FuzzyKeyPruning(),
}
REFINED = (
    "gradient",
    "gradient and class weight, product",
    "both where they agree",
    "hybrid attention",
)
KEY_EDITED = ("gradient", "class attention", "class weight")


def variants() -> list[Variant]:
    base = Variant("gradient", camkit.Method(GRADIENT, refine=()))
    seeds = {
        name: Variant(name, camkit.Method(seed, refine=()), base=base)
        for name, seed in SEEDS.items()
    }
    seeds["gradient"] = base
    found = list(seeds.values())
    edits = [
        ("class weight", f"{title}, last {blocks}", edit, blocks)
        for title, edit in CALIBRATIONS.items()
        for blocks in ((1, 3, 5) if edit == EXCEL else (3,))
    ]
    edits += [("like what the gradient points at, tokens", "qkv, last 3", EXCEL, 3)]
    edits += [(name, "qkv, last 4", EXCEL, 4) for name in REFINED[1:3]]
    edits += [("hybrid attention", "k, last 4", CALIBRATED.method.edit, 4)]
    edits += [(name, title, edit, None) for name in KEY_EDITED for title, edit in KEY_EDITS.items()]
    found += [
        Variant(
            f"{name} @ {title}",
            camkit.Method(SEEDS[name], edit=edit, edit_blocks=blocks, refine=()),
            base=seeds[name],
        )
        for name, title, edit, blocks in edits
    ]
    last: Variant | None = None
    ends = ("", " @ qkv, last 4", " @ k, last 4")
    spread = {name + end for name in REFINED for end in ends}
    for variant in [one for one in found if one.name in spread]:
        refined = Variant(
            f"{variant.name}, refined",
            replace(variant.method, refine=CHAIN),
            base=last or variant,
        )
        last = last or refined
        found.append(refined)
    return found


def choice(report: Report) -> str:
    """What the best line on the tuning split costs where figures come from."""

    def told(row: Row) -> str:
        return f"{row.name} ({row.tuned_mean_iou:.1%} on {report.tune_split}, {row.mean_iou:.1%})"

    def chosen(rows: list[Row], default: str) -> str:
        on_train = max(rows, key=lambda row: row.tuned_mean_iou)
        best = max(rows, key=lambda row: row.mean_iou)
        today = next(row for row in rows if row.name == default)
        return (
            f"best on {report.tune_split}: {told(on_train)}; best on {report.split}, known only "
            f"afterwards: {told(best)}; the choice costs {best.mean_iou - on_train.mean_iou:.2%}. "
            f"The default: {told(today)}."
        )

    default = "hybrid attention @ k, last 4"
    seeds = [row for row in report.rows if not row.name.endswith(", refined")]
    refined = [row for row in report.rows if row.name.endswith(", refined")]
    return f"Seeds, {chosen(seeds, default)}\n\nRefined, {chosen(refined, default + ', refined')}"


def main() -> None:
    parser = table_options(__doc__)
    parser.add_argument("--voc", action="store_true", help="the model trained on VOC")
    options = parser.parse_args()
    found_data()
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    report = measure(variants(), options, opened=opened).report
    told = choice(report)
    write(report, options, "seeds_voc" if options.voc else "seeds", told=told, choice=told)


if __name__ == "__main__":
    main()
