"""Exports: masks read again from every format, by other libraries where there are any."""

import io
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import small_recipe, write_photos

import camkit
from camkit.bulk import run
from camkit.data import (
    TARGETS,
    ExportOptions,
    export,
    open_coco,
    open_voc,
    read_cam,
    write_cam,
    write_shapes,
)
from camkit.data.sample import mask_values
from camkit.data.targets.regions import (
    VOID,
    filled,
    joined,
    regions_of,
    rings_of,
    run_lengths,
    simplified,
    without_specks,
)
from camkit.errors import CamkitError, DataError
from camkit.mask import voc_colour
from camkit.paint import save_mask
from camkit.photo import FIRST_PAGE

# pycocotools and numpy disagree on a detail, which is theirs
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

CLASSES = ("Katze", "犬", 'pot "plant", big')
SIZE = (40, 56)


def blobs(rng_seed, size=SIZE):
    """Regions with holes, parts that touch at corners, specks and void."""
    rng = np.random.default_rng(rng_seed)
    mask = np.zeros(size, np.int32)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for value in rng.permutation(len(CLASSES)) + 1:
        row, column = rng.integers(0, size[0]), rng.integers(0, size[1])
        distance = np.hypot(rows - row, columns - column)
        mask[(distance < 14) & (distance > 5)] = value
    mask[rng.random(size) < 0.03] = rng.integers(1, len(CLASSES) + 1)
    mask[rng.random(size) < 0.02] = 0
    mask[rng.integers(0, 30) :, :3] = VOID
    return mask


MASKS = {"a": blobs(0), "b": blobs(1), "more/c": blobs(2), "empty": np.zeros(SIZE, np.int32)}


def write_all(folder, masks, *, bits=8):
    """Masks and photos of these names."""
    rng = np.random.default_rng(0)
    for name, mask in masks.items():
        for kind in ("masks", "photos"):
            (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
        ids = np.where(mask == VOID, 255 if bits == 8 else 65535, mask)
        save_mask(ids.astype(np.int32), folder / "masks" / f"{name}.png", bits=bits)
        photo = rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(photo).save(folder / "photos" / f"{name}.jpg")
    return folder / "masks"


@pytest.fixture
def masks(tmp_path):
    return write_all(tmp_path, MASKS)


@pytest.fixture
def coco():
    return pytest.importorskip("pycocotools.mask", reason="needs the extra camkit[export]")


def send(masks, to, out, *, classes=CLASSES, **options):
    images = masks.parent / "photos"
    return export(masks, to, out, classes=classes, images=images, options=ExportOptions(**options))


def painted(region, size=SIZE):
    whole = np.zeros(size, np.uint8)
    left, top, width, height = region.box
    whole[top : top + height, left : left + width] = region.inside
    return whole


def flat(name):
    return name.replace("/", "__")


# Regions


@pytest.mark.parametrize("density", [0.1, 0.4, 0.6, 0.95])
def test_components_are_those_of_scipy(density):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = (np.random.default_rng(0).random(SIZE) < density).astype(np.int32)
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    found = {painted(region).tobytes() for region in regions_of(mask, "component")}
    assert found == {(labels == label).astype(np.uint8).tobytes() for label in range(1, count + 1)}


@pytest.mark.parametrize("kind", ["class", "component"])
def test_areas_and_boxes_are_those_of_the_pixels(kind):
    for region in regions_of(MASKS["a"], kind):
        rows, columns = np.nonzero(painted(region))
        left, top, width, height = region.box
        assert (left, top) == (columns.min(), rows.min())
        assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
        assert region.area == len(rows)
        assert set(MASKS["a"][rows, columns].tolist()) == {region.value}


def test_regions_cover_the_mask_once():
    for kind in ("class", "component"):
        whole = np.zeros(SIZE, np.int32)
        for region in regions_of(MASKS["b"], kind):
            whole += region.value * painted(region).astype(np.int32)
        assert np.array_equal(whole, MASKS["b"])


def test_runs_worked_by_hand():
    mask = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1]])  # column by column: 011 001 111
    (region,) = regions_of(mask, "class")
    assert run_lengths(region, (3, 3)) == [1, 2, 2, 4]
    (region,) = regions_of(np.array([[1, 0], [0, 0]]), "class")
    assert run_lengths(region, (2, 2)) == [0, 1, 3]


def test_runs_are_those_of_pycocotools(coco):
    rng = np.random.default_rng(0)
    for density in (0.02, 0.3, 0.7, 1.0):
        mask = (rng.random(SIZE) < density).astype(np.int32)
        for region in regions_of(mask, "component"):
            runs = {"size": SIZE, "counts": run_lengths(region, SIZE)}
            expected = coco.encode(np.asfortranarray(painted(region)))
            assert coco.frPyObjects(runs, *SIZE)["counts"] == expected["counts"]


