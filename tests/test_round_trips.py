"""What camkit exports, it reads back: every pixel, or all but what polygons are stated to lose."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camkit.data import (
    SHAPE_CLASSES,
    ExportOptions,
    check_dataset,
    export,
    open_dataset,
    open_voc,
    write_shapes,
)
from camkit.data.exporting import TARGETS
from camkit.data.sample import mask_ids
from camkit.mask import voc_palette

SIZE = (48, 64)


def ids_of(dataset, split):
    """The mask of every sample with one, by its name."""
    count = len(dataset.classes)
    return {
        sample.name: mask_ids(sample.mask, size=SIZE, num_classes=count, form=sample.form)
        for sample in dataset.split(split)
        if sample.mask is not None
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Eight photos of shapes; each mask has a stripe of void, and one shows nothing else."""
    data = write_shapes(tmp_path_factory.mktemp("drawn"), 8, size=SIZE)
    for number, sample in enumerate((*data.split("train"), *data.split("val"))):
        with Image.open(sample.mask) as image:
            ids = np.array(image)
        ids[:, 20:23] = 255
        if number == 2:
            ids[ids != 255] = 0
        mask = Image.fromarray(ids)
        mask.putpalette(voc_palette())
        mask.save(sample.mask)
    (data.root / "labels.json").unlink()
    return data.root


@pytest.fixture(scope="module")
def truth(drawn):
    # without labels.json, the classes are those of VOC: say which these are
    return open_dataset(drawn, classes=SHAPE_CLASSES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("target", ["coco", "voc", "mmseg", "hf", "cvat"])
def test_formats_of_pixels_come_back_bit_for_bit(target, truth, tmp_path):
    if target == "coco":
        pytest.importorskip("pycocotools")
    export(truth, target, tmp_path / "out")
    again = open_dataset(tmp_path / "out")
    assert again.classes == truth.classes
    assert set(again.splits) == {"train", "val"}
    for split in truth.splits:
        old, new = ids_of(truth, split), ids_of(again, split)
        assert set(old) == set(new)
        for name, ids in old.items():
            assert np.array_equal(new[name], ids)
        classes = {sample.name: sample.classes for sample in truth.split(split)}
        assert {sample.name: sample.classes for sample in again.split(split)} == classes
    assert [finding for finding in check_dataset(again) if finding.certain] == []


@pytest.mark.parametrize("target", ["coco", "voc", "mmseg", "hf", "cvat"])
def test_photos_come_back_byte_for_byte(target, truth, tmp_path):
    export(truth, target, tmp_path / "out")
    again = open_dataset(tmp_path / "out")
    for old in truth.split("val"):
        (new,) = [sample for sample in again.split("val") if sample.name == old.name]
        assert new.photo.read_bytes() == old.photo.read_bytes()


@pytest.mark.parametrize("target", ["coco-polygons", "yolo"])
def test_outlines_without_tolerance_lose_no_pixel(target, truth, tmp_path):
    pytest.importorskip("pycocotools")
    export(truth, target, tmp_path / "out", options=ExportOptions(tolerance=0.0))
    again = open_dataset(tmp_path / "out")
    old, new = ids_of(truth, "train"), ids_of(again, "train")
    assert set(old) == set(new)
    for name, ids in old.items():
        # YOLO has no void: its pixels become background
        expected = np.where(ids == -1, 0, ids) if target == "yolo" else ids
        assert np.array_equal(new[name], expected)


def test_labelme_gains_a_rim_of_pixels_as_labelme_itself_draws_it(truth, tmp_path):
    export(truth, "labelme", tmp_path / "out", options=ExportOptions(tolerance=0.0))
    again = open_dataset(tmp_path / "out")
    assert again.classes == truth.classes
    for name, ids in ids_of(truth, "train").items():
        drawn = ids_of(again, "train")[name]
        changed = drawn != ids
        # LabelMe covers the outline itself: at most one pixel further at the right and the bottom
        near = np.zeros_like(changed)
        for down, right in ((0, 1), (1, 0), (1, 1)):
            moved = np.zeros_like(ids)
            moved[down:, right:] = ids[: SIZE[0] - down, : SIZE[1] - right]
            near |= moved != ids
        assert not (changed & ~near).any()
        assert changed.mean() < 0.12


@pytest.mark.parametrize("target", [*TARGETS])
def test_a_split_called_all_comes_back(target, truth, tmp_path):
    if target.startswith("coco"):
        pytest.importorskip("pycocotools")
    if target == "hf":
        pytest.importorskip("pyarrow")
    lists = tmp_path / "lists"
    lists.mkdir()
    names = [sample.name for sample in truth.split("train")]
    (lists / "all.txt").write_text("\n".join(names))
    export(truth, target, tmp_path / "out", options=ExportOptions(splits=lists))
    again = open_dataset(tmp_path / "out")
    (split,) = again.splits
    assert sorted(ids_of(again, split)) == sorted(names)


@pytest.mark.parametrize("target", [*TARGETS])
def test_names_with_suffixes_and_numbers_survive(target, tmp_path):
    if target.startswith("coco"):
        pytest.importorskip("pycocotools")
    if target == "hf":
        pytest.importorskip("pyarrow")
    names = ("cat", "cat.avif", "cat.jpg", "IMG 1.final.JPG", "IMG 2", "v1.5")
    (tmp_path / "masks").mkdir()
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(names):
        ids = np.zeros(SIZE, np.uint8)
        ids[10 : 20 + number, 10:30] = 1
        Image.fromarray(ids).save(tmp_path / "masks" / f"{name}.png")
        photo = np.full((*SIZE, 3), 30 * number, np.uint8)
        Image.fromarray(photo).save(tmp_path / "photos" / f"{name}.png")
    out = tmp_path / "out"
    export(tmp_path / "masks", target, out, classes=["cat"], images=tmp_path / "photos")
    again = open_dataset(out)
    found = {name: int((ids == 1).sum()) for name, ids in ids_of(again, again.splits[0]).items()}
    number_2 = "IMG_2" if target in ("voc", "cvat") else "IMG 2"
    assert sorted(found) == sorted(
        ["cat", "cat_avif", "cat_jpg", "IMG 1.final_JPG", number_2, "v1.5"]
    )
    if target != "labelme":  # which draws outlines too
        assert found["cat_avif"] == 20 * 11
        assert found[number_2] == 20 * 14
        assert check_dataset(again) == []


def test_an_export_of_a_reading_is_that_of_the_original(truth, tmp_path):
    pytest.importorskip("pycocotools")
    export(truth, "coco", tmp_path / "coco")
    export(tmp_path / "coco", "voc", tmp_path / "voc")
    again = open_voc(tmp_path / "voc")
    for split in truth.splits:
        for name, ids in ids_of(truth, split).items():
            assert np.array_equal(ids_of(again, split)[name], ids)
