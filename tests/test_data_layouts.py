"""Layouts of the field: VOC with SBD's masks and label vectors, COCO in its forms, ImageNet-S."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from camkit.data import (
    COCO_CLASSES,
    VOC_CLASSES,
    CocoFolder,
    DataSet,
    ImageNetSFolder,
    open_coco,
    open_dataset,
    open_imagenet_s,
    open_voc,
    read_mask,
)
from camkit.data.coco import COCO_IDS, VOC_IN_COCO, coco_form
from camkit.data.labels import label_vectors
from camkit.errors import DataError

PERSON, CAR, TRUCK, ELEPHANT, TOOTHBRUSH = 0, 2, 7, 20, 79  # places among the 80 of COCO


def write_photo(path: Path, size: tuple[int, int] = (2, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, format="JPEG")


def write_ids(path: Path, ids: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(ids, np.uint8)).save(path)


def write_colours(path: Path, values: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.array(values)
    colours = np.stack([table % 256, table // 256 % 256, table // 65536], axis=-1)
    Image.fromarray(colours.astype(np.uint8)).save(path)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_vectors(path: Path, vectors: dict) -> None:
    np.save(path, np.array(vectors, dtype=object))


def truth(dataset: DataSet, split: str, place: int = 0, **settings: object) -> list[list[int]]:
    sample = dataset.split(split)[place]
    return read_mask(
        sample.mask,
        size=(2, 2),
        num_classes=len(dataset.classes),
        form=sample.form,
        **settings,
    ).tolist()


# VOC


@pytest.fixture
def voc(tmp_path) -> Path:
    """Three photos; one has VOC's own mask, all have SBD's."""
    for name in ("2007_000001", "2007_000002", "2008_000003"):
        write_photo(tmp_path / "JPEGImages" / f"{name}.jpg")
        write_ids(tmp_path / "SegmentationClassAug" / f"{name}.png", [[0, 2], [2, 2]])
    write_ids(tmp_path / "SegmentationClass" / "2007_000001.png", [[0, 1], [0, 255]])
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000001\n")
    (lists / "train_aug.txt").write_text("2007_000001\n2007_000002\n2008_000003\n")
    return tmp_path


def folders(dataset: DataSet, split: str) -> set[str]:
    return {sample.mask.parent.name for sample in dataset.split(split)}


def test_a_split_takes_the_folder_with_more_of_its_masks_and_never_both(voc):
    data = open_voc(voc)
    assert folders(data, "train") == {"SegmentationClass"}
    assert folders(data, "train_aug") == {"SegmentationClassAug"}
    assert data.split("train")[0].classes == (0,)
    assert data.split("train_aug")[0].classes == (1,)


def test_the_folder_of_the_masks_can_be_named(voc):
    assert folders(open_voc(voc, masks="SegmentationClassAug"), "train") == {"SegmentationClassAug"}
    data = open_voc(voc, masks="SegmentationClass")
    assert folders(data, "train") == {"SegmentationClass"}
    with pytest.raises(DataError, match="2007_000002 has neither a mask in SegmentationClass nor"):
        data.split("train_aug")


def test_a_named_folder_of_masks_must_be_there(voc):
    (voc / "SegmentationClass" / "2007_000001.png").unlink()
    (voc / "SegmentationClass").rmdir()
    with pytest.raises(DataError, match=r"SegmentationClass does not exist; add the folder"):
        open_voc(voc, masks="SegmentationClass")


def test_lists_of_file_pairs_are_lists_of_names(voc):
    lines = "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\n"
    (voc / "ImageSets" / "Segmentation" / "psa.txt").write_text(lines)
    (sample,) = open_voc(voc).split("psa")
    assert (sample.name, sample.photo.is_file()) == ("2007_000001", True)


def vector(*classes: int, length: int = 20) -> np.ndarray:
    return np.isin(np.arange(length), classes).astype(np.float32)


@pytest.mark.parametrize("file", ["cls_labels.npy", "cls_labels_onehot.npy"])
@pytest.mark.parametrize("as_number", [False, True])
def test_label_vectors_are_read_by_name_or_number(voc, file, as_number):
    known = {"2007_000001": (14,), "2007_000002": (), "2008_000003": (0, 19)}
    vectors = {
        np.int32(name.replace("_", "")) if as_number else name: vector(*classes)
        for name, classes in known.items()
    }
    write_vectors(voc / file, vectors)
    samples = open_voc(voc).split("train_aug")
    assert {sample.name: sample.classes for sample in samples} == known


def test_label_names_go_before_vectors(voc):
    write_vectors(voc / "cls_labels.npy", {"2007_000001": vector(3)})
    content = {"classes": ["cat", "dog"], "labels": {"2007_000001": ["dog"]}}
    write_json(voc / "labels.json", content)
    data = open_voc(voc)
    assert data.classes == ("cat", "dog")
    assert data.split("train")[0].classes == (1,)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": vector(1, length=21)}, r"labels of 'a' have shape \(21,\); .* of the 20 classes"),
        ({"a": 0.5 * vector(1)}, "labels of 'a' are not all 0 or 1"),
        ({(1, 2): vector(1)}, r"a key is neither a name nor a number"),
        ({}, "holds no dict of label vectors"),
    ],
)
def test_wrong_label_vectors_are_told(tmp_path, content, words):
    write_vectors(tmp_path / "cls_labels.npy", content)
    with pytest.raises(DataError, match=words):
        label_vectors(tmp_path / "cls_labels.npy", length=20)


class Touch:
    """Unpickled the usual way, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_label_vectors_run_no_code(tmp_path):
    write_vectors(tmp_path / "cls_labels.npy", {"a": Touch(tmp_path / "trap")})
    with pytest.raises(DataError, match="could run code"):
        label_vectors(tmp_path / "cls_labels.npy", length=20)
    assert not (tmp_path / "trap").exists()


