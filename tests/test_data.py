"""Data sets: folders written by hand, drawn shapes, and the counts of real ones."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from camkit.data import (
    SHAPE_CLASSES,
    VOC_CLASSES,
    DataSet,
    Sample,
    draw_shapes,
    open_dataset,
    open_folder,
    open_voc,
    read_mask,
    write_shapes,
)
from camkit.errors import DataError
from camkit.paint import save_mask
from camkit.photo import load_photo


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _write_mask(path, ids, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(ids, np.uint8))
    if mode == "P":
        image.putpalette([0, 128, 64] * 256)  # PIL packs shorter ones into fewer bits
    image.save(path)
    return path


@pytest.fixture
def voc(tmp_path) -> Path:
    """Two photos: one with an aeroplane and a person, one with nothing but background."""
    for name, ids in (("a", [[0, 1], [15, 255]]), ("b", [[0, 0], [255, 0]])):
        _write_mask(tmp_path / "SegmentationClass" / f"{name}.png", ids)
        (tmp_path / "JPEGImages").mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    _write(tmp_path / "ImageSets" / "Segmentation" / "val.txt", "b\na\n")
    return tmp_path


@pytest.fixture
def plain(tmp_path) -> Path:
    """Two images with labels, one of them with a mask."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "one.jpg")
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "two.PNG")
    _write_mask(tmp_path / "masks" / "two.png", [[0, 1], [2, 0]])
    _write(tmp_path / "labels.csv", "image,labels\none.jpg,dog\ntwo,dog; cat\n")
    return tmp_path


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_mask_is_read_as_ids_not_colours(tmp_path, mode):
    path = _write_mask(tmp_path / "m.png", [[0, 1, 2], [255, 20, 0]], mode)
    mask = read_mask(path, size=(2, 3), num_classes=20)
    assert torch.equal(mask, torch.tensor([[0, 1, 2], [255, 20, 0]]))


def test_a_mask_of_another_size_is_refused(tmp_path):
    path = _write_mask(tmp_path / "m.png", [[0, 1, 2], [255, 20, 0]])
    with pytest.raises(DataError, match=r"m\.png has 2x3 pixels .* its image has 3x2"):
        read_mask(path, size=(3, 2), num_classes=20)


def test_ids_of_no_class_are_listed(tmp_path):
    path = _write_mask(tmp_path / "m.png", [[0, 4, 3], [255, 9, 0]])
    with pytest.raises(DataError, match=r"m\.png holds the ids 4, 9; allowed are 0 to 3 for 3"):
        read_mask(path, size=(2, 3), num_classes=3)


def test_a_mask_in_colours_is_refused(tmp_path):
    path = tmp_path / "m.png"
    Image.new("RGB", (3, 2), (128, 0, 0)).save(path)
    with pytest.raises(DataError, match=r"m\.png is a PNG of mode RGB; expected class ids"):
        read_mask(path, size=(2, 3), num_classes=20)


def test_a_lossy_mask_is_refused(tmp_path):
    path = tmp_path / "m.jpg"
    Image.new("L", (3, 2), 1).save(path)
    with pytest.raises(
        DataError, match=r"m\.jpg is a JPEG, whose compression changes class ids near every edge"
    ):
        read_mask(path, size=(2, 3), num_classes=20)


def test_grey_levels_of_four_bits_are_read_as_they_are_stored(tmp_path):
    path = tmp_path / "m.png"

    def chunk(name, data):
        check = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + check

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)  # 2 columns, 1 row, 4 bits of grey
    row = zlib.compress(b"\0\x01")  # no filter; 0 and 1 in one byte
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert np.array(Image.open(path)).tolist() == [[0, 17]]
    assert read_mask(path, size=(1, 2), num_classes=20).tolist() == [[0, 1]]


def test_voc_labels_come_from_the_masks(voc):
    b, a = open_voc(voc).split("val")
    mask = voc / "SegmentationClass" / "a.png"
    assert a == Sample("a", voc / "JPEGImages" / "a.jpg", mask, (0, 14))
    assert b.classes == ()


def test_voc_labels_come_from_labels_json_where_there_is_one(voc):
    content = {"classes": ["cat", "dog"], "labels": {"a": ["dog", "cat"], "b": ["dog"]}}
    _write(voc / "labels.json", json.dumps(content))
    data = open_voc(voc)
    assert data.classes == ("cat", "dog")
    assert [sample.classes for sample in data.split("val")] == [(1,), (0, 1)]


