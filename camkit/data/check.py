"""What is wrong with a data set, file by file, before a benchmark finds out."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeAlias

from PIL import ExifTags, Image
from tqdm import tqdm

from camkit.data.sample import VOC_FORM, DataSet, Sample, mask_ids, present
from camkit.errors import DataError
from camkit.mask import voc_palette
from camkit.photo import read_picture


def shared_images(first: Sequence[Sample], second: Sequence[Sample]) -> list[tuple[str, str]]:
    """Find images that are in both splits.

    Two images are one if they have the same name, or files of the same content. Only files of equal
    size are read. A photo saved anew, resized or cut is not found.

    Args:
        first: samples of a split.
        second: samples of another.

    Returns:
        The names in the first and in the second split, in the order of the first.

    Raises:
        DataError: a photo cannot be read.
    """
    named = {sample.name for sample in second}
    contents = _Contents((*first, *second))
    by_content: dict[str, list[str]] = defaultdict(list)
    for sample in second:
        by_content[contents.of(sample.photo)].append(sample.name)
    pairs: list[tuple[str, str]] = []
    for sample in first:
        twins = by_content.get(contents.of(sample.photo), [])
        if sample.name in named and sample.name not in twins:
            pairs.append((sample.name, sample.name))
        pairs += [(sample.name, twin) for twin in twins]
    return pairs


def repeated_images(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Sample]]:
    """Find images of one split whose files have the same content: the first, and each other.

    Raises:
        DataError: a photo cannot be read.
    """
    contents = _Contents(samples)
    first_with: dict[str, Sample] = {}
    for sample in samples:
        first = first_with.setdefault(contents.of(sample.photo), sample)
        if first is not sample:
            yield first, sample


class _Contents:
    """Names the content of files; those whose size no other file has are not read."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._size = {sample.photo: _size(sample.photo) for sample in samples}
        counts: dict[int, int] = defaultdict(int)
        for size in self._size.values():
            counts[size] += 1
        self._files_of_size = counts
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        size = self._size[path]
        if self._files_of_size[size] == 1:
            return str(path)
        if path not in self._known:
            try:
                with path.open("rb") as file:
                    self._known[path] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error}); check the file") from error
        return self._known[path]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check the file") from error


