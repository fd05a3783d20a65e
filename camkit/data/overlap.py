"""Images that two splits share, under one name or two."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from camkit.data.sample import Sample
from camkit.errors import DataError


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
