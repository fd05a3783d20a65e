"""Which reading, reach and strength of DOEI to measure: looked for on `train` only.

    CAMKIT_DATA=folder python benchmarks/doei_search.py

Every control is given the same blocks and strengths. Background scores are picked on the first
images of `train`, figures come from the next ones; `val` is not read.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tables import CLASSES, KEPT, RESULTS, SEED, found_data, write

import camkit
from camkit.bench import Variant, run
from camkit.cli.models import DEFAULT_MODEL, open_model
from camkit.data import DataSet, Sample, open_dataset
from camkit.ops.confidence import TwoMeans

BLOCKS, STRENGTHS = (1, 3, 6), (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Halves:
    """The first images of a split and the next ones, as splits of their own."""

    whole: DataSet
    name: str
    images: int

    @property
    def root(self) -> Path:
        return self.whole.root

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    @property
    def splits(self) -> tuple[str, ...]:
        return ("first", "next")

    def split(self, name: str) -> tuple[Sample, ...]:
        samples = self.whole.split(self.name)
        start = self.splits.index(name) * self.images
        return samples[start : start + self.images]


def variants(virtual: camkit.edits.VirtualClassTokens) -> list[Variant]:
    seed = Variant("gradient", camkit.Method(SEED, refine=()))
    found = [seed]

    def add(name: str, edit: object, blocks: int) -> None:
        label = f"{name}, last {blocks}"
        found.append(
            Variant(label, camkit.Method(SEED, edit=edit, edit_blocks=blocks, refine=()), base=seed)
        )

    for blocks in BLOCKS:
        for s in STRENGTHS:
            add(f"control: output x{1 + s:g}", camkit.edits.ScaleOutput(1 + s), blocks)
            add(f"control: one more hop x{s:g}", camkit.edits.OneMoreHop(s), blocks)
            add(f"gate x{s:g}", camkit.DOEI.as_drawn(strength=s), blocks)
            add(f"affinity x{s:g}", camkit.DOEI.as_drawn(reading="affinity", strength=s), blocks)
            add(f"virtual proto x{s:g}", camkit.DOEI.as_drawn(virtual=virtual, strength=s), blocks)
    gate = camkit.DOEI.as_drawn(virtual=virtual, reading="gate")
    add("virtual gate x1", gate, 3)
    add("virtual proto x4", camkit.DOEI.as_drawn(virtual=virtual, strength=4.0), 3)
    two_sided, descriptor = camkit.contrib.TwoSidedAlignment(), camkit.contrib.DescriptorAlignment()
    for name, aligned in (("two_sided", two_sided), ("descriptor", descriptor)):
        add(
            f"affinity x1, colours {name}",
            camkit.DOEI.as_drawn(alignment=aligned, reading="affinity"),
            3,
        )
    strong = camkit.edits.HybridAlignment("mean", weight=2.0)
    add("affinity x1, alignment x4", camkit.DOEI.as_drawn(alignment=strong, reading="affinity"), 3)
    groups = camkit.edits.PatchDecoupling(strength=0.9, rule=TwoMeans())
    add("affinity x1, two means", camkit.DOEI.as_drawn(patches=groups, reading="affinity"), 3)
    add("gate x1, two means", camkit.DOEI.as_drawn(patches=groups), 3)
    return found


def main() -> None:
    folder = found_data()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60, help="in each half")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    opened = open_model(DEFAULT_MODEL)
    torch.set_num_threads(1)
    report = run(
        opened.model,
        Halves(open_dataset(folder / "voc12_animals"), "train", options.images),
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=variants(camkit.edits.VirtualClassTokens.from_classifier(opened.model)),
        split="next",
        tune_split="first",
        photos=opened.photos,
        cache=KEPT,
    )
    write(report, options, "doei_search")


if __name__ == "__main__":
    main()
