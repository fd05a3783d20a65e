"""Plain folders as data sets, and the function that opens a folder of any layout."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from camkit.data.coco import coco_splits, open_coco
from camkit.data.imagenet import open_imagenet_s
from camkit.data.labels import check_split, read_names, read_text
from camkit.data.sample import DataSet, Sample
from camkit.data.voc import open_voc
from camkit.errors import DataError, closest, nearby
from camkit.formats import IMAGE_SUFFIXES, is_image

_HEADER = ["image", "labels"]
_ALL = "all"


def open_dataset(path: str | Path) -> DataSet:
    """Open a folder in the layout of PASCAL VOC, MS COCO or ImageNet-S, or a plain folder.

    Args:
        path: a folder with ``JPEGImages/`` and ``ImageSets/Segmentation/`` (VOC), ``images/`` and
            ``labels.csv`` (plain), ``validation-segmentation/`` or ``train-semi-segmentation/``
            (ImageNet-S), or photos in folders such as ``train2017/`` (COCO). `open_voc` and
            `open_coco` have settings.

    Raises:
        DataError: the folder has another layout, or a file in it cannot be used.
    """
    root = Path(path)
    if not root.is_dir():
        hint = nearby(root) or "; name the folder that holds the data set"
        raise DataError(f"{root} is not a folder{hint}")
    opener = find_layout(root)
    if opener is not None:
        return opener(root)
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    shown = ", ".join(entries[:8]) or "nothing"
    more = ", ..." if len(entries) > 8 else ""
    raise DataError(
        f"{root} is no known data set: expected JPEGImages/ and ImageSets/Segmentation/ (VOC), or "
        "images/ and labels.csv (plain folder), or folders such as train2017/ (COCO), or "
        f"validation/ and validation-segmentation/ (ImageNet-S), got {shown}{more}; name the "
        "folder that holds these"
    )


def find_layout(root: Path) -> Callable[[Path], DataSet] | None:
    """Return the function that opens this folder, or None for an unknown layout."""
    if (root / "JPEGImages").is_dir() and (root / "ImageSets" / "Segmentation").is_dir():
        return open_voc
    if (root / "images").is_dir() and (root / "labels.csv").is_file():
        return open_folder
    if any((root / f"{split}-segmentation").is_dir() for split in ("validation", "train-semi")):
        return open_imagenet_s
    return open_coco if coco_splits(root) else None


@dataclass(frozen=True)
class PlainFolder:
    """A data set in a plain folder; `open_folder` finds its classes and splits.

    ``labels.csv`` starts with the line ``image,labels``; each row names a file in ``images/``, with
    or without its ending, and its classes with ``;`` between them: ``cat1.jpg,cat;sofa``. Images
    without a row are left out. ``classes.txt`` lists the classes in the order of their mask ids,
    one per line; without it they are the names in ``labels.csv``, sorted. Masks are
    ``masks/<name>.png``; an image may lack one. Each file ``splits/<split>.txt`` lists names, one
    per line; without any there is one split, "all".
    """

    root: Path
    classes: tuple[str, ...]
    splits: tuple[str, ...] = (_ALL,)

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, in the order of its list."""
        check_split(name, self.splits)
        samples = {}
        for stem, (photo, labels, line) in _read_rows(self.root).items():
            for label in labels:
                if label not in self.classes:
                    raise DataError(
                        f"{self.root / 'labels.csv'}, line {line}: {label!r} is not a class; "
                        f"{closest(label, self.classes)}"
                    )
            mask = self.root / "masks" / f"{stem}.png"
            classes = tuple(sorted({self.classes.index(label) for label in labels}))
            samples[stem] = Sample(stem, photo, mask if mask.is_file() else None, classes)
        listing = self.root / "splits" / f"{name}.txt"
        if name == _ALL and not listing.is_file():
            return tuple(samples.values())
        stems = read_names(listing)
        for stem, line in stems.items():
            if stem not in samples:
                raise DataError(
                    f"{listing}, line {line}: {stem!r} has no row in labels.csv; "
                    f"{closest(stem, samples)}"
                )
        return tuple(samples[stem] for stem in stems)

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split; `open_folder` has already raised errors of rows."""
        yield from self.split(name)


def open_folder(root: str | Path) -> PlainFolder:
    """Find the classes and splits of a plain folder, and check its table of labels.

    Args:
        root: the folder that holds ``images`` and ``labels.csv``.

    Raises:
        DataError: the folder is empty, or a file in it has another form.
    """
    root = Path(root).absolute()
    rows = _read_rows(root)
    names = root / "classes.txt"
    if names.is_file():
        classes = tuple(read_names(names))
    else:
        classes = tuple(sorted({label for _, labels, _ in rows.values() for label in labels}))
    splits = tuple(sorted(path.stem for path in (root / "splits").glob("*.txt")))
    data = PlainFolder(root, classes, splits or (_ALL,))
    for name in data.splits:
        data.split(name)  # report a wrong line now, not hours into a run
    return data


def _read_rows(root: Path) -> dict[str, tuple[Path, list[str], int]]:
    """Map each image name in ``labels.csv`` to its photo, labels and line number."""
    path = root / "labels.csv"
    images = _find_images(root / "images")
    reader = csv.reader(read_text(path).splitlines(), skipinitialspace=True, strict=True)
    rows: dict[str, tuple[Path, list[str], int]] = {}
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if header != _HEADER:
            raise DataError(f"{path}, line 1: expected image,labels, got {','.join(header)}")
        for cells in filter(None, reader):
            line = reader.line_num
            photo, labels = _read_row(cells, f"{path}, line {line}", images)
            if photo.stem in rows:
                raise DataError(
                    f"{path}, line {line}: {photo.stem!r} is already on line "
                    f"{rows[photo.stem][2]}; put all its labels in one row"
                )
            rows[photo.stem] = (photo, labels, line)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; check the quotes") from error
    if not rows:
        raise DataError(f"{path} has no rows; add one for each image, such as cat1.jpg,cat;sofa")
    return rows


def _read_row(cells: list[str], source: str, images: dict[str, Path]) -> tuple[Path, list[str]]:
    if len(cells) != len(_HEADER):
        raise DataError(f"{source}: expected 2 columns, got {len(cells)}; put ; between labels")
    image = cells[0].strip()
    if image not in images:
        raise DataError(f"{source}: images/ holds no {image!r}; add the file or remove the row")
    labels = [label.strip() for label in cells[1].split(";") if label.strip()]
    if not labels:
        raise DataError(f"{source}: {image!r} has no labels; name at least one class")
    return images[image], labels


def _find_images(folder: Path) -> dict[str, Path]:
    """Map file names and stems to images."""
    paths = sorted(path for path in folder.glob("*") if is_image(path.name))
    if not paths:
        raise DataError(
            f"{folder} holds no images; expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    by_stem: dict[str, Path] = {}
    for path in paths:
        if path.stem in by_stem:
            raise DataError(
                f"{folder} holds both {by_stem[path.stem].name} and {path.name}, which would share "
                "a mask; rename one"
            )
        by_stem[path.stem] = path
    return by_stem | {path.name: path for path in paths}
