"""What a read-out fitted over a folder gains, beside its controls, and how few photos suffice.

    CAMKIT_DATA=folder python benchmarks/fitted.py
    CAMKIT_DATA=folder python benchmarks/fitted.py --voc

Read-outs are fitted on `train` of voc12_animals with its image-level labels, without masks; photos
with drawn boxes are left out. Background scores are picked on the first 120 of these photos,
figures come from `val`. Gains are over the default of `camkit.wrap`, with a CRF over the default
with a CRF. The shuffled control gives each patch the margin of another patch of its photo.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from tables import CLASSES, Clean, found_data, measure, table_options, write

import camkit
from camkit.bench import Variant
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, open_model
from camkit.data import Sample, open_dataset
from camkit.method import CALIBRATED, with_readout
from camkit.seeds import HybridAttentionSeed

VOC_MODEL = "vit_tiny_patch16_224.voc20_animals_ft"
TUNED = 120
HYBRID = replace(CALIBRATED.method, seed=HybridAttentionSeed())
CRF = (camkit.refiners.AtReducedSize(camkit.DenseCRF(background_score=0.5), scale=0.5),)
SHARP = (
    camkit.refiners.AtReducedSize(
        camkit.DenseCRF(background_score=0.5, temperature=0.1), scale=0.5
    ),
)


@dataclass(frozen=True, eq=False)
class Shuffled(camkit.Readout):
    """A control: the margins of a photo are dealt to its patches at random."""

    def margins(self, tokens: torch.Tensor, names: list[list[str]]) -> torch.Tensor:
        margins = super().margins(tokens, names)
        order = np.random.default_rng(0).permutation(margins.shape[-1])
        return margins[..., torch.from_numpy(order)]

    def __repr__(self) -> str:
        return f"Shuffled{super().__repr__()}"


def fitted(
    opened: OpenedModel, method: camkit.Method, samples: tuple[Sample, ...], names: tuple[str, ...]
) -> camkit.Readout:
    """A read-out of photos with their labels among the measured classes."""
    pipeline = camkit.Pipeline(
        opened.model, method, vocabulary=opened.vocabulary.subset(CLASSES), photos=opened.photos
    )
    labels = [[names[c] for c in sample.classes if names[c] in CLASSES] for sample in samples]
    return camkit.fit(pipeline, [sample.photo for sample in samples], labels)


def draws(samples: tuple[Sample, ...], names: tuple[str, ...], photos: int) -> tuple[Sample, ...]:
    """Some labelled photos of a split, drawn at random."""
    labelled = [s for s in samples if any(names[c] in CLASSES for c in s.classes)]
    order = np.random.default_rng(photos).permutation(len(labelled))
    return tuple(labelled[place] for place in order[:photos])


def variants(opened: OpenedModel, photos: int | None) -> list[Variant]:
    dataset = Clean(open_dataset(found_data() / "voc12_animals"))
    train = dataset.split("train")[:photos]
    names = dataset.classes
    default, model = CALIBRATED.method, opened.model
    base = Variant("default", default)
    edges = Variant("default + CRF", replace(default, refine=(*default.refine, *CRF)))
    hybrid = fitted(opened, HYBRID, train, names)
    few = fitted(opened, HYBRID, draws(train, names, 10), names)
    some = fitted(opened, HYBRID, draws(train, names, 20), names)
    read = with_readout([HYBRID], hybrid, model)
    lines = {
        "no gradients": HYBRID,
        "no gradients, fitted": read,
        "no gradients, fitted, one column": with_readout(
            [HYBRID], replace(hybrid, form="object"), model
        ),
        "no gradients, fitted on 10 photos": with_readout([HYBRID], few, model),
        "no gradients, fitted on 20 photos": with_readout([HYBRID], some, model),
        "control: margins shuffled": with_readout([HYBRID], Shuffled(**_fields(hybrid)), model),
        "default, fitted": with_readout([default], fitted(opened, default, train, names), model),
    }
    found = [base, edges, *(Variant(name, method, base=base) for name, method in lines.items())]
    found.append(
        Variant("no gradients + CRF", replace(HYBRID, refine=(*HYBRID.refine, *CRF)), base=edges)
    )
    found.append(Variant("no gradients, fitted + CRF", replace(read, refine=SHARP), base=edges))
    return found


def _fields(readout: camkit.Readout) -> dict[str, object]:
    kept = ("classes", "patches", "images", "photos", "origin", "form")
    return {name: getattr(readout, name) for name in kept}


def main() -> None:
    parser = table_options(__doc__)
    parser.add_argument("--voc", action="store_true", help="the model trained on VOC")
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(VOC_MODEL if options.voc else DEFAULT_MODEL)
    entries = variants(opened, options.limit)
    report = measure(entries, options, opened=opened, clean=True, tuned=TUNED).report
    write(report, options, "fitted_voc" if options.voc else "fitted")


if __name__ == "__main__":
    main()