def test_an_image_without_a_vector_is_named(voc):
    write_vectors(voc / "cls_labels.npy", {"2007_000001": vector(3)})
    with pytest.raises(DataError, match=r"no labels for 2007_000002 \(.*train_aug\.txt, line 2\)"):
        open_voc(voc).split("train_aug")


def test_entries_go_on_after_what_cannot_be_used(voc):
    (voc / "JPEGImages" / "2007_000002.jpg").unlink()
    first, second, third = open_voc(voc).entries("train_aug")
    assert (first.name, third.name) == ("2007_000001", "2008_000003")
    assert "2007_000002.jpg does not exist" in str(second)


# COCO


def instances(images: dict[int, list[int]]) -> dict:
    """As in instances_*.json, for image numbers and the places of their classes."""
    numbers = list(COCO_IDS.values())
    return {
        "categories": [{"id": number, "name": name} for name, number in COCO_IDS.items()],
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in images],
        "annotations": [
            {"image_id": i, "category_id": numbers[place]}
            for i, places in images.items()
            for place in places
        ],
    }


@pytest.fixture
def coco(tmp_path) -> Path:
    """Two photos with labels, without masks."""
    for number in (9, 25):
        write_photo(tmp_path / "val2017" / f"{number:012d}.jpg")
    content = instances({9: [TOOTHBRUSH, PERSON, PERSON], 25: [ELEPHANT]})
    write_json(tmp_path / "annotations" / "instances_val2017.json", content)
    return tmp_path


def test_the_classes_of_coco_are_known():
    assert (len(COCO_CLASSES), len(VOC_IN_COCO)) == (80, 20)
    assert tuple(VOC_IN_COCO) == VOC_CLASSES
    assert set(VOC_IN_COCO.values()) <= set(COCO_CLASSES)
    left_out = set(range(1, 91)) - set(COCO_IDS.values())
    assert left_out == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    torchvision = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert [torchvision[number] for number in COCO_IDS.values()] == list(COCO_CLASSES)


