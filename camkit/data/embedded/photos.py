"""Photographs that scikit-image brings along, with masks drawn for camkit."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from camkit.data.names import check_split
from camkit.data.sample import Sample
from camkit.errors import DataError

DEMO_CLASSES = ("cat", "person", "cup", "tripod")
"""Classes of the masks: names that an ImageNet classifier's vocabulary knows."""

_CONTENT = {  # public domain (NASA), or CC0 by their photographers: see THIRD_PARTY.md
    "astronaut.png": ("person",),
    "camera.png": ("person", "tripod"),
    "coffee.png": ("cup",),
    "chelsea.png": ("cat",),
}
_SPLITS = ("all",)


@dataclass(frozen=True)
class DemoPhotos:
    """Four photographs to look at and to try things on; far too few to measure with.

    They are the photographs in scikit-image's wheel that may be redistributed and show an object
    that ImageNet has a name for, but for the rocket: it is thinner than one patch at 384 pixels.
    Masks are drawn by hand; the video camera, blurred fur at the cat's chin and a line along each
    border are 255, ignore.
    """

    root: Path
    photos: Path
    classes: tuple[str, ...] = DEMO_CLASSES
    splits: tuple[str, ...] = _SPLITS

    def split(self, name: str = "all") -> tuple[Sample, ...]:
        """List the photographs; there is one split, "all".

        Raises:
            ValueError: there is no such split.
            DataError: this scikit-image does not bring a photograph along.
        """
        check_split(name, self.splits)
        return tuple(self._sample(file, present) for file, present in _CONTENT.items())

    def entries(self, name: str = "all") -> Iterator[Sample | DataError]:
        """Go through the photographs."""
        yield from self.split(name)

    def _sample(self, file: str, present: tuple[str, ...]) -> Sample:
        photo = self.photos / file
        if not photo.is_file():
            raise DataError(
                f"{photo} is not there, though scikit-image 0.24 to 0.26 bring it along; "
                "install one of these"
            )
        classes = tuple(sorted(self.classes.index(name) for name in present))
        return Sample(photo.stem, photo, self.root / "masks" / file, classes)


def demo_photos() -> DemoPhotos:
    """Open the photographs that come with camkit; nothing is copied or downloaded.

    Returns:
        A data set with the one split "all".

    Raises:
        DataError: scikit-image, which holds the photographs, is not installed.
    """
    found = find_spec("skimage")  # where it lies; importing it would take a second
    if found is None or not found.submodule_search_locations:
        raise DataError("the photographs are scikit-image's; install it: pip install scikit-image")
    return DemoPhotos(Path(__file__).parent, Path(found.submodule_search_locations[0]) / "data")
