"""Masks of first guesses, without any label, beside masks of given labels, on photos of animals.

A first guess takes the most probable class of the classifier. Measured are guesses among the single
outputs of ImageNet (before) and among objects (now: the groups of `imagenet_vocabulary`, whose
outputs add up), with the defaults of `camkit.wrap`. Photos are those of voc12_animals/train with an
animal and without drawn boxes; a pixel counts as object if it is of any of the six classes.

    python benchmarks/first_guesses.py [--limit N]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from tables import RESULTS, Clean
from tqdm.auto import tqdm

import camkit
from camkit.cli.models import DEFAULT_MODEL, data_folder, open_model
from camkit.data import VOC_IN_IMAGENET, imagenet_vocabulary, open_dataset, read_mask
from camkit.manifest import environment, weights_hash
from camkit.score import Gain, class_iou, confusion_matrix, mean_iou, paired_gain

CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
OTHER = len(CLASSES) + 1  # a guess of something else


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="only N photos, spread over the split")
    options = parser.parse_args()
    folder = data_folder()
    if folder is None:
        parser.error("set CAMKIT_DATA to the folder that holds voc12_animals/")
    dataset = Clean(open_dataset(folder / "voc12_animals"))
    animals = {dataset.classes.index(name) for name in CLASSES[:-1]}
    samples = [s for s in dataset.split("train") if animals & set(s.classes)]
    if options.limit is not None:
        samples = samples[:: max(1, len(samples) // options.limit)][: options.limit]
    opened = open_model(DEFAULT_MODEL)
    objects = imagenet_vocabulary()
    single = replace(objects, candidates=tuple(range(1000)))
    pipelines = {
        "labels given": camkit.wrap(opened.model, vocabulary=objects, photos=opened.photos),
        "guess among outputs": camkit.wrap(opened.model, vocabulary=single, photos=opened.photos),
        "guess among objects": camkit.wrap(opened.model, vocabulary=objects, photos=opened.photos),
    }
    counts: dict[str, list[torch.Tensor]] = {name: [] for name in pipelines}
    right = dict.fromkeys(pipelines, 0)
    for sample in tqdm(samples, unit="photo"):
        truth = truth_of(sample, dataset)
        names = [dataset.classes[index] for index in sample.classes]
        present = [name for name in names if name in CLASSES]
        for name, pipeline in pipelines.items():
            given = present if name == "labels given" else None
            result = pipeline(sample.photo, classes=given)
            mask = in_voc(result, objects)
            counts[name].append(confusion_matrix(truth, mask, num_classes=OTHER + 1))
            right[name] += bool(set(voc_classes(result, objects)) & set(present))
    stacked = {name: torch.stack(each) for name, each in counts.items()}
    report(stacked, {name: count / len(samples) for name, count in right.items()}, opened.model)


def truth_of(sample: camkit.data.Sample, dataset: Clean) -> torch.Tensor:
    photo = camkit.load_photo(sample.photo)
    return read_mask(
        sample.mask,
        size=photo.size,
        num_classes=len(dataset.classes),
        form=sample.form,
        classes=[dataset.classes.index(name) for name in CLASSES],
    )


def voc_classes(result: camkit.Result, objects: camkit.Vocabulary) -> list[str | None]:
    """Return the VOC class of each class of a result, None for what is none of the six."""
    named = []
    for index in result.classes:
        outputs = set(objects.members[index])
        holders = [name for name in CLASSES if outputs <= set(VOC_IN_IMAGENET[name])]
        named.append(holders[0] if holders else None)
    return named


def in_voc(result: camkit.Result, objects: camkit.Vocabulary) -> torch.Tensor:
    """Return the mask of a result with the ids of `CLASSES`, or `OTHER`."""
    mask = torch.zeros_like(result.mask, dtype=torch.int64)
    for value, name in zip(result.legend, voc_classes(result, objects), strict=True):
        mask[result.mask == value] = OTHER if name is None else CLASSES.index(name) + 1
    return mask


def as_object(counts: torch.Tensor) -> torch.Tensor:
    """Join all classes but the background."""
    halves = torch.stack([counts[..., 0], counts[..., 1:].sum(-1)], dim=-1)
    return torch.stack([halves[..., 0, :], halves[..., 1:, :].sum(-2)], dim=-2)


def report(
    stacked: dict[str, torch.Tensor], right: dict[str, float], model: torch.nn.Module
) -> None:
    measured = list(range(OTHER))
    rows, lines = {}, []
    for name, counts in stacked.items():
        named = float(mean_iou(counts.sum(0), classes=measured))
        thing = float(class_iou(as_object(counts.sum(0)))[1])
        rows[name] = {"mean_iou": named, "object_iou": thing, "right": right[name]}
        numbers = (f"{100 * right[name]:.0f}", f"{100 * thing:.1f}", f"{100 * named:.1f}")
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    before, now = stacked["guess among outputs"], stacked["guess among objects"]
    gains = {
        "object_iou": paired_gain(as_object(before), as_object(now), classes=[1]),
        "mean_iou": paired_gain(before, now, classes=measured),
    }
    text = f"""Masks of first guesses on {len(before)} photos of voc12_animals/train with an animal,
without those with drawn boxes; ViT-Ti/16 (augreg, ImageNet), 384 pixels, the defaults of
`camkit.wrap`. "right" is the share of photos whose guess is of a class in the photo; "object" the
IoU of all object pixels, whatever the class; mIoU is over background and the six classes.
`python benchmarks/first_guesses.py`

| classes | right, % | object IoU | mIoU |
|---|---|---|---|
{chr(10).join(lines)}

Guesses among objects over guesses among outputs: object IoU {interval(gains["object_iou"])}, mIoU
{interval(gains["mean_iou"])}.
"""
    RESULTS.joinpath("first_guesses.md").write_text(text, encoding="utf-8")
    content = {
        "rows": rows,
        "gains": {name: vars(gain) for name, gain in gains.items()},
        "photos": len(before),
        "weights_sha256": weights_hash(model),
        "environment": environment(),
    }
    Path(RESULTS / "first_guesses.json").write_text(json.dumps(content, indent=2) + "\n")
    print(text)


def interval(gain: Gain) -> str:
    return f"{100 * gain.gain:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


if __name__ == "__main__":
    main()
