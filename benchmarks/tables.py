"""What the scripts that publish tables of mIoU share: data, model, protocol, and files written."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import camkit
from camkit.bench import Entry, Report, run, to_json, to_markdown
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, data_folder, open_model
from camkit.data import DataSet, Sample, open_dataset

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parent.parent / "out" / "measured.sqlite"  # so that a run can go on
CLASSES = ["cat", "dog", "horse", "cow", "sheep", "person"]
CHAIN = (camkit.Propagate(steps=2, blocks=6, balance=3), camkit.refiners.Normalize(mode="minmax"))
SEED = camkit.GradientSeed()
CRF = (camkit.refiners.AtReducedSize(camkit.DenseCRF(background_score=0.5), scale=0.5),)
TUNED = 120
BEFORE = camkit.Method(
    camkit.seeds.GatedProductSeed(SEED, camkit.seeds.ClassWeightSeed()),
    edit=camkit.edits.StaticCalibration(),
    edit_blocks=4,
    refine=CHAIN,
)
"""The default of camkit.wrap before it did without gradients, and without a guided filter."""


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


@dataclass(frozen=True)
class Part:
    """Some images of a data set."""

    whole: DataSet

    @property
    def root(self) -> Path:
        return self.whole.root

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    @property
    def splits(self) -> tuple[str, ...]:
        return self.whole.splits


@dataclass(frozen=True)
class Clean(Part):
    """A data set without the photos that a detector's boxes are drawn into.

    Of `train` only the first ``tuned`` images are used, if it is given.
    """

    tuned: int | None = None

    def split(self, name: str) -> tuple[Sample, ...]:
        listed = self.root / "ImageSets" / "Segmentation" / "drawn_boxes.txt"
        drawn = set(listed.read_text().split())
        kept = tuple(s for s in self.whole.split(name) if s.name not in drawn)
        return kept[: self.tuned] if name == "train" else kept


@dataclass(frozen=True)
class Halves(Part):
    """The first images of a split and the next ones, as splits of their own."""

    name: str
    images: int

    @property
    def splits(self) -> tuple[str, ...]:
        return ("first", "next")

    def split(self, name: str) -> tuple[Sample, ...]:
        samples = self.whole.split(self.name)
        start = self.splits.index(name) * self.images
        return samples[start : start + self.images]


@dataclass(frozen=True)
class Measured:
    """A report, and what it was made with."""

    report: Report
    opened: OpenedModel
    dataset: DataSet
    vocabulary: camkit.Vocabulary


def found_data() -> Path:
    """The folder that CAMKIT_DATA names, or the end of the script."""
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/ and weights/")
    return folder


def table_options(description: str | None, *, coco: bool = False) -> argparse.ArgumentParser:
    """The flags that all these scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, help="only the first images of each split")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    if coco:
        parser.add_argument("--coco", action="store_true", help="measure on coco100_voc")
    return parser


def measure(
    variants: Sequence[Entry],
    options: argparse.Namespace,
    *,
    opened: OpenedModel | None = None,
    outlines: bool = False,
    classes: Sequence[str] = CLASSES,
    tuned: int | None = TUNED,
) -> Measured:
    """Pick on `train` of voc12_animals; figures are from its `val`, or from photos of COCO.

    Photos of voc12_animals with drawn boxes are left out, and background scores are picked on the
    first ``tuned`` images of `train`.
    """
    folder = found_data()
    dataset: DataSet = Clean(open_dataset(folder / "voc12_animals"), tuned)
    tune_split, split = "train", "val"
    if getattr(options, "coco", False):
        dataset = Across(dataset, open_dataset(folder / "coco100_voc"))
        tune_split, split = dataset.splits
    opened = opened or open_model(DEFAULT_MODEL)
    vocabulary = opened.vocabulary.subset(classes)
    torch.set_num_threads(1)
    report = run(
        opened.model,
        dataset,
        vocabulary=vocabulary,
        variants=variants,
        split=split,
        tune_split=tune_split,
        photos=opened.photos,
        cache=KEPT,
        outlines=outlines,
        limit=options.limit,
    )
    return Measured(report, opened, dataset, vocabulary)


def measure_halves(
    opened: OpenedModel, variants: Sequence[Entry], images: int, **settings: Any
) -> Report:
    """Pick on the first images of `train`, and measure on the next; to choose, not to report."""
    torch.set_num_threads(1)
    return run(
        opened.model,
        Halves(Clean(open_dataset(found_data() / "voc12_animals")), "train", images),
        vocabulary=opened.vocabulary.subset(CLASSES),
        variants=variants,
        split="next",
        tune_split="first",
        photos=opened.photos,
        **settings,
    )


def write(
    report: Report, options: argparse.Namespace, name: str, *, told: str = "", **more: Any
) -> None:
    """Print a report and write it, as JSON with what is measured besides, and as Markdown."""
    text = to_markdown(report) + (f"\n{told}\n" if told else "")
    found = json.loads(to_json(report)) | more
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.out / f"{name}.md").write_text(text)
    print(text)
