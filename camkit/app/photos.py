"""The photos that the page offers: a folder, a data set with masks, or those of camkit."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int

from camkit.data import DataSet, Sample, demo_photos, open_dataset, read_mask
from camkit.data.layouts import find_layout
from camkit.errors import CamkitError, DataError, nearby
from camkit.formats import is_image, open_image
from camkit.photo import read_picture
from camkit.vocabulary import Vocabulary

_MOST_PIXELS = 30_000_000
_THUMBNAIL = 120  # pixels
PAGE = 24
"""Thumbnails shown together."""


@dataclass(frozen=True, eq=False)
class PhotoShelf:
    """Photos by name; the page opens no other files of this machine.

    Attributes:
        title: of the photos.
        folder: their folder, as it was given.
        paths: the file of each photo.
        samples: labels and masks of a data set, in the same order; empty for a plain folder.
        data: the data set.
    """

    title: str
    folder: str
    paths: tuple[Path, ...]
    samples: tuple[Sample, ...] = ()
    data: DataSet | None = None

    @classmethod
    def of(cls, folder: Path | str | None) -> "PhotoShelf":
        """List the photos of a folder or of all splits of a data set; None takes camkit's own.

        Raises:
            DataError: the folder does not exist or holds no photos.
        """
        if folder is None:
            return cls._of_data(demo_photos(), "camkit", "photos")
        root = Path(folder)
        if not root.is_dir():
            hint = nearby(root) or "; give the folder of the photos"
            raise DataError(f"{root} is not a folder{hint}")
        if find_layout(root) is not None:
            return cls._of_data(open_dataset(root), root.name, str(folder))
        paths = sorted(
            Path(where, name)
            for where, _, names in os.walk(root)
            for name in names
            if is_image(name) and not name.startswith(".")
        )
        if not paths:
            raise DataError(f"{root} holds no photos; expected files such as cat.jpg")
        return cls(root.name, str(folder), tuple(paths))

    @classmethod
    def _of_data(cls, data: DataSet, title: str, folder: str) -> "PhotoShelf":
        samples = {sample.photo: sample for name in data.splits for sample in data.split(name)}
        return cls(title, folder, tuple(samples), tuple(samples.values()), data)

    @property
    def names(self) -> list[str]:
        """A numbered name for each photo, with its suffix where another differs in that alone."""
        stems = Counter(path.stem for path in self.paths)
        shown = [path.stem if stems[path.stem] == 1 else path.name for path in self.paths]
        return [f"{place}: {name}" for place, name in enumerate(shown, start=1)]

    def thumbnails(self, start: int) -> list[tuple[np.ndarray, str]]:
        """Return small pictures of `PAGE` photos from ``start``, with their names."""
        several = list(enumerate(self.paths))[start : start + PAGE]
        return [(_thumbnail(path), self.names[place]) for place, path in several]

    def labels(self, place: int, vocabulary: Vocabulary | None) -> tuple[int, ...]:
        """Return the classes of a photo that the data set names and the model knows."""
        if self.data is None or vocabulary is None:
            return ()
        known = _known(self.data.classes, vocabulary)
        return tuple(known[index] for index in self.samples[place].classes if index in known)

    def truth(self, place: int, vocabulary: Vocabulary | None) -> Int[np.ndarray, "H W"] | None:
        """Return the true mask of a photo with the values of the model's masks, if there is one.

        Classes that the model does not know are background; ignored pixels are -1.
        """
        sample = self.samples[place] if self.samples else None
        if self.data is None or vocabulary is None or sample is None or sample.mask is None:
            return None
        size = read_picture(sample.photo).shape[:2]
        number = len(self.data.classes)
        mask = read_mask(sample.mask, size=size, num_classes=number, form=sample.form).numpy()
        values = np.zeros(max(number + 1, 256), np.int64)
        for index, own in _known(self.data.classes, vocabulary).items():
            values[index + 1] = vocabulary.value(own)
        values[255] = -1
        return values[mask]


def check_photo(path: Path) -> None:
    """Refuse files that are no pictures, and pictures too large for a page.

    Raises:
        DataError: the sentence to show.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        width, height = open_image(file, path.name).size
    if width * height > _MOST_PIXELS:
        raise DataError(
            f"{path.name} has {width * height / 1e6:.0f} megapixels, and the page takes at most "
            f"{_MOST_PIXELS / 1e6:.0f}; reduce it, or use `camkit cam`"
        )


def _known(names: Sequence[str], vocabulary: Vocabulary) -> dict[int, int]:
    """Map the classes of a data set to those of the model, where names agree."""
    known = {}
    for index, name in enumerate(names):
        try:
            known[index] = vocabulary.index(name)
        except ValueError:
            continue  # the model does not know it
    return known


@lru_cache(maxsize=512)
def _thumbnail(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            image = open_image(file, path.name)
            image.draft("RGB", (2 * _THUMBNAIL, 2 * _THUMBNAIL))
            small = image.convert("RGB")
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
            return np.array(small)
    except (CamkitError, OSError, SyntaxError, ValueError):
        return np.full((_THUMBNAIL, _THUMBNAIL, 3), 200, np.uint8)  # its error shows when opened