def test_coco_labels_come_from_its_instances(coco):
    data = open_dataset(coco)
    assert isinstance(data, CocoFolder)
    first, second = data.split("val2017")
    assert (first.name, first.classes, first.mask) == ("000000000009", (PERSON, TOOTHBRUSH), None)
    assert second.classes == (ELEPHANT,)


CONTIGUOUS = [[TOOTHBRUSH + 1, 1], [0, 255]]
ORIGINAL = [[90, 1], [0, 255]]
STUFF = [[89, 0], [156, 255]]  # 156 is stuff


@pytest.mark.parametrize(
    ("folder", "ids", "known"),
    [
        ("SegmentationClass", CONTIGUOUS, [[80, 1], [0, 255]]),
        ("masks", ORIGINAL, [[80, 1], [0, 255]]),
        ("stuffthingmaps", STUFF, [[80, 1], [0, 255]]),
    ],
)
def test_the_labels_tell_what_masks_hold(coco, folder, ids, known):
    write_ids(coco / folder / "val2017" / "000000000009.png", ids)
    assert truth(open_coco(coco), "val2017") == known


def test_one_odd_mask_does_not_change_how_the_others_are_read(coco):
    write_ids(coco / "masks" / "val2017" / "000000000009.png", [[0, 90], [1, 1]])
    write_ids(coco / "masks" / "val2017" / "000000000025.png", [[ELEPHANT + 1, 22], [22, 0]])
    assert truth(open_coco(coco), "val2017") == [[0, 80], [1, 1]]


def test_what_masks_hold_can_be_said(coco):
    write_ids(coco / "masks" / "val2017" / "000000000009.png", [[27, 0], [0, 0]])
    assert truth(open_coco(coco, ids="original"), "val2017")[0] == [25, 0]
    assert truth(open_coco(coco, ids="contiguous"), "val2017")[0] == [27, 0]
    assert truth(open_coco(coco, ids="stuff"), "val2017") == [[26, 1], [1, 1]]


@pytest.mark.usefixtures("no_shape_checks")
def test_unknown_ids_of_coco_are_refused(coco):
    with pytest.raises(ValueError, match='"original" or "stuff", got "91"'):
        open_coco(coco, ids="91")


def test_coco_without_labels_takes_them_from_contiguous_masks(coco):
    (coco / "annotations" / "instances_val2017.json").unlink()
    write_ids(coco / "masks" / "val2017" / "000000000009.png", CONTIGUOUS)
    write_ids(coco / "masks" / "val2017" / "000000000025.png", [[0, 0], [3, 0]])
    samples = open_coco(coco).split("val2017")
    assert [sample.classes for sample in samples] == [(PERSON, TOOTHBRUSH), (CAR,)]
    write_ids(coco / "masks" / "val2017" / "000000000025.png", [[0, 90], [3, 0]])
    with pytest.raises(DataError, match=r"holds the ids 90; allowed are 81 from 0 to 80 for 80"):
        open_coco(coco).split("val2017")


def test_coco_speaks_voc_when_asked(coco):
    content = instances({9: [PERSON, TRUCK, CAR], 25: [ELEPHANT]})
    write_json(coco / "annotations" / "instances_val2017.json", content)
    write_ids(coco / "masks" / "val2017" / "000000000009.png", [[1, 3], [8, 255]])
    data = open_coco(coco, voc=True)
    first, second = data.split("val2017")
    assert [VOC_CLASSES[index] for index in first.classes] == ["car", "person"]
    assert second.classes == ()
    assert truth(data, "val2017") == [[15, 7], [0, 255]]


def test_each_reading_of_voc_ends_at_its_own_class():
    numbers = list(COCO_IDS.values())
    forms = {ids: coco_form(ids, voc=True).ids for ids in ("contiguous", "original", "stuff")}
    for place, name in enumerate(COCO_CLASSES):
        known = next((i + 1 for i, v in enumerate(VOC_CLASSES) if VOC_IN_COCO[v] == name), 0)
        assert forms["contiguous"][place + 1] == known
        assert forms["original"][numbers[place]] == known
        assert forms["stuff"][numbers[place] - 1] == known


