"""Photos and masks in folders side by side: MMSegmentation, ADE20K, Cityscapes and the like."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camkit.data.colours import read_class_dict
from camkit.data.files import (
    MASK_SUFFIXES,
    folders_in,
    holds,
    in_short,
    masks_of,
    photos_in,
    refuse_lossy,
    relative_to,
)
from camkit.data.names import check_split, read_names
from camkit.data.reading import Reading, Zero, is_background, numbered_classes, some_class
from camkit.data.sample import MaskReader, Sample, all_usable, mask_classes
from camkit.data.text import read_text
from camkit.errors import DataError
from camkit.formats import IMAGE_SUFFIXES
from camkit.printing import several

PAIRS = (
    *(("img_dir", "ann_dir"), ("leftImg8bit", "gtFine"), ("images", "masks")),
    *(("images", "annotations"), ("images", "labels"), ("images", "segmentations")),
    *(("imgs", "masks"), ("image", "mask"), ("image", "label"), ("Images", "Masks")),
    *(("Images", "Labels"), ("photos", "masks"), ("JPEGImages", "SegmentationClass")),
)
"""Names of the folders of photos and masks."""

_ALL = "all"
_COLOURS = "class_dict.csv"
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


@dataclass(frozen=True)
class MaskFolders:
    """A data set of photos and masks in folders side by side; `open_mmseg` finds its classes.

    Photos are in ``img_dir/<split>`` and masks in ``ann_dir/<split>``, or in the folders of another
    pair of `PAIRS`, also ``<split>/images`` and ``<split>/masks``; folders without splits are one
    split, "all", or those that ``splits/<split>.txt`` list. So are photos with masks that lie
    beside folders of photos, with all of these. A mask has the name of its photo, up to
    endings such as ``_mask`` or ``_gtFine_labelTrainIds``. Labels come from the masks.

    Attributes:
        root: the folder of the data set.
        classes: in the order of their ids.
        parts: name, folder of photos and folder of masks of each split.
        form: how masks are read.
        notes: what the files were taken for.
    """

    root: Path
    classes: tuple[str, ...]
    parts: tuple[tuple[str, Path, Path], ...]
    form: MaskReader = field(hash=False)
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        lists = self._lists
        return tuple(lists) if lists else tuple(name for name, _, _ in self.parts)

    @property
    def _lists(self) -> dict[str, Path]:
        if len(self.parts) > 1 or self.parts[0][0] != _ALL:
            return {}
        return {path.stem: path for path in sorted((self.root / "splits").glob("*.txt"))}

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split, by name; every mask is read once."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        return some_class(self._entries(name), name, self.root)

    def _entries(self, name: str) -> Iterator[Sample | DataError]:
        listing = self._lists.get(name)
        part = self.parts[0] if listing else next(p for p in self.parts if p[0] == name)
        photos, masks = found_in(part)
        for stem in photos if listing is None else read_names(listing):
            try:
                yield self._sample(stem, photos.get(stem), masks.get(stem), part)
            except DataError as error:
                yield error

    def _sample(
        self, stem: str, photo: Path | None, mask: Path | None, part: tuple[str, Path, Path]
    ) -> Sample:
        if photo is None:
            raise DataError(f"{part[1]} holds no {stem}, which a list of splits/ names; add it")
        if mask is None:
            raise DataError(f"{photo} has no mask in {part[2]}; add the mask or remove the photo")
        classes = mask_classes(mask, num_classes=len(self.classes), form=self.form)
        return Sample(stem, photo, mask, classes, self.form)

    def _left_out(self) -> Iterator[str]:
        """Name the folders of photos without masks, such as those of a test split."""
        top = self.parts[0][1].parent
        if self.parts[0][0] != _ALL and top != self.root and top.parent == self.root:
            used = {folder for _, folder, _ in self.parts}
            if holds(top, IMAGE_SUFFIXES, deep=False):
                count = several(len(photos_in(top)), "photo")
                yield f"{relative_to(top, self.root)}: {count} without masks, left out"
            for folder in folders_in(top):
                if folder not in used and holds(folder, IMAGE_SUFFIXES):
                    yield f"{relative_to(folder, self.root)}: photos without masks, left out"

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        sentences = [*self.notes, *self._left_out()]
        for name, top, folder in self.parts:
            photos, masks = found_in((name, top, folder))
            sentences.append(
                f"{relative_to(top, self.root)}: {several(len(photos), 'photo')}; "
                f"{relative_to(folder, self.root)}: {several(len(masks), 'mask')}"
            )
        return tuple(sentences)


def found_in(part: tuple[str, Path, Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the photos and masks of a split by name."""
    _, top, folder = part
    photos = photos_in(top, deep=True)
    return photos, masks_of(photos, top, folder)


