"""MS COCO's instances, as run lengths or polygons, written annotation by annotation."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from camkit.data.targets.outlines import outlines
from camkit.data.targets.plan import JsonList, MaskedImage, Plan, place_photo, stream
from camkit.data.targets.regions import VOID, Region, run_lengths


@contextmanager
def write_coco(plan: Plan) -> Iterator[Callable[[MaskedImage, str], None]]:
    """Write ``annotations/instances_SPLIT.json`` with run lengths, and photos in ``SPLIT``.

    The ids of categories are the values of the mask. Void is a crowd region (``iscrowd``, which
    COCO's scores ignore) of each class that the image holds, as a crowd belongs to one category;
    of every class if the image holds none.
    """
    with _write(plan, _run_lengths()) as add:
        yield add


@contextmanager
def write_polygons(plan: Plan) -> Iterator[Callable[[MaskedImage, str], None]]:
    """Write the files of `write_coco` with polygons; crowd regions stay run lengths."""
    runs = _run_lengths()

    def encode(region: Region, size: tuple[int, int]) -> Any:
        if region.value == VOID:
            return runs(region, size)
        return [ring.ravel().tolist() for ring in outlines(region, plan)]

    with _write(plan, encode) as add:
        yield add


@contextmanager
def _write(
    plan: Plan, encode: Callable[[Region, tuple[int, int]], Any]
) -> Iterator[Callable[[MaskedImage, str], None]]:
    with ExitStack() as stack:
        files = {split: stack.enter_context(_instances(plan, split)) for split in plan.splits}
        last_image = last_annotation = 0

        def add(image: MaskedImage, split: str) -> None:
            nonlocal last_image, last_annotation
            last_image += 1
            images, annotations = files[split]
            rows, columns = image.size
            photo = place_photo(image, plan.out / split, plan)
            images.add({"id": last_image, "file_name": photo, "width": columns, "height": rows})
            confidence = image.confidence()
            shown = {value for value in image.present if value in plan.legend}
            void: list[Region] = []
            for region in plan.regions(image):
                if region.value == VOID:
                    void.append(region)
                    continue
                shown.add(region.value)
                last_annotation += 1
                entry = _entry(region, encode(region, image.size), region.value)
                score = confidence(region)
                entry |= {} if score is None else {"score": score}
                annotations.add({"id": last_annotation, "image_id": last_image, **entry})
            for region in void:
                segmentation = encode(region, image.size)
                for value in sorted(shown) or plan.legend:
                    last_annotation += 1
                    entry = _entry(region, segmentation, value) | {"iscrowd": 1}
                    annotations.add({"id": last_annotation, "image_id": last_image, **entry})

        yield add


def _entry(region: Region, segmentation: Any, category: int) -> dict[str, Any]:
    return {
        "category_id": category,
        "iscrowd": 0,
        "area": region.area,
        "bbox": list(region.box),
        "segmentation": segmentation,
    }


@contextmanager
def _instances(plan: Plan, split: str) -> Iterator[tuple[JsonList, JsonList]]:
    """Open the file of a split; images are kept in a second file until the annotations end."""
    path = plan.out / "annotations" / f"instances_{split}.json"
    categories = [
        {"id": value, "name": name, "supercategory": "object"}
        for value, name in plan.legend.items()
    ]
    head = {"info": {"description": "exported by camkit"}, "licenses": [], "categories": categories}
    opening = json.dumps(head, ensure_ascii=False)[:-1] + ', "annotations": ['
    with stream(path) as file, tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        annotations = JsonList(file, opening)
        yield JsonList(spool, ""), annotations
        file.write('\n], "images": [')
        spool.seek(0)
        shutil.copyfileobj(spool, file)
        file.write("\n]}\n")


def _run_lengths() -> Callable[[Region, tuple[int, int]], dict[str, Any]]:
    """Return the function that encodes a region as COCO's compressed run lengths."""
    from pycocotools.mask import frPyObjects

    def encode(region: Region, size: tuple[int, int]) -> dict[str, Any]:
        runs = {"size": list(size), "counts": run_lengths(region, size)}
        return {"size": list(size), "counts": frPyObjects(runs, *size)["counts"].decode("ascii")}

    return encode
