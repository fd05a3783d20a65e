"""Show camkit on real photos: a contact sheet, and mIoU before and after refinement."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from camkit.bench import Variant, measure, to_markdown
from camkit.cli.models import EMBEDDED, OpenedModel, add_model_arguments, data_folder, open_named
from camkit.cli.options import default_method
from camkit.data import DataSet, Sample, demo_photos, open_dataset, read_mask
from camkit.mask import to_mask
from camkit.ops.images import resize_cam
from camkit.paint import contact_sheet, overlay_cam, overlay_mask, save_picture
from camkit.pipeline import Pipeline, wrap
from camkit.result import Result
from camkit.score import class_iou, confusion_matrix, mean_iou
from camkit.screen import progress

EXAMPLES = """examples:
  camkit demo
  camkit demo --model demo --out pictures     the model that comes with camkit, no download
  CAMKIT_DATA=data camkit demo --images 100

Shows photos of voc12_animals/ (VOC layout, with masks) in the folder in CAMKIT_DATA, or else four
photographs that come with scikit-image."""

CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
TITLES = ("photo", "seed", "refined", "mask", "ground truth")

SCORES = {"seed": 0.04, "refined": 0.47}
"""Background scores of the default model in the README's table, picked on photos of VOC 2012."""

EMBEDDED_SCORES = {"seed": 0.06, "refined": 0.51}
"""The same for the model that comes with camkit (benchmarks/results/demo_model.json)."""

_NO_BENCHMARK = """{photographs} no benchmark: this shows how camkit works, not how well.
{model}
mIoU in % over {names}; background scores were picked on other
photos, and the classes of each photo are given.
"""
_DEFAULT = "The README's table shows how well it works."
_EMBEDDED = """The model is the small one that comes with camkit. It needs no download, but it
recognises classes less well than the default model; docs/start.md compares both."""