Problem: TypeAlias = Literal[
    "entry", "photo", "mask", "orientation", "palette", "labels", "no mask", "repeated", "shared"
]
"""What a finding is about."""

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a data set.

    Attributes:
        problem: what it is about.
        file: where it is.
        message: what is wrong and what to do, the file named.
        certain: False where a look is needed to tell whether it is wrong at all.
    """

    problem: Problem
    file: Path
    message: str
    certain: bool = True

    def __str__(self) -> str:
        return self.message if self.certain else f"note: {self.message}"


def check_dataset(dataset: DataSet, *, splits: Sequence[str] | None = None) -> list[Finding]:
    """Read every photo and mask of a data set, and compare them, their labels and the splits.

    Errors are photos and masks that cannot be read to their end, masks of another size than their
    upright photo, ids of no class, a palette that an editor has renumbered, classes in a mask that
    the labels lack, listed images that are not there, and images with one content under two names,
    within a split or in two. Notes are labels without a pixel, images without a mask beside others
    that have one, photos stored upside down, and splits that share images by name, as trainval and
    train do.

    Args:
        dataset: what to check.
        splits: those to check and to compare; None takes all.

    Returns:
        The findings, split by split; none where all is well.

    Raises:
        ValueError: there is no such split.
    """
    names = dataset.splits if splits is None else tuple(splits)
    found: list[Finding] = []
    seen: set[Sample] = set()
    samples: dict[str, list[Sample]] = {}
    for name in names:
        samples[name] = []
        for entry in _entries(dataset, name):
            if isinstance(entry, Sample):
                samples[name].append(entry)
            else:
                found.append(Finding("entry", dataset.root, str(entry)))
        masked = any(sample.mask is not None for sample in samples[name])
        for sample in tqdm(
            samples[name], desc=f"checking {name}", unit="image", delay=2, mininterval=0.5
        ):
            if sample not in seen:
                found += _check_sample(dataset, sample, mask_expected=masked)
                seen.add(sample)
        found += _repeated(samples[name])
    for first, second in combinations(names, 2):
        found += _shared(dataset, (first, samples[first]), (second, samples[second]))
    return found


def _entries(dataset: DataSet, name: str) -> Iterator[Sample | DataError]:
    try:
        yield from dataset.entries(name)
    except DataError as error:  # the list itself cannot be read
        yield error


def _check_sample(dataset: DataSet, sample: Sample, *, mask_expected: bool) -> Iterator[Finding]:
    try:
        size = read_picture(sample.photo).shape[:2]
    except DataError as error:
        yield Finding("photo", sample.photo, str(error))
        return
    if sample.mask is None:
        if mask_expected:
            message = f"{sample.photo} has no mask, others of its split do; add it or live without"
            yield Finding("no mask", sample.photo, message, certain=False)
        return
    count = len(dataset.classes)
    try:
        ids = mask_ids(sample.mask, size=size, num_classes=count, form=sample.form)
    except DataError as error:
        yield Finding("mask", sample.mask, str(error))
        return
    yield from _check_orientation(sample)
    shown = [value - 2 for value in present(ids + 1).tolist() if value > 1]
    yield from _check_palette(dataset, sample, shown)
    yield from _check_labels(dataset, sample, shown)


def _check_orientation(sample: Sample) -> Iterator[Finding]:
    with Image.open(sample.photo) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        square = image.width == image.height
    # a quarter turn changes the size, unless the photo is square; the sizes have been compared
    if orientation in (2, 3, 4) or (orientation in (5, 6, 7, 8) and square):
        yield Finding(
            "orientation",
            sample.photo,
            f"{sample.photo} is stored turned or mirrored (EXIF orientation {orientation}) and is "
            f"read upright; see that {sample.mask} fits the upright photo, or save both anew "
            "without EXIF",
            certain=False,
        )


def _check_palette(dataset: DataSet, sample: Sample, shown: Sequence[int]) -> Iterator[Finding]:
    """Find ids that bear the VOC colour of another class: an editor has renumbered them."""
    if sample.mask is None or sample.form != VOC_FORM:
        return
    with Image.open(sample.mask) as image:
        palette = image.getpalette() or []
    voc = voc_palette()
    owner = {tuple(voc[3 * i : 3 * i + 3]): i for i in range(len(dataset.classes) + 1)}
    for value in [index + 1 for index in shown]:
        colour = tuple(palette[3 * value : 3 * value + 3])
        if owner.get(colour, value) != value:
            yield Finding(
                "palette",
                sample.mask,
                f"{sample.mask} shows id {value} in the VOC colour of id {owner[colour]}: a "
                "program has renumbered the palette, so ids mean other classes; map colours back "
                "to ids",
            )


def _check_labels(dataset: DataSet, sample: Sample, shown: Sequence[int]) -> Iterator[Finding]:
    def named(indices: set[int]) -> str:
        return ", ".join(dataset.classes[index] for index in sorted(indices))

    unnamed, unseen = set(shown) - set(sample.classes), set(sample.classes) - set(shown)
    if unnamed and sample.mask is not None:
        message = f"{sample.mask} shows {named(unnamed)}, which the labels of {sample.name} lack"
        yield Finding("labels", sample.mask, f"{message}; add to the labels or correct the mask")
    if unseen and sample.mask is not None:
        message = f"{sample.mask} shows no {named(unseen)}, which the labels of {sample.name} name"
        yield Finding("labels", sample.mask, f"{message}; right if it is ignored", certain=False)


def _repeated(samples: Sequence[Sample]) -> Iterator[Finding]:
    for first, again in repeated_images(samples):
        message = f"{again.photo} has the same content as {first.photo}; keep one of them"
        yield Finding("repeated", again.photo, message)


def _shared(
    dataset: DataSet, first: tuple[str, Sequence[Sample]], second: tuple[str, Sequence[Sample]]
) -> Iterator[Finding]:
    pairs = shared_images(first[1], second[1])
    same = [one for one, other in pairs if one == other]
    if same:
        shown = ", ".join(same[:_SHOWN]) + ", ..." * (len(same) > _SHOWN)
        message = (
            f"{dataset.root}: {first[0]} and {second[0]} share {len(same)} images ({shown}); "
            "never choose on one what is reported on the other"
        )
        yield Finding("shared", dataset.root, message, certain=False)
    photos = {sample.name: sample.photo for sample in second[1]}
    for one, other in pairs:
        if one != other:
            message = (
                f"{photos[other]} of {second[0]} has the same content as {one} of {first[0]}; "
                "remove it from one of the splits"
            )
            yield Finding("shared", photos[other], message)