def mask_folders(root: Path) -> tuple[tuple[str, Path, Path], ...]:
    """Find the splits of a tree: name, folder of photos, folder of masks; none if it is no tree."""
    for photos, masks in PAIRS:
        top, folder = root / photos, root / masks
        if top.is_dir() and folder.is_dir() and holds(folder, MASK_SUFFIXES):
            splits = [
                (path.name, path, folder / path.name)
                for path in folders_in(top)
                if (folder / path.name).is_dir() and holds(path, IMAGE_SUFFIXES)
            ]
            parts = tuple(splits) or ((_ALL, top, folder),)
            if splits and _directly(top, folder):
                _refuse_splits(top, [name for name, _, _ in splits])
                parts = ((_ALL, top, folder),)
            if any(found_in(part)[1] for part in parts):
                return parts
    beside = [
        (path.name, path, labels)
        for path in folders_in(root)
        if (labels := root / f"{path.name}_labels").is_dir()  # CamVid
        and holds(labels, MASK_SUFFIXES)
        and holds(path, IMAGE_SUFFIXES)
    ]
    if beside:
        return tuple(beside)
    found = [(path.name, *pair) for path in folders_in(root) if (pair := _pair_in(path))]
    return tuple(found)


def _directly(top: Path, folder: Path) -> bool:
    """Return whether photos with masks lie beside the folders of photos, not in them."""
    return holds(top, IMAGE_SUFFIXES, deep=False) and bool(masks_of(photos_in(top), top, folder))


def _refuse_splits(top: Path, names: Sequence[str]) -> None:
    """Raise DataError if photos lie beside folders that are splits by their names."""
    splits = [name for name in names if name.lower() in _SPLITS]
    if splits:
        raise DataError(
            f"{top} holds photos with masks beside the splits {', '.join(splits)}; move these "
            "photos and their masks into the folder of a split"
        )


def refuse_lossy_masks(root: Path) -> None:
    """Raise DataError if a folder has photos and masks side by side, but its masks are JPEG."""
    for top in (root, *folders_in(root)):
        for photos, masks in PAIRS:
            if (top / photos).is_dir() and not holds(top / masks, MASK_SUFFIXES):
                refuse_lossy(top / masks)


def _pair_in(split: Path) -> tuple[Path, Path] | None:
    """Return the folders of photos and of masks in the folder of a split."""
    for photos, masks in PAIRS:
        top, folder = split / photos, split / masks
        if top.is_dir() and folder.is_dir() and holds(folder, MASK_SUFFIXES):
            return (top, folder) if holds(top, IMAGE_SUFFIXES) else None
    return None


def open_mmseg(root: str | Path, *, reading: Reading | None = None) -> MaskFolders:
    """Find classes and splits of photos and masks in folders side by side.

    Class names come from ``reading``, ``dataset.py`` (of MMSegmentation or of camkit's export; it
    is parsed, not run), ``class_dict.csv`` (CamVid: masks are its colours), ``objectInfo150.txt``
    (ADE20K) or ``classes.txt``; else every mask is read once, and classes are called "class 1" and
    so on. The same files say what 0 means.

    Raises:
        DataError: there are no such folders, or a file in them cannot be used.
    """
    root, reading = Path(root).absolute(), reading or Reading()
    parts = mask_folders(root)
    if not parts:
        refuse_lossy_masks(root)
        raise DataError(f"{root} holds no folders of photos and masks such as img_dir and ann_dir")
    if (root / _COLOURS).is_file():
        return _coloured(root, parts, reading)
    found = _found_names(root) or _Names(None, None, "")
    zero, zero_note = _zero(root, parts, reading, found)
    names = reading.classes or _without_background(found.names, zero)
    note = "given" if reading.classes else found.source
    if names is None:
        paths = [path for part in parts for path in found_in(part)[1].values()]
        names = numbered_classes(paths, reading, zero)
        note = 'no file names the classes, so they are called "class 1" and so on (name them with '
        note += "classes, --data-classes)"
    form = reading.form(len(names), zero)
    notes = (f"{several(len(names), 'class')} ({in_short(names)}): {note}", zero_note)
    return MaskFolders(root, names, parts, form, notes)


