"""Checks that find the faults of a data set before a benchmark does."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeAlias

from camkit.data.sample import VOC_FORM, DataSet, Sample, mask_classes
from camkit.errors import DataError
from camkit.levels import orientation
from camkit.mask import voc_palette
from camkit.photo import opened, read_picture
from camkit.printing import several
from camkit.screen import progress

Problem: TypeAlias = Literal[
    "entry", "photo", "mask", "orientation", "palette", "labels", "no mask", "repeated", "shared"
]


@dataclass(frozen=True)
class Finding:
    """One fault of a data set.

    ``message`` names the file, the fault and what to do. ``certain`` is False if only a person can
    tell whether it is a fault.
    """

    problem: Problem
    file: Path
    message: str
    certain: bool = True

    def __str__(self) -> str:
        return self.message if self.certain else f"note: {self.message}"


def check_dataset(dataset: DataSet, *, splits: Sequence[str] | None = None) -> list[Finding]:
    """Read every photo and mask of a data set, and compare them, their labels and the splits.

    Errors are listed images that are missing, photos and masks that cannot be read to their end,
    masks whose size differs from that of their upright photo, ids of no class, a palette that an
    editor has renumbered, classes in a mask that the labels lack, splits whose masks show no class
    at all, and one content under two names, within a split or across splits. Notes are labels
    without a pixel, images without a mask beside others that have one, photos stored rotated, and
    splits that share images by name, as trainval and train do.

    Args:
        dataset: the data set to check.
        splits: the splits to check and to compare; None takes all.

    Returns:
        The findings, split by split.

    Raises:
        ValueError: there is no such split.
    """
    findings: list[Finding] = []
    checked: set[Sample] = set()
    shown: dict[Sample, Sequence[int]] = {}  # the classes in each readable mask
    samples: dict[str, list[Sample]] = {}
    for name in dataset.splits if splits is None else splits:
        samples[name] = []
        try:
            for entry in dataset.entries(name):
                if isinstance(entry, DataError):
                    findings.append(Finding("entry", dataset.root, str(entry)))
                else:
                    samples[name].append(entry)
        except DataError as error:  # the list itself cannot be read
            findings.append(Finding("entry", dataset.root, str(error)))
        masked = any(sample.mask is not None for sample in samples[name])
        for sample in progress(
            samples[name], desc=f"checking {name}", unit="image", mininterval=0.5
        ):
            if sample not in checked:
                findings += _check_sample(dataset, sample, shown, mask_expected=masked)
                checked.add(sample)
        findings += _check_any_class(dataset, name, samples[name], shown)
        findings += _repeated(samples[name])
    for first, second in combinations(samples.items(), 2):
        findings += _shared(dataset, first, second)
    return findings


def shared_images(first: Sequence[Sample], second: Sequence[Sample]) -> list[tuple[str, str]]:
    """Find images that are in both splits: those of the same name or the same file content.

    A photo that was saved again, resized or cropped is not found.

    Returns:
        The names in the first and in the second split, in the order of the first.

    Raises:
        DataError: a photo cannot be read.
    """
    names = {sample.name for sample in second}
    contents = _contents((*first, *second))
    by_content: dict[str, list[str]] = defaultdict(list)
    for sample in second:
        by_content[contents[sample.photo]].append(sample.name)
    pairs = []
    for sample in first:
        twins = by_content.get(contents[sample.photo], [])
        if sample.name in names and sample.name not in twins:
            pairs.append((sample.name, sample.name))
        pairs += [(sample.name, twin) for twin in twins]
    return pairs


def _contents(samples: Iterable[Sample]) -> dict[Path, str]:
    """Identify the content of each photo: by its hash, or by its path if its size is unique."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    contents: dict[Path, str] = {}
    path = Path()  # the file that an error is about
    try:
        for path in {sample.photo: None for sample in samples}:
            by_size[path.stat().st_size].append(path)
        for paths in by_size.values():
            contents[paths[0]] = str(paths[0])
            for path in paths if len(paths) > 1 else ():
                with path.open("rb") as file:
                    contents[path] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check the file") from error
    return contents


def _check_sample(
    dataset: DataSet,
    sample: Sample,
    shown: dict[Sample, Sequence[int]],
    *,
    mask_expected: bool,
) -> Iterator[Finding]:
    """Check a photo and its mask; note the classes of a readable mask in ``shown``."""
    try:
        size = read_picture(sample.photo).shape[:2]
    except DataError as error:
        yield Finding("photo", sample.photo, str(error))
        return
    if sample.mask is None:
        if mask_expected:
            message = f"{sample.photo} has no mask, unlike others of its split; add it if you can"
            yield Finding("no mask", sample.photo, message, certain=False)
        return
    count = len(dataset.classes)
    try:
        classes = mask_classes(sample.mask, num_classes=count, form=sample.form, size=size)
    except DataError as error:
        yield Finding("mask", sample.mask, str(error))
        return
    shown[sample] = classes
    yield from _check_orientation(sample.photo, sample.mask)
    if sample.form == VOC_FORM and sample.mask.suffix == ".png":
        yield from _check_palette(sample.mask, classes, count)
    yield from _check_labels(dataset.classes, sample, sample.mask, classes)


