"""Annotations in COCO's form: categories of any ids, where photos are found, masks as drawn."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camkit.data import check_dataset, open_coco, open_dataset
from camkit.data.coco import COCO_IDS
from camkit.data.drawn import CocoMask, coco_pixels
from camkit.data.sample import mask_ids
from camkit.errors import DataError

SQUARE = [1, 1, 3, 1, 3, 3, 1, 3]  # pixels 1 and 2 in both directions
APPLE, PEAR = 7, 300


def write_photo(path: Path, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def annotation(category, segmentation=None, *, image=1, number=1, **more):
    segmentation = [SQUARE] if segmentation is None else segmentation
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": [1, 1, 2, 2]}
    return {**entry, "segmentation": segmentation, "iscrowd": 0, **more}


def listing(*annotations, names=("a.png",), categories=None):
    """Images of 4 rows and 6 columns with these names, and two categories of fruit."""
    categories = {APPLE: "apple", PEAR: "pear"} if categories is None else categories
    return {
        "images": [
            {"id": number, "file_name": name, "width": 6, "height": 4}
            for number, name in enumerate(names, start=1)
        ],
        "annotations": list(annotations),
        "categories": [{"id": n, "name": name} for n, name in categories.items()],
    }


def ids(dataset, place=0):
    sample = dataset.split(dataset.splits[0])[place]
    count = len(dataset.classes)
    return mask_ids(sample.mask, size=(4, 6), num_classes=count, form=sample.form)


def square(value):
    drawn = np.zeros((4, 6), int)
    drawn[1:3, 1:3] = value
    return drawn


@pytest.fixture
def fruit(tmp_path) -> Path:
    """One photo with a pear, in the way of COCO."""
    write_photo(tmp_path / "train" / "a.png")
    write_json(tmp_path / "annotations" / "instances_train.json", listing(annotation(PEAR)))
    return tmp_path


@pytest.fixture(autouse=True)
def polygons():
    pytest.importorskip("pycocotools", reason="draws polygons")


def test_own_categories_keep_their_names_and_any_ids(fruit):
    data = open_dataset(fruit)
    assert (data.classes, data.splits) == (("apple", "pear"), ("train",))
    assert data.split("train")[0].classes == (1,)
    assert np.array_equal(ids(data), square(2))
    assert [finding for finding in check_dataset(data) if finding.certain] == []


def test_the_category_0_is_a_class(fruit):
    content = listing(annotation(0), categories={0: "zero", 1: "one"})
    write_json(fruit / "annotations" / "instances_train.json", content)
    data = open_dataset(fruit)
    assert (data.classes, data.split("train")[0].classes) == (("zero", "one"), (0,))
    assert np.array_equal(ids(data), square(1))


def test_only_the_80_categories_themselves_are_those_of_coco(tmp_path):
    write_photo(tmp_path / "train" / "a.png")
    path = tmp_path / "annotations" / "instances_train.json"
    write_json(path, listing(categories={v: name for name, v in COCO_IDS.items()}))
    assert open_coco(tmp_path, voc=True).classes[:2] == ("aeroplane", "bicycle")
    write_json(path, listing(categories={1: "person", 2: "bicycle", 3: "unicorn"}))
    assert open_dataset(tmp_path).classes == ("person", "bicycle", "unicorn")
    with pytest.raises(ValueError, match=r"has its own categories \(person, bicycle, unicorn\)"):
        open_coco(tmp_path, voc=True)


@pytest.mark.parametrize(
    ("categories", "words"),
    [
        (None, "has no categories, so its ids have no names; add"),
        ([{"id": "apple", "name": "apple"}], "the category 'apple' has the id 'apple'; expected a"),
        ([{"id": True, "name": "apple"}], "has the id True; expected a whole number"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "two categories have the id 1"),
        ([{"name": "a"}], "is no list of COCO instances"),
    ],
)
def test_categories_that_name_nothing_are_refused(fruit, categories, words):
    content = {**listing(), "categories": categories}
    write_json(fruit / "annotations" / "instances_train.json", content)
    with pytest.raises(DataError, match=words):
        open_dataset(fruit)


def test_two_categories_of_one_name_are_told_apart(fruit):
    content = listing(categories={1: "other", 2: "other"})
    write_json(fruit / "annotations" / "instances_train.json", content)
    assert open_dataset(fruit).classes == ("other (1)", "other (2)")


def test_names_of_categories_have_no_spaces_around_them(fruit):
    content = listing(annotation(APPLE), categories={APPLE: " apple ", PEAR: "pear"})
    write_json(fruit / "annotations" / "instances_train.json", content)
    assert open_dataset(fruit).classes == ("apple", "pear")


def test_splits_share_their_categories_or_are_refused(fruit):
    write_photo(fruit / "val" / "b.png")
    path = fruit / "annotations" / "instances_val.json"
    write_json(path, listing(names=("b.png",), categories={PEAR: "pear", 400: "plum"}))
    assert open_dataset(fruit).classes == ("apple", "pear", "plum")
    write_json(path, listing(categories={PEAR: "plum"}))
    with pytest.raises(DataError, match="category 300 is 'plum', but 'pear' in instances_train"):
        open_dataset(fruit)


def test_categories_may_be_nested_in_other_parts_of_the_file(fruit):
    content = {"info": {"categories": [{"id": 1, "name": "wrong"}]}, **listing()}
    write_json(fruit / "annotations" / "instances_train.json", content)
    assert open_dataset(fruit).classes == ("apple", "pear")


# where files are


@pytest.mark.parametrize(
    ("place", "photo", "file_name", "split"),
    [
        ("annotations/instances_default.json", "images/default/a.png", "a.png", "default"),
        ("annotations/instances_default.json", "images/a.png", "a.png", "default"),
        ("annotations/train.json", "images/train/a.png", "a.png", "train"),
        ("annotations/instances_day 1.json", "day 1/a.png", "a.png", "day 1"),
        ("result.json", "images/1f2e3d4c-a.png", "images/1f2e3d4c-a.png", "all"),
        ("result.json", "images/a.png", "../../label-studio/data/media/upload/1/a.png", "all"),
        ("result.json", "images/a.png", r"images\1f2e3d4c-a.png", "all"),
        ("result.json", "images/a b.png", "/data/local-files/?d=images/a%20b.png", "all"),
        ("labels.json", "data/a.png", "a.png", "all"),
        ("train/_annotations.coco.json", "train/a.png", "a.png", "train"),
        ("annotations.json", "a.png", "a.png", "all"),
        ("annotations/instances_train2017.json", "train2017/a.png", "a.png", "train2017"),
    ],
)
def test_annotations_and_photos_are_found_in_every_dialect(
    place, photo, file_name, split, tmp_path
):
    write_json(tmp_path / place, listing(annotation(APPLE), names=(file_name,)))
    path = write_photo(tmp_path / photo)
    data = open_dataset(tmp_path)
    assert data.splits == (split,)
    (sample,) = data.split(split)
    assert (sample.photo, sample.classes) == (path, (0,))
    assert np.array_equal(ids(data), square(1))


def test_a_file_of_annotations_is_a_data_set(fruit):
    data = open_dataset(fruit / "annotations" / "instances_train.json")
    assert (data.root, data.splits) == (fruit, ("train",))
    assert np.array_equal(ids(data), square(2))


def test_the_folder_of_the_photos_can_be_named(fruit, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (fruit / "train" / "a.png").rename(elsewhere / "a.png")
    with pytest.raises(DataError, match=r"lists a\.png, which is not there; .*`images`"):
        open_coco(fruit).split("train")
    assert open_coco(fruit, images=elsewhere).split("train")[0].photo == elsewhere / "a.png"


def test_a_name_that_two_photos_have_is_not_guessed(tmp_path):
    write_json(tmp_path / "result.json", listing(annotation(APPLE), names=("other/a.png",)))
    for folder in ("one", "two"):
        write_photo(tmp_path / "images" / folder / "a.png")
    with pytest.raises(DataError, match=r"may be .*one/a\.png or .*two/a\.png; write its path"):
        open_dataset(tmp_path).split("all")


def test_photos_of_one_name_in_two_folders_are_two_samples(tmp_path):
    names = ("one/a.png", "two/a.png", "b.png")
    write_json(tmp_path / "result.json", listing(annotation(APPLE, image=2), names=names))
    for name in names:
        write_photo(tmp_path / "images" / name)
    samples = open_dataset(tmp_path).split("all")
    assert [sample.name for sample in samples] == ["one/a", "two/a", "b"]
    assert [sample.classes for sample in samples] == [(), (0,), ()]


def test_a_file_name_never_leaves_the_data_set(tmp_path):
    secret = write_photo(tmp_path / "secret.png")
    (tmp_path / "set" / "images").mkdir(parents=True)
    for name in ("../secret.png", str(secret)):
        write_json(tmp_path / "set" / "result.json", listing(names=(name,)))
        with pytest.raises(DataError, match="which is not there"):
            open_dataset(tmp_path / "set").split("all")


# what masks are


def draw(fruit, *annotations):
    path = fruit / "annotations" / "instances_train.json"
    write_json(path, listing(*annotations))
    return ids(open_dataset(fruit))


def test_the_smaller_of_two_objects_is_on_top(fruit):
    large = [0, 0, 6, 0, 6, 4, 0, 4]
    expected = np.where(square(1), 2, 1)
    pear, apple = annotation(PEAR), annotation(APPLE, [large], number=2)
    assert np.array_equal(draw(fruit, pear, apple), expected)
    assert np.array_equal(draw(fruit, apple, pear), expected)


def test_of_equal_objects_the_later_is_on_top(fruit):
    both = annotation(APPLE), annotation(PEAR, number=2)
    assert np.array_equal(draw(fruit, *both), square(2))


def test_crowds_are_ignored_where_no_object_lies_and_are_labels(fruit):
    runs = {"size": [4, 6], "counts": [4, 8, 12]}  # the second and third column
    expected = np.zeros((4, 6), int)
    expected[:, 1:3] = -1
    expected[1:3, 1:3] = 1
    drawn = draw(fruit, annotation(APPLE), annotation(PEAR, runs, number=2, iscrowd=1))
    assert np.array_equal(drawn, expected)
    assert open_dataset(fruit).split("train")[0].classes == (0, 1)


@pytest.mark.parametrize(
    ("more", "info", "value"),
    [
        ({"attributes": {"occluded": False}}, {"description": "my data"}, 2),  # CVAT
        ({}, {"contributor": "", "description": "", "year": ""}, 2),  # Datumaro
        ({}, {"description": "COCO 2017 Dataset"}, -1),
        ({}, {}, -1),
    ],
)
def test_what_cvat_writes_of_a_brush_is_an_object(fruit, more, info, value):
    runs = {"size": [4, 6], "counts": [0, 24]}
    content = listing(annotation(PEAR, runs, iscrowd=1, **more))
    write_json(fruit / "annotations" / "instances_train.json", {**content, "info": info})
    assert np.unique(ids(open_dataset(fruit))).tolist() == [value]
    assert np.unique(ids(open_coco(fruit, crowds="objects"))).tolist() == [2]
    assert np.unique(ids(open_coco(fruit, crowds="ignored"))).tolist() == [-1]


def test_run_lengths_are_read_column_by_column_as_numbers_or_text(fruit):
    coco = pytest.importorskip("pycocotools.mask")
    pixels = np.random.default_rng(0).random((4, 6)) < 0.5
    numbers = [0] if pixels[0, 0] else []
    flat = pixels.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    numbers += np.diff([0, *edges, flat.size]).tolist()
    text = coco.encode(np.asfortranarray(pixels))["counts"].decode()
    for counts in (numbers, text):
        drawn = draw(fruit, annotation(APPLE, {"size": [4, 6], "counts": counts}))
        assert np.array_equal(drawn, pixels.astype(int))


def test_text_of_run_lengths_is_that_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(1)
    for density in (0.0, 0.001, 0.3, 0.999, 1.0):
        pixels = rng.random((90, 70)) < density
        pixels[20:60, 10:50] |= density > 0
        text = coco.encode(np.asfortranarray(pixels))["counts"].decode()
        runs = {"size": [90, 70], "counts": text}
        assert np.array_equal(coco_pixels(runs, (90, 70), "a"), pixels)


def test_polygons_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(2)
    for _ in range(20):
        rings = [(rng.random(2 * rng.integers(3, 9)) * 60 - 5).tolist() for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its decoder
            expected = coco.decode(coco.merge(coco.frPyObjects(rings, 40, 50))) == 1
        assert np.array_equal(coco_pixels(rings, (40, 50), "a"), expected)


def test_boxes_give_labels_and_no_mask(fruit):
    path = fruit / "annotations" / "instances_train.json"
    write_json(path, listing(annotation(APPLE, []), annotation(PEAR, number=2)))
    (sample,) = open_dataset(fruit).split("train")
    assert (sample.mask, sample.classes) == (None, (0, 1))


def test_an_image_without_annotations_is_background(fruit):
    write_photo(fruit / "train" / "b.png")
    path = fruit / "annotations" / "instances_train.json"
    write_json(path, listing(annotation(APPLE), names=("a.png", "b.png")))
    assert not ids(open_dataset(fruit), 1).any()
    assert open_dataset(fruit).split("train")[1].classes == ()


def test_png_masks_go_before_drawn_ones_and_may_hold_category_ids(fruit):
    for values in ([0, 2], [0, PEAR]):
        mask = np.zeros((4, 6), np.uint16)
        mask[0, :2] = values
        (fruit / "masks" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(fruit / "masks" / "train" / "a.png")
        assert np.flatnonzero(ids(open_dataset(fruit)) == 2).tolist() == [1]


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[1, 2, 3]], "a polygon has 3 numbers; expected lists of x, y"),
        ([["a", "b"]], "its polygon is .*expected lists of x, y"),
        ("abc", "its segmentation is str; expected lists"),
        ([[1e9, 1, 1, 2, 2, 2]], "points far outside of the image of 4x6"),
        ({"size": [6, 4], "counts": [24]}, r"of size \[6, 4\], but the image has \[4, 6\]"),
        ({"size": [4, 6], "counts": [20]}, "no whole numbers that add up to the 4x6 pixels"),
        ({"size": [4, 6], "counts": [-1, 25]}, "no whole numbers that add up"),
        ({"size": [4, 6], "counts": "zzzz"}, "no whole numbers that add up"),
        ({"size": [4, 6]}, "no whole numbers that add up"),
    ],
)
def test_a_damaged_annotation_is_named_with_its_file(fruit, segmentation, words):
    with pytest.raises(
        DataError, match=rf"instances_train\.json, annotation 41 of a\.png: .*{words}"
    ):
        draw(fruit, annotation(APPLE, segmentation, number=41))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            annotation(5, number=8),
            r"annotation 8 of a.png: there is no category 5; known are 7 \(apple\)",
        ),
        (annotation(APPLE, image=9, number=8), "annotation 8: there is no image 9"),
    ],
)
def test_one_wrong_reference_does_not_hide_the_other_images(fruit, entry, words):
    write_photo(fruit / "train" / "b.png")
    good = annotation(PEAR, image=2, number=2)
    path = fruit / "annotations" / "instances_train.json"
    write_json(path, listing(entry, good, names=("a.png", "b.png")))
    entries = list(open_dataset(fruit).entries("train"))
    (fault,) = [str(each) for each in entries if isinstance(each, DataError)]
    assert words.replace("\\", "") in fault
    assert "b" in [each.name for each in entries if not isinstance(each, DataError)]


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"images": [], "annotations": 3}'])
def test_a_broken_file_is_an_error_of_the_data(fruit, text):
    path = fruit / "annotations" / "instances_train.json"
    whole = ', "categories": [{"id": 1, "name": "a"}], "images": 1, "annotations": 1'
    path.write_text(text.replace("3}", "3" + ', "categories": [{"id": 1, "name": "a"}]}') + whole)
    with pytest.raises(DataError, match=r"instances_train\.json (is no|cannot be read)"):
        open_coco(path).split("train")


@pytest.mark.parametrize(
    ("outline", "words"),
    [
        ([0.1, 0.1, 0.9, 0.1, 0.9, 0.9], "all its points lie between 0 and 1, as shares of width"),
        ([6, 1, 9, 1, 9, 3], "its outline lies wholly outside of the image of 4x6"),
        ([1, -9, 3, -9, 3, -1], "its outline lies wholly outside of the image of 4x6"),
    ],
)
def test_an_outline_that_covers_nothing_is_an_error_of_its_image(fruit, outline, words):
    with pytest.raises(DataError, match=rf"instances_train\.json, annotation 3 of a\.png: {words}"):
        draw(fruit, annotation(APPLE, [outline], number=3))


def test_the_first_pixel_and_a_part_outside_are_no_errors(fruit):
    drawn = draw(fruit, annotation(APPLE, [[0, 0, 1, 0, 1, 1, 0, 1]]))
    assert (drawn.sum(), drawn[0, 0]) == (1, 1)
    assert np.array_equal(draw(fruit, annotation(APPLE, [SQUARE, [7, 1, 9, 1, 9, 3]])), square(1))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"id": 1, "file_name": "b.png"}, r"two images have the id 1 \(a\.png and b\.png\); give"),
        ({"id": 2, "file_name": "a.png"}, r"a\.png is listed under the ids 1 and 2; keep one"),
    ],
)
def test_images_that_are_listed_twice_are_refused(fruit, second, words):
    content = listing(annotation(APPLE))
    content["images"].append({"width": 6, "height": 4, **second})
    write_json(fruit / "annotations" / "instances_train.json", content)
    with pytest.raises(DataError, match=rf"instances_train\.json: {words}"):
        open_dataset(fruit).split("train")


def test_a_size_that_is_not_that_of_the_photo_is_one_finding_that_names_it(fruit):
    write_json(
        fruit / "annotations" / "instances_train.json",
        listing(annotation(APPLE), names=("a.png", "b.png")),
    )
    write_photo(fruit / "train" / "a.png", (3, 2))
    Image.new("RGB", (6, 4), "red").save(fruit / "train" / "b.png")
    (found,) = check_dataset(open_dataset(fruit))
    assert "image a.png: listed with 4x6 pixels (rows x columns) but the photo has 2x3" in str(
        found
    )


def test_an_image_that_is_too_large_to_draw_is_refused(fruit):
    content = listing(annotation(APPLE))
    content["images"][0] |= {"width": 10**6, "height": 10**6}
    write_json(fruit / "annotations" / "instances_train.json", content)
    with pytest.raises(
        DataError, match=r"image 1 \(a\.png\): rows and columns are 1000000 and 1000000"
    ):
        open_dataset(fruit).split("train")


def test_an_image_without_a_size_has_that_of_its_photo(fruit):
    content = listing(annotation(APPLE))
    for key in ("width", "height"):
        content["images"][0].pop(key)
    write_json(fruit / "annotations" / "instances_train.json", content)
    assert np.array_equal(ids(open_dataset(fruit)), square(1))


def test_a_sample_brings_only_its_own_annotations_to_a_worker(tmp_path):
    outline = np.random.default_rng(0).random(400).round(2).tolist()
    many = [annotation(APPLE, [outline], image=n, number=n) for n in range(1, 101)]
    names = tuple(f"{number}.png" for number in range(1, 101))
    path = write_json(tmp_path / "result.json", listing(*many, names=names))
    for name in names:
        write_photo(tmp_path / "images" / name)
    samples = open_dataset(tmp_path).split("all")
    sizes = [len(pickle.dumps(sample)) for sample in samples]
    assert max(sizes) < 2 * path.stat().st_size / 100
    assert pickle.loads(pickle.dumps(samples[3])) == samples[3]
    assert isinstance(samples[3].form, CocoMask)
    assert samples[3].form.digest(path) != samples[4].form.digest(path)


def test_what_files_were_taken_for_is_said(fruit):
    write_photo(fruit / "train" / "b.png")
    runs = {"size": [4, 6], "counts": [24]}
    content = listing(
        annotation(APPLE, [SQUARE, [1, 1, 2, 2]]),
        annotation(APPLE, runs, number=2, iscrowd=1),
        annotation(PEAR, [], image=2, number=3),
        names=("a.png", "b.png"),
    )
    write_json(fruit / "annotations" / "instances_train.json", content)
    (sentence,) = open_dataset(fruit).describe()
    assert sentence == (
        "annotations/instances_train.json: COCO annotations, 2 categories of its own "
        "(apple, pear), masks drawn from 1 polygon and 1 run length; 1 crowd region ignored; "
        "1 polygon of fewer than 3 points left out; 1 annotation without a segmentation: labels "
        "only; of objects that overlap, the smaller is on top"
    )