def shoelace(ring):
    x, y = ring.T
    return abs(int(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_outlines_enclose_the_area_of_their_pixels(density):
    mask = (np.random.default_rng(1).random(SIZE) < density).astype(np.int32)
    for region in regions_of(mask, "component"):
        parts = rings_of(region)
        outer = sum(shoelace(ring) for ring, _ in parts)
        holes = sum(shoelace(hole) for _, rings in parts for hole in rings)
        assert outer - holes == region.area
        assert filled([joined([ring, *rings]) for ring, rings in parts], region) == (0, 0)


def test_a_hole_is_joined_to_its_outline_and_stays_open(coco):
    mask = np.zeros((9, 9), np.int32)
    mask[1:8, 1:8] = 1
    mask[3:5, 3:6] = 0
    (region,) = regions_of(mask, "class")
    ((outer, (hole,)),) = rings_of(region)
    assert sorted(map(tuple, outer.tolist())) == [(1, 1), (1, 8), (8, 1), (8, 8)]
    assert sorted(map(tuple, hole.tolist())) == [(3, 3), (3, 5), (6, 3), (6, 5)]
    polygon = joined([outer, hole])
    assert len(polygon) == 4 + 4 + 2
    encoded = coco.frPyObjects([polygon.ravel().tolist()], 9, 9)
    assert np.array_equal(coco.decode(encoded)[..., 0], mask)


def is_inside(x, y, ring):
    """The even-odd rule, for one point."""
    inside = False
    for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            inside = not inside
    return inside


def test_lost_pixels_are_those_of_the_even_odd_rule():
    region = next(r for r in regions_of(MASKS["a"], "component") if r.area > 200)
    short = [
        joined([simplified(ring, 2.0) for ring in (outer, *holes)])
        for outer, holes in rings_of(region)
    ]
    covered = np.zeros(SIZE, bool)
    for row, column in np.ndindex(*SIZE):
        covered[row, column] = sum(is_inside(column + 0.5, row + 0.5, r) for r in short) % 2
    inside = painted(region).astype(bool)
    within = np.zeros(SIZE, bool)
    left, top, width, height = region.box
    within[top : top + height, left : left + width] = True
    lost, added = filled(short, region)
    assert lost == (inside & ~covered).sum() > 0
    assert added == (covered & ~inside & within).sum() == (covered & ~inside).sum()


def test_a_short_outline_stays_within_the_tolerance():
    (region,) = regions_of((np.hypot(*np.mgrid[-20:20, -20:20]) < 18).astype(np.int32), "class")
    ((outer, _),) = rings_of(region)
    short = simplified(outer, 1.0)
    assert 3 < len(short) < len(outer) / 2
    start, along = short, np.roll(short, -1, axis=0) - short
    for corner in outer:
        share = ((corner - start) * along).sum(1) / (along**2).sum(1)
        nearest = start + np.clip(share, 0, 1)[:, None] * along
        assert np.hypot(*(corner - nearest).T).min() <= 1.0


def test_the_outline_of_a_speck_is_not_shortened():
    mask = np.zeros((6, 6), np.int32)
    mask[2:4, 2:4] = 1
    (region,) = regions_of(mask, "class")
    ((outer, _),) = rings_of(region)
    assert np.array_equal(simplified(outer, 3.0), outer)


def test_specks_become_background():
    mask = np.array([[1, 0, 0, 2], [0, 0, 2, 2], [VOID, 0, 0, 0]])
    kept, removed = without_specks(mask, 2)
    assert kept.tolist() == [[0, 0, 0, 2], [0, 0, 2, 2], [VOID, 0, 0, 0]]
    assert removed == 1


# Round trips


def read_coco(path, size=SIZE):
    """The masks in a file of COCO, by the API of COCO; crowds are void."""
    coco = pytest.importorskip("pycocotools.coco").COCO(str(path))
    masks = {}
    for image in coco.imgs.values():
        mask = masks.setdefault(Path(image["file_name"]).stem, np.zeros(size, np.int32))
        annotations = coco.imgToAnns[image["id"]]
        for annotation in sorted(annotations, key=lambda each: -each["iscrowd"]):
            pixels = coco.annToMask(annotation) > 0
            mask[pixels] = VOID if annotation["iscrowd"] else annotation["category_id"]
    return masks


def same(found, expected=MASKS):
    assert sorted(found) == sorted(map(flat, expected))
    for name, mask in expected.items():
        assert np.array_equal(found[flat(name)], mask), name


@pytest.mark.parametrize("regions", ["class", "component"])
@pytest.mark.parametrize(("to", "tolerance"), [("coco", 1.0), ("coco-polygons", 0.0)])
def test_coco_gives_back_every_pixel(masks, tmp_path, coco, regions, to, tolerance, capsys):
    summary = send(masks, to, tmp_path / "out", regions=regions, tolerance=tolerance)
    found = read_coco(tmp_path / "out" / "annotations" / "instances_train.json")
    same(found)
    assert (summary.missed, summary.added, summary.void_dropped) == (0, 0, 0)


def test_void_of_an_image_without_classes_is_a_crowd_of_every_class(tmp_path, coco):
    mask = np.where(MASKS["a"] == VOID, VOID, 0)
    summary = send(write_all(tmp_path, {"a": mask}), "coco", tmp_path / "out")
    path = summary.out / "annotations" / "instances_train.json"
    same(read_coco(path), {"a": mask})
    crowds = json.loads(path.read_text("utf-8"))["annotations"]
    assert [(crowd["category_id"], crowd["iscrowd"]) for crowd in crowds] == [
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert summary.annotations == 0


def test_categories_areas_and_boxes_of_coco(masks, tmp_path, coco):
    summary = send(masks, "coco", tmp_path / "out", regions="component")
    path = tmp_path / "out" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text("utf-8"))
    named = {each["id"]: each["name"] for each in content["categories"]}
    assert named == dict(enumerate(CLASSES, start=1)) == summary.classes
    assert CLASSES[1] in path.read_text("utf-8")  # names are not escaped
    for annotation in content["annotations"]:
        segmentation = annotation["segmentation"]
        assert annotation["area"] == coco.area(segmentation)
        assert annotation["bbox"] == coco.toBbox(segmentation).tolist()
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert sum(not each["iscrowd"] for each in content["annotations"]) == summary.annotations


def evaluated(path, detections):
    coco = pytest.importorskip("pycocotools.coco").COCO(str(path))
    from pycocotools.cocoeval import COCOeval

    scores = COCOeval(coco, coco.loadRes([dict(each) for each in detections]), "segm")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    return scores.stats[0]


@pytest.mark.parametrize("to", ["coco", "coco-polygons"])
def test_the_evaluator_of_coco_accepts_the_files(masks, tmp_path, coco, to, capsys):
    send(masks, to, tmp_path / "out", regions="component")
    path = tmp_path / "out" / "annotations" / "instances_train.json"
    truth = pytest.importorskip("pycocotools.coco").COCO(str(path))
    detections = [
        {
            "image_id": each["image_id"],
            "category_id": each["category_id"],
            "segmentation": truth.annToRLE(each),
            "score": 0.9,
        }
        for each in truth.anns.values()
        if not each["iscrowd"]
    ]
    assert evaluated(path, detections) == pytest.approx(1.0)


def test_detections_in_void_do_not_count_against_a_model(tmp_path, coco, capsys):
    mask = np.zeros(SIZE, np.int32)
    mask[5:25, 10:40], mask[30:38, 10:40] = 2, VOID
    masks = write_all(tmp_path, {"a": mask})
    send(masks, "coco", tmp_path / "out")
    path = tmp_path / "out" / "annotations" / "instances_train.json"

    def detection(rows, score):
        pixels = np.zeros(SIZE, np.uint8, order="F")
        pixels[rows, 10:40] = 1
        encoded = coco.encode(pixels)
        segmentation = {"size": list(SIZE), "counts": encoded["counts"].decode()}
        return {"image_id": 1, "category_id": 2, "segmentation": segmentation, "score": score}

    right = detection(slice(5, 25), 0.5)
    assert evaluated(path, [right, detection(slice(30, 38), 0.9)]) == pytest.approx(1.0)
    assert evaluated(path, [right, detection(slice(25, 30), 0.9)]) < 0.6


def ids_of(path):
    values = mask_values(path).astype(np.int32)
    return np.where(values == 255, VOID, values)


@pytest.mark.parametrize("regions", ["class", "component"])
def test_voc_gives_back_every_pixel(masks, tmp_path, regions):
    send(masks, "voc", tmp_path / "out", regions=regions, val=0.5)
    data = open_voc(tmp_path / "out")
    assert data.classes == CLASSES
    samples = [sample for split in ("train", "val") for sample in data.split(split)]
    same({sample.name: ids_of(sample.mask) for sample in samples})
    for sample in samples:
        shown = np.unique(ids_of(sample.mask))
        assert sample.classes == tuple(value - 1 for value in shown if value > 0)
    objects = tmp_path / "out" / "SegmentationObject"
    assert objects.is_dir() == (regions == "component")
    if regions == "component":
        count = sum(region.value > 0 for region in regions_of(MASKS["a"], "component"))
        assert ids_of(objects / "a.png").max() == count


def test_mmseg_gives_back_every_pixel(masks, tmp_path):
    send(masks, "mmseg", tmp_path / "out", val=0.25)
    places = sorted((tmp_path / "out" / "ann_dir").rglob("*.png"))
    same({path.stem: ids_of(path) for path in places})
    for path in places:
        photo = tmp_path / "out" / "img_dir" / path.parent.name / f"{path.stem}.jpg"
        assert photo.is_file()
    settings = {}
    exec((tmp_path / "out" / "dataset.py").read_text("utf-8"), settings)
    assert settings["metainfo"]["classes"] == ("background", *CLASSES)
    assert settings["metainfo"]["palette"][2] == list(voc_colour(2))
    assert settings["val_dataset"]["data_prefix"]["seg_map_path"] == "ann_dir/val"
    assert settings["num_classes"] == 4


def test_cvat_gives_back_every_pixel(masks, tmp_path):
    send(masks, "cvat", tmp_path / "out")
    found = {}
    with zipfile.ZipFile(tmp_path / "out" / "train.zip") as archive:
        lines = archive.read("labelmap.txt").decode().splitlines()[1:]
        values = {"background": 0, "ignored": VOID, **{n: i + 1 for i, n in enumerate(CLASSES)}}
        colours = {}
        for line in lines:
            name, colour, parts, actions = line.split(":")
            colours[tuple(map(int, colour.split(",")))] = values[name]
            assert parts == actions == ""
        names = archive.read("ImageSets/Segmentation/default.txt").decode().split()
        for name in names:
            content = archive.read(f"SegmentationClass/{name}.png")
            image = Image.open(io.BytesIO(content))
            assert image.mode == "RGB"
            rows = np.array(image).reshape(-1, 3).tolist()
            found[name] = np.array([colours[tuple(row)] for row in rows]).reshape(SIZE)
            assert f"SegmentationObject/{name}.png" in archive.namelist()
    same(found)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text("utf-8"))
    assert [label["name"] for label in labels] == ["ignored", *CLASSES]


@pytest.mark.parametrize("name", ["a:b", "#tag", "background", "ignored"])
def test_names_that_cvat_cannot_read_back_are_refused(name, masks, tmp_path):
    with pytest.raises(DataError, match=rf"labelmap\.txt cannot hold a class called '{name}'"):
        send(masks, "cvat", tmp_path / "out", classes=("cat", name, "dog"))


def test_hugging_face_gives_back_every_pixel(masks, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    send(masks, "hf", tmp_path / "out", val=0.25)
    found = {}
    for split, count in (("train", 3), ("val", 1)):
        rows = parquet.read_table(tmp_path / "out" / "data" / f"{split}-00000.parquet").to_pylist()
        assert len(rows) == count
        for row in rows:
            ids = np.array(Image.open(io.BytesIO(row["annotation"]["bytes"]))).astype(np.int32)
            found[flat(row["name"])] = np.where(ids == 255, VOID, ids)
            photo = (masks.parent / "photos" / f"{row['name']}.jpg").read_bytes()
            assert row["image"]["bytes"] == photo
            shown = np.unique(MASKS[row["name"]])
            assert row["classes"] == [CLASSES[value - 1] for value in shown if value > 0]
    same(found)
    names = json.loads((tmp_path / "out" / "id2label.json").read_text("utf-8"))
    assert names == {"0": "background", "1": CLASSES[0], "2": CLASSES[1], "3": CLASSES[2]}


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("coco", "pycocotools", "export"),
        ("coco-polygons", "pycocotools", "export"),
        ("hf", "pyarrow", "parquet"),
    ],
)
def test_a_missing_package_is_named_before_the_folder_is_made(
    masks, tmp_path, monkeypatch, to, package, extra
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        CamkitError, match=rf"needs {package}; .* `pip install 'camkit\[{extra}\]'`"
    ):
        send(masks, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_datasets_loads_the_folder(masks, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    send(masks, "hf", tmp_path / "out", val=0.25)
    data = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "val": 1}
    row = next(row for row in data["train"] if row["name"] != "empty")
    ids = np.array(row["annotation"]).astype(np.int32)
    assert np.array_equal(np.where(ids == 255, VOID, ids), MASKS[row["name"]])
    assert row["image"].size == SIZE[::-1]


def read_polygons(coco, shapes, size=SIZE):
    """Fill outlines as pycocotools does; void below classes."""
    mask = np.zeros(size, np.int32)
    for value, points in sorted(shapes, key=lambda shape: shape[0]):
        (encoded,) = coco.frPyObjects([np.ravel(points).tolist()], *size)
        mask[coco.decode(encoded) > 0] = value
    return mask


def read_yolo(coco, folder, size=SIZE):
    found = {}
    for path in folder.rglob("*.txt"):
        shapes = []
        for line in path.read_text().splitlines():
            place, *shares = line.split()
            points = np.array(shares, float).reshape(-1, 2) * size[::-1]
            shapes.append((int(place) + 1, points))
        found[path.stem] = read_polygons(coco, shapes, size)
    return found


@pytest.mark.parametrize("regions", ["class", "component"])
def test_yolo_gives_back_every_pixel_but_void(masks, tmp_path, coco, regions):
    summary = send(masks, "yolo", tmp_path / "out", regions=regions, tolerance=0.0)
    expected = {name: np.maximum(mask, 0) for name, mask in MASKS.items()}
    same(read_yolo(coco, tmp_path / "out" / "labels" / "train"), expected)
    assert summary.void_dropped == sum((mask == VOID).sum() for mask in MASKS.values())
    text = (tmp_path / "out" / "data.yaml").read_text("utf-8")
    assert text.splitlines()[:4] == [
        *("train: images/train", "val: images/train", "nc: 3", "names:")
    ]
    assert f'  1: "{CLASSES[1]}"' in text
    assert (tmp_path / "out" / "labels" / "train" / "empty.txt").read_text() == ""


@pytest.mark.parametrize("regions", ["class", "component"])
def test_labelme_gives_back_every_pixel(masks, tmp_path, coco, regions):
    send(masks, "labelme", tmp_path / "out", regions=regions, tolerance=0.0)
    labels = (tmp_path / "out" / "labels.txt").read_text("utf-8").splitlines()
    assert labels == ["__ignore__", "_background_", *CLASSES]
    found = {}
    for path in (tmp_path / "out" / "train").glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        assert (path.parent / content["imagePath"]).is_file()
        assert (content["imageHeight"], content["imageWidth"]) == SIZE
        shapes = [(labels.index(s["label"]) - 1, s["points"]) for s in content["shapes"]]
        found[path.stem] = read_polygons(coco, shapes)
        grouped = [shape["group_id"] for shape in content["shapes"] if shape["group_id"]]
        assert all(grouped.count(group) > 1 for group in grouped)
    same(found)


@pytest.mark.parametrize("to", ["coco-polygons", "yolo", "labelme"])
def test_the_loss_of_short_polygons_is_stated(tmp_path, coco, to):
    rows, columns = np.mgrid[:120, :160]
    mask = np.zeros((120, 160), np.int32)
    mask[np.hypot(rows - 60, columns - 50) < 40] = 1
    mask[np.hypot(rows - 55, columns - 45) < 15] = 0
    mask[np.hypot(rows - 60, (columns - 120) / 0.6) < 50] = 2
    masks = write_all(tmp_path, {"a": mask})
    summary = send(masks, to, tmp_path / "out", tolerance=1.5, regions="class")
    if to == "yolo":
        found = read_yolo(coco, tmp_path / "out" / "labels", mask.shape)["a"]
    elif to == "coco-polygons":
        path = tmp_path / "out" / "annotations" / "instances_train.json"
        found = read_coco(path, mask.shape)["a"]
    else:
        content = json.loads((tmp_path / "out" / "train" / "a.json").read_text("utf-8"))
        shapes = [(CLASSES.index(s["label"]) + 1, s["points"]) for s in content["shapes"]]
        found = read_polygons(coco, shapes, mask.shape)
    missed, added = ((mask > 0) & (found == 0)).sum(), ((mask == 0) & (found > 0)).sum()
    # pycocotools rounds oblique edges in its own way, by fractions of a pixel
    assert missed == pytest.approx(summary.missed, rel=0.3)
    assert added == pytest.approx(summary.added, rel=0.3)
    assert 0 < summary.missed + summary.added < 0.05 * summary.area
    assert f"polygons miss {summary.missed / summary.area:.2%}" in str(summary)


# Values of masks


def test_masks_of_16_bits(tmp_path, coco):
    mask = MASKS["a"].copy()
    mask[mask == 1], mask[mask == 2], mask[mask == 3] = 255, 300, 60000
    masks = write_all(tmp_path, {"a": mask}, bits=16)
    names = {255: "a", 300: "b", 60000: "c", 7: "unseen"}
    send(masks, "coco", tmp_path / "coco", classes=names)
    same(read_coco(tmp_path / "coco" / "annotations" / "instances_train.json"), {"a": mask})
    summary = send(masks, "mmseg", tmp_path / "mmseg", classes=names)
    assert list(summary.classes) == [7, 255, 300, 60000]  # without gaps: 1, 2, 3, 4
    dense = np.where(MASKS["a"] > 0, MASKS["a"] + 1, MASKS["a"])
    same({"a": ids_of(tmp_path / "mmseg" / "ann_dir" / "train" / "a.png")}, {"a": dense})


def test_many_classes_go_to_the_formats_that_hold_them(tmp_path):
    mask = np.where(MASKS["a"] == VOID, VOID, MASKS["a"] * 100)
    masks = write_all(tmp_path, {"a": mask}, bits=16)
    names = [f"class {number}" for number in range(400)]
    with pytest.raises(DataError, match=r"at most 254 classes, got 400; export to coco or hf"):
        send(masks, "voc", tmp_path / "voc", classes=names)
    parquet = pytest.importorskip("pyarrow.parquet")
    send(masks, "hf", tmp_path / "hf", classes=names)
    row = parquet.read_table(tmp_path / "hf" / "data" / "train-00000.parquet").to_pylist()[0]
    ids = np.array(Image.open(io.BytesIO(row["annotation"]["bytes"]))).astype(np.int32)
    assert np.array_equal(np.where(ids == 65535, VOID, ids), mask)


def test_classes_of_one_name_are_told_apart_by_their_values(masks, tmp_path):
    summary = send(masks, "voc", tmp_path / "out", classes=("crane", "dog", "crane"))
    assert list(summary.classes.values()) == ["crane (1)", "dog", "crane (3)"]
    assert open_voc(tmp_path / "out").classes == ("crane (1)", "dog", "crane (3)")


def test_small_components_are_removed_if_wished(masks, tmp_path):
    summary = send(masks, "mmseg", tmp_path / "out", least_area=10)
    expected = {name: without_specks(mask, 10)[0] for name, mask in MASKS.items()}
    places = (tmp_path / "out" / "ann_dir").rglob("*.png")
    same({path.stem: ids_of(path) for path in places}, expected)
    lost = sum((MASKS[name] != expected[name]).sum() for name in MASKS)
    assert summary.specks == lost > 0


# Splits


def split_of(out):
    """The split of each image in an exported folder of MMSegmentation."""
    return {path.stem: path.parent.name for path in (out / "ann_dir").rglob("*.png")}


def test_a_split_is_drawn_by_its_seed_and_share(tmp_path):
    small = np.zeros((4, 4), np.int32)
    masks = write_all(tmp_path, {f"{number:02}": small for number in range(20)})
    splits = [
        split_of(send(masks, "mmseg", tmp_path / str(number), val=0.25, rng_seed=seed).out)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert splits[0] == splits[1] != splits[2]
    assert [list(split.values()).count("val") for split in splits] == [5, 5, 5]
    write_all(tmp_path, {"20": small})  # another image moves at most one of the others
    more = split_of(send(masks, "mmseg", tmp_path / "more", val=0.25).out)
    assert sum(more[name] != split for name, split in splits[0].items()) <= 1


def test_lists_name_the_splits_and_leave_out_the_rest(masks, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "test.txt").write_text("empty\n")
    summary = send(masks, "mmseg", tmp_path / "out", splits=lists)
    assert split_of(summary.out) == {"a": "train", "more__c": "train", "empty": "test"}
    assert summary.images == {"train": 2, "test": 1}
    assert summary.left_out == 1
    assert "1 image left out" in str(summary)


def test_folders_of_splits_are_kept(tmp_path):
    masks = write_all(tmp_path, {"train/a": MASKS["a"], "val/b": MASKS["b"]})
    assert split_of(send(masks, "mmseg", tmp_path / "out").out) == {"a": "train", "b": "val"}


def test_the_splits_and_masks_of_a_data_set_are_kept(tmp_path, coco):
    data = write_shapes(tmp_path / "shapes", 8, size=(48, 64))
    for source, out in ((data, "one"), (data.root, "two")):
        summary = export(source, "coco", tmp_path / out)
        assert summary.images == {split: len(data.split(split)) for split in data.splits}
    for split in data.splits:
        found = read_coco(tmp_path / "two" / "annotations" / f"instances_{split}.json", (48, 64))
        same(found, {sample.name: ids_of(sample.mask) for sample in data.split(split)})
        photos = {path.stem for path in (tmp_path / "two" / split).iterdir()}
        assert photos == {sample.name for sample in data.split(split)}
    assert open_coco(tmp_path / "two").splits == data.splits


def test_an_image_on_two_lists_counts_for_the_usual_split(tmp_path):
    data = write_shapes(tmp_path / "shapes", 8, size=(48, 64))
    lists = data.root / "ImageSets" / "Segmentation"
    for name in ("easy", "trainval"):
        (lists / f"{name}.txt").write_text((lists / "train.txt").read_text())
    assert export(open_voc(data.root), "mmseg", tmp_path / "out").images == {"train": 6, "val": 2}


# Photos


def test_photos_are_copied_bit_for_bit_or_linked(masks, tmp_path, coco):
    photo = masks.parent / "photos" / "a.jpg"
    send(masks, "coco", tmp_path / "copies")
    assert (tmp_path / "copies" / "train" / "a.jpg").read_bytes() == photo.read_bytes()
    send(masks, "coco", tmp_path / "links", photos="link")
    assert (tmp_path / "links" / "train" / "a.jpg").readlink() == photo
    send(masks, "coco", tmp_path / "none", photos="none")
    assert not (tmp_path / "none" / "train").exists()


def test_a_photo_that_exif_turns_becomes_upright(tmp_path):
    masks = write_all(tmp_path, {"a": MASKS["a"]})
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[:20] = 255
    turned = Image.fromarray(np.rot90(colours).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned clockwise
    turned.save(tmp_path / "photos" / "a.jpg", exif=exif, quality=95)
    summary = send(masks, "mmseg", tmp_path / "out")
    with Image.open(tmp_path / "out" / "img_dir" / "train" / "a.jpg") as photo:
        assert photo.getexif().get(0x0112) is None
        assert np.abs(np.array(photo).astype(int) - colours).max() < 40
    assert summary.reencoded == 1
    assert "1 photo encoded again as JPEG" in str(summary)


@pytest.mark.filterwarnings("error")
def test_what_a_photo_lost_is_counted_in_the_summary(masks, tmp_path):
    photos = masks.parent / "photos"
    (photos / "a.jpg").unlink()
    sensor = np.linspace(0, 4095, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint16)
    Image.fromarray(sensor).save(photos / "a.png")
    (photos / "b.jpg").unlink()
    page = Image.new("L", SIZE[::-1])
    page.save(photos / "b.tif", save_all=True, append_images=[page])
    summary = send(masks, "voc", tmp_path / "out")
    scaled, pages = sorted(summary.notes, key=lambda note: note == FIRST_PAGE)
    assert (pages, summary.notes) == (FIRST_PAGE, {scaled: 1, FIRST_PAGE: 1})
    assert f"1 photo encoded again: {FIRST_PAGE}" in str(summary)
    with Image.open(tmp_path / "out" / "JPEGImages" / "a.jpg") as photo:
        assert photo.getextrema()[0][1] > 250  # the levels of 12 bits are scaled to white


def test_png_photos_become_jpeg_where_all_suffixes_must_be_equal(masks, tmp_path):
    photo = masks.parent / "photos" / "a.jpg"
    with Image.open(photo) as image:
        image.save(photo.with_suffix(".png"))
    photo.unlink()
    assert send(masks, "voc", tmp_path / "voc").reencoded == 1
    with Image.open(tmp_path / "voc" / "JPEGImages" / "a.jpg") as image:
        assert image.format == "JPEG"
    assert send(masks, "yolo", tmp_path / "yolo").reencoded == 0
    assert (tmp_path / "yolo" / "images" / "train" / "a.png").is_file()


# Sources


@pytest.mark.slow
@pytest.mark.parametrize("cams", ["npz", "both", "parquet", "none"])
def test_a_bulk_run_brings_classes_photos_and_confidence(tmp_path, coco, cams):
    if cams == "parquet":
        pytest.importorskip("pyarrow")
    photos = write_photos(tmp_path / "photos", 6)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no photo")
    run(small_recipe(cams=cams, background_score=0.3), photos, tmp_path / "run", workers=0)
    summary = export(tmp_path / "run", "coco", tmp_path / "out")
    assert summary.classes == {1: "circle", 3: "triangle"}
    assert summary.left_out == 1
    path = tmp_path / "out" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text("utf-8"))
    keys = {each["id"]: Path(each["file_name"]).stem for each in content["images"]}
    for annotation in content["annotations"]:
        key, value = keys[annotation["image_id"]].replace("__", "/"), annotation["category_id"]
        mask = mask_values(tmp_path / "run" / "masks" / f"{key}.png")
        pixels = coco.decode(annotation["segmentation"]) > 0
        assert np.array_equal(pixels, mask == value)
        assert ("score" in annotation) == (cams != "none")
        if cams in ("npz", "both"):
            suffix = ".npz" if cams == "npz" else ".npy"
            maps = read_cam(tmp_path / "run" / "cams" / f"{key}{suffix}")
            expected = maps.cam[maps.classes.index(value - 1)].numpy()[pixels].mean()
            assert annotation["score"] == pytest.approx(expected, abs=1e-4)
        elif cams == "parquet":
            assert 0.25 < annotation["score"] <= 1
    assert content["annotations"]
    names = [path.name for path in (tmp_path / "out" / "train").iterdir()]
    assert sorted(names) == [*(f"more__p{i:03}.png" for i in (4,)), *_numbered((0, 1, 2, 3, 5))]


def _numbered(numbers):
    return [f"p{number:03}.png" for number in numbers]


@pytest.mark.slow
def test_the_full_list_of_classes_may_be_given_to_a_run(tmp_path):
    photos = write_photos(tmp_path / "photos", 3)
    run(small_recipe(), photos, tmp_path / "run", workers=0)
    names = ["circle", "square", "triangle"]
    summary = export(tmp_path / "run", "voc", tmp_path / "out", classes=names)
    assert open_voc(summary.out).classes == tuple(names)
    with pytest.raises(DataError, match="the mask value 1 stands for 'cat' and for 'circle'"):
        export(tmp_path / "run", "voc", tmp_path / "no", classes=["cat", "dog", "triangle"])


def result(mask, path=None, rng_seed=0):
    """A result of two classes, the first of which has the map 0.25, the second 0.75."""
    size = mask.shape
    photo = camkit.photo_from_array(np.zeros((*size, 3), np.uint8), size=32)
    if path is not None:
        photo = camkit.load_photo(path, size=32)
    cam = torch.tensor([0.25, 0.75])[None, :, None, None].expand(1, 2, *size)
    return camkit.Result(
        photo=photo,
        classes=(0, 4),
        names=("cat", "dog"),
        seed=torch.zeros(1, 2, 2, 2),
        cam=cam,
        mask=torch.from_numpy(mask),
        legend={1: "cat", 5: "dog"},
        logits=torch.zeros(1, 5),
        settings={},
    )


def test_results_in_memory(masks, tmp_path, coco):
    mask = np.select([MASKS["a"] == 1, MASKS["a"] == 2, MASKS["a"] == VOID], [1, 5, 255])
    mask = mask.astype(np.uint8)
    path = masks.parent / "photos" / "a.jpg"
    export([result(mask), result(mask, path)], "coco", tmp_path / "out")
    file = tmp_path / "out" / "annotations" / "instances_train.json"
    expected = np.where(mask == 255, VOID, mask.astype(np.int32))
    same(read_coco(file), {"photo_000000": expected, "a": expected})
    scores = {
        (annotation["category_id"], annotation.get("score"))
        for annotation in json.loads(file.read_text("utf-8"))["annotations"]
        if not annotation["iscrowd"]
    }
    assert scores == {(1, 0.25), (5, 0.75)}
    assert (tmp_path / "out" / "train" / "a.jpg").read_bytes() == path.read_bytes()
    with Image.open(tmp_path / "out" / "train" / "photo_000000.png") as image:
        assert image.size == SIZE[::-1]
    assert export(result(mask), "voc", tmp_path / "voc").images == {"train": 1}


def test_confidence_of_masks_with_cam_files(tmp_path, coco):
    masks = write_all(tmp_path, {"a": MASKS["a"]})
    (tmp_path / "cams").mkdir()
    maps = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
    write_cam(tmp_path / "cams" / "a.npy", (0, 1, 2), maps)
    send(masks, "labelme", tmp_path / "out", cams=tmp_path / "cams", regions="class")
    shapes = json.loads((tmp_path / "out" / "train" / "a.json").read_text("utf-8"))["shapes"]
    found = {shape["label"]: shape["description"] for shape in shapes}
    for value, name in enumerate(CLASSES, start=1):
        mean = float(maps[value - 1].numpy()[MASKS["a"] == value].mean())
        assert math.isclose(float(found[name].removeprefix("confidence ")), mean, abs_tol=1e-4)
    assert found["__ignore__"] == ""


# Other libraries


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("to", ["coco", "coco-polygons", "yolo"])
def test_supervision_loads_the_files(masks, tmp_path, coco, to):
    supervision = pytest.importorskip("supervision")
    send(masks, to, tmp_path / "out", tolerance=0.0, regions="component")
    out = tmp_path / "out"
    if to == "yolo":
        data = supervision.DetectionDataset.from_yolo(
            str(out / "images" / "train"),
            str(out / "labels" / "train"),
            str(out / "data.yaml"),
            force_masks=True,
        )
    else:
        file = str(out / "annotations" / "instances_train.json")
        data = supervision.DetectionDataset.from_coco(str(out / "train"), file, force_masks=True)
    assert data.classes == list(CLASSES)
    assert len(data) == len(MASKS)
    for path, _, detections in data:
        mask = next(mask for name, mask in MASKS.items() if flat(name) == Path(path).stem)
        count = sum(region.value > 0 for region in regions_of(mask, "component"))
        crowds = len(set(mask[mask > 0].tolist())) if to != "yolo" and VOID in mask else 0
        assert len(detections) == count + crowds
        if to == "coco" and count:
            for place, pixels in zip(detections.class_id, detections.mask, strict=True):
                assert set(np.unique(mask[pixels]).tolist()) <= {place + 1, VOID}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("to", ["coco", "coco-polygons"])
def test_fiftyone_loads_the_files(masks, tmp_path, coco, to):
    pytest.importorskip("fiftyone.utils.coco", reason="needs fiftyone and its database")
    import fiftyone.utils.coco as theirs

    send(masks, to, tmp_path / "out", tolerance=0.0)
    file = str(tmp_path / "out" / "annotations" / "instances_train.json")
    _, classes, _, images, annotations = theirs.load_coco_detection_annotations(file)
    for number, image in images.items():
        mask = next(m for n, m in MASKS.items() if flat(n) == Path(image["file_name"]).stem)
        whole = np.zeros(SIZE, np.int32)
        objects = annotations.get(number, [])
        for each in sorted(objects, key=lambda each: -each.iscrowd):
            detection = each.to_detection(SIZE[::-1], classes_map=classes, load_segmentation=True)
            left, top, width, height = (round(v) for v in each.bbox)
            window = whole[top : top + height, left : left + width]
            value = VOID if each.iscrowd else CLASSES.index(detection.label) + 1
            window[detection.mask > 0] = value
        assert np.array_equal(whole, mask)


# Whole or not at all


@pytest.mark.parametrize("to", TARGETS)
def test_a_broken_mask_leaves_no_file_of_annotations(masks, tmp_path, to):
    if to.startswith("coco"):
        pytest.importorskip("pycocotools")
    if to == "hf":
        pytest.importorskip("pyarrow")
    good = (masks / "more" / "c.png").read_bytes()
    (masks / "more" / "c.png").write_bytes(good[:100])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"c\.png cannot be read as an image"):
        send(masks, to, out)
    left = [path for path in out.rglob("*") if path.is_file()]
    whole = ("*.jpg", "labels/*/*.txt", "train/*.json", "Segmentation*/*.png", "ann_dir/*/*.png")
    others = [path for path in left if not any(path.match(pattern) for pattern in whole)]
    assert others == [out / "export.json"]
    assert json.loads((out / "export.json").read_text("utf-8"))["finished"] is False
    (masks / "more" / "c.png").write_bytes(good)
    with pytest.raises(DataError, match="holds an export already"):
        send(masks, to, out)
    assert send(masks, to, out, overwrite=True).images == {"train": 4}
    assert json.loads((out / "export.json").read_text("utf-8"))["finished"] is True


def test_a_folder_of_something_else_is_left_alone(masks, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"holds something else \(thesis.txt\)"):
            send(masks, "voc", out, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_only_what_an_export_wrote_is_overwritten(masks, tmp_path):
    out = tmp_path / "out"
    send(masks, "voc", out)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"holds other files beside its export \(thesis.txt\)"):
        send(masks, "mmseg", out, overwrite=True)
    assert (out / "JPEGImages").is_dir()
    (out / "thesis.txt").unlink()
    send(masks, "mmseg", out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {
        *("ann_dir", "img_dir", "dataset.py", "export.json")
    }


# Errors


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"to": "coko"}, ValueError, "got 'coko'; did you mean 'coco'?"),
        ({"classes": None}, ValueError, "do not name their classes; give `classes`"),
        ({"classes": ("background", "cat")}, ValueError, "not the background"),
        ({"classes": "cat"}, TypeError, "must be a list of names, got the text 'cat'"),
        ({"classes": ("cat", "dog")}, DataError, "holds 3, but the classes name 1, 2"),
        ({"classes": ("cat", "a:b", "dog"), "to": "cvat"}, DataError, "class called 'a:b'"),
        ({"images": None}, DataError, "a has no photo; give the folder of the photos"),
        ({"out": "masks/out"}, ValueError, "lies in .*; choose a folder outside of it"),
        ({"source": "masc"}, DataError, "is not a folder; did you mean .*masks"),
        ({"source": "photos/more"}, DataError, "holds no masks: expected manifest.jsonl"),
        ({"splits": "photos"}, DataError, "holds no lists"),
    ],
)
def test_wrong_arguments_say_what_to_do(masks, tmp_path, change, error, words):
    given = {"source": "masks", "to": "voc", "out": "out", "classes": CLASSES, "images": "photos"}
    options = {key: tmp_path / value for key, value in change.items() if key == "splits"}
    given |= {key: value for key, value in change.items() if key != "splits"}
    images = given["images"] and tmp_path / given["images"]
    with pytest.raises(error, match=words):
        export(
            tmp_path / given["source"],
            given["to"],
            tmp_path / given["out"],
            classes=given["classes"],
            images=images,
            options=ExportOptions(**options),
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": -1.0}, "at least 0 pixels, got -1.0"),
        ({"tolerance": math.nan}, "at least 0 pixels, got nan"),
        ({"least_area": 0}, "at least 1 pixel, got 0"),
        ({"val": 1.0}, r"share in \[0, 1\), got 1.0"),
        ({"val": 0.5, "splits": Path("lists")}, "give one of them"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ExportOptions(**options)


def test_a_photo_of_another_size_is_an_error(masks, tmp_path):
    Image.new("RGB", (20, 10)).save(masks.parent / "photos" / "b.jpg")
    with pytest.raises(DataError, match=r"mask of b has 40x56 pixels .* its photo has 10x20"):
        send(masks, "voc", tmp_path / "out")


def test_names_that_would_meet_in_one_folder_are_an_error(tmp_path):
    masks = write_all(tmp_path, {"a/b": MASKS["a"], "a__b": MASKS["a"]})
    with pytest.raises(DataError, match="a__b and a/b would have the same file name a__b"):
        send(masks, "voc", tmp_path / "out")


def test_a_run_that_has_not_finished_is_an_error(tmp_path):
    (tmp_path / "run" / "masks").mkdir(parents=True)
    (tmp_path / "run" / "journal.sqlite").touch()
    with pytest.raises(DataError, match="has not finished; give its command again"):
        export(tmp_path / "run", "voc", tmp_path / "out")
