"""CVAT's XML of polygons and masks: pixels by hand and by pycocotools, z_order, what is refused."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from camkit.data import check_dataset, open_dataset
from camkit.data.sample import read_mask
from camkit.errors import DataError
from camkit.untrusted import read_xml

SIZE = (4, 6)
SQUARE = '<polygon label="{}" points="1.0,1.0;3.0,1.0;3.0,3.0;1.0,3.0" z_order="{}"/>'
# two rows of three pixels at row 2 and column 3: . x x / x x .
BRUSH = '<mask label="{}" rle="1, 4, 1" left="3" top="2" width="3" height="2" z_order="{}"/>'
LABELS = ("cat", "dog", "background", "ignored")


def xml(*shapes: str, more: str = 'subset="val"') -> str:
    labels = "".join(f"<label><name>{name}</name></label>" for name in LABELS)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>'
        f"<meta><task><labels>{labels}</labels></task></meta>"
        f'<image id="0" name="a.png" width="6" height="4" {more}>{"".join(shapes)}</image>'
        "</annotations>"
    )


def folder(root: Path, *shapes: str, more: str = 'subset="val"') -> Path:
    (root / "images").mkdir(exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(root / "images" / "a.png")
    (root / "annotations.xml").write_text(xml(*shapes, more=more))
    return root


def pixels(data):
    sample = data.split(data.splits[0])[0]
    mask = read_mask(sample.mask, size=SIZE, num_classes=len(data.classes), form=sample.form)
    return mask.numpy()


BRUSHED = np.array([[0] * 6, [0] * 6, [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]])


def test_runs_go_row_by_row_within_their_box(tmp_path):
    data = open_dataset(folder(tmp_path, BRUSH.format("dog", 0)))
    assert (data.classes, data.splits) == (("cat", "dog"), ("val",))
    assert data.split("val")[0].classes == (1,)
    np.testing.assert_array_equal(pixels(data), BRUSHED * 2)
    assert [finding for finding in check_dataset(data) if finding.certain] == []
    assert "2 labels (cat, dog), masks drawn from 0 polygons and 1 mask" in data.describe()[0]


def test_polygons_are_those_of_pycocotools(tmp_path):
    ring = [0.5, 0.2, 5.4, 1.3, 3.1, 3.9]
    text = ";".join(f"{x},{y}" for x, y in zip(ring[::2], ring[1::2], strict=True))
    data = open_dataset(folder(tmp_path, f'<polygon label="cat" points="{text}"/>'))
    runs = coco.frPyObjects([ring], *SIZE)
    assert np.count_nonzero(pixels(data)) == coco.area(runs)[0] > 0


@pytest.mark.parametrize(("first", "second", "on_top"), [(0, 0, 2), (1, 0, 1), (0, 1, 2)])
def test_a_higher_z_order_is_on_top_of_equal_ones_the_later(tmp_path, first, second, on_top):
    shapes = (SQUARE.format("cat", first), SQUARE.format("dog", second))
    mask = pixels(open_dataset(folder(tmp_path, *shapes)))
    assert set(np.unique(mask)) == {0, on_top}


def test_background_and_ignored_are_no_classes(tmp_path):
    shapes = (
        SQUARE.format("cat", 0),
        SQUARE.format("background", 1),
        BRUSH.format("ignored", 0),
    )
    data = open_dataset(folder(tmp_path, *shapes))
    np.testing.assert_array_equal(pixels(data), BRUSHED * 255)
    assert data.split("val")[0].classes == (0,)


def test_tags_alone_give_labels_without_a_mask(tmp_path):
    data = open_dataset(folder(tmp_path, '<tag label="dog"/>', more=""))
    assert data.splits == ("all",)
    sample = data.split("all")[0]
    assert (sample.classes, sample.mask) == ((1,), None)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ('<box label="cat" xtl="1" ytl="1" xbr="2" ybr="2"/>', "shape 1: a box does not say which"),
        ('<polyline label="cat" points="1,1;2,2"/>', "a polyline does not say which pixels"),
        (SQUARE.format("cow", 0), "'cow' is not a label; known are"),
        (BRUSH.format("cat", 0).replace("1, 4, 1", "1, 4"), "do not add up to 3x2 pixels"),
        (BRUSH.format("cat", 0).replace("1, 4, 1", "1, x"), "rle, left, top, width or height is"),
        (BRUSH.format("cat", 0).replace('left="3"', 'left="4"'), "lies outside of the image"),
        ('<polygon label="cat" points="1,1;2"/>', "a polygon has 3 numbers"),
        ('<polygon label="cat" points="1,1;2,b;3,3"/>', "its points are no pairs of numbers"),
    ],
)
def test_what_has_no_pixels_is_an_error_of_its_image(tmp_path, shape, words):
    with pytest.raises(DataError, match=words):
        pixels(open_dataset(folder(tmp_path, shape)))


def test_the_archive_that_cvat_downloads_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "cache"))
    source = folder(tmp_path, BRUSH.format("cat", 0))
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        archive.write(source / "annotations.xml", "annotations.xml")
        archive.write(source / "images" / "a.png", "images/val/a.png")
    (source / "images" / "a.png").unlink()
    np.testing.assert_array_equal(pixels(open_dataset(tmp_path / "task.zip")), BRUSHED)


def test_boxes_of_voc_and_old_files_of_labelme_are_refused_in_one_line(tmp_path):
    (tmp_path / "Annotations").mkdir()
    path = tmp_path / "Annotations" / "a.xml"
    path.write_text("<annotation><filename>a.jpg</filename></annotation>")
    for place in (tmp_path, path):
        with pytest.raises(DataError, match="LabelMe's old web tool, which are not read") as caught:
            open_dataset(place)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "has the DOCTYPE a"),
        ("<a>" * 100 + "</a>" * 100, "nests more than 64 elements"),
        ("<a>", "is not XML"),
    ],
)
def test_hostile_xml_is_refused(tmp_path, text, words):
    path = tmp_path / "annotations.xml"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_xml(path)