CaptionedRow: TypeAlias = tuple[list[np.ndarray], str]
"""A row of the contact sheet, and its caption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
    parser.add_argument("--photos", type=int, default=6, help="rows of the sheet (default: 6)")
    parser.add_argument(
        "--images", type=int, default=40, help="images of each split in the table (default: 40)"
    )
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    if options.photos < 1 or options.images < 1:
        raise ValueError("--photos and --images must be at least 1")
    opened = open_named(vars(options), or_embedded=True)
    name = EMBEDDED if opened.embedded else options.model
    print(f"model {name} from {opened.source}", file=sys.stderr)
    folder = data_folder()
    animals = None if folder is None else folder / "voc12_animals"
    if animals is not None and animals.is_dir():
        dataset = open_dataset(animals)
        table, sheet = _benchmark(opened, dataset, images=options.images, count=options.photos)
    else:
        print(
            "no table on VOC photos, because "
            f"{'CAMKIT_DATA is not set' if animals is None else f'{animals} does not exist'}; "
            "showing photographs that come with scikit-image",
            file=sys.stderr,
        )
        table, sheet = _photographs(opened, demo_photos(), count=options.photos)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sheet.png"
    rows, captions = [row for row, _ in sheet], [caption for _, caption in sheet]
    save_picture(contact_sheet(rows, titles=TITLES, captions=captions), path)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    print(f"wrote {path}")
    return 0


def _benchmark(
    opened: OpenedModel, dataset: DataSet, *, images: int, count: int
) -> tuple[str, list[CaptionedRow]]:
    """Measure as `camkit bench` does on two splits, and show photos from all over the second."""
    vocabulary = opened.vocabulary.subset(CLASSES)
    method = default_method(opened)
    base = Variant("seed", replace(method, refine=()))
    report = measure.run(
        opened.model,
        dataset,
        vocabulary=vocabulary,
        variants=(base, Variant("refined", method, base)),
        split="val",
        tune_split="train",
        photos=opened.photos,
        limit=images,
    )
    score = report.rows[-1].background_score
    pipeline = wrap(opened.model, vocabulary=vocabulary, background_score=score)
    usable = [sample for sample in dataset.split("val") if _present(dataset, sample, CLASSES)]
    stride = max(1, len(usable) // count)
    sheet = []
    samples = usable[stride // 2 :: stride][:count]
    for sample in progress(samples, desc="painting", unit="photo"):
        result, truth = _segment(pipeline, opened, dataset, sample, CLASSES)
        sheet.append((_row(result, truth), f"{sample.name}: {', '.join(result.names)}"))
    note = f"{_EMBEDDED}\n\n" if opened.embedded else ""
    return note + to_markdown(report), sheet


def _photographs(
    opened: OpenedModel, dataset: DataSet, *, count: int
) -> tuple[str, list[CaptionedRow]]:
    """Show a few photographs, with fixed background scores: they are too few to pick any."""
    names = dataset.classes
    columns = ("background", *names)
    scores = EMBEDDED_SCORES if opened.embedded else SCORES
    vocabulary = opened.vocabulary.subset(names)
    pipeline = wrap(opened.model, vocabulary=vocabulary, background_score=scores["refined"])
    samples = dataset.split(dataset.splits[0])[:count]
    totals = dict.fromkeys(scores, torch.zeros(len(columns), len(columns), dtype=torch.int64))
    sheet = []
    for sample in samples:
        result, truth = _segment(pipeline, opened, dataset, sample, names)
        seed = resize_cam(result.seed, result.photo.size).clamp(0, 1)
        shares = []
        for (name, score), cam in zip(scores.items(), (seed, result.cam), strict=True):
            mask = to_mask(cam, torch.tensor([result.classes]), background_score=score)[0].cpu()
            counts = confusion_matrix(truth, mask.long(), num_classes=len(columns))
            totals[name] = totals[name] + counts
            shares.append(f"{100 * float(mean_iou(counts)):.0f}")
        caption = f"{sample.name}: {', '.join(result.names)}; mIoU {' to '.join(shares)}"
        sheet.append((_row(result, truth), caption))
    photographs = "One photograph is" if len(samples) == 1 else f"{len(samples)} photographs are"
    lines = [
        _NO_BENCHMARK.format(
            photographs=photographs,
            model=_EMBEDDED if opened.embedded else _DEFAULT,
            names=", ".join(columns),
        ),
        f"| maps | background score | mIoU | {' | '.join(columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for name, total in totals.items():
        by_class = [100 * value for value in class_iou(total).tolist()]
        cells = " | ".join("-" if value != value else f"{value:.0f}" for value in by_class)
        mean = 100 * float(mean_iou(total))
        lines.append(f"| {name} | {scores[name]:.2f} | {mean:.1f} | {cells} |")
    return "\n".join(lines) + "\n", sheet


def _present(dataset: DataSet, sample: Sample, classes: tuple[str, ...]) -> list[str]:
    return [dataset.classes[i] for i in sample.classes if dataset.classes[i] in classes]


def _segment(
    pipeline: Pipeline,
    opened: OpenedModel,
    dataset: DataSet,
    sample: Sample,
    classes: tuple[str, ...],
) -> tuple[Result, Int[Tensor, "H W"]]:
    """Return the result and the ground truth; without a mask, all of it is background."""
    photo = opened.photos.load(sample.photo)
    result = pipeline(photo, classes=_present(dataset, sample, classes))
    if sample.mask is None:
        return result, torch.zeros(photo.size, dtype=torch.int64)
    truth = read_mask(
        sample.mask,
        size=photo.size,
        num_classes=len(dataset.classes),
        form=sample.form,
        classes=[dataset.classes.index(name) for name in classes],
    )
    return result, truth


def _row(result: Result, truth: Int[Tensor, "H W"]) -> list[np.ndarray]:
    picture = result.picture()
    seed = resize_cam(result.seed.amax(1, keepdim=True), result.photo.size)[0, 0].clamp(0, 1)
    return [
        picture,
        overlay_cam(picture, seed.cpu()),
        overlay_cam(picture, result.cam[0].amax(0).cpu()),
        overlay_mask(picture, result.mask.cpu()),
        overlay_mask(picture, truth),
    ]