def test_panoptic_masks_are_read_segment_by_segment(coco):
    segments = [
        {"id": 70_000, "category_id": 90},  # toothbrush
        {"id": 300, "category_id": 1},  # person
        {"id": 7, "category_id": 200},  # stuff
    ]
    listing = {"annotations": [{"file_name": "000000000009.png", "segments_info": segments}]}
    write_json(coco / "annotations" / "panoptic_val2017.json", listing)
    mask = coco / "annotations" / "panoptic_val2017" / "000000000009.png"
    write_colours(mask, [[70_000, 300], [7, 0]])
    assert truth(open_coco(coco), "val2017") == [[80, 1], [0, 255]]
    segments[1]["iscrowd"] = 1
    write_json(coco / "annotations" / "panoptic_val2017.json", listing)
    assert truth(open_coco(coco), "val2017") == [[80, 255], [0, 255]]
    assert truth(open_coco(coco, crowds="objects"), "val2017") == [[80, 1], [0, 255]]
    write_colours(mask, [[70_000, 301], [7, 0]])
    with pytest.raises(DataError, match="holds the ids 301; allowed are 4 from 0 to 70000"):
        truth(open_coco(coco), "val2017")


def test_names_of_2014_have_labels_by_vector(tmp_path):
    for folder, name in (("train2014", "COCO_train2014_000000000009"), ("val2014", "b")):
        write_photo(tmp_path / "JPEGImages" / folder / f"{name}.jpg")
    vectors = {9: vector(44, 48, length=80), "b": vector(length=80)}
    write_vectors(tmp_path / "cls_labels_onehot.npy", vectors)
    data = open_dataset(tmp_path)
    assert data.splits == ("train2014", "val2014")
    assert data.split("train2014")[0].classes == (44, 48)
    assert data.split("val2014")[0].classes == ()


def test_a_photo_that_the_instances_list_must_be_there(coco):
    (coco / "val2017" / "000000000025.jpg").unlink()
    with pytest.raises(DataError, match=r"instances_val2017\.json lists 000000000025\.jpg, which"):
        open_coco(coco).split("val2017")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("panoptic_val2017.json", {"annotations": [{}]}, "is no list of COCO panoptic masks"),
    ],
)
def test_wrong_json_is_named(coco, file, content, words):
    write_json(coco / "annotations" / file, content)
    with pytest.raises(DataError, match=words):
        open_coco(coco).split("val2017")


def test_a_folder_without_photos_of_coco_is_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"holds no photos of COCO and no annotations; expected annotations/instances",
    ):
        open_coco(tmp_path)


@pytest.mark.parametrize(
    ("layout", "split"), [("voc", "train"), ("coco", "val2017"), ("imagenet_s", "validation")]
)
def test_a_relative_folder_stays_readable_when_the_working_directory_changes(
    layout, split, request, tmp_path, monkeypatch
):
    request.getfixturevalue(layout)
    monkeypatch.chdir(tmp_path)
    data = open_dataset(".")
    monkeypatch.chdir("/")
    assert all(sample.photo.is_file() for sample in data.split(split))
    assert all(sample.mask.is_file() for sample in data.split(split) if sample.mask)


# ImageNet-S


@pytest.fixture
def imagenet_s(tmp_path) -> Path:
    """Three classes of the official list, one of them without an image here."""
    categories = "n02012849\nn01443537\nn03126707\n"
    (tmp_path / "ImageNetS_categories_im50.txt").write_text(categories)
    for split, folder, name in (
        ("train-semi", "n01443537", "n01443537_10"),
        ("validation", "n03126707", "ILSVRC2012_val_00000001"),
        ("test", "n01443537", "ILSVRC2012_val_00000002"),
    ):
        write_photo(tmp_path / split / folder / f"{name}.JPEG")
    write_colours(
        tmp_path / "train-semi-segmentation" / "n01443537" / "n01443537_10.png",
        [[1, 0], [1000, 1]],
    )
    write_colours(
        tmp_path / "validation-segmentation" / "n03126707" / "ILSVRC2012_val_00000001.png",
        [[3, 0], [1000, 3]],
    )
    return tmp_path


