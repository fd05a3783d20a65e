"""Plain folders as data sets: images, a file of labels, and masks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from camkit.data.labels import ImageLabels, label_file, read_labels, shortened
from camkit.data.names import (
    NameIndex,
    check_split,
    composed,
    label_keys,
    read_image_names,
    read_names,
)
from camkit.data.sample import Sample
from camkit.errors import DataError, closest
from camkit.formats import IMAGE_SUFFIXES, is_image
from camkit.printing import several

_ALL = "all"


@dataclass(frozen=True)
class PlainFolder:
    """A data set in a plain folder; `open_folder` finds its classes and splits.

    The label file is the first of `LABEL_FILES` in the folder or in its ``images``, in any form
    that `read_labels` reads, such as ``labels.csv`` with rows like ``cat1.jpg,cat;sofa``. It names
    the images below ``images/``, with or without endings and folders. Images that it does not name
    are left out. ``classes.txt`` lists the classes in the order of their mask ids, one per line;
    without it they are those of the label file: in its order, if it lists them, else sorted. Masks
    are ``masks/<name>.png``; an image may lack one. Each file ``splits/<split>.txt`` lists names,
    one per line; without any, a column called split says it, or there is one split, "all".
    """

    root: Path
    classes: tuple[str, ...]
    splits: tuple[str, ...] = (_ALL,)

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, in the order of its list, else of the label file."""
        check_split(name, self.splits)
        labels = _labels_of(self.root, self.classes)
        samples = {}
        for entry, photo in _photos_of(self.root, labels).items():
            stem = _stem(photo, self.root)
            mask = self.root / "masks" / f"{stem}.png"
            found = mask if mask.is_file() else None
            samples[stem] = Sample(stem, photo, found, labels.labels[entry])
        listing = self.root / "splits" / f"{name}.txt"
        if listing.is_file():
            return _listed(listing, samples)
        if not labels.splits:
            return tuple(samples.values())
        chosen = _photos_of(self.root, labels)
        return tuple(
            samples[_stem(photo, self.root)]
            for entry, photo in chosen.items()
            if labels.splits.get(entry) == name
        )

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split; `open_folder` has already raised errors of rows."""
        yield from self.split(name)

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        labels = _labels_of(self.root, self.classes)
        order = "in the order of the label file" if labels.listed else "sorted"
        if (self.root / "classes.txt").is_file():
            order = "in the order of classes.txt"
        lines = [
            f"{labels.path.relative_to(self.root)}: {labels.form}",
            f"{several(len(self.classes), 'class')}, {order}: {shortened(self.classes)}",
        ]
        if (self.root / "splits").is_dir():
            lines.append(f"splits/: lists of {', '.join(self.splits)}")
        elif labels.splits:
            lines.append(f"splits of a column: {', '.join(self.splits)}")
        return tuple(lines)


def open_folder(root: str | Path) -> PlainFolder:
    """Find the classes and splits of a plain folder, and check its table of labels.

    Args:
        root: the folder that holds ``images`` and a label file.

    Raises:
        DataError: the folder is empty, or a file in it has another form.
    """
    root = Path(root).absolute()
    if plain_label_file(root) is None:
        raise DataError(
            f"{root} holds no file of labels, nor does its images/; add one such as labels.csv "
            "with rows like cat1.jpg,cat;sofa"
        )
    names = root / "classes.txt"
    labels = _labels_of(root, tuple(read_names(names)) if names.is_file() else None)
    classes = labels.classes
    if classes is None:  # labels are numbers that no file names
        count = 1 + max((index for row in labels.labels.values() for index in row), default=0)
        classes = tuple(map(str, range(count)))
    splits = tuple(sorted(path.stem for path in (root / "splits").glob("*.txt")))
    splits = splits or tuple(sorted({*labels.splits.values()}))
    data = PlainFolder(root, classes, splits or (_ALL,))
    for name in data.splits:
        data.split(name)  # report a wrong line now, not hours into a run
    return data


def plain_label_file(root: Path) -> Path | None:
    """Return the label file of a plain folder, if it has one."""
    return label_file(root) or label_file(root / "images")


def _labels_of(root: Path, classes: tuple[str, ...] | None) -> ImageLabels:
    path = plain_label_file(root)
    if path is None:
        raise DataError(f"{root} no longer holds labels; open it again")
    return read_labels(path, classes=classes)


def _photos_of(root: Path, labels: ImageLabels) -> dict[str | int, Path]:
    """Find the photo of each entry of a label file, in the order of the file."""
    images = _find_images(root / "images")
    index = NameIndex(images)
    numbers = {key: name for name in images for key in label_keys(name.rpartition("/")[2])[1:2]}
    photos: dict[str | int, Path] = {}
    entry_of: dict[Path, str | int] = {}
    for entry in labels.labels:
        names = index.find(entry) if isinstance(entry, str) else [numbers.get(entry, "")]
        if len(names) != 1 or names[0] not in images:
            found = f"holds no {entry!r}; add the file or remove the row"
            if len(names) > 1:
                found = f"holds {names[0]} and {names[1]}, which both fit {entry!r}; add its folder"
            raise DataError(f"{labels.place(entry)}: images/ {found}")
        photo = images[str(names[0])]
        if photo in entry_of:
            first = labels.lines.get(entry_of[photo])
            place = "there" if first is None else f"on line {first}"
            raise DataError(
                f"{labels.place(entry)}: {photo.stem!r} is already {place}; put all its labels in "
                "one row"
            )
        entry_of[photo] = entry
        photos[entry] = photo
    return photos


def _listed(listing: Path, samples: Mapping[str, Sample]) -> tuple[Sample, ...]:
    """Choose the samples on a list."""
    index = NameIndex(samples)
    chosen = []
    for name, line in read_image_names(listing).items():
        found = index.find(name)
        if len(found) != 1:
            raise DataError(
                f"{listing}, line {line}: {name!r} has no row in the label file; "
                f"{closest(name, samples)}"
            )
        chosen.append(samples[str(found[0])])
    return tuple(chosen)


def _stem(photo: Path, root: Path) -> str:
    return composed(photo.relative_to(root / "images").with_suffix("").as_posix())


def _find_images(folder: Path) -> dict[str, Path]:
    """Map the names of images, with their folders below ``folder``, to the images."""
    paths = sorted(path for path in folder.rglob("*") if is_image(path.name))
    if not paths:
        raise DataError(
            f"{folder} holds no images; expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    by_stem: dict[str, Path] = {}
    for path in paths:
        stem = composed(path.relative_to(folder).with_suffix("").as_posix())
        if stem in by_stem:
            raise DataError(
                f"{folder} holds both {by_stem[stem].name} and {path.name}, which would share "
                "a mask; rename one"
            )
        by_stem[stem] = path
    return by_stem
