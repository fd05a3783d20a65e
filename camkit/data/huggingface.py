"""Data sets of Hugging Face on disk: what `datasets` saved, and Parquet files with images."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from camkit.data.files import in_short
from camkit.data.names import check_split
from camkit.data.reading import Reading, Zero, is_background, numbered_classes, some_class
from camkit.data.sample import MaskForm, Sample, all_usable, mask_classes
from camkit.data.unpacked import unpacked
from camkit.errors import DataError, require
from camkit.formats import IMAGE_SUFFIXES
from camkit.printing import several
from camkit.untrusted import read_json

_PHOTOS = ("image", "img", "photo", "picture", "pixel_values")
_MASKS = (
    *("annotation", "mask", "label", "segmentation", "semantic_mask", "seg", "labels"),
    *("annotations", "masks", "segmentation_mask", "semantic_segmentation", "ground_truth"),
)
_LABELS = ("label", "labels", "class", "classes", "category", "fine_label")
_NAMES = ("name", "file_name", "image_name", "image_id", "id")
_STARTS = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"GIF8": ".gif",
}
_INDEX = "index.json"


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A data set of Hugging Face in a folder; `open_huggingface` unpacks it.

    Attributes:
        root: the folder of the data set.
        place: where its images and masks are files, unchanged.
        classes: in the order of their ids.
        splits: names of the splits.
        form: how masks are read.
        notes: what the files were taken for.
    """

    root: Path
    place: Path
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    form: MaskForm = field(hash=False)
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split; labels come from the masks if there are any."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        return some_class(self._entries(name), name, self.root)

    def _entries(self, name: str) -> Iterator[Sample | DataError]:
        for stem, photo, mask, labels in _index(self.place)["splits"][name]:
            if mask is None:
                yield Sample(stem, self.place / photo, None, tuple(labels))
                continue
            path = self.place / mask
            try:
                classes = mask_classes(path, num_classes=len(self.classes), form=self.form)
                yield Sample(stem, self.place / photo, path, classes, self.form)
            except DataError as error:
                yield error

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        return self.notes


