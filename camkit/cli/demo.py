"""Show the main job on real photos: a contact sheet, and mIoU before and after refinement."""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from camkit.bench import Variant, measure, to_markdown
from camkit.cli.models import OpenedModel, add_model_arguments, data_folder, open_model
from camkit.data import DataSet, Sample, open_dataset, read_mask
from camkit.errors import CamkitError
from camkit.ops.resampling import resize_cam
from camkit.paint import contact_sheet, overlay_cam, overlay_mask, save_picture
from camkit.pipeline import DEFAULT_REFINE, Pipeline, wrap
from camkit.seed.attention.gradient import GradientSeed

EXAMPLES = """examples:
  camkit demo
  CAMKIT_DATA=data camkit demo --out out/demo --images 100

Needs a folder named by CAMKIT_DATA with voc12_animals/ (VOC layout, with masks) in it."""

CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
TITLES = ("photo", "seed", "refined", "mask", "ground truth")


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
    folder = data_folder()
    if folder is None or not (folder / "voc12_animals").is_dir():
        raise CamkitError(
            "the demo needs photos: set CAMKIT_DATA to a folder that holds voc12_animals/ in the "
            "VOC layout (JPEGImages, SegmentationClass, ImageSets/Segmentation)"
        )
    dataset = open_dataset(folder / "voc12_animals")
    opened = open_model(options.model, size=options.size)
    print(f"model {options.model} from {opened.source}", file=sys.stderr)
    vocabulary = opened.vocabulary.subset(CLASSES)
    seed = GradientSeed()
    base = Variant("gradient seed", seed)
    report = measure.run(
        opened.model,
        dataset,
        vocabulary=vocabulary,
        variants=(base, Variant("refined", seed, DEFAULT_REFINE, base)),
        split="val",
        tune_split="train",
        photos=opened.photos,
        limit=options.images,
    )
    pipeline = wrap(
        opened.model,
        seed=seed,
        vocabulary=vocabulary,
        background_score=report.rows[-1].background_score,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    samples = _chosen(dataset, options.photos)
    rows = [
        _row(pipeline, opened, dataset, sample)
        for sample in tqdm(samples, desc="painting", unit="photo", delay=2)
    ]
    captions = [f"{s.name}: {', '.join(_present(dataset, s))}" for s in samples]
    sheet = options.out / "sheet.png"
    save_picture(contact_sheet(rows, titles=TITLES, captions=captions), sheet)
    (options.out / "table.md").write_text(to_markdown(report), encoding="utf-8")
    print(to_markdown(report))
    print(f"look at {sheet}")
    return 0


def _present(dataset: DataSet, sample: Sample) -> list[str]:
    return [dataset.classes[i] for i in sample.classes if dataset.classes[i] in CLASSES]


def _chosen(dataset: DataSet, count: int) -> list[Sample]:
    """Photos spread evenly over the validation split, none of which tuned anything."""
    usable = [sample for sample in dataset.split("val") if _present(dataset, sample)]
    stride = max(1, len(usable) // count)
    return usable[stride // 2 :: stride][:count]


def _row(
    pipeline: Pipeline, opened: OpenedModel, dataset: DataSet, sample: Sample
) -> list[np.ndarray]:
    photo = opened.photos.load(sample.photo)
    result = pipeline(photo, classes=_present(dataset, sample))
    picture = result.picture()
    seed = resize_cam(result.seed.amax(1, keepdim=True), photo.size)[0, 0].clamp(0, 1)
    refined = result.cam[0].amax(0)
    truth = np.zeros(photo.size, np.uint8)
    if sample.mask is not None:
        ids = read_mask(
            sample.mask,
            size=photo.size,
            num_classes=len(dataset.classes),
            form=sample.form,
            classes=[dataset.classes.index(name) for name in CLASSES],
        )
        truth = np.where(ids == 255, 0, ids).astype(np.uint8)
        truth[(ids == 255).numpy()] = 255
    return [
        picture,
        overlay_cam(picture, seed.cpu()),
        overlay_cam(picture, refined.cpu()),
        overlay_mask(picture, result.mask.cpu()),
        overlay_mask(picture, truth),
    ]