def _check_any_class(
    dataset: DataSet,
    split: str,
    samples: Sequence[Sample],
    shown: Mapping[Sample, Sequence[int]],
) -> Iterator[Finding]:
    """Find a split whose masks measure nothing, and count the masks without their labels."""
    masks = [(sample, shown[sample]) for sample in samples if sample in shown]
    readable = len(masks) == sum(sample.mask is not None for sample in samples)
    if masks and readable and not any(classes for _, classes in masks):
        message = (
            f"{dataset.root}: none of the {len(masks)} masks of {split} shows a class, only "
            "background and ignored pixels, so they measure nothing; if they mark objects with "
            "255, which is ignored, write class + 1 there: 1 for the first class"
        )
        yield Finding("mask", dataset.root, message)
        return
    unseen = [sample for sample, classes in masks if not {*sample.classes} <= {*classes}]
    if len(unseen) > 1:
        message = (
            f"{dataset.root}: {len(unseen)} of {len(masks)} masks of {split} show no pixel of a "
            f"class that their labels name, such as {unseen[0].name}; check whether they mark it "
            "with 255, which is ignored"
        )
        yield Finding("labels", dataset.root, message, certain=False)


def _check_orientation(photo: Path, mask: Path) -> Iterator[Finding]:
    with opened(photo) as image:
        turn = orientation(image)
        square = image.width == image.height
    # a quarter turn changes the size, which has been compared, unless the photo is square
    if turn in (2, 3, 4) or (turn in (5, 6, 7, 8) and square):
        message = (
            f"{photo} is stored rotated or mirrored (EXIF orientation {turn}) and is read "
            f"upright; check that {mask} fits the upright photo, or save both again without EXIF"
        )
        yield Finding("orientation", photo, message, certain=False)


def _check_palette(mask: Path, shown: Sequence[int], count: int) -> Iterator[Finding]:
    """Find ids that have the VOC colour of another class, because an editor renumbered them."""
    with opened(mask) as image:
        palette = image.getpalette() or []
    voc = voc_palette()
    owner = {tuple(voc[3 * id_ : 3 * id_ + 3]): id_ for id_ in range(count + 1)}
    for id_ in (index + 1 for index in shown):
        colour = tuple(palette[3 * id_ : 3 * id_ + 3])
        if owner.get(colour, id_) != id_:
            message = (
                f"{mask} shows id {id_} in the VOC colour of id {owner[colour]}: a program has "
                "renumbered the palette, so ids mean other classes; map colours back to ids"
            )
            yield Finding("palette", mask, message)


def _check_labels(
    classes: Sequence[str], sample: Sample, mask: Path, shown: Sequence[int]
) -> Iterator[Finding]:
    unlabelled = ", ".join(classes[index] for index in shown if index not in sample.classes)
    unseen = ", ".join(classes[index] for index in sample.classes if index not in shown)
    if unlabelled:
        message = f"{mask} shows {unlabelled}, which the labels of {sample.name} lack"
        yield Finding("labels", mask, f"{message}; add to the labels or correct the mask")
    if unseen:
        message = f"{mask} shows no {unseen}, which the labels of {sample.name} name"
        yield Finding("labels", mask, f"{message}; correct if it is ignored", certain=False)


def _repeated(samples: Sequence[Sample]) -> Iterator[Finding]:
    contents = _contents(samples)
    first_with: dict[str, Sample] = {}
    for sample in samples:
        first = first_with.setdefault(contents[sample.photo], sample)
        if first is not sample:
            message = f"{sample.photo} has the same content as {first.photo}; keep one of them"
            yield Finding("repeated", sample.photo, message)


def _shared(
    dataset: DataSet, first: tuple[str, Sequence[Sample]], second: tuple[str, Sequence[Sample]]
) -> Iterator[Finding]:
    pairs = shared_images(first[1], second[1])
    same = [name for name, other in pairs if name == other]
    if same:
        shown = ", ".join(same[:3]) + ", ..." * (len(same) > 3)
        message = (
            f"{dataset.root}: {first[0]} and {second[0]} share {several(len(same), 'image')} "
            f"({shown}); do not tune on one and report on the other"
        )
        yield Finding("shared", dataset.root, message, certain=False)
    photos = {sample.name: sample.photo for sample in second[1]}
    for name, other in pairs:
        if name != other:
            message = (
                f"{photos[other]} of {second[0]} has the same content as {name} of {first[0]}; "
                "remove it from one of the splits"
            )
            yield Finding("shared", photos[other], message)