def is_huggingface(root: Path) -> bool:
    """Return whether a folder holds what `datasets` saved, or Parquet files in ``data``."""
    saved = (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()
    return saved or next((root / "data").glob("*.parquet"), None) is not None


def open_huggingface(root: str | Path, *, reading: Reading | None = None) -> HuggingFaceFolder:
    """Unpack a data set of Hugging Face into the cache, once, and find its classes.

    Images are in the column ``image`` (or a similar name), masks in ``annotation``, ``mask``,
    ``label`` or similar, both as images. Names of classes come from ``reading``,
    ``id2label.json``, or the features of a column of labels; else classes are numbered.

    Raises:
        DataError: there are no such files, or no column of images.
        CamkitError: pyarrow is missing.
    """
    root, reading = Path(root).absolute(), reading or Reading()
    tables = _tables(root)
    if not tables:
        raise DataError(
            f"{root} holds no data set of Hugging Face; expected dataset_dict.json or state.json "
            "(save_to_disk), or data/*.parquet"
        )
    files = [path for paths in tables.values() for path in paths]
    place = unpacked(files, partial(_unpack, tables), "huggingface 1")
    index = _index(place)
    listed = _id2label(root)
    zero = None if listed is None else listed[1]
    if reading.classes is not None:
        names, source = reading.classes, "given"
    elif listed is not None:
        names = listed[0]
        source = (
            f"id2label.json, in which 0 is {'background' if zero == 'background' else names[0]}"
        )
    elif index["names"]:
        names, source = tuple(index["names"]), "the features of the labels"
    else:
        names, source = numbered_classes(_masks(place, index), reading), "called by their numbers"
    columns = index["columns"]
    notes = [f"{several(len(names), 'class')} ({in_short(names)}): {source}"]
    what = f"photos in the column {columns['photo']}, "
    what += f"masks in {columns['mask']}" if columns["mask"] else f"labels in {columns['label']}"
    notes += [
        f"{name}: {several(len(index['splits'][name]), 'row')}, {what}, unpacked in {place}"
        for name in tables
    ]
    if columns["mask"] and zero is None and reading.zero is None and reading.values is None:
        notes.append("0 is taken for background; if it is not, say so with zero (--zero)")
    form = reading.form(len(names), zero)
    return HuggingFaceFolder(root, place, names, tuple(tables), form, tuple(notes))


def _index(place: Path) -> dict[str, Any]:
    return json.loads((place / _INDEX).read_text("utf-8"))


def _masks(place: Path, index: Mapping[str, Any]) -> list[Path]:
    return [place / row[2] for rows in index["splits"].values() for row in rows if row[2]]


def _tables(root: Path) -> dict[str, list[Path]]:
    """Return the files of each split."""
    if (root / "dataset_dict.json").is_file():
        folders = {path.parent.name: path.parent for path in sorted(root.glob("*/state.json"))}
        return {name: sorted(folder.glob("*.arrow")) for name, folder in folders.items()}
    if (root / "state.json").is_file():
        return {"all": sorted(root.glob("*.arrow"))}
    tables: dict[str, list[Path]] = {}
    for path in sorted((root / "data").glob("*.parquet")):
        tables.setdefault(path.stem.partition("-")[0], []).append(path)
    return tables


def _id2label(root: Path) -> tuple[tuple[str, ...], Zero] | None:
    """Read the names of the classes, and what 0 is: background, or the first class."""
    path = root / "id2label.json"
    if not path.is_file():
        return None
    try:
        names = {int(number): str(name) for number, name in read_json(path).items()}
    except (ValueError, AttributeError) as error:
        raise DataError(f'{path} must hold {{"0": "background", "1": "cat"}}') from error
    background = is_background(names.pop(0)) if is_background(names.get(0, "")) else 0 not in names
    first = 1 if background else 0
    if not names or sorted(names) != list(range(first, len(names) + first)):
        raise DataError(f"{path} must number the classes without gaps, from 0 or 1")
    return tuple(names[number] for number in sorted(names)), "background" if background else "class"


def _unpack(tables: Mapping[str, Sequence[Path]], out: Path) -> None:
    """Write images and masks as files, and an index of them."""
    content: dict[str, Any] = {"splits": {}, "names": [], "columns": {}}
    for split, paths in tables.items():
        rows: list[list[Any]] = []
        taken: set[str] = set()
        for path in paths:
            try:
                for batch in _batches(path):
                    columns = _columns(path, batch.schema)
                    content |= {"columns": columns, "names": columns["names"]}
                    table = batch.to_pylist()
                    rows += [_write_row(row, columns, out, split, taken) for row in table]
            except UnicodeDecodeError as error:
                raise DataError(f"{path} holds damaged text ({error}); copy it again") from error
        content["splits"][split] = rows
    (out / _INDEX).write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def _batches(path: Path) -> Iterator[Any]:
    """Yield the record batches of a file of Arrow or Parquet."""
    require("pyarrow", "data sets of Hugging Face need", "parquet")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=64)
            return
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                for start in range(0, batch.num_rows, 64):
                    yield batch.slice(start, 64)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again") from error


