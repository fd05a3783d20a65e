"""Label files of many dialects, each read as meant or refused with its line.

    python benchmarks/odd_labels.py

Writes several hundred label files, some by pandas, `csv` and `json`, and compares what
`camkit.data.read_labels` finds with what was written. Damaged files must give one line that names
the file, and the line where a text file has one. The table counts them by kind.
"""

import argparse
import csv
import io
import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from camkit.data import read_labels
from camkit.errors import DataError

RESULTS = Path(__file__).parent / "results"
IMAGES: dict[str, tuple[str, ...]] = {
    "cat1": ("cat",),
    "two dogs": ("dog", "hot dog"),
    "v1.5": ("cat", "hot dog"),
    "2007_000032": ("dog",),
}
CLASSES = ("cat", "dog", "hot dog")
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
HEADERS = (
    ("image", "labels"),
    ("filename", "label"),
    ("Image ID", "Class Name"),
    ("file_name", "tags"),
    ("img_path", "category"),
    ("Path", "Target"),
)
SPELLINGS: dict[str, Callable[[str], str]] = {
    "stem": lambda name: name,
    "file": lambda name: f"{name}.jpg",
    "folder": lambda name: f"images/{name}.JPG",
    "absolute": lambda name: f"/home/me/data/images/{name}.png",
    "windows": lambda name: f"C:\\data\\images\\{name}.jpeg",
    "dot": lambda name: f"./{name}.jpg",
}


@dataclass(frozen=True)
class Case:
    """A label file.

    Attributes:
        kind: for the table.
        name: of the file.
        content: its bytes.
        error: words of the error that is due; None if the labels of `IMAGES` are due.
        classes: given to `read_labels`.
        labels: of the images, if not those of `IMAGES`.
    """

    kind: str
    name: str
    content: bytes
    error: str | None = None
    classes: tuple[str, ...] | None = None
    labels: Mapping[str, tuple[str, ...]] | None = None


def cases() -> list[Case]:
    """Return all label files."""
    return [
        *_tables(),
        *_without_header(),
        *_encodings(),
        *_lists_in_cells(),
        *_one_row_per_label(),
        *_vectors(),
        *_pandas(),
        *_json(),
        *_arrays(),
        *_damaged_tables(),
        *_damaged_json(),
    ]


def outcome(case: Case, folder: Path) -> str | None:
    """Read a file; return what is wrong, or None."""
    path = folder / case.name
    path.write_bytes(case.content)
    try:
        labels = read_labels(path, classes=case.classes)
        names = case.classes or labels.classes or CLASSES
        actual = {
            image: tuple(sorted(names[index] for index in labels.of(image)))
            for image in case.labels or IMAGES
        }
    except DataError as error:
        message = str(error)
        if case.error is None:
            return f"refused: {message}"
        if "\n" in message or not message.startswith(str(path)):
            return f"not one line that starts with the file: {message!r}"
        return None if re.search(case.error, message) else f"another error: {message}"
    if case.error is not None:
        return f"read as {actual}, expected an error"
    expected = {image: tuple(sorted(row)) for image, row in (case.labels or IMAGES).items()}
    return None if actual == expected else f"read as {actual}"