def test_imagenet_s_counts_classes_by_sorted_wordnet_id(imagenet_s):
    data = open_dataset(imagenet_s)
    assert isinstance(data, ImageNetSFolder)
    assert data.splits == ("train-semi", "validation", "test")
    assert data.classes[0] == "goldfish, Carassius auratus"
    (sample,) = data.split("validation")
    assert sample.classes == (2,)
    assert truth(data, "validation") == [[3, 0], [255, 3]]
    (unmasked,) = data.split("test")
    assert (unmasked.mask, unmasked.classes) == (None, (0,))


def test_two_classes_of_one_name_are_told_apart(imagenet_s):
    # a bird and a machine
    assert open_imagenet_s(imagenet_s).classes[1:] == ("crane (n02012849)", "crane (n03126707)")


def test_ids_beyond_255_and_the_id_255_itself_are_classes(tmp_path):
    folders = [f"n{number:08d}" for number in range(919)]
    (tmp_path / "ImageNetS_categories_im919.txt").write_text("\n".join(folders))
    write_photo(tmp_path / "validation" / folders[299] / "a.JPEG")
    mask = tmp_path / "validation-segmentation" / folders[299] / "a.png"
    write_colours(mask, [[300, 255], [1000, 919]])
    data = open_imagenet_s(tmp_path)
    assert len(data.classes) == 919
    assert truth(data, "validation", classes=[254, 299]) == [[2, 1], [255, 0]]
    assert truth(data, "validation", classes=[918]) == [[0, 0], [255, 1]]
    with pytest.raises(ValueError, match="room for 254 classes, got 919; pass the classes of"):
        truth(data, "validation")


def test_a_part_of_imagenet_s_needs_the_list_of_all_classes(imagenet_s):
    (imagenet_s / "ImageNetS_categories_im50.txt").unlink()
    with pytest.raises(DataError, match="has 2 class folders, expected 50, 300 or 919; ids count"):
        open_imagenet_s(imagenet_s)


def test_fifty_class_folders_are_a_list_themselves(tmp_path):
    for number in range(50):
        write_photo(tmp_path / "validation" / f"n{number:08d}" / f"v{number}.JPEG")
    data = open_imagenet_s(tmp_path)
    assert data.classes == data.folders == tuple(f"n{number:08d}" for number in range(50))
    assert [sample.classes for sample in data.split("validation")] == [(i,) for i in range(50)]


def test_a_folder_that_is_no_class_is_named(imagenet_s):
    write_photo(imagenet_s / "validation" / "n00000001" / "x.JPEG")
    with pytest.raises(DataError, match="n00000001 is none of the 3 classes"):
        open_imagenet_s(imagenet_s).split("validation")


def test_a_folder_without_splits_is_no_imagenet_s(tmp_path):
    with pytest.raises(DataError, match="is no folder of ImageNet-S; expected train, train-semi"):
        open_imagenet_s(tmp_path)


def test_masks_in_colours_must_be_rgb(imagenet_s):
    mask = imagenet_s / "validation-segmentation" / "n03126707" / "ILSVRC2012_val_00000001.png"
    write_ids(mask, [[3, 0], [0, 3]])
    with pytest.raises(DataError, match="expected ids written as colours in an RGB PNG"):
        truth(open_imagenet_s(imagenet_s), "validation")


def test_some_classes_of_a_mask_can_be_asked(tmp_path):
    write_ids(tmp_path / "m.png", [[1, 2], [3, 255]])
    asked = read_mask(tmp_path / "m.png", size=(2, 2), num_classes=3, classes=[2, 0])
    assert torch.equal(asked, torch.tensor([[2, 0], [1, 255]]))