def _coloured(
    root: Path, parts: tuple[tuple[str, Path, Path], ...], reading: Reading
) -> MaskFolders:
    """Open masks whose colours are listed in a file."""
    if given := reading.given():
        raise ValueError(
            f"{root / _COLOURS} says what `{given[0]}` would; leave it out, or remove the file"
        )
    names, form = read_class_dict(root / _COLOURS)
    note = f"{_COLOURS}: {several(len(names), 'class')} by colour ({in_short(names)})"
    return MaskFolders(root, names, parts, form, (note,))


@dataclass(frozen=True)
class _Names:
    """What a file says of a tree: names of classes, what 0 means, and the name of the file."""

    names: tuple[str, ...] | None
    zero: Zero | None
    source: str


def _found_names(root: Path) -> _Names | None:
    if (root / "dataset.py").is_file():
        return _from_python(root / "dataset.py")
    ade = root / "objectInfo150.txt"
    if ade.is_file():
        rows = [line.split("\t") for line in read_text(ade).splitlines()[1:] if line.strip()]
        names = tuple(row[-1].split(",")[0].strip() for row in rows)
        return _Names(_distinct(names), "void", ade.name)
    if (root / "classes.txt").is_file():
        return _Names(tuple(read_names(root / "classes.txt")), None, "classes.txt")
    return _Names(None, "void", root.name) if root.name.startswith("ADEChallenge") else None


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Tell apart classes of one name by their numbers."""
    return tuple(
        name if names.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(names, start=1)
    )


def _from_python(path: Path) -> _Names:
    """Read classes and `reduce_zero_label` of a configuration; it is parsed and never run."""
    try:
        tree = ast.parse(read_text(path))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no Python file ({error}); correct it or remove it") from error
    settings: dict[str, Any] = {}
    for node in ast.walk(tree):
        for name, value in _pairs(node):
            if name in ("classes", "CLASSES", "reduce_zero_label"):
                try:
                    settings.setdefault(name.lower(), ast.literal_eval(value))
                except (ValueError, TypeError, RecursionError):
                    continue  # a computed value
    names = settings.get("classes")
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        return _Names(
            None, "void" if settings.get("reduce_zero_label") is True else None, path.name
        )
    if settings.get("reduce_zero_label") is True:
        return _Names(_distinct(names), "void", path.name)
    zero: Zero = "background" if names and is_background(names[0]) else "class"
    return _Names(_distinct(names), zero, path.name)


def _pairs(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield what a piece of code gives a name: keywords, assignments, entries and defaults."""
    if isinstance(node, ast.keyword) and node.arg is not None:
        yield node.arg, node.value
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield node.targets[0].id, node.value
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
    elif isinstance(node, ast.arguments):
        last = node.args[len(node.args) - len(node.defaults) :]
        yield from ((each.arg, default) for each, default in zip(last, node.defaults, strict=True))


def _zero(
    root: Path, parts: Sequence[tuple[str, Path, Path]], reading: Reading, found: _Names
) -> tuple[Zero, str]:
    """Return what 0 means, and the sentence that says why."""
    meaning = {
        "background": "0 is background",
        "void": "0 is not scored",
        "class": "0 is the first class",
    }
    if reading.zero is not None:
        return reading.zero, f"{meaning[reading.zero]}, as given"
    if reading.values is not None:
        return "background", f"values of masks, as given: {dict(reading.values)}"
    if found.zero is not None:
        return found.zero, f"{found.source}: {meaning[found.zero]}"
    first = next(iter(found_in(parts[0])[1].values()), root)
    if first.stem.lower().endswith("labeltrainids"):
        return "class", f"{first.name}: {meaning['class']}, as in all files of this name"
    return "background", "0 is taken for background; if it is not, say so with zero (--zero)"


def _without_background(names: tuple[str, ...] | None, zero: Zero) -> tuple[str, ...] | None:
    if names and zero == "background" and is_background(names[0]):
        return names[1:]
    return names