def _table(rows: list[tuple[str, ...]], separator: str, **settings: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n", **settings).writerows(rows)
    return text.getvalue()


def _rows(spell: Callable[[str], str], between: str) -> list[tuple[str, ...]]:
    return [(spell(name), between.join(labels)) for name, labels in IMAGES.items()]


def _tables() -> Iterator[Case]:
    for (word, separator), header, (how, spell) in itertools.product(
        SEPARATORS.items(), HEADERS, SPELLINGS.items()
    ):
        between = "|" if separator == ";" else ";"
        text = _table([header, *_rows(spell, between)], separator)
        yield Case("table with header", f"{word}_{how}.csv", text.encode())


def _without_header() -> Iterator[Case]:
    for (word, separator), (how, spell) in itertools.product(SEPARATORS.items(), SPELLINGS.items()):
        between = ", " if separator == ";" else ";"
        text = _table(_rows(spell, between), separator)
        yield Case("table without header", f"{word}_{how}.txt", text.encode())
    indices = {name: [CLASSES.index(label) for label in row] for name, row in IMAGES.items()}
    for between in (" ", "  ", "\t"):
        lines = [f"{n}.jpg{between}{between.join(map(str, row))}" for n, row in indices.items()]
        content = "\n".join(lines).encode()
        yield Case("list with indices", "list.txt", content, classes=CLASSES)


def _encodings() -> Iterator[Case]:
    names = {"köln": ("Kätzchen",), "日本": ("犬", "Kätzchen")}
    rows = [("image", "labels"), *((f"{n}.jpg", ";".join(row)) for n, row in names.items())]
    for encoding, ending in itertools.product(
        ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"), ("\n", "\r\n", "\r")
    ):
        text = _table(rows, ",").replace("\n", ending)
        yield Case("encoding", "labels.csv", text.encode(encoding), labels=names)
    decomposed = json.dumps({"ko\u0308ln": ["Ka\u0308tzchen"]}, ensure_ascii=False).encode()
    yield Case("encoding", "labels.json", decomposed, labels={"köln": ("Kätzchen",)})
    for mark in ("sep=,\n", '"sep=,"\r\n', "# exported 2024\n#\n", "\n\n"):
        text = mark + _table(rows, ",")
        yield Case("lines before the header", "labels.csv", text.encode(), labels=names)


def _lists_in_cells() -> Iterator[Case]:
    forms: dict[str, Callable[[tuple[str, ...]], str]] = {
        "comma": ", ".join,
        "bar": "|".join,
        "python": lambda row: str(list(row)),
        "tuple": str,
        "json": json.dumps,
        "numpy": lambda row: "[" + " ".join(map(repr, row)) + "]",
    }
    for (how, join), quoting in itertools.product(
        forms.items(), (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    ):
        rows = [("image", "labels"), *((name, join(row)) for name, row in IMAGES.items())]
        if how == "numpy":  # its texts hold no spaces here
            rows = [("image", "labels"), *((n, join(r[:1])) for n, r in IMAGES.items())]
            labels = {name: row[:1] for name, row in IMAGES.items()}
            text = _table(rows, ",", quoting=quoting)
            yield Case("list in a cell", f"{how}.csv", text.encode(), labels=labels)
            continue
        yield Case("list in a cell", f"{how}.csv", _table(rows, ",", quoting=quoting).encode())


def _one_row_per_label() -> Iterator[Case]:
    pairs = [(name, label) for name, row in IMAGES.items() for label in row]
    for separator, order in itertools.product(SEPARATORS.values(), (1, -1)):
        text = _table([("image", "label"), *pairs[::order]], separator)
        yield Case("a row for each label", "long.csv", text.encode())
    rows = [("ImageID", "Source", "LabelName", "Confidence")]
    rows += [(name, "human", label, "1") for name, label in pairs] + [("cat1", "human", "dog", "0")]
    yield Case("a row for each label", "openimages.csv", _table(rows, ",").encode())


def _vectors() -> Iterator[Case]:
    words = (("1", "0"), ("1.0", "0.0"), ("True", "False"), ("x", ""), ("yes", "no"), ("1", ""))
    for (on, off), separator, first in itertools.product(
        words, SEPARATORS.values(), ("image", "", "ID", "photo file")
    ):
        if first == "photo file" and (on, off) not in (("1", "0"), ("1.0", "0.0")):
            continue
        rows = [(first, *CLASSES)]
        rows += [(n, *(on if c in row else off for c in CLASSES)) for n, row in IMAGES.items()]
        if first == "" and on not in ("1", "1.0"):
            continue
        yield Case("0 and 1 for each class", "onehot.csv", _table(rows, separator).encode())
    for how, join in (("spaces", " ".join), ("list", lambda bits: f"[{', '.join(bits)}]")):
        cells = {n: join([str(int(c in row)) for c in CLASSES]) for n, row in IMAGES.items()}
        for separator in SEPARATORS.values():
            rows = [("image", "labels"), *cells.items()]
            content = _table(rows, separator).encode()
            yield Case("0 and 1 for each class", f"{how}.csv", content, classes=CLASSES)
    for separator in (*SEPARATORS.values(), " "):
        rows = [(f"{n}.jpg", *(str(int(c in r)) for c in CLASSES)) for n, r in IMAGES.items()]
        text = "\n".join(separator.join(row) for row in rows)
        yield Case("0 and 1 for each class", "bare.txt", text.encode(), classes=CLASSES)


def _pandas() -> Iterator[Case]:
    try:
        import pandas
    except ImportError:
        return
    names = [f"{name}.jpg" for name in IMAGES]
    joined = pandas.DataFrame({"image": names, "labels": [";".join(r) for r in IMAGES.values()]})
    lists = pandas.DataFrame({"image": names, "labels": [list(r) for r in IMAGES.values()]})
    onehot = pandas.DataFrame(
        [[int(label in row) for label in CLASSES] for row in IMAGES.values()], names, CLASSES
    )
    split = joined.assign(split="train", width=500, height=375)
    for how, frame in (("joined", joined), ("lists", lists), ("split", split)):
        for index, separator in itertools.product((True, False), (",", "\t")):
            text = frame.to_csv(index=index, sep=separator)
            yield Case("written by pandas", f"{how}.csv", text.encode())
        for orient in ("records", "index"):
            if orient == "records":
                text = frame.to_json(orient=orient)
                yield Case("written by pandas", f"{how}.json", text.encode())
                lines = frame.to_json(orient=orient, lines=True)
                yield Case("written by pandas", f"{how}.jsonl", lines.encode())
    for name, frame in (("onehot", onehot), ("bool", onehot.astype(bool))):
        yield Case("written by pandas", f"{name}.csv", frame.to_csv().encode())
        yield Case("written by pandas", f"{name}.json", frame.to_json(orient="index").encode())


def _coco() -> dict[str, object]:
    numbers = {"cat": 7, "dog": 0, "hot dog": 93}
    images = [{"id": 10 + i, "file_name": f"{name}.jpg"} for i, name in enumerate(IMAGES)]
    pairs = [(10 + i, label) for i, row in enumerate(IMAGES.values()) for label in row]
    annotations = [
        {"id": i, "image_id": image, "category_id": numbers[label], "iscrowd": 0, "bbox": [0] * 4}
        for i, (image, label) in enumerate(pairs)
    ]
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _studio() -> list[dict[str, object]]:
    """Return tasks as Label Studio exports them."""
    return [
        {
            "id": number,
            "data": {"image": f"/data/upload/3/0f3a9c{number:02d}-{name}.jpg"},
            "annotations": [
                {"result": [{"type": "choices", "value": {"choices": list(row)}}]},
                {"was_cancelled": True, "result": []},
            ],
        }
        for number, (name, row) in enumerate(IMAGES.items())
    ]


def _json() -> Iterator[Case]:
    names = {name: list(row) for name, row in IMAGES.items()}
    indices = {name: [CLASSES.index(label) for label in row] for name, row in IMAGES.items()}
    vectors = {name: [int(c in row) for c in CLASSES] for name, row in IMAGES.items()}
    switches = {name: {c: c in row for c in CLASSES} for name, row in IMAGES.items()}
    by_index = {str(index): name for index, name in enumerate(CLASSES)}
    by_name = {name: index for index, name in enumerate(CLASSES)}
    files = {f"images/{name}.jpg": row for name, row in names.items()}
    documents: dict[str, object] = {
        "names": names,
        "files": files,
        "indices": indices,
        "vectors": vectors,
        "switches": switches,
        "classes": {"classes": CLASSES, "labels": names},
        "class_indices": {"classes": CLASSES, "labels": indices},
        "class_dict": {"classes": by_index, "labels": indices},
        "class_numbers": {"classes": by_name, "labels": indices},
        "labels_only": {"labels": names},
        "pairs": {"labels": [[name, row] for name, row in names.items()]},
        "bare_pairs": [[name, row] for name, row in indices.items()],
        "coco": _coco(),
        "studio": _studio(),
        "studio_min": [{"image": n, "choice": {"choices": row}} for n, row in names.items()],
    }
    for image, label in itertools.product(
        ("image", "file_name", "filename", "path", "id"), ("labels", "classes", "tags", "label")
    ):
        documents[f"records_{image}_{label}"] = [{image: n, label: r} for n, r in names.items()]
    for how, document in documents.items():
        given = CLASSES if "classes" not in how else None
        for indent in (None, 1):
            content = json.dumps(document, indent=indent).encode()
            yield Case("JSON", f"{how}.json", content, classes=given)
    for image in ("image", "file_name"):
        lines = [json.dumps({image: f"{n}.png", "labels": row}) for n, row in names.items()]
        for ending in ("\n", "\r\n", "\n\n"):
            content = ending.join(lines).encode()
            yield Case("JSON lines", "labels.jsonl", content)


def _arrays() -> Iterator[Case]:
    for kind in (np.float32, np.int64, np.uint8, np.bool_):
        vectors = {n: np.isin(CLASSES, row).astype(kind) for n, row in IMAGES.items()}
        file = io.BytesIO()
        np.save(file, vectors)  # type: ignore[arg-type]
        yield Case("npy of vectors", "cls_labels.npy", file.getvalue(), classes=CLASSES)


def _damaged_tables() -> Iterator[Case]:
    good = [(f"{name}.jpg", ";".join(row)) for name, row in IMAGES.items()]
    for word, separator in SEPARATORS.items():
        between = "|" if separator == ";" else ";"
        rows = [("image", "labels"), *((n, r.replace(";", between)) for n, r in good)]
        damages = {
            r"line 3: expected 2 columns, got 3": (2, ("a.jpg", "cat", "dog")),
            r"line 3: expected 2 columns, got 1": (2, ("a.jpg",)),
            r"line 3: 'a\.jpg' has no labels": (2, ("a.jpg", "")),
            r"line 3: no image is named": (2, ("", "cat")),
            r"line 6: 'cat1\.jpg' is already on line 2": (5, ("cat1.jpg", f"cat{between}dog")),
            r"line 3: a\.jpg is labelled 'cta', .* did you mean 'cat'": (2, ("a.jpg", "cta")),
            r"line 3: a\.jpg is labelled 3, expected an index from 0 to 2": (2, ("a.jpg", "3")),
            r"line 3: expected a class of 'a\.jpg', got the file 'b\.png'": (2, ("a.jpg", "b.png")),
        }
        for error, (place, row) in damages.items():
            damaged = [*rows[:place], row, *rows[place:]]
            content = _table(damaged, separator).encode()
            yield Case("damaged table", f"{word}.csv", content, error, CLASSES)
        vectors = [("image", *CLASSES), ("a", "1", "0", "0"), ("b", "0", "2", "1")]
        content = _table(vectors, separator).encode()
        error = "line 3: expected 0 or 1 in column dog, got '2'"
        yield Case("damaged table", f"{word}.csv", content, error)
        content = _table([("image", "age", "breed"), ("a", "7", "pug")], separator).encode()
        error = "line 1: expected a column called labels"
        yield Case("damaged table", f"{word}.csv", content, error)
        content = _table([("image", "labels")], separator).encode()
        yield Case("damaged table", f"{word}.csv", content, "has no rows")
        text = f'image{separator}labels\na{separator}"cat\nb{separator}dog\n'
        yield Case("damaged table", f"{word}.csv", text.encode(), "line 3: .* check the quotes")
    two = b"one.jpg 1 0\ntwo.jpg 0 1\n"
    yield Case("damaged table", "two.txt", two, "a 0 and a 1, which may be", ("cat", "dog"))
    cells = b'image,labels\none.jpg,"[1, 0]"\ntwo.jpg,"[0, 1]"\n'
    yield Case("damaged table", "two.csv", cells, "a 0 and a 1, which may be", ("cat", "dog"))
    twice = b"image,cat,cat\na,1,0\nb,0,1\n"
    yield Case("damaged table", "twice.csv", twice, "line 1: two columns are called 'cat'")
    yield Case("damaged table", "empty.csv", b"", "is empty")
    yield Case("damaged table", "blank.csv", b" \n\n", "is empty")
    yield Case("damaged table", "names.txt", b"cat\ndog\n", "line 1: expected image,labels")
    yield Case("damaged table", "binary.csv", bytes(range(256)), "line 2 cannot be read")
    yield Case("damaged table", "book.xlsx", b"PK\x03\x04....", "is an Excel or zip file; save it")
    yield Case("damaged table", "a.pkl", b"\x80\x04\x95", "is a pickle, which would run code")
    yield Case(
        "damaged table",
        "main.txt",
        b"a -1\nb 1\n",
        "line 1: 'a' is labelled -1, as in the lists of ImageSets/Main",
    )


def _damaged_json() -> Iterator[Case]:
    long = "1" * 5000
    texts = {
        "{": "is not JSON",
        "[1, 2": "is not JSON",
        '{"a": NaN}': "is not JSON",
        f'{{"a": {long}}}': "is not JSON",
        "[" * 100_000: "is not JSON|nested too deeply",
        '{"a": "cat", "b": "cat", "a": "dog"}': "the key 'a' comes twice",
        '{"cat": ["a.jpg", "b.jpg"]}': "got the file 'a.jpg' under 'cat'; turn it round",
        '{"a": [1, 0, 1, 0]}': "a 0 or 1 for each of the 3 classes, got 4",
        "[]": "no image in it",
        "{}": "no image in it",
        "[1]": "entry 1 is 1, expected an object",
        "[null]": "entry 1 is None, expected an object",
        '[{"image": "a"}]': "entry 1 has image, expected the image",
        '[{"labels": ["cat"]}]': "entry 1 has labels, expected the image",
        '[{"image": 3, "labels": ["cat"]}]': "entry 1 has image, labels, expected the image",
        '{"a": null}': "'a' is labelled None",
        '{"a": [null]}': "'a': expected a class name or an index from 0, got None",
        '{"a": [["cat"]]}': "'a': expected a class name or an index from 0",
        '{"a": [1.5]}': "'a': expected a class name or an index from 0, got 1.5",
        '{"a": [-1]}': "'a' is labelled -1",
        '{"a": [true]}': "'a': expected a class name or an index from 0, got True",
        '{"a": [""]}': "'a' is labelled ''",
        '{"a": [7]}': "a is labelled 7, expected an index from 0 to 2",
        '{"a": ["cta"]}': "did you mean 'cat'",
        '{"a": {"cat": 2}}': "'a' has 2 for a class, expected 0 or 1",
        '{"classes": ["cat", "cat"], "labels": {"a": ["cat"]}}': "at least one and none twice",
        '{"classes": [], "labels": {"a": ["cat"]}}': "at least one",
        '{"classes": {"0": "cat", "2": "dog"}, "labels": {"a": ["cat"]}}': "without gaps",
        '{"classes": ["cat"], "labels": {"a": [1]}}': "a is labelled 1, expected an index",
        '{"classes": ["cat"]}': "must hold",
        '{"labels": 5}': "must hold",
        '{"images": [], "annotations": [], "categories": []}': "must hold",
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, '
        '"category_id": 1}], "categories": [{"id": 1, "name": "cat"}]}': "annotation 1 is of image",
        '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}': (
            "must hold .*file_name"
        ),
        '[{"data": {"text": "x"}, "annotations": []}]': "names no image",
    }
    for number, (text, error) in enumerate(texts.items()):
        yield Case("damaged JSON", f"{number}.json", text.encode(), error, CLASSES)
    lines = '{"image": "a", "labels": ["cat"]}\n{"image": "b", "labels": ["cat"\n'
    yield Case("damaged JSON", "a.jsonl", lines.encode(), "line 2 is not JSON", CLASSES)
    for content in ({}, {"a": np.ones((2, 2))}, {"a": np.full(3, 0.5)}, {(1, 2): np.ones(3)}):
        file = io.BytesIO()
        np.save(file, content)  # type: ignore[arg-type]
        error = "holds no dict|have shape|not all 0 or 1|neither a name nor a number"
        yield Case("damaged npy", "cls_labels.npy", file.getvalue(), error, CLASSES)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            fault = outcome(case, Path(folder))
            counts[case.kind, "due" if fault is None else "fault"] += 1
            if fault is not None:
                faults.append(f"{case.kind}: {case.name}: {fault}\n{case.content[:200]!r}")
    kinds = dict.fromkeys(case.kind for case in cases())
    lines = ["| files | tried | as meant |", "|---|---|---|"]
    for kind in kinds:
        due, fault = counts[kind, "due"], counts[kind, "fault"]
        how = "refused with the reason" if kind.startswith("damaged") else "read"
        lines.append(f"| {kind} | {due + fault} | {due} {how} |")
    total = sum(counts.values())
    lines.append(f"| all | {total} | {total - len(faults)} |")
    (RESULTS / "odd_labels.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join((*faults, *lines)))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
