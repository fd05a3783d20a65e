"""`camkit export` from outside: what it writes, what it says, and its errors."""

import json

import numpy as np
import pytest
from PIL import Image

from camkit.cli import main
from camkit.data import TARGETS, open_voc, write_shapes

NAMES = "circle,square,triangle"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), 8, size=(40, 48))


def send(*words):
    return main(["export", *map(str, words)])


def needed(to):
    if to.startswith("coco"):
        pytest.importorskip("pycocotools", reason="needs the extra camkit[export]")
    if to == "hf":
        pytest.importorskip("pyarrow", reason="needs the extra camkit[parquet]")


@pytest.mark.parametrize("to", TARGETS)
def test_every_format_takes_masks_and_photos(shapes, tmp_path, capsys, to):
    needed(to)
    root, out = shapes.root, tmp_path / "out"
    options = ["--classes", NAMES, "--images", root / "JPEGImages", "--val", 0.25]
    assert send(root / "SegmentationClass", "--to", to, "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: 8 images (train 6, val 2), ")
    assert "annotations of 3 classes" in printed
    record = json.loads((out / "export.json").read_text("utf-8"))
    assert (record["finished"], record["target"]) == (True, to)
    assert record["images"] == {"train": 6, "val": 2}
    assert {path.name for path in out.iterdir()} - {"export.json"} <= set(record["entries"])


def test_a_data_set_keeps_its_splits_and_classes(shapes, tmp_path, capsys):
    assert send(shapes.root, "--to", "voc", "--out", tmp_path / "out") == 0
    data = open_voc(tmp_path / "out")
    assert (data.classes, data.splits) == (shapes.classes, shapes.splits)
    for split in data.splits:
        for mine, theirs in zip(data.split(split), shapes.split(split), strict=True):
            assert (mine.name, mine.classes) == (theirs.name, theirs.classes)
            with Image.open(mine.mask) as copy, Image.open(theirs.mask) as mask:
                assert np.array_equal(copy, mask)
    assert "polygons" not in capsys.readouterr().out


def test_options_reach_the_export(shapes, tmp_path, capsys):
    out, names = tmp_path / "out", tmp_path / "names.txt"
    names.write_text(NAMES.replace(",", "\n"), "utf-8")
    options = ["--tolerance", 2, "--regions", "class", "--photos", "none", "--least-area", 30]
    options += ["--classes", names, "--rng-seed", 3, "--val", 0.5]
    assert send(shapes.root / "SegmentationClass", "--to", "yolo", "--out", out, *options) == 0
    record = json.loads((out / "export.json").read_text("utf-8"))
    assert record["options"] | {"cams": None, "splits": None} == {
        "regions": "class",
        "tolerance": 2.0,
        "least_area": 30,
        "val": 0.5,
        "rng_seed": 3,
        "photos": "none",
        "overwrite": False,
        "cams": None,
        "splits": None,
    }
    assert record["missed"] + record["added"] > 0
    assert "polygons miss" in capsys.readouterr().out
    assert not (out / "images").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--to", "voc"], "do not name their classes; give `classes` (--classes)"),
        (["--to", "voc", "--classes", NAMES], "give the folder of the photos (`images`, --images)"),
        (["--to", "voc", "--classes", "nmaes.txt"], "--classes nmaes.txt: no such file"),
        (["--to", "voc", "--classes", NAMES, "--val", 2], "must be a share in [0, 1), got 2"),
    ],
)
def test_errors_are_one_line(shapes, tmp_path, capsys, words, error):
    assert send(shapes.root / "SegmentationClass", "--out", tmp_path / "out", *words) == 1
    printed = capsys.readouterr().err
    assert error in printed
    assert printed.count("\n") == 1


def test_a_second_export_needs_overwrite(shapes, tmp_path, capsys):
    words = [shapes.root, "--to", "mmseg", "--out", tmp_path / "out"]
    assert [send(*words), send(*words), send(*words, "--overwrite")] == [0, 1, 0]
    assert "holds an export already; choose another folder" in capsys.readouterr().err


def test_an_unknown_format_is_refused(shapes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        send(shapes.root, "--to", "pascal", "--out", tmp_path / "out")
    assert "invalid choice: 'pascal'" in capsys.readouterr().err
