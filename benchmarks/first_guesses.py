"""Masks of first guesses, without any label, beside masks of given labels, on photos of animals.

A first guess takes the most probable class of the classifier: among the single outputs of ImageNet,
or among objects, the groups of `imagenet_vocabulary`. The probabilities of a group's n outputs add
up and are divided by n to a small power. On `train` several powers are tried, and 0.1 was chosen
there; on `val` only the default is measured. All other settings are the defaults of `camkit.wrap`.
Photos are those with an animal and without drawn boxes; a pixel counts as object if it is of any of
the six classes.

    python benchmarks/first_guesses.py [--split train] [--limit N]
"""

import argparse
import json
from collections.abc import Callable

import torch
from tables import RESULTS, Clean
from torch import Tensor
from tqdm.auto import tqdm

import camkit
from camkit.cli.models import DEFAULT_MODEL, data_folder, open_model
from camkit.data import VOC_IN_IMAGENET, imagenet_vocabulary, open_dataset, read_mask
from camkit.manifest import environment, weights_hash
from camkit.score import Gain, class_iou, confusion_matrix, mean_iou, paired_gain

CLASSES = ("cat", "dog", "horse", "cow", "sheep", "person")
OTHER = len(CLASSES) + 1  # a guess of something else
LABELS, OUTPUTS, OBJECTS = "labels given", "guess among outputs", "guess among objects"
POWERS = (0.0, 0.2, 0.5)  # tried on train beside the default

Rule = Callable[[Tensor], int]
"""``outputs (1000) -> class``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument("--limit", type=int, help="only N photos, spread over the split")
    options = parser.parse_args()
    folder = data_folder()
    if folder is None:
        parser.error("set CAMKIT_DATA to the folder that holds voc12_animals/")
    dataset = Clean(open_dataset(folder / "voc12_animals"))
    animals = {dataset.classes.index(name) for name in CLASSES[:-1]}
    samples = [s for s in dataset.split(options.split) if animals & set(s.classes)]
    if options.limit is not None:
        samples = samples[:: max(1, len(samples) // options.limit)][: options.limit]
    opened, objects = open_model(DEFAULT_MODEL), imagenet_vocabulary()
    refined = camkit.wrap(opened.model, vocabulary=objects, photos=opened.photos)
    rules: dict[str, Rule] = {
        OUTPUTS: lambda outputs: int(outputs.argmax()),
        OBJECTS: lambda outputs: int(objects.for_guesses(objects.score(outputs)).argmax()),
    }
    if options.split == "train":
        rules |= {f"{OBJECTS}, power {power}": _with_power(objects, power) for power in POWERS}
    counts: dict[str, list[Tensor]] = {name: [] for name in (LABELS, *rules)}
    right = dict.fromkeys(counts, 0)
    for sample in tqdm(samples, unit="photo"):
        truth = truth_of(sample, dataset)
        named = [dataset.classes[index] for index in sample.classes]
        present = [name for name in named if name in CLASSES]
        results = {LABELS: refined(sample.photo, classes=present)}
        by_class: dict[int, camkit.Result] = {}
        for name, rule in rules.items():
            guess = rule(results[LABELS].logits[0])
            if guess not in by_class:
                by_class[guess] = refined(sample.photo, classes=[guess])
            results[name] = by_class[guess]
        for name, result in results.items():
            mask = in_voc(result, objects)
            counts[name].append(confusion_matrix(truth, mask, num_classes=OTHER + 1))
            right[name] += bool(set(voc_classes(result, objects)) & set(present))
    stacked = {name: torch.stack(each) for name, each in counts.items()}
    shares = {name: count / len(samples) for name, count in right.items()}
    report(stacked, shares, opened.model, options.split)


def _with_power(objects: camkit.Vocabulary, power: float) -> Rule:
    sizes = torch.tensor([len(objects.members[index]) for index in objects.candidates])

    def rule(outputs: Tensor) -> int:
        scores = objects.score(outputs)[list(objects.candidates)] - power * sizes.log()
        return objects.candidates[int(scores.argmax())]

    return rule


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
    stacked: dict[str, Tensor], right: dict[str, float], model: torch.nn.Module, split: str
) -> None:
    measured, rows, lines = list(range(OTHER)), {}, []
    before = stacked[OUTPUTS]
    for name, counts in stacked.items():
        named = float(mean_iou(counts.sum(0), classes=measured))
        thing = float(class_iou(as_object(counts.sum(0)))[1])
        rows[name] = {"mean_iou": named, "object_iou": thing, "right": right[name]}
        cells = [f"{100 * right[name]:.0f}", f"{100 * thing:.1f}", f"{100 * named:.1f}"]
        if name.startswith(OBJECTS):
            gains = {
                "object_iou": paired_gain(as_object(before), as_object(counts), classes=[1]),
                "mean_iou": paired_gain(before, counts, classes=measured),
            }
            rows[name]["gains"] = {key: vars(gain) for key, gain in gains.items()}
            cells[1] += f", {interval(gains['object_iou'])}"
            cells[2] += f", {interval(gains['mean_iou'])}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    photos = f"{len(before)} photos of voc12_animals/{split} with an animal"
    text = f"""Masks of first guesses on {photos},
without those with drawn boxes; ViT-Ti/16 (augreg, ImageNet), 384 pixels, the defaults of
`camkit.wrap`. "right" is the share of photos whose guess is of a class in the photo; "object" the
IoU of all object pixels, whatever the class; mIoU is over background and the six classes. Gains are
over guesses among outputs. `python benchmarks/first_guesses.py --split {split}`

| classes | right, % | object IoU | mIoU |
|---|---|---|---|
{chr(10).join(lines)}
"""
    place = RESULTS / ("first_guesses" if split == "val" else f"first_guesses_{split}")
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    content = {
        "rows": rows,
        "photos": len(before),
        "weights_sha256": weights_hash(model),
        "environment": environment(),
    }
    place.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    print(text)


def interval(gain: Gain) -> str:
    return f"{100 * gain.gain:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


if __name__ == "__main__":
    main()
