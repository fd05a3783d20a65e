"""Options that say which images a command works on, and which classes they show."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from camkit.bulk import Item
from camkit.bulk.by_folder import LabelledByFolder
from camkit.bulk.sources import Labelled, PhotoFolder, Source, SourceKind, open_source
from camkit.cli.datasets import add_dataset_arguments, reading_of
from camkit.cli.options import class_names, read_predicted
from camkit.data.labels import read_labels
from camkit.errors import CamkitError, closest, nearby
from camkit.fitting import GUESSES
from camkit.formats import IMAGE_SUFFIXES
from camkit.printing import several
from camkit.seeds import PredictedClasses
from camkit.vocabulary import Vocabulary

_FIRST = PredictedClasses(0.5, "softmax")  # at most one class can have more than half


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `open_input`, `labelled` and `vocabulary_for` read, but for INPUT."""
    add = parser.add_argument
    kinds = get_args(SourceKind)
    add("--as", dest="kind", choices=kinds, default="auto", help="kind of INPUT (default: auto)")
    add("--split", help="split of a data set")
    add("--root", type=Path, help="folder that the paths of a list start at (default: its own)")
    add("--image-column", default="image", help="Parquet column of image bytes (default: image)")
    add("--key-column", help="Parquet column of image names (default: numbers of the rows)")
    add("--label-column", help="Parquet column of class indices")
    add("--classes", help="classes of every image: names or indices, separated by commas")
    add(
        "--labels",
        help="dataset (from INPUT), folders (an image shows the class that its folder is called "
        "after), first (the classifier's most probable class), "
        "predicted[:SCORE] (all classes with this probability), or a file: a table, JSON, "
        "cls_labels.npy (default: dataset if INPUT has labels, else first)",
    )
    add(
        "--vocabulary",
        help="classes that label indices count: voc, coco, a file of names, or names with "
        "commas (default: the classes of the data set or label file, else of the model)",
    )
    add_dataset_arguments(parser)


def open_input(options: argparse.Namespace) -> Source:
    """Open INPUT; raises the errors of `open_source`."""
    return open_source(
        options.input,
        kind=options.kind,
        split=options.split,
        root=options.root,
        image=options.image_column,
        key=options.key_column,
        labels=options.label_column,
        reading=reading_of(vars(options)),
    )


def check_has_images(source: Source, place: Path) -> None:
    """Raise CamkitError for an input without images; say which files of a folder are not read."""
    if next(iter(source), None) is None:
        if isinstance(source, PhotoFolder):
            name_skipped(source)
        raise CamkitError(f"{place} has no images; read are {', '.join(IMAGE_SUFFIXES)}")


def name_skipped(photos: PhotoFolder) -> None:
    """Say how many files of a folder are left out, by reason."""
    skipped = photos.skipped()
    if skipped:
        listed = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common(8))
        more = f", {several(len(skipped) - 8, 'more suffix')}" if len(skipped) > 8 else ""
        files = "file is" if skipped.total() == 1 else "files are"
        plugin = any("plug-in" in reason for reason in skipped)
        way = "; pip install 'camkit[formats]' reads HEIC and JPEG XL" if plugin else ""
        print(f"camkit: {skipped.total()} {files} not read ({listed}{more}){way}", file=sys.stderr)


def name_notes(notes: Mapping[str, int]) -> None:
    """Say how many photos were read in a way that their owner may not expect, by reason."""
    for note, number in sorted(notes.items()):
        photos = several(number, "photo")
        print(f"camkit: {photos}: {note}; `notes` in the manifest names them", file=sys.stderr)


def labelled(
    source: Source, options: argparse.Namespace, *, partial: bool = False
) -> tuple[Source, PredictedClasses | None]:
    """Return the source with the labels of ``--labels``, or the prediction that replaces them.

    Images that a label file leaves out are failures, or with ``partial`` images without labels.
    """
    text = options.labels
    if text is None:
        labels = (entry.classes is not None for entry in source if isinstance(entry, Item))
        return source, None if (any(labels) if partial else next(labels, False)) else _FIRST
    if text == "dataset":
        return source, None
    if text == "folders":
        return LabelledByFolder(source), None
    if text == "first":
        return source, _FIRST
    predicted = read_predicted(text)
    if predicted is None and not Path(text).exists():
        word = closest(text, ("dataset", "folders", "first", "predicted"))
        hint = f"; {word}" if word.startswith("did you mean") else nearby(Path(text)) or f"; {word}"
        raise ValueError(f"--labels {text}: no such file{hint}")
    if predicted is not None:
        return source, predicted
    names = options.vocabulary and class_names("--vocabulary", options.vocabulary)
    table = read_labels(text, classes=names or None)
    print(f"camkit: {text}: {table.form}", file=sys.stderr)
    found = Labelled(source, table, partial=partial)
    if partial and not any(isinstance(x, Item) and x.classes is not None for x in found):
        raise ValueError(f"--labels {text} names none of the images; check the names in it")
    return found, None


def guesses_for(text: str | None, predicted: PredictedClasses | None) -> PredictedClasses:
    """Return the classes that teach a read-out where an image has no labels.

    Without ``--labels predicted`` or ``first`` they are only those that the classifier is sure of:
    a wrong guess would teach a wrong class.
    """
    return GUESSES if text is None or predicted is None else predicted


def vocabulary_for(options: argparse.Namespace, source: Source, known: Vocabulary) -> Vocabulary:
    """Return the classes that labels count: those of --vocabulary, of the source, or the model."""
    names = source.classes
    if options.vocabulary is not None:
        names = class_names("--vocabulary", options.vocabulary)
    return known if names is None else known.subset(list(names))