def test_voc_masks_may_be_absent_where_labels_are_given(voc):
    (voc / "SegmentationClass" / "a.png").unlink()
    content = {"classes": ["cat"], "labels": {"a": ["cat"], "b": []}}
    _write(voc / "labels.json", json.dumps(content))
    assert open_voc(voc).split("val")[1] == Sample("a", voc / "JPEGImages" / "a.jpg", None, (0,))


def test_voc_without_mask_or_labels_is_refused(voc):
    (voc / "SegmentationClass" / "a.png").unlink()
    with pytest.raises(DataError, match=r"val\.txt, line 2: a has neither a mask"):
        open_voc(voc).split("val")


def test_an_unknown_split_is_refused_with_the_likely_one(voc):
    with pytest.raises(ValueError, match="got 'vall'; did you mean 'val'"):
        open_voc(voc).split("vall")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "ImageSets/Segmentation/val.txt",
            "a\n\nc\n",
            r"val\.txt, line 3: .*c\.jpg does not exist",
        ),
        ("ImageSets/Segmentation/val.txt", "a\nb\na\n", r"line 3: 'a' is already on line 1"),
        ("ImageSets/Segmentation/val.txt", "\n", r"val\.txt is empty; expected one name per line"),
        ("labels.json", "{", r"labels\.json is not JSON"),
        ("labels.json", '{"classes": ["cat"]}', r"labels\.json must hold"),
        (
            "labels.json",
            '{"classes": ["cat"], "labels": {"a": [["cat"]]}}',
            r"labels\.json: 'a': exp",
        ),
        ("labels.json", '{"classes": ["cat"], "labels": {"b": []}}', "has no labels for a"),
        (
            "labels.json",
            '{"classes": ["cat"], "labels": {"b": [], "a": ["Cats"]}}',
            "a is labelled 'Cats', which is not a class; did you mean 'cat'",
        ),
    ],
)
def test_a_wrong_file_in_a_voc_folder_is_named(voc, file, text, words):
    _write(voc / file, text)
    with pytest.raises(DataError, match=words):
        open_voc(voc).split("val")


def test_a_plain_folder_gives_labels_masks_and_sorted_classes(plain):
    data = open_folder(plain)
    assert (data.classes, data.splits) == (("cat", "dog"), ("all",))
    assert data.split("all") == (
        Sample("one", plain / "images" / "one.jpg", None, (1,)),
        Sample("two", plain / "images" / "two.PNG", plain / "masks" / "two.png", (0, 1)),
    )


def test_classes_txt_gives_the_order_of_the_classes(plain):
    _write(plain / "classes.txt", "dog\nhorse\ncat\n")
    assert [sample.classes for sample in open_folder(plain).split("all")] == [(0,), (0, 2)]


def test_split_lists_choose_among_the_images(plain):
    _write(plain / "splits" / "val.txt", "two\n")
    data = open_folder(plain)
    assert data.splits == ("val",)
    assert [sample.name for sample in data.split("val")] == ["two"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.csv", "image;labels\none.jpg;dog\nimages/two.PNG;dog, cat\n"),
        ("labels.csv", "one,dog\ntwo,cat|dog\n"),
        ("labels.csv", ",dog,cat\none,1,0\ntwo,1,1\n"),
        ("labels.tsv", "id\tclass\none\tdog\ntwo\tdog\ntwo\tcat\n"),
        ("labels.json", '{"one": "dog", "two.PNG": ["cat", "dog"]}'),
        ("images/metadata.csv", "file_name,label\none.jpg,dog\ntwo.PNG,cat;dog\n"),
        (
            "metadata.jsonl",
            '{"file_name": "images/one.jpg", "labels": ["dog"]}\n'
            '{"file_name": "two.PNG", "labels": ["cat", "dog"]}\n',
        ),
    ],
)
def test_a_plain_folder_takes_label_files_of_every_kind(plain, file, text):
    (plain / "labels.csv").unlink()
    _write(plain / file, text)
    data = open_dataset(plain)
    actual = {s.name: {data.classes[index] for index in s.classes} for s in data.split("all")}
    assert actual == {"one": {"dog"}, "two": {"cat", "dog"}}
    assert data.split("all")[1].mask == plain / "masks" / "two.png"
    assert data.describe()[0].startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one,dog\ntwo,cat|dog\n", "2 classes, sorted: cat, dog"),
        (",dog,cat\none,1,0\ntwo,1,1\n", "2 classes, in the order of the label file: dog, cat"),
        ("one,dog\ntwo,dog\n", "1 class, sorted: dog"),
    ],
)
def test_the_order_of_the_classes_is_said(plain, text, words):
    (plain / "classes.txt").unlink(missing_ok=True)
    _write(plain / "labels.csv", text)
    data = open_folder(plain)
    assert data.describe()[1] == words
    _write(plain / "classes.txt", "dog\ncat\n")
    said = "2 classes, in the order of classes.txt: dog, cat"
    assert open_folder(plain).describe()[1] == said


