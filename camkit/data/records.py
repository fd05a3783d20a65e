"""Labels by image as files of other tools hold them, before names become class indices."""

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from camkit.data.names import class_list, composed, has_image_suffix
from camkit.data.tables import FALSE, TRUE, Row, Table, image_column, plain_word
from camkit.errors import DataError

Label: TypeAlias = str | int
_LABELS = """labels label labelnames labelname classes class classnames classname categories
category tags tag targets target objects object choices choice presentclasses classid classids
labelid labelids categoryid classindex labelindex labelidx classidx"""
_OTHERS = """split subset set fold partition width height size xmin ymin xmax ymax bbox box area url
source index unnamed0 score confidence annotator annotationid leadtime createdat updatedat id md5
license"""
_LABEL_WORDS = _LABELS.split()
_OTHER_WORDS = frozenset(_OTHERS.split())
_KEYS = frozenset(("labels", "classes", "class_names", "info"))
_SPLIT_WORDS = ("split", "subset", "partition", "set")


@dataclass
class Records:
    """The labels of each image, as a file spells them.

    Attributes:
        path: the file.
        form: a description of the file.
        labels: names, or indices from 0, by image.
        classes: the classes in the order of their indices, if the file lists them.
        lines: where each image stands in a text file.
        splits: the split of each image, if the file says it.
    """

    path: Path
    form: str
    labels: dict[str | int, tuple[Label, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    lines: dict[str | int, int] = field(default_factory=dict)
    splits: dict[str | int, str] = field(default_factory=dict)

    def place(self, image: str | int) -> str:
        """Return the file, and the line if there is one, for errors."""
        line = self.lines.get(image)
        return str(self.path) if line is None else f"{self.path}, line {line}"

    def add(self, image: str | int, labels: Iterable[Label], *, line: int | None = None) -> None:
        """Add the labels of an image.

        A file may give each label of an image a row of its own; rows with several labels must not
        repeat an image.
        """
        row = tuple(labels)
        known = self.labels.get(image)
        if known is not None and (len(row) > 1 or (len(known) > 1 and not self._one_each)):
            place = f"{self.path}, line {line}: " if line is not None else f"{self.path}: "
            first = f" on line {self.lines[image]}" if image in self.lines else ""
            raise DataError(
                f"{place}{image!r} is already{first or ' there'}; put all its labels in one row"
            )
        self._one_each = self._one_each and len(row) <= 1
        self.labels[image] = tuple(dict.fromkeys((*(known or ()), *row)))
        if line is not None:
            self.lines.setdefault(image, line)

    _one_each: bool = field(default=True, repr=False)


def table_records(table: Table, *, known: Sequence[str] | None = None) -> Records:
    """Read the labels of a table.

    With a header, the labels stand in a column called labels, class, tags or the like, or there is
    a column of 0 and 1 for each class (one-hot). Without, they follow the image: names, indices
    from 0, or a 0 or 1 for each class.

    Args:
        table: the rows.
        known: the classes, if they are known; a cell that is one of these is not split.

    Raises:
        DataError: a row has another form; the message names its line.
    """
    records = Records(table.path, table.form)
    reader = _headed if table.header is not None else _headless
    reader(table, records, known)
    if not records.labels:
        raise DataError(
            f"{table.path} has no rows; add one for each image, such as cat1.jpg,cat;sofa"
        )
    return records


@dataclass(frozen=True)
class _Columns:
    """Positions of the columns of a table with a header."""

    image: int
    labels: int | None
    vector: tuple[int, ...]
    split: int | None
    confidence: int | None


def _columns(table: Table) -> _Columns:
    header = table.header or ()
    words = [plain_word(name) for name in header]

    def first(of: Iterable[str]) -> int | None:
        return next((words.index(word) for word in of if word in words), None)

    image, labels = image_column(header) or 0, first(_LABEL_WORDS)
    free = [i for i, word in enumerate(words) if i != image and word and word not in _OTHER_WORDS]
    vector = tuple(free) if labels is None and _are_vectors(table, free) else ()
    if labels is None and not vector:
        if len(free) != 1:
            raise DataError(
                f"{table.path}, line 1: expected a column called labels, or a column of 0 and 1 "
                f"for each class, got {', '.join(header[:8])}"
            )
        labels = free[0]
    return _Columns(image, labels, vector, first(_SPLIT_WORDS), first(("confidence",)))


def _headed(table: Table, records: Records, known: Sequence[str] | None) -> None:
    header, columns = table.header or (), _columns(table)
    for row in table.rows:
        if len(row.cells) != len(header):
            raise DataError(
                f"{table.path}, line {row.line}: expected {len(header)} columns, got "
                f"{len(row.cells)}; put ; between labels"
            )
    labels, vectors = _labels_of(table, records, columns, known)
    for row, found in zip(table.rows, labels, strict=True):
        if columns.confidence is not None and row.cells[columns.confidence] in ("0", "0.0"):
            continue  # Open Images: a person said that the class is absent
        image = row.cells[columns.image]
        _add_row(records, row, image, found, empty=vectors)
        if columns.split is not None and row.cells[columns.split]:
            records.splits[image] = row.cells[columns.split]


def _labels_of(
    table: Table, records: Records, columns: _Columns, known: Sequence[str] | None
) -> tuple[list[list[Label]], bool]:
    """Return the labels of each row of a table with a header, and whether they were vectors."""
    header = table.header or ()
    if columns.labels is not None:
        cells = [split_labels(row.cells[columns.labels], known) for row in table.rows]
        return _or_vectors(cells, records, known)
    names = [header[i] for i in columns.vector]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{table.path}, line 1: two columns are called {twice!r}; rename one")
    records.classes = tuple(names)
    records.form += f"; a column of 0 and 1 for each of {len(names)} classes"
    on = [
        [_is_on(f"{table.path}, line {row.line}", header[i], row.cells[i]) for i in columns.vector]
        for row in table.rows
    ]
    return [[index for index, value in enumerate(row) if value] for row in on], True


def _or_vectors(
    rows: list[list[Label]], records: Records, known: Sequence[str] | None
) -> tuple[list[list[Label]], bool]:
    """Return labels as they are, or the places of the 1s if all rows are vectors, and which."""
    width = _vector_width(rows, known, records.path)
    if not width:
        return rows, False
    records.form += f"; a 0 or 1 for each of {width} classes"
    return [[index for index, value in enumerate(row) if value] for row in rows], True


def _headless(table: Table, records: Records, known: Sequence[str] | None) -> None:
    first = table.rows[0]
    if len(first.cells) == 1:
        raise DataError(
            f"{table.path}, line {first.line}: expected image,labels, got {first.cells[0]!r}"
        )
    rows = [
        [label for cell in row.cells[1:] for label in split_labels(cell, known)]
        for row in table.rows
    ]
    found, vectors = _or_vectors(rows, records, known)
    for row, labels in zip(table.rows, found, strict=True):
        _add_row(records, row, row.cells[0], labels, empty=vectors)


def _vector_width(rows: Iterable[Sequence[object]], known: Sequence[str] | None, path: Path) -> int:
    """Return the length of the 0/1 vectors that all rows are, or 0 if they are something else.

    Class indices do not repeat in a row, vectors of more than two classes always do. Rows of a 0
    and a 1 may be either.

    Raises:
        DataError: the rows are vectors of another number of classes, or may be either.
    """
    widths, repeated = set(), False
    for row in rows:
        if not all(str(value) in _BITS for value in row):
            return 0
        widths.add(len(row))
        repeated = repeated or len({str(value)[:1] for value in row}) < len(row)
    width = max(widths, default=0)
    if len(widths) != 1 or width < 2 or (not repeated and known is not None and len(known) > 2):
        return 0
    if not repeated:
        raise DataError(
            f"{path}: every image has a 0 and a 1, which may be class indices, or a 0 or 1 for "
            "each of two classes; write the names of the classes"
        )
    if known is not None and len(known) != width:
        raise DataError(
            f"{path}: expected a 0 or 1 for each of the {len(known)} classes, got {width}"
        )
    return width


_BITS = frozenset(("0", "1", "0.0", "1.0", "True", "False"))


def _add_row(
    records: Records, row: Row, image: str, labels: Sequence[Label], *, empty: bool
) -> None:
    place = f"{records.path}, line {row.line}"
    if not image:
        raise DataError(f"{place}: no image is named; remove the row")
    if not labels and not empty:
        raise DataError(f"{place}: {image!r} has no labels; name at least one class")
    wrong = next((label for label in labels if has_image_suffix(str(label))), None)
    if wrong is not None:
        raise DataError(f"{place}: expected a class of {image!r}, got the file {wrong!r}")
    negative = next((label for label in labels if _NEGATIVE.fullmatch(str(label))), None)
    if negative is not None:
        raise DataError(
            f"{place}: {image!r} is labelled {negative}, as in the lists of ImageSets/Main; "
            "expected a class name or an index from 0"
        )
    records.add(image, labels, line=row.line)


def _are_vectors(table: Table, columns: Sequence[int]) -> bool:
    """Return whether columns hold one 0 or 1 per class, and at least one 1."""
    held = {row.cells[i].casefold() for row in table.rows for i in columns if i < len(row.cells)}
    # one wrong cell among many is an error of its own, not another form
    right = held & (TRUE | FALSE)
    numbers = bool(columns) and bool(held & TRUE)
    return numbers and all(_NUMBER.fullmatch(cell) for cell in held - right)


_NEGATIVE = re.compile(r"-\d+(\.\d+)?")
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


def _is_on(place: str, column: str, cell: str) -> bool:
    value = cell.casefold()
    if value not in TRUE | FALSE:
        raise DataError(f"{place}: expected 0 or 1 in column {column}, got {cell!r}")
    return value in TRUE


def split_labels(cell: str, known: Sequence[str] | None = None) -> list[Label]:
    """Split a cell into labels; whole numbers become indices.

    A known class is kept whole. Otherwise the cell may be a list in brackets, or labels between
    semicolons, bars or commas; numbers may be between spaces.

    >>> split_labels("cat; dog"), split_labels("3 0"), split_labels("['hot dog', 'cup']")
    (['cat', 'dog'], [3, 0], ['hot dog', 'cup'])
    """
    known = known or ()
    if not cell or cell in known:
        return [cell] if cell else []
    parts: Sequence[object] = [cell]
    if (cell[0], cell[-1]) in (("[", "]"), ("(", ")"), ("{", "}")):
        parts = _literal(cell)
    else:
        mark = next((mark for mark in ";|," if mark in cell), None)
        words = cell.split()
        if mark is not None:
            parts = cell.split(mark)
        elif all(_NUMBER.fullmatch(word) for word in words) or {*words} <= {*known}:
            parts = words
    return [as_label(part, known) for part in parts if not isinstance(part, str) or part.strip()]


def _literal(cell: str) -> Sequence[object]:
    """Read a list as Python, JSON or numpy print it."""
    if len(cell) < 10_000:
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
        else:
            return list(value) if isinstance(value, list | tuple | set) else [value]
    inner = cell[1:-1]
    return [part.strip("'\" ") for part in (inner.split(",") if "," in inner else inner.split())]


def as_label(value: object, known: Sequence[str] = ()) -> Label:
    """Return a name in NFC, or an index; a text of digits is an index unless it is a class."""
    if isinstance(value, str):
        text = composed(value.strip())
        if text not in known and re.fullmatch(r"\d{1,9}(\.0)?", text, re.ASCII):
            return int(text.removesuffix(".0"))
        return text
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if type(value) is int:
        return value
    raise ValueError(f"expected a class name or an index from 0, got {value!r}")


def json_records(
    content: Any, path: Path, *, form: str = "JSON", known: Sequence[str] | None = None
) -> Records:
    """Read the labels of a JSON file.

    Read are ``{"classes": [names], "labels": {image: [names or indices]}}``; ``{image: labels}``
    where labels are a name, an index, a list of these, 0 or 1 for each class, or
    ``{class: 0 or 1}``; a list of ``{"image": ..., "labels": ...}``, with the names of columns of
    tables; pairs ``[image, label]`` (StyleGAN); COCO's instances; Label Studio's JSON and JSON-MIN.

    Raises:
        DataError: the file has another form.
    """
    records = Records(path, form)
    try:
        _read_json(content, records, known)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise DataError(_FORMS.format(path=path, detail=f" ({detail})")) from error
    if not records.labels:
        raise DataError(_FORMS.format(path=path, detail=" (no image in it)"))
    return records


_FORMS = (
    '{path} must hold {{"classes": [names], "labels": {{image: [names]}}}}, {{image: [class '
    'indices or names]}}, a list of {{"image": name, "labels": [names]}}, or COCO annotations'
    "{detail}; correct it, or remove it to take the labels from the masks"
)


def _read_json(content: Any, records: Records, known: Sequence[str] | None) -> None:
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        _read_coco(content, records)
        return
    table = content
    if isinstance(content, dict) and {*content} and {*content} <= _KEYS:
        table = content["labels"]
        names = content.get("classes", content.get("class_names"))
        records.classes = None if names is None else class_list(names)
    pairs = _pairs(table, records.path) if isinstance(table, list) else list(table.items())
    lists = [labels for _, labels in pairs if isinstance(labels, list)]
    known = records.classes if records.classes is not None else known
    width = _vector_width(lists, known, records.path) if len(lists) == len(pairs) else 0
    if width:
        records.form += "; a 0 or 1 for each class"
    for image, row in pairs:
        labels = [index for index, value in enumerate(row) if value] if width else row
        records.add(composed(image), _json_labels(labels, records, image))


def _switched_on(labels: Mapping[Any, Any], place: str) -> list[Any]:
    wrong = next((value for value in labels.values() if value not in (0, 1)), None)
    if wrong is not None:
        raise DataError(f"{place} has {wrong!r} for a class, expected 0 or 1")
    return [name for name, value in labels.items() if value]


def _json_labels(labels: Any, records: Records, image: object) -> list[Label]:
    if isinstance(labels, Mapping):
        labels = _switched_on(labels, f"{records.path}: {image!r}")
    elif isinstance(labels, str):
        labels = split_labels(labels.strip(), records.classes) or [""]
    elif isinstance(labels, int | float):
        labels = [labels]
    if not isinstance(labels, list):
        raise DataError(
            f"{records.path}: {image!r} is labelled {labels!r}, expected names or indices"
        )
    try:
        found = [as_label(label, records.classes or ()) for label in labels]
    except ValueError as error:
        raise DataError(f"{records.path}: {image!r}: {error}") from error
    wrong = [label for label in found if label == "" or (isinstance(label, int) and label < 0)]
    if wrong:
        raise DataError(
            f"{records.path}: {image!r} is labelled {wrong[0]!r}, expected a name or an index "
            "from 0"
        )
    file = next((label for label in found if has_image_suffix(str(label))), None)
    if file is not None:
        raise DataError(
            f"{records.path}: expected classes by image, got the file {file!r} under {image!r}; "
            "turn it round: {image: [classes]}"
        )
    return found


def _pairs(entries: list[Any], path: Path) -> list[tuple[str, Any]]:
    """Return the image and the labels of each object or pair of a list."""
    pairs: list[tuple[str, Any]] = []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
            pairs.append((entry[0], entry[1]))
        elif not isinstance(entry, dict):
            raise DataError(
                f"{path}: entry {number} is {_short(entry)}, expected an object with the "
                "image and its labels"
            )
        else:
            pairs.append(_studio_entry(entry) if "data" in entry else _entry(entry, path, number))
    return pairs


def _entry(entry: Mapping[str, Any], path: Path, number: int) -> tuple[str, Any]:
    names = list(entry)
    image = image_column(names)
    words = [plain_word(name) for name in names]
    found = [words.index(word) for word in _LABEL_WORDS if word in words]
    if image is None or not isinstance(entry[names[image]], str) or not found:
        raise DataError(
            f"{path}: entry {number} has {', '.join(names[:8]) or 'nothing'}, expected the image "
            "under image or file_name, and its classes under labels"
        )
    labels = entry[names[found[0]]]
    if isinstance(labels, dict) and "choices" in labels:  # JSON-MIN of Label Studio
        labels = labels["choices"]
    return entry[names[image]], labels


def _studio_entry(entry: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Read a task of Label Studio: chosen classes, and the labels of its regions."""
    data = entry["data"]
    column = image_column(list(data))
    if column is None:
        raise ValueError("a task of Label Studio names no image")
    labels: dict[str, None] = {}
    for annotation in entry.get("annotations", entry.get("completions", ())):
        for result in () if annotation.get("was_cancelled") else annotation["result"]:
            for kind, names in result.get("value", {}).items():
                if kind == "choices" or kind.endswith("labels"):
                    labels.update(dict.fromkeys(names))
    # uploaded files get a number in front: 0a1b2c3d-cat.jpg
    image = re.sub(r"/upload/(?:\d+/)?[0-9a-f]{8}-", "/upload/", str(list(data.values())[column]))
    return image.rpartition("?d=")[2], list(labels)


def _read_coco(content: Mapping[str, Any], records: Records) -> None:
    records.form = "COCO annotations"
    categories = {entry["id"]: composed(entry["name"].strip()) for entry in content["categories"]}
    images = {entry["id"]: composed(entry["file_name"]) for entry in content["images"]}
    records.classes = class_list([categories[number] for number in sorted(categories)])
    present: dict[str, dict[Label, None]] = {name: {} for name in images.values()}
    for number, annotation in enumerate(content["annotations"], start=1):
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in images or category not in categories:
            raise DataError(
                f"{records.path}: annotation {annotation.get('id', number)} is of image {image!r} "
                f"and category {category!r}, of which one is not listed; export the file again"
            )
        if not annotation.get("iscrowd"):
            present[images[image]][categories[category]] = None
    for name, labels in present.items():
        records.labels[name] = tuple(labels)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
