"""The published table: what refiners gain on held-out images, over their seeds and over controls.

    CAMKIT_DATA=folder python benchmarks/gains.py
    CAMKIT_DATA=folder python benchmarks/gains.py --coco
    CAMKIT_DATA=folder python benchmarks/gains.py --html out/gains.html
    python benchmarks/gains.py --tables    # writes the tables of README and docs/gains.md again

ViT-Ti with its ImageNet classifier. Background scores are picked on `train` of voc12_animals,
figures come from its `val`, or from photos of COCO. Settings of the refiners were chosen on
`train` (docs/benchmark.md).
"""

from dataclasses import replace
from pathlib import Path

from gain_tables import PROPAGATED, write_tables
from tables import BEFORE, CHAIN, measure, table_options, write

import camkit
from camkit.bench import Variant, collect_examples, standard_variants, to_html


def variants() -> tuple[Variant, ...]:
    """The standard seeds and propagations, controls of the best, and what follows colours."""
    lines = {line.name: line for line in standard_variants()}
    seed, best, minmax = lines["hybrid"], lines[PROPAGATED], CHAIN[1]
    lines["hybrid"] = seed = replace(seed, base=lines["gradient"])
    controls = tuple(
        replace(
            best,
            name=f"control: hybrid + blur {width:g}",
            method=replace(best.method, refine=(blur, minmax)),
        )
        for width, blur in ((width, camkit.refiners.Blur(width)) for width in (1.0, 2.0))
    )
    lines[PROPAGATED] = best = replace(best, base=seed, controls=controls)
    lines["default"] = replace(lines["default"], base=best)
    crf = camkit.DenseCRF(background_score=0.5)
    edges = {
        "PixelAdaptive, half size": camkit.refiners.PixelAdaptive(scale=0.5),
        "DenseCRF, half size": camkit.refiners.AtReducedSize(crf, scale=0.5),
    }
    after = (
        replace(
            best,
            name=f"{PROPAGATED} + {name}",
            method=replace(best.method, refine=(*CHAIN, refiner)),
            base=best,
            controls=(),
        )
        for name, refiner in edges.items()
    )
    gated = Variant("gradient, gated by class weight", replace(BEFORE, refine=()))
    before = Variant(f"{gated.name} + balanced propagation", BEFORE, base=gated)
    return (*lines.values(), *controls, *after, gated, before)


def main() -> None:
    parser = table_options(__doc__, coco=True)
    parser.add_argument("--html", type=Path, help="also write a page with pictures there")
    parser.add_argument("--tables", action="store_true", help="only write the tables of the docs")
    options = parser.parse_args()
    if options.tables:
        write_tables()
        return
    found = measure(variants(), options, outlines=True)
    write(found.report, options, "gains_coco" if options.coco else "gains")
    if options.html:
        settings = {"vocabulary": found.vocabulary, "photos": found.opened.photos}
        shown = collect_examples(found.opened.model, found.dataset, found.report, **settings)
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(to_html(found.report, shown), encoding="utf-8")


if __name__ == "__main__":
    main()
