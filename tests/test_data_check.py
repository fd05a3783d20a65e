"""Checks of a data set: each thing that can be wrong, alone, and nothing where all is well."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camkit.cli import data as command
from camkit.data import (
    Sample,
    check_dataset,
    open_dataset,
    open_voc,
    shared_images,
    write_shapes,
)
from camkit.errors import DataError
from camkit.mask import voc_palette


@pytest.fixture
def shapes(tmp_path) -> Path:
    """Drawn images with exact masks: nine in train, three in val."""
    write_shapes(tmp_path / "shapes", count=12, size=(32, 48))
    return tmp_path / "shapes"


def photo(root: Path, number: int) -> Path:
    return root / "JPEGImages" / f"shapes_{number:04d}.jpg"


def mask(root: Path, number: int) -> Path:
    return root / "SegmentationClass" / f"shapes_{number:04d}.png"


def redraw(path: Path, ids: np.ndarray, palette: list[int] | None = None) -> None:
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(palette or voc_palette())
    image.save(path)


def ids_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_a_data_set_without_fault_has_no_findings(shapes):
    assert check_dataset(open_dataset(shapes)) == []


def truncate_photo(root):
    data = photo(root, 0).read_bytes()
    photo(root, 0).write_bytes(data[: len(data) * 2 // 3])


def truncate_mask(root):
    data = mask(root, 0).read_bytes()
    mask(root, 0).write_bytes(data[: len(data) * 2 // 3])


def shrink_mask(root):
    redraw(mask(root, 0), ids_of(mask(root, 0))[:-1])


def unknown_id(root):
    redraw(mask(root, 0), np.where(ids_of(mask(root, 0)) > 0, 9, 0))


def colour_mask(root):
    with Image.open(mask(root, 0)) as image:
        coloured = image.convert("RGB")
    coloured.save(mask(root, 0))


def renumber(root):
    # what an editor does that packs the colours in use: the colour stays, the id does not
    ids = ids_of(mask(root, 0))
    used = next(value for value in (1, 2, 3) if (ids == value).any())
    other = used % 3 + 1
    palette = voc_palette()
    palette[3 * other : 3 * other + 3] = voc_palette()[3 * used : 3 * used + 3]
    redraw(mask(root, 0), np.where(ids == used, other, ids), palette)


def lose_photo(root):
    photo(root, 0).unlink()


def unlabel(root):
    content = json.loads((root / "labels.json").read_text())
    content["labels"]["shapes_0000"] = []
    (root / "labels.json").write_text(json.dumps(content))


def copy_within(root):
    shutil.copy(photo(root, 0), photo(root, 1))
    shutil.copy(mask(root, 0), mask(root, 1))
    content = json.loads((root / "labels.json").read_text())
    content["labels"]["shapes_0001"] = content["labels"]["shapes_0000"]
    (root / "labels.json").write_text(json.dumps(content))


def copy_across(root):
    shutil.copy(photo(root, 0), photo(root, 11))
    shutil.copy(mask(root, 0), mask(root, 11))
    content = json.loads((root / "labels.json").read_text())
    content["labels"]["shapes_0011"] = content["labels"]["shapes_0000"]
    (root / "labels.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "problem", "file", "words"),
    [
        (truncate_photo, "photo", photo, "cannot be read as an image"),
        (truncate_mask, "mask", mask, "cannot be read as an image"),
        (shrink_mask, "mask", mask, "has 31x48 pixels"),
        (unknown_id, "mask", mask, "holds the ids 9; allowed are 0 to 3"),
        (colour_mask, "mask", mask, "of mode RGB; expected class ids"),
        (renumber, "palette", mask, "has renumbered the palette"),
        (lose_photo, "entry", photo, "does not exist; add the photo or remove the line"),
        (unlabel, "labels", mask, "which the labels of shapes_0000 lack"),
    ],
)
def test_each_fault_is_found_and_its_file_named(shapes, spoil, problem, file, words):
    spoil(shapes)
    found = [one for one in check_dataset(open_dataset(shapes)) if one.problem == problem]
    assert len(found) == 1
    assert found[0].certain
    assert words in found[0].message
    assert str(file(shapes, 0)) in found[0].message


def hide_objects(root, numbers):
    for number in numbers:
        ids = ids_of(mask(root, number))
        redraw(mask(root, number), np.where(ids > 0, 255, ids))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_split_whose_masks_mark_objects_with_255_is_an_error(shapes, labelled):
    hide_objects(shapes, range(9, 12))  # those of val
    if not labelled:
        (shapes / "labels.json").unlink()
    dataset = open_dataset(shapes) if labelled else open_voc(shapes)
    (found,) = [one for one in check_dataset(dataset) if one.problem == "mask"]
    assert found.certain
    assert "none of the 3 masks of val shows a class, only background and ignored" in found.message
    assert "write class + 1 there: 1 for the first class" in found.message


def test_masks_without_the_class_of_their_labels_are_counted(shapes):
    hide_objects(shapes, [0, 1])
    *each, counted = check_dataset(open_dataset(shapes))
    assert [one.file for one in each] == [mask(shapes, 0), mask(shapes, 1)]
    assert "2 of 9 masks of train show no pixel of a class that their labels" in counted.message
    assert not counted.certain


def test_faults_do_not_hide_one_another(shapes):
    truncate_photo(shapes)
    shutil.copy(photo(shapes, 1), photo(shapes, 2))
    mask(shapes, 3).write_bytes(b"")
    photo(shapes, 4).unlink()
    problems = sorted(one.problem for one in check_dataset(open_dataset(shapes)) if one.certain)
    # the copied photo has the size of its mask still, so only the content tells
    assert problems == ["entry", "mask", "photo", "repeated"]


def test_without_labels_a_broken_mask_is_one_finding_among_the_others(shapes):
    (shapes / "labels.json").unlink()
    mask(shapes, 3).write_bytes(b"")
    (found,) = check_dataset(open_voc(shapes))
    assert found.problem == "entry"
    assert str(mask(shapes, 3)) in found.message


def test_one_content_under_two_names_is_found_within_a_split(shapes):
    copy_within(shapes)
    (found,) = check_dataset(open_dataset(shapes))
    assert found.problem == "repeated"
    assert found.message.startswith(f"{photo(shapes, 1)} has the same content as")


def test_one_content_under_two_names_is_found_across_splits(shapes):
    copy_across(shapes)
    (found,) = check_dataset(open_dataset(shapes))
    assert found.problem == "shared"
    assert found.certain
    assert "shapes_0011.jpg of val has the same content as shapes_0000 of train" in found.message


def test_a_list_of_lists_is_noted_once_and_its_images_checked_once(shapes):
    lists = shapes / "ImageSets" / "Segmentation"
    both = (lists / "train.txt").read_text() + (lists / "val.txt").read_text()
    (lists / "trainval.txt").write_text(both)
    truncate_photo(shapes)
    found = check_dataset(open_dataset(shapes))
    assert [(one.problem, one.certain) for one in found] == [
        ("photo", True),
        ("shared", False),
        ("shared", False),
    ]
    assert "train and trainval share 9 images (shapes_0000, shapes_0001, shapes_0002, ...)" in (
        found[1].message
    )


def test_only_the_asked_splits_are_checked(shapes):
    truncate_photo(shapes)
    data = open_dataset(shapes)
    assert check_dataset(data, splits=("val",)) == []
    assert len(check_dataset(data, splits=("train",))) == 1
    with pytest.raises(ValueError, match="got 'vel'; did you mean 'val'"):
        check_dataset(data, splits=("vel",))


def test_a_label_without_a_pixel_is_noted(shapes):
    content = json.loads((shapes / "labels.json").read_text())
    content["labels"]["shapes_0000"] = content["classes"]
    (shapes / "labels.json").write_text(json.dumps(content))
    (found,) = check_dataset(open_dataset(shapes))
    assert (found.problem, found.certain) == ("labels", False)
    missing = set(range(3)) - {value - 1 for value in np.unique(ids_of(mask(shapes, 0))).tolist()}
    assert all(content["classes"][index] in found.message for index in missing)


def test_a_missing_mask_is_noted_beside_others_that_are_there(shapes):
    mask(shapes, 0).unlink()
    (found,) = check_dataset(open_dataset(shapes))
    assert (found.problem, found.certain, found.file) == ("no mask", False, photo(shapes, 0))
    shutil.rmtree(shapes / "SegmentationClass")
    assert check_dataset(open_dataset(shapes)) == []


def turn(path: Path, orientation: int) -> None:
    with Image.open(path) as image:
        image.load()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "problems"),
    [(1, []), (2, ["orientation"]), (3, ["orientation"]), (6, ["mask"]), (8, ["mask"])],
)
def test_photos_stored_turned_are_told_by_size_or_noted(shapes, orientation, problems):
    turn(photo(shapes, 0), orientation)
    assert [one.problem for one in check_dataset(open_dataset(shapes))] == problems


def test_a_mask_turned_as_its_photo_is_right(shapes):
    turn(photo(shapes, 0), 6)
    redraw(mask(shapes, 0), np.rot90(ids_of(mask(shapes, 0)), -1))
    assert check_dataset(open_dataset(shapes)) == []


def test_masks_in_grey_levels_have_no_palette_to_be_wrong(shapes):
    Image.fromarray(ids_of(mask(shapes, 0))).save(mask(shapes, 0))
    assert check_dataset(open_dataset(shapes)) == []


def test_real_images_have_nothing_wrong(real_data, tmp_path):
    root, lists = real_data / "coco100_voc", tmp_path / "ImageSets" / "Segmentation"
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).symlink_to(root / folder)
    shutil.copy(root / "labels.json", tmp_path)
    names = (root / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(names[:15]))
    assert check_dataset(open_dataset(tmp_path)) == []


# shared images


def sample(folder: Path, name: str, content: bytes) -> Sample:
    path = folder / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Sample(name, path, None, ())


def test_shared_images_have_one_name_or_one_content(tmp_path):
    first = [
        sample(tmp_path / "x", name, content)
        for name, content in (("a", b"1111"), ("b", b"2222"), ("c", b"333"), ("d", b"4444"))
    ]
    second = [
        sample(tmp_path / "y", name, content)
        for name, content in (("b", b"other"), ("e", b"1111"), ("f", b"444x"), ("c", b"333"))
    ]
    # b by name, a and e by content, c by both (told once); d and f only share their size
    assert shared_images(first, second) == [("a", "e"), ("b", "b"), ("c", "c")]


def test_a_content_that_comes_twice_is_told_twice(tmp_path):
    first = [sample(tmp_path / "x", "a", b"1111")]
    second = [sample(tmp_path / "y", name, b"1111") for name in ("b", "a")]
    assert shared_images(first, second) == [("a", "b"), ("a", "a")]


def test_one_file_listed_under_one_name_in_both_is_shared(tmp_path):
    both = [sample(tmp_path, "a", b"1"), sample(tmp_path, "b", b"22")]
    assert shared_images(both, both[1:]) == [("b", "b")]


def test_splits_without_a_common_image_share_nothing(real_data):
    data = open_dataset(real_data / "voc12_animals")
    assert shared_images(data.split("train"), data.split("val")) == []
    train = [one.name for one in data.split("train")]
    assert shared_images(data.split("train"), data.split("trainaug")) == list(
        zip(train, train, strict=True)
    )


def test_a_photo_that_is_gone_is_named(tmp_path):
    gone = Sample("a", tmp_path / "a.jpg", None, ())
    with pytest.raises(DataError, match=r"a\.jpg cannot be read .*check the file"):
        shared_images([gone], [gone])


# camkit data check


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.execute(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_prints_findings_and_counts_them(shapes, capsys):
    assert run("check", shapes) == 0
    *taken_for, last = capsys.readouterr().out.splitlines()
    assert taken_for == [
        "ImageSets/Segmentation: a layout of PASCAL VOC, 3 classes (circle, square, triangle), "
        "labels from labels.json",
        "train: 9 names, 9 masks in SegmentationClass, ids",
        "val: 3 names, 3 masks in SegmentationClass, ids",
    ]
    assert last == f"{shapes}: 3 classes, splits train, val: 0 errors, 0 notes"
    truncate_photo(shapes)
    mask(shapes, 1).unlink()
    assert run("check", shapes) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    del lines[:3]
    assert lines[0].startswith(f"{photo(shapes, 0)} cannot be read as an image")
    assert lines[1].startswith(f"note: {photo(shapes, 1)} has no mask")
    assert last.endswith("1 error, 1 note")


def test_the_command_checks_the_asked_splits(shapes, capsys):
    truncate_photo(shapes)
    assert run("check", shapes, "--split", "val", "--split", "val") == 0
    assert "splits val: 0 errors" in capsys.readouterr().out


def test_the_command_needs_an_action(shapes, capsys):
    with pytest.raises(SystemExit):
        run()
    assert "ACTION" in capsys.readouterr().err