def test_a_plain_folder_without_labels_says_what_to_add(plain):
    (plain / "labels.csv").unlink()
    with pytest.raises(DataError, match=r"holds no file of labels.*add one such as labels\.csv"):
        open_dataset(plain, layout="plain")


def test_a_column_of_a_table_may_say_the_splits(plain):
    _write(plain / "labels.csv", "image,labels,split\none,dog,train\ntwo,cat,val\n")
    data = open_folder(plain)
    assert data.splits == ("train", "val")
    assert [sample.name for sample in data.split("val")] == ["two"]


def test_images_may_stand_in_folders(plain):
    for name in ("x/1", "y/1"):
        picture = plain / "images" / f"{name}.png"
        picture.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(picture)
    _write(plain / "labels.csv", "path,label\nimages/x/1.png,cat\ny/1,dog\n")
    samples = open_folder(plain).split("all")
    assert [(sample.name, sample.classes) for sample in samples] == [("x/1", (0,)), ("y/1", (1,))]
    _write(plain / "labels.csv", "path,label\n1.png,cat\n")
    with pytest.raises(DataError, match=r"line 2: images/ holds x/1 and y/1, which both fit"):
        open_folder(plain)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("labels.csv", "one\ntwo\n", r"labels\.csv, line 1: expected image,labels, got 'one'"),
        ("labels.csv", "image,labels\n", r"labels\.csv has no rows"),
        ("labels.csv", "image,labels\none,cat,dog\n", "line 2: expected 2 columns, got 3; put ;"),
        ("labels.csv", "image,labels\n\none, ;\n", "line 3: 'one' has no labels"),
        (
            "labels.csv",
            "image,labels\nthree,cat\n",
            "line 2: images/ holds no 'three'; add the file",
        ),
        (
            "labels.csv",
            "image,labels\none,cat\ntwo,cat\none.jpg,dog\n",
            "line 4: 'one' is already on line 2; put all",
        ),
        ("labels.csv", 'image,labels\none,"cat\n', r"labels\.csv, line 2: .*check the quotes"),
        (
            "classes.txt",
            "Dog\ncat\n",
            r"labels\.csv, line 2: one\.jpg is labelled 'dog', .* did you .*'Dog'",
        ),
        ("classes.txt", "cat\ndog\ncat\n", r"classes\.txt, line 3: 'cat' is already on line 1"),
        ("splits/val.txt", "one\ntow\n", r"val\.txt, line 2: 'tow' has no row .* mean 'two'"),
        ("images/one.png", "", r"holds both one\.jpg and one\.png"),
    ],
)
def test_a_wrong_file_in_a_plain_folder_is_named(plain, file, text, words):
    _write(plain / file, text)
    with pytest.raises(DataError, match=words):
        open_folder(plain)


def test_a_folder_without_images_is_refused(tmp_path):
    _write(tmp_path / "labels.csv", "image,labels\none,cat\n")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"images holds no images; expected files ending in \.jpg"):
        open_folder(tmp_path)


def test_a_table_that_is_no_text_is_refused(plain):
    (plain / "labels.csv").write_bytes(b"image,labels\none,\0\xff\n")
    with pytest.raises(DataError, match=r"labels\.csv, line 2 cannot .* expected a UTF-8 text"):
        open_folder(plain)


def test_the_layout_is_told_by_the_folders(plain, tmp_path_factory):
    drawn = write_shapes(tmp_path_factory.mktemp("drawn"), 2)
    assert open_dataset(plain) == open_folder(plain)
    assert open_dataset(drawn.root) == open_voc(drawn.root)
    assert isinstance(open_dataset(plain), DataSet)


@pytest.mark.parametrize("layout", ["voc", "plain"])
def test_a_relative_folder_stays_readable_when_the_working_directory_changes(
    layout, request, tmp_path_factory, monkeypatch
):
    root, elsewhere = request.getfixturevalue(layout), tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "link").symlink_to(root)
    for start, path in ((root.parent, root.name), (elsewhere, "link"), (root / "..", root.name)):
        monkeypatch.chdir(start)
        data = open_dataset(path)
        monkeypatch.chdir(elsewhere)
        samples = [sample for split in data.splits for sample in data.split(split)]
        assert {sample.name for sample in samples} in ({"a", "b"}, {"one", "two"})
        for sample in samples:
            assert load_photo(sample.photo).size == (2, 2)
            if sample.mask is not None:
                read_mask(sample.mask, size=(2, 2), num_classes=20)


