"""Panoptic annotations without instances: ids as colours, categories by name, crowds not scored."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camkit.data import check_dataset, open_dataset
from camkit.data.sample import read_mask
from camkit.errors import DataError

ROAD, CAT = 21, 4000
# red, green, blue of each pixel, and by hand the id: red + 256 * green + 65536 * blue
COLOURS = [[(1, 0, 0), (2, 1, 0)], [(3, 2, 1), (0, 0, 0)]]
ROAD_ID, CAT_ID, CROWD_ID = 1, 258, 66_051


def segment(number, category, **more):
    return {"id": number, "category_id": category, "iscrowd": 0, **more}


def listing(segments):
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 2, "height": 2}],
        "annotations": [{"image_id": 5, "file_name": "a.png", "segments_info": segments}],
        "categories": [
            {"id": CAT, "name": "cat", "isthing": 1},
            {"id": ROAD, "name": "road", "isthing": 0},
        ],
    }


def write(root: Path, content) -> Path:
    path = root / "annotations" / "panoptic_val.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


SEGMENTS = [segment(ROAD_ID, ROAD), segment(CAT_ID, CAT), segment(CROWD_ID, CAT, iscrowd=1)]


@pytest.fixture
def streets(tmp_path) -> Path:
    """A photo with a road, a cat, a crowd of cats and a pixel of no segment."""
    (tmp_path / "val").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "val" / "a.jpg")
    write(tmp_path, listing(SEGMENTS))
    (tmp_path / "annotations" / "panoptic_val").mkdir()
    picture = Image.fromarray(np.array(COLOURS, np.uint8))
    picture.save(tmp_path / "annotations" / "panoptic_val" / "a.png")
    return tmp_path


def pixels(data):
    sample = data.split(data.splits[0])[0]
    mask = read_mask(sample.mask, size=(2, 2), num_classes=len(data.classes), form=sample.form)
    return mask.tolist()


def test_segments_become_classes_and_crowds_are_not_scored(streets):
    data = open_dataset(streets)
    assert (data.classes, data.splits) == (("road", "cat"), ("val",))
    assert data.split("val")[0].classes == (0, 1)
    assert pixels(data) == [[1, 2], [255, 255]]
    assert [finding for finding in check_dataset(data) if finding.certain] == []
    (sentence,) = data.describe()
    assert "panoptic annotations, 2 categories (road, cat)" in sentence
    assert "2 segments; 1 crowd region ignored" in sentence


def test_the_file_alone_is_enough(streets):
    path = streets / "annotations" / "panoptic_val.json"
    assert pixels(open_dataset(path)) == [[1, 2], [255, 255]]


def test_a_crowd_alone_gives_no_label(streets):
    write(streets, listing([segment(ROAD_ID, ROAD), segment(CAT_ID, CAT, iscrowd=1), SEGMENTS[2]]))
    assert open_dataset(streets).split("val")[0].classes == (0,)


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        (SEGMENTS[:2], r"a\.png holds the ids 66051; allowed are 3 from 0 to 258"),
        ([*SEGMENTS, SEGMENTS[0]], r"a\.png: two segments have the id 1"),
        ([segment(ROAD_ID, 9)], r"a\.png, segment 1: there is no category 9"),
        ([segment("1", ROAD)], "a segment has the id '1'; expected a whole number"),
        (["x"], "is no list of COCO panoptic masks"),
        ([{"id": 1}], "is no list of COCO panoptic masks"),
    ],
)
def test_damaged_segments_are_errors_of_their_image(streets, segments, words):
    write(streets, listing(segments))
    with pytest.raises(DataError, match=words):
        pixels(open_dataset(streets))


def test_an_image_has_one_annotation(streets):
    content = listing(SEGMENTS)
    write(streets, {**content, "annotations": content["annotations"] * 2})
    with pytest.raises(DataError, match=r"has 2 annotations of a\.jpg; expected one"):
        open_dataset(streets).split("val")


def test_instances_beside_panoptic_masks_keep_the_layout_of_coco(streets):
    content = {**listing(SEGMENTS), "annotations": []}
    (streets / "annotations" / "instances_val.json").write_text(json.dumps(content))
    assert type(open_dataset(streets)).__name__ == "CocoFolder"