def _columns(path: Path, schema: Any) -> dict[str, Any]:
    """Find the columns of photos, masks, labels and names, and the names of the classes."""
    features = _features(schema)
    kinds = {name: _kind(features.get(name), schema.field(name).type) for name in schema.names}
    images = [name for name, kind in kinds.items() if kind == "image"]
    photo = next((name for name in _PHOTOS if name in images), None)
    mask = next((name for name in _MASKS if name in images), None)
    if photo is None and len(images) == 1:
        photo = images[0]
    if photo is None:
        raise DataError(
            f"{path} has the columns {', '.join(schema.names)}; expected an image column called "
            "image, and one called annotation, mask or label for the masks"
        )
    label = next((n for n in _LABELS if kinds.get(n) == "label"), None) if mask is None else None
    if mask is None and label is None:
        raise DataError(
            f"{path} has neither a column of masks ({', '.join(_MASKS[:4])}) nor one of class "
            f"labels, only {', '.join(schema.names)}; rename the columns"
        )
    name = next((n for n in _NAMES if kinds.get(n) == "text"), None)
    names = [] if label is None else _class_names(features[label])
    return {"photo": photo, "mask": mask, "label": label, "name": name, "names": names}


def _features(schema: Any) -> dict[str, Any]:
    """Return what `datasets` says of the columns."""
    try:
        content = read_json((schema.metadata or {})[b"huggingface"], "the schema")
        return dict(content["info"]["features"])
    except (DataError, KeyError, ValueError, TypeError):
        return {}


def _kind(feature: Any, type_: Any) -> str:
    from pyarrow import types

    if isinstance(feature, dict) and feature.get("_type") == "Image":
        return "image"
    if _class_names(feature):
        return "label"
    if types.is_struct(type_) and {"bytes", "path"} <= {field.name for field in type_}:
        return "image"
    return "text" if types.is_string(type_) or types.is_integer(type_) else "other"


def _class_names(feature: Any) -> list[str]:
    """Return the names of a class label, or of a list of class labels."""
    inner = feature
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        inner = feature["feature"]
    if isinstance(inner, list) and inner:
        inner = inner[0]
    if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
        return [str(name) for name in inner.get("names", [])]
    return []


def _write_row(
    row: Mapping[str, Any], columns: Mapping[str, Any], out: Path, split: str, taken: set[str]
) -> list[Any]:
    """Write the image and the mask of a row; return name, files and labels."""
    photo = row[columns["photo"]]
    stem = _name(row, columns, len(taken))
    while stem in taken:
        stem += "_"
    taken.add(stem)
    source = f"row {len(taken)} of {split}"
    written = _write(photo, out / "photos" / split, stem, source)
    mask: str | None = None
    labels: list[int] = []
    if columns["mask"] is not None and row[columns["mask"]] is not None:
        path = _write(row[columns["mask"]], out / "masks" / split, stem, source)
        mask = path.relative_to(out).as_posix()
    elif columns["label"] is not None:
        value = row[columns["label"]]
        several = value if isinstance(value, list) else [value]
        labels = sorted({number for number in several if number is not None and number >= 0})
    return [stem, written.relative_to(out).as_posix(), mask, labels]


def _name(row: Mapping[str, Any], columns: Mapping[str, Any], number: int) -> str:
    """Return a file name for a row: its name, that of its image, or its number."""
    name = "" if columns["name"] is None else str(row[columns["name"]] or "")
    if not name:
        photo = row[columns["photo"]]
        name = str((photo or {}).get("path") or "") if isinstance(photo, dict) else ""
        name = name.replace("\\", "/").rpartition("/")[2]
    base, dot, suffix = name.rpartition(".")
    stem = base if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name
    safe = stem.replace("/", "__").replace("\\", "__").replace("\0", "").lstrip(".")
    return safe[:120] or f"row_{number:06d}"


def _write(image: Any, folder: Path, stem: str, source: str) -> Path:
    """Write the bytes of an image, unchanged."""
    content = image.get("bytes") if isinstance(image, dict) else image
    if content is None and isinstance(image, dict) and image.get("path"):
        path = Path(image["path"])
        content = path.read_bytes() if path.is_file() else None
    if not isinstance(content, bytes):
        raise DataError(f"{source} holds no bytes of an image; save the data set with its images")
    suffix = next((end for start, end in _STARTS.items() if content.startswith(start)), ".img")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}{suffix}"
    path.write_bytes(content)
    return path
