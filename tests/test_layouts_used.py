"""Data sets of other layouts in use: benchmarks, runs, checks and exports, by Python or words."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from camkit import GradientSeed, Method
from camkit.bench import PhotoSettings, Variant, run, to_json
from camkit.bulk.items import Item
from camkit.bulk.sources import DataSetPhotos, open_source
from camkit.cli import main
from camkit.cli.datasets import reading_of
from camkit.data import SHAPE_CLASSES, Reading, export, open_dataset, write_shapes
from camkit.errors import DataError
from camkit.vocabulary import Vocabulary

SIZE = (48, 64)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), 8, size=SIZE)


@pytest.fixture(scope="module")
def coco(shapes, tmp_path_factory):
    """The same images with their masks as run lengths."""
    pytest.importorskip("pycocotools", reason="writes run lengths")
    out = tmp_path_factory.mktemp("export") / "coco"
    export(shapes, "coco", out)
    return out


@pytest.fixture
def cells(tmp_path):
    """Two photos whose masks hold 0 and 255."""
    for number, name in enumerate(("a", "b")):
        mask = np.zeros(SIZE, np.uint8)
        mask[10 : 30 + number, 20:40] = 255
        for folder in ("images", "masks"):
            (tmp_path / "cells" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(tmp_path / "cells" / folder / f"{name}.png")
    return tmp_path / "cells"


def test_a_benchmark_of_drawn_masks_is_that_of_the_files(shapes, coco, tmp_path):
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **small).eval()
    variants = (Variant("seed", Method(GradientSeed(), refine=())),)
    settings = {
        "vocabulary": Vocabulary(SHAPE_CLASSES),
        "variants": variants,
        "split": "val",
        "tune_split": "train",
        "photos": PhotoSettings(size=64),
    }
    from_files = run(model, shapes, **settings)
    drawn = open_dataset(coco)
    for _ in range(2):  # the second time from the cache, in which all images share one file
        report = run(model, drawn, cache=tmp_path / "kept.sqlite", **settings)
        assert report.rows[0].image_iou == from_files.rows[0].image_iou
        assert report.rows[0].mean_iou == from_files.rows[0].mean_iou
    assert json.loads(to_json(report))["images"] == 2


@pytest.mark.parametrize("whole", [True, False])
def test_photos_and_labels_of_annotations_are_a_source_of_a_run(coco, shapes, whole):
    place = coco / "annotations" / "instances_val.json" if whole else coco
    source = open_source(place, split="val")
    assert isinstance(source, DataSetPhotos)
    assert source.classes == SHAPE_CLASSES
    items = list(source)
    assert all(isinstance(item, Item) for item in items)
    labels = {item.key: item.classes for item in items}
    assert labels == {sample.name: sample.classes for sample in shapes.split("val")}


def test_settings_reach_the_source_of_a_run(cells):
    with pytest.raises(DataError, match=r"none of the 2 masks shows a class.*\(--as folder\)"):
        open_source(cells)
    with pytest.raises(DataError, match=r"none of the 2 masks shows a class.*255=1\)$"):
        open_source(cells, kind="dataset")
    assert len(list(open_source(cells, kind="folder"))) == 4
    with pytest.raises(ValueError, match="is read as a folder, to which no settings of a data"):
        open_source(cells / "images", reading=Reading(void=(0,)))
    source = open_source(cells, reading=Reading(values={255: 1}, classes=("cell",)))
    assert [item.classes for item in source] == [(0,), (0,)]
    assert source.classes == ("cell",)


def test_the_check_says_first_what_files_are_taken_for(coco, capsys):
    assert main(["data", "check", str(coco)]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("annotations/instances_train.json: COCO annotations, 3 categories of")
    assert "run lengths; of objects that overlap, the smaller is on top" in second
    assert last.endswith("3 classes, splits train, val: 0 errors, 0 notes")


def test_settings_of_a_data_set_are_options_of_the_check(cells, capsys):
    assert main(["data", "check", str(cells)]) == 1
    assert "say so with values={255: 1} (--mask-values 255=1)" in capsys.readouterr().err
    options = ["--mask-values", "255=1", "--data-classes", "cell,"]
    assert main(["data", "check", str(cells), *options]) == 0
    printed = capsys.readouterr().out
    assert "1 class (cell): given" in printed
    assert "values of masks, as given: {255: 1}" in printed


def test_an_export_takes_the_settings_and_single_files(cells, coco, tmp_path, capsys):
    options = ["--mask-values", "255=1", "--data-classes", "cell,", "--to", "voc"]
    assert main(["export", str(cells), "--out", str(tmp_path / "voc"), *options]) == 0
    assert "2 images (all 2), 2 annotations of 1 class" in capsys.readouterr().out
    place = coco / "annotations" / "instances_val.json"
    assert main(["export", str(place), "--out", str(tmp_path / "yolo"), "--to", "yolo"]) == 0
    assert "2 images (val 2)" in capsys.readouterr().out


def test_words_become_settings(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    words = {
        "data-classes": str(tmp_path / "names.txt"),
        "void": "0, 254",
        "zero": "void",
        "layout": "mmseg",
    }
    expected = Reading(("cat", "dog"), (0, 254), "void", None, "mmseg")
    assert reading_of(words) == reading_of({k.replace("-", "_"): v for k, v in words.items()})
    assert reading_of(words) == expected
    assert reading_of({"mask_values": "255=1,128=2"}) == Reading(values={255: 1, 128: 2})
    assert reading_of({}) == Reading()
    with pytest.raises(ValueError, match=r"--layout mmsg: no such layout; did you mean 'mmseg'"):
        reading_of({"layout": "mmsg"})
