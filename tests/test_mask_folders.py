"""Folders of photos and masks: MMSegmentation, ADE20K, Cityscapes, flat ones; masks of any file."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camkit.data import MaskFolders, Reading, check_dataset, open_dataset, open_folder, open_mmseg
from camkit.data.sample import mask_ids, mask_values
from camkit.errors import DataError

TWO = [[0, 1, 2], [255, 2, 0]]


def write_photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(path)


def write_mask(path: Path, values=TWO, dtype=np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, np.array(values, dtype))
    else:
        Image.fromarray(np.array(values, dtype)).save(path)
    return path


def pair(root, photo, mask, values=TWO):
    write_photo(root / photo)
    return write_mask(root / mask, values)


def ids(data, split=None, place=0):
    sample = data.split(split or data.splits[0])[place]
    count = len(data.classes)
    return mask_ids(sample.mask, size=(2, 3), num_classes=count, form=sample.form).tolist()


@pytest.mark.parametrize(
    ("photo", "mask", "split"),
    [
        ("img_dir/train/a.jpg", "ann_dir/train/a.png", "train"),
        ("images/train/a.png", "masks/train/a.png", "train"),
        ("images/training/a.jpg", "annotations/training/a.png", "training"),
        ("images/val/a.tif", "labels/val/a.tif", "val"),
        ("train/images/a.jpg", "train/masks/a.png", "train"),
        ("leftImg8bit/val/x/x_1_leftImg8bit.png", "gtFine/val/x/x_1_gtFine_labelIds.png", "val"),
        ("img_dir/val/x_leftImg8bit.png", "ann_dir/val/x_gtFine_labelIds.png", "val"),
        ("images/a.JPG", "masks/a_mask.png", "all"),
        ("images/a.jpg", "masks/a.npy", "all"),
        ("images/a_image.jpg", "masks/a_gt.png", "all"),
        ("images/a.jpg", "masks/a-seg.png", "all"),
        ("images/one/a.jpg", "masks/one/a.png", "all"),
        ("Images/a.jpg", "Labels/a.png", "all"),
    ],
)
def test_masks_are_found_beside_their_photos(photo, mask, split, tmp_path):
    path = pair(tmp_path, photo, mask)
    data = open_dataset(tmp_path, layout="mmseg" if split in ("x",) else None)
    if split == "all" and "one/" in photo:
        assert data.splits == ("one",)
    else:
        assert data.splits == (split,)
    (sample,) = data.split(data.splits[0])
    assert (sample.mask, sample.classes) == (path, (0, 1))
    assert data.classes == ("class 1", "class 2")
    assert ids(data) == [[0, 1, 2], [-1, 2, 0]]


def test_the_plain_name_of_a_mask_goes_before_one_with_an_ending(tmp_path):
    pair(tmp_path, "images/a.jpg", "masks/a.png", [[1, 1, 1], [1, 1, 1]])
    write_mask(tmp_path / "masks" / "a_seg.png")
    (sample,) = open_dataset(tmp_path).split("all")
    assert sample.mask.name == "a.png"


def test_training_ids_go_before_the_other_files_of_cityscapes(tmp_path):
    for end, value in (("labelTrainIds", 0), ("labelIds", 7), ("instanceIds", 9), ("color", 9)):
        path = tmp_path / "gtFine" / "train" / "x" / f"x_1_gtFine_{end}.png"
        pair(tmp_path, "leftImg8bit/train/x/x_1_leftImg8bit.png", path, [[value] * 3] * 2)
    data = open_dataset(tmp_path, classes=["road", "sidewalk"])
    assert ids(data) == [[1, 1, 1], [1, 1, 1]]  # 0 is the first class
    assert any("0 is the first class" in sentence for sentence in data.describe())


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ("background", [[0, 1, 2], [-1, 2, 0]]),
        ("void", [[-1, 1, 2], [-1, 2, -1]]),
        ("class", [[1, 2, 3], [-1, 3, 1]]),
    ],
)
def test_what_0_means_can_be_said(zero, expected, tmp_path):
    pair(tmp_path, "img_dir/train/a.jpg", "ann_dir/train/a.png")
    data = open_dataset(tmp_path, zero=zero)
    assert ids(data) == expected
    assert len(data.classes) == (3 if zero == "class" else 2)


def test_an_assumption_about_0_is_said(tmp_path):
    pair(tmp_path, "img_dir/train/a.jpg", "ann_dir/train/a.png")
    said = open_dataset(tmp_path).describe()
    assert "0 is taken for background; if it is not, say so with zero (--zero)" in said
    assert any(sentence.startswith("2 classes (class 1, class 2): no file") for sentence in said)
    assert "img_dir/train: 1 photo; ann_dir/train: 1 mask" in said


def test_photos_without_masks_are_left_out_and_named(tmp_path):
    pair(tmp_path, "img_dir/train/a.jpg", "ann_dir/train/a.png")
    write_photo(tmp_path / "img_dir" / "test" / "b.jpg")
    data = open_dataset(tmp_path)
    assert data.splits == ("train",)
    assert "img_dir/test: photos without masks, left out" in data.describe()


def test_photos_beside_a_folder_of_photos_are_read_too(tmp_path):
    for name in ("a", "b", "c", "new/d", "new/a"):
        pair(tmp_path, f"images/{name}.jpg", f"masks/{name}.png")
    data = open_mmseg(tmp_path)
    names = [sample.name for sample in data.split("all")]
    assert sorted(names) == ["a", "b", "c", "d", "new/a"]
    masks = {sample.name: sample.mask for sample in data.split("all")}
    assert masks["new/a"] == tmp_path / "masks" / "new" / "a.png"


def test_photos_with_masks_beside_splits_are_refused(tmp_path):
    pair(tmp_path, "images/a.jpg", "masks/a.png")
    pair(tmp_path, "images/train/b.jpg", "masks/train/b.png")
    with pytest.raises(DataError, match="photos with masks beside the splits train; move these"):
        open_mmseg(tmp_path)


def test_photos_without_masks_beside_splits_are_named(tmp_path):
    write_photo(tmp_path / "images" / "a.jpg")
    pair(tmp_path, "images/train/b.jpg", "masks/train/b.png")
    data = open_mmseg(tmp_path)
    assert data.splits == ("train",)
    assert "images: 1 photo without masks, left out" in data.describe()


@pytest.mark.parametrize("layout", [None, "mmseg"])
@pytest.mark.parametrize("top", ["", "train/"])
def test_masks_that_are_jpeg_are_refused_by_name(top, layout, tmp_path):
    write_photo(tmp_path / f"{top}images" / "a.jpg")
    write_photo(tmp_path / f"{top}masks" / "a.jpg")
    words = rf"{top}masks/a\.jpg would be a mask, but JPEG and WebP are refused as masks"
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path, layout=layout)


def test_ade20k_names_its_classes_and_0_is_not_scored(tmp_path):
    pair(tmp_path, "images/training/ADE_train_1.jpg", "annotations/training/ADE_train_1.png")
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    rows += [
        f"{n}\t0.1\t1\t1\t1\t{name}" for n, name in enumerate(("wall", "building, edifice"), 1)
    ]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    data = open_dataset(tmp_path)
    assert data.classes == ("wall", "building")
    assert ids(data) == [[-1, 1, 2], [-1, 2, -1]]


@pytest.mark.parametrize(
    ("text", "classes", "first"),
    [
        (
            'metainfo = dict(classes=("background", "cat", "dog"), palette=[[0, 0, 0]])\n'
            "train = dict(reduce_zero_label=False)",
            ("cat", "dog"),
            [0, 1, 2],
        ),
        (
            "class Mine(BaseSegDataset):\n"
            "    METAINFO = dict(classes=('cat', 'dog'), palette=[])\n"
            "    def __init__(self, seg_map_suffix='.png', reduce_zero_label=True, **kwargs):\n"
            "        super().__init__(reduce_zero_label=reduce_zero_label, **kwargs)\n",
            ("cat", "dog"),
            [-1, 1, 2],
        ),
        ('metainfo = {"classes": ["road", "car", "tree"]}', ("road", "car", "tree"), [1, 2, 3]),
        ("CLASSES = ('cat', 'dog')\nreduce_zero_label = True\n", ("cat", "dog"), [-1, 1, 2]),
    ],
)
def test_classes_and_the_meaning_of_0_come_from_a_configuration(text, classes, first, tmp_path):
    pair(tmp_path, "img_dir/train/a.jpg", "ann_dir/train/a.png")
    (tmp_path / "dataset.py").write_text(text)
    data = open_dataset(tmp_path)
    assert data.classes == classes
    assert ids(data)[0] == first


def test_a_configuration_is_never_run(tmp_path):
    pair(tmp_path, "img_dir/train/a.jpg", "ann_dir/train/a.png")
    trap = "open('trap', 'w')"
    (tmp_path / "dataset.py").write_text(f"{trap}\nmetainfo = dict(classes=[{trap}])\n")
    assert open_dataset(tmp_path).classes == ("class 1", "class 2")
    assert not Path("trap").exists()
    (tmp_path / "dataset.py").write_text("def broken(")
    with pytest.raises(DataError, match=r"dataset\.py is no Python file"):
        open_dataset(tmp_path)


def test_classes_txt_names_the_classes(tmp_path):
    pair(tmp_path, "images/a.jpg", "masks/a.png")
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    assert open_dataset(tmp_path).classes == ("cat", "dog")


def test_lists_of_names_make_the_splits_of_a_flat_folder(tmp_path):
    for name in ("a", "b", "c"):
        pair(tmp_path, f"images/{name}.jpg", f"masks/{name}.png")
    for split, names in (("train", "a\nb\n"), ("val", "c\n")):
        (tmp_path / "splits").mkdir(exist_ok=True)
        (tmp_path / "splits" / f"{split}.txt").write_text(names)
    data = open_dataset(tmp_path)
    assert data.splits == ("train", "val")
    assert [sample.name for sample in data.split("train")] == ["a", "b"]


def test_a_photo_without_a_mask_is_an_error_of_its_own(tmp_path):
    pair(tmp_path, "images/a.jpg", "masks/a.png")
    write_photo(tmp_path / "images" / "b.jpg")
    first, second = open_dataset(tmp_path).entries("all")
    assert first.name == "a"
    assert "b.jpg has no mask in" in str(second)


def test_folders_with_photos_only_are_no_data_set(tmp_path):
    write_photo(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="is no known data set"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="holds no folders of photos and masks such as img_dir"):
        open_mmseg(tmp_path)


# 0 and 255, void, other values


@pytest.mark.parametrize("named", [True, False])
def test_masks_of_0_and_255_are_refused_and_can_be_explained(named, tmp_path):
    for name in ("a", "b"):
        pair(tmp_path, f"images/{name}.jpg", f"masks/{name}.png", [[0, 255, 255], [0, 0, 0]])
    if named:
        (tmp_path / "classes.txt").write_text("cell\n")
    words = r"none of the 2 masks.* shows a class, only background and ignored .*values=\{255: 1\}"
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path).split("all")
    data = open_dataset(tmp_path, values={255: 1})
    assert ids(data) == [[0, 1, 1], [0, 0, 0]]
    assert [sample.classes for sample in data.split("all")] == [(0,), (0,)]
    assert data.classes == (("cell",) if named else ("class 1",))
    assert check_dataset(data)  # the photos are equal; nothing else
    assert {finding.problem for finding in check_dataset(data)} == {"repeated"}


def test_another_value_than_255_may_be_void(tmp_path):
    pair(tmp_path, "images/a.jpg", "masks/a.png", [[0, 1, 254], [2, 254, 0]])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="holds the ids 254; allowed are 0 to 2 for 2 classes"):
        open_dataset(tmp_path).split("all")
    assert ids(open_dataset(tmp_path, void=[254])) == [[0, 1, -1], [2, -1, 0]]
    assert ids(open_dataset(tmp_path, void=[0, 254])) == [[-1, 1, -1], [2, -1, -1]]


def test_settings_that_a_layout_cannot_use_are_refused(tmp_path):
    pair(tmp_path, "images/a.jpg", "masks/a.png")
    (tmp_path / "labels.csv").write_text("image,labels\na,cat;dog\n")
    with pytest.raises(ValueError, match="is plain, whose files say what `classes`"):
        open_dataset(tmp_path, classes=["cat"])
    with pytest.raises(ValueError, match="got 'mseg'; did you mean 'mmseg'"):
        open_dataset(tmp_path, layout="mseg")
    assert isinstance(open_dataset(tmp_path, layout="mmseg"), MaskFolders)
    assert open_dataset(tmp_path) == open_folder(tmp_path)
    assert ids(open_dataset(tmp_path, void=[1, 255]))[0] == [0, -1, 2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": ("a", "a")}, "must be different names, got a, a"),
        ({"classes": ("background", "a")}, "must start with the first class, not the background"),
        ({"zero": "void", "values": {1: 1}}, "`values` already says what 0 means"),
        ({"values": {}}, "must map values of masks"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Reading(**settings)


# files of masks


@pytest.mark.parametrize(
    ("name", "dtype", "values"),
    [
        ("a.png", np.uint16, [[0, 1, 2], [65535, 255, 0]]),
        ("a.npy", np.int64, [[0, 1, 2], [-1, 255, 0]]),
        ("a.npy", np.uint8, [[0, 1, 2], [255, 255, 0]]),
        ("a.tif", np.uint8, [[0, 1, 2], [255, 255, 0]]),
        ("a.tif", np.uint16, [[0, 1, 2], [65535, 255, 0]]),
        ("a.tiff", np.int32, [[0, 1, 2], [-1, 65535, 0]]),
        ("a.bmp", np.uint8, [[0, 1, 2], [255, 255, 0]]),
    ],
)
def test_masks_may_be_files_of_whole_numbers(name, dtype, values, tmp_path):
    path = write_mask(tmp_path / name, values, dtype)
    form = open_form()
    assert form.read(path, num_classes=2).tolist() == [[0, 1, 2], [-1, -1, 0]]


def open_form():
    return Reading().form(2)


def test_with_many_classes_255_is_one_of_them(tmp_path):
    path = write_mask(tmp_path / "a.npy", [[0, 255, 300], [65535, -1, 0]], np.int32)
    assert open_form().read(path, num_classes=300).tolist() == [[0, 255, 300], [-1, -1, 0]]


def test_true_and_false_are_0_and_1(tmp_path):
    values = np.array([[True, False, True], [False, False, True]])
    np.save(tmp_path / "a.npy", values)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    for name in ("a.npy", "a.png", "a.tif"):
        assert mask_values(tmp_path / name).tolist() == values.astype(int).tolist()


def grey_png(path, bits, levels):
    """A grey PNG of less than 8 bits, packed as its specification says."""

    def chunk(name, data):
        check = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + check

    header = struct.pack(">IIBBBBB", len(levels), 1, bits, 0, 0, 0, 0)
    text = "".join(f"{level:0{bits}b}" for level in levels).ljust(8, "0")
    row = zlib.compress(b"\0" + int(text, 2).to_bytes(len(text) // 8, "big"))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(("bits", "levels"), [(1, [0, 1, 1]), (2, [0, 3, 2, 1]), (4, [0, 15])])
def test_grey_levels_of_few_bits_are_read_as_stored(bits, levels, tmp_path):
    grey_png(tmp_path / "a.png", bits, levels)
    assert mask_values(tmp_path / "a.png").tolist() == [levels]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), np.float32), "holds float32 of shape .* expected whole numbers"),
        (np.zeros((2, 3, 1), np.uint8), r"holds uint8 of shape \(2, 3, 1\)"),
        (np.array([{"a": 1}], object), "cannot be read as an array"),
    ],
)
def test_arrays_of_something_else_are_refused(array, words, tmp_path):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=words):
        mask_values(tmp_path / "a.npy")


def test_a_cut_array_is_refused(tmp_path):
    path = write_mask(tmp_path / "a.npy", TWO, np.int64)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="cannot be read as an array"):
        mask_values(path)


def test_lossy_masks_are_refused_with_the_reason(tmp_path):
    write_photo(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "a.jpg")
    write_mask(tmp_path / "masks" / "other.png")
    with pytest.raises(
        DataError, match=r"a\.jpg would be a mask, but JPEG and WebP are refused as masks"
    ):
        open_dataset(tmp_path, classes=["cat", "dog"]).split("all")
    Image.fromarray(np.array(TWO, np.uint8)).save(tmp_path / "b.tif", compression="jpeg")
    with pytest.raises(DataError, match="is a TIFF, whose compression changes class ids"):
        mask_values(tmp_path / "b.tif")


def test_a_file_of_several_pictures_is_no_mask(tmp_path):
    pages = [Image.fromarray(np.full((2, 3), n, np.uint8)) for n in (0, 1)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"a\.tif holds several pictures; expected one mask"):
        mask_values(tmp_path / "a.tif")


@pytest.mark.parametrize("zero", [None, "void", "class"])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
def test_minus_1_in_an_array_is_not_scored(zero, dtype, tmp_path):
    write_photo(tmp_path / "images" / "a.png")
    write_mask(tmp_path / "masks" / "a.npy", [[-1, 1, 2], [2, -1, 1]], dtype)
    data = open_dataset(tmp_path, zero=zero, classes=["a", "b", "c"])
    more = zero == "class"
    assert ids(data) == [[-1, 1 + more, 2 + more], [2 + more, -1, 1 + more]]


def test_camvid_is_read_by_the_colours_of_its_classes(tmp_path):
    rows = "name, r, g, b\nSky,128,128,128\nCar,64,0,128\nVoid,0,0,0\n"
    (tmp_path / "class_dict.csv").write_text(rows)
    colours = [[(128, 128, 128), (64, 0, 128), (0, 0, 0)], [(64, 0, 128)] * 3]
    write_photo(tmp_path / "train" / "0001TP_006690.png")
    write_mask(tmp_path / "train_labels" / "0001TP_006690_L.png", colours)
    data = open_dataset(tmp_path)
    assert (data.classes, data.splits) == (("Sky", "Car"), ("train",))
    assert data.split("train")[0].classes == (0, 1)
    assert ids(data) == [[1, 2, -1], [2, 2, 2]]
    assert "class_dict.csv: 2 classes by colour (Sky, Car)" in data.describe()
    with pytest.raises(ValueError, match=r"class_dict\.csv says what `void` would"):
        open_dataset(tmp_path, void=[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Sky,128,128,128\n", "expected the header name,r,g,b"),
        ("name,r,g,b\nSky,128,128\n", "line 2: expected a name and levels of 0 to 255"),
        ("name,r,g,b\nSky,1,2,3\nCar,1,2,3\n", "line 3: Car has the colour of a label above it"),
        ("name,r,g,b\nVoid,0,0,0\n", "names no class"),
    ],
)
def test_a_class_dict_that_names_no_colours_is_refused(text, words, tmp_path):
    pair(tmp_path, "images/a.png", "masks/a.png")
    (tmp_path / "class_dict.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path)
