"""A Hugging Face data set: Parquet files with photos and masks, and a card that describes them."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from camkit.data.targets.plan import (
    MaskedImage,
    Plan,
    encoded_photo,
    png_bytes,
    without_suffix,
    write_text,
)
from camkit.manifest import unfinished

_ROWS, _FILE_BYTES = 100, 400 * 2**20  # of a row group, as the hub's viewer likes; of a file


@contextmanager
def write_hf(plan: Plan) -> Iterator[Callable[[MaskedImage, str], None]]:
    """Write ``data/SPLIT-00000.parquet`` and ``README.md``; `datasets.load_dataset` reads them.

    Columns: ``image``; ``annotation``, a PNG of 8 or 16 bits with the numbers of the classes, 0 for
    background, 255 or 65535 for void; ``name``; ``classes``, the name of each region;
    ``confidence``, the mean of its map, or None without maps. ``id2label.json``
    names the numbers, as the scripts of transformers expect.
    """
    import pyarrow as pa

    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "image": picture,
        "annotation": picture,
        "name": pa.string(),
        "classes": pa.list_(pa.string()),
        "confidence": pa.list_(pa.float32()),
    }
    text = {"dtype": "string", "_type": "Value"}
    score = {"dtype": "float32", "_type": "Value"}
    features = {
        "image": {"_type": "Image"},
        "annotation": {"_type": "Image"},
        "name": text,
        "classes": {"feature": text, "_type": "Sequence"},
        "confidence": {"feature": score, "_type": "Sequence"},
    }
    if plan.options.photos == "none":
        columns.pop("image")
        features.pop("image")
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(columns, metadata=metadata)
    with ExitStack() as stack:
        files = {s: stack.enter_context(_split(plan.out / "data", s, schema)) for s in plan.splits}

        def add(image: MaskedImage, split: str) -> None:
            row: dict[str, Any] = {"name": without_suffix(image.key), "image": None}
            if plan.options.photos != "none":
                suffix, content = encoded_photo(image, plan)
                if content is None and isinstance(image.photo, Path):
                    content = image.photo.read_bytes()
                row["image"] = {"bytes": content, "path": image.name + suffix}
            ids = png_bytes(plan.ids(image))
            row["annotation"] = {"bytes": ids, "path": f"{image.name}.png"}
            confidence = image.confidence()
            row["classes"], row["confidence"] = [], []
            for region in plan.regions(image):
                if region.value > 0:
                    row["classes"].append(plan.legend[region.value])
                    row["confidence"].append(confidence(region))
            files[split](row)

        yield add
    names = {"0": "background"} | {str(n): plan.legend[v] for v, n in plan.numbers.items()}
    write_text(plan.out / "id2label.json", json.dumps(names, ensure_ascii=False, indent=1))
    write_text(plan.out / "README.md", _card(plan, names))


@contextmanager
def _split(folder: Path, split: str, schema: Any) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write the rows of a split into files of some hundred megabytes."""
    from pyarrow import RecordBatch, parquet

    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    number, written = 0, 0
    file = ExitStack()
    writer: Any = None

    def flush() -> None:
        nonlocal number, written, writer
        if writer is None:
            path = folder / f"{split}-{number:05d}.parquet"
            draft = file.enter_context(unfinished(path))
            writer = file.enter_context(parquet.ParquetWriter(draft, schema))
            number += 1
        batch = RecordBatch.from_pylist(rows, schema=schema)
        writer.write_batch(batch)
        written += batch.nbytes
        rows.clear()
        if written > _FILE_BYTES:
            file.close()
            writer, written = None, 0

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == _ROWS:
            flush()

    with file:
        yield add
        if rows or not number:
            flush()  # a split without images is a file without rows


def _card(plan: Plan, names: dict[str, str]) -> str:
    files = [
        line
        for split in plan.splits
        for line in (f"  - split: {split}", f"    path: data/{split}-*.parquet")
    ]
    head = ["configs:", "- config_name: default", "  data_files:", *files]
    head += ["task_categories:", "- image-segmentation"]
    listed = [f"- {number}: {name}" for number, name in names.items()]
    text = ["# Segmentation masks", "", "Exported by camkit. Values of `annotation`:", "", *listed]
    return "\n".join(["---", *head, "---", *text, "- 255 (65535 in 16 bits): ignored"]) + "\n"