def test_shapes_written_to_a_relative_folder_stay_readable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_shapes("drawn", 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_photo(data.split("val")[0].photo).size == (64, 96)


def test_an_unknown_layout_says_what_is_known_and_what_was_found(tmp_path):
    (tmp_path / "VOC2012").mkdir()
    _write(tmp_path / "readme.txt", "")
    with pytest.raises(DataError, match=r"\(voc\), or .* got VOC2012/, readme\.txt; name"):
        open_dataset(tmp_path)


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match="gone is not a folder"):
        open_dataset(tmp_path / "gone")


def test_drawn_images_are_the_same_for_the_same_seed():
    first, again, other = (draw_shapes(4, rng_seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_drawn_images_hold_one_or_two_whole_shapes():
    counts = [len(np.unique(mask)) - 1 for _, mask in draw_shapes(40)]
    assert set(counts) == {1, 2}


def test_the_area_of_a_shape_is_that_of_its_outline():
    for _, mask in draw_shapes(12, size=(200, 320)):
        for value in np.unique(mask)[1:]:
            rows, cols = (np.ptp(axis) + 1 for axis in np.nonzero(mask == value))
            share = (mask == value).sum() / (rows * cols)
            assert share == pytest.approx({1: np.pi / 4, 2: 1.0, 3: 0.5}[value], abs=0.02)


def test_a_shape_differs_in_colour_from_everything_outside_its_mask():
    hues = {1: [1, 0, 0], 2: [0, 0, 1], 3: [1, 1, 0]}  # red, blue, yellow
    for rgb, mask in draw_shapes(12):
        for value in np.unique(mask)[1:]:
            inside = rgb[mask == value].mean(axis=0)
            assert (inside > inside.mean()).astype(int).tolist() == hues[value]


def test_written_shapes_are_read_back_exactly(tmp_path):
    data = write_shapes(tmp_path, 5, size=(32, 48))
    assert data == open_voc(tmp_path)
    assert (len(data.split("train")), len(data.split("val"))) == (4, 1)
    drawn = draw_shapes(5, size=(32, 48))
    for sample, (_, mask) in zip(data.split("train") + data.split("val"), drawn, strict=True):
        read = read_mask(sample.mask, size=(32, 48), num_classes=len(SHAPE_CLASSES))
        assert np.array_equal(read.numpy(), mask)
        assert sample.classes == tuple(np.unique(mask)[1:] - 1)


@pytest.mark.parametrize(
    ("count", "size", "words"),
    [(1, (64, 96), "at least 2, one image for each split, got 1"), (2, (8, 96), "at least 16")],
)
def test_shapes_that_cannot_be_written_are_refused(tmp_path, count, size, words):
    with pytest.raises(ValueError, match=words):
        write_shapes(tmp_path, count, size=size)


def test_real_splits_have_their_published_counts(real_data):
    data = open_dataset(real_data / "voc12_animals")
    counts = {name: len(data.split(name)) for name in ("train", "trainaug", "val")}
    assert counts == {"train": 457, "trainaug": 757, "val": 226}
    assert data.classes == VOC_CLASSES


def test_real_labels_are_the_classes_in_the_masks(real_data):
    for sample in open_dataset(real_data / "voc12_animals").split("val")[::25]:
        size = load_photo(sample.photo).size
        ids = set(read_mask(sample.mask, size=size, num_classes=20).unique().tolist()) - {0, 255}
        assert tuple(sorted(value - 1 for value in ids)) == sample.classes


def test_masks_of_16_bits_hold_more_than_254_classes(tmp_path):
    ids = torch.tensor([[0, 1, 255], [256, 1281, 65535]], dtype=torch.int32)
    save_mask(ids, tmp_path / "mask.png", bits=16)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "I;16"
    read = read_mask(tmp_path / "mask.png", size=(2, 3), num_classes=1300, classes=[254, 1280])
    assert read.tolist() == [[0, 0, 1], [0, 2, 255]]  # 255 is a class, 65535 is ignored
    with pytest.raises(DataError, match=r"holds the ids 1281; .*0 to 300 .* and 65535 for ignore"):
        read_mask(tmp_path / "mask.png", size=(2, 3), num_classes=300, classes=[0])
    with pytest.raises(ValueError, match=r"ids in 0\.\.255, got 0 to 65535; use bits=16"):
        save_mask(ids, tmp_path / "mask.png")
