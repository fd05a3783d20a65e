"""Layouts of tools: VOC's variants, CVAT's masks, LabelMe, YOLO, data sets of Hugging Face."""

import base64
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from camkit.data import (
    VOC_CLASSES,
    CvatArchives,
    check_dataset,
    open_cvat,
    open_dataset,
    open_huggingface,
    open_labelme,
    open_voc,
    open_yolo,
)
from camkit.data.drawn import filled
from camkit.data.labelme import shape_pixels
from camkit.data.sample import mask_ids
from camkit.errors import DataError
from camkit.mask import voc_colour, voc_palette

SIZE = (12, 16)
IDS = np.zeros(SIZE, np.uint8)
IDS[2:6, 3:9], IDS[8:11, 10:15], IDS[0] = 1, 2, 255


def write_photo(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (90, 120, 30)).save(path, **options)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def in_colours(ids=IDS) -> Image.Image:
    return Image.fromarray(np.array([voc_colour(n) for n in range(256)], np.uint8)[ids])


def ids(data, split=None, place=0):
    sample = data.split(split or data.splits[0])[place]
    count = len(data.classes)
    return mask_ids(sample.mask, size=SIZE, num_classes=count, form=sample.form)


KNOWN = np.where(IDS == 255, -1, IDS.astype(int))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CAMKIT_CACHE", str(folder))
    return folder


# VOC


@pytest.fixture
def voc(tmp_path) -> Path:
    write_photo(tmp_path / "JPEGImages" / "a.png")
    (tmp_path / "SegmentationClass").mkdir()
    in_colours().save(tmp_path / "SegmentationClass" / "a.png")
    write_text(tmp_path / "ImageSets" / "Segmentation" / "val.txt", "a\n")
    return tmp_path


def test_masks_in_the_colours_of_voc_are_its_ids(voc):
    data = open_dataset(voc)
    assert data.classes == VOC_CLASSES
    assert np.array_equal(ids(data), KNOWN)
    assert data.split("val")[0].classes == (0, 1)
    assert "val: 1 name, 1 mask in SegmentationClass, the colours of VOC's palette" in (
        data.describe()
    )


def test_a_colour_that_voc_does_not_have_is_shown(voc):
    odd = in_colours()
    odd.putpixel((0, 5), (1, 2, 3))
    odd.save(voc / "SegmentationClass" / "a.png")
    with pytest.raises(DataError, match=r"holds the colours \(1, 2, 3\), which VOC's palette does"):
        open_dataset(voc).split("val")


@pytest.mark.parametrize("line", ["a", "a.png", "/JPEGImages/a.png /SegmentationClass/a.png"])
def test_lists_may_name_files(voc, line):
    write_text(voc / "ImageSets" / "Segmentation" / "val.txt", f"{line}\n")
    (sample,) = open_voc(voc).split("val")
    assert (sample.name, sample.photo.name) == ("a", "a.png")


def test_photos_of_voc_may_have_any_suffix(voc):
    (voc / "JPEGImages" / "a.png").unlink()
    for name in ("a.JPG", "a.webp", "a.tif"):
        path = write_photo(voc / "JPEGImages" / name)
        assert open_voc(voc).split("val")[0].photo == path
        path.unlink()


def test_masks_of_voc_may_have_another_name_and_other_settings(voc):
    (voc / "SegmentationClass" / "a.png").unlink()
    np.save(voc / "SegmentationClass" / "a_mask.npy", np.where(IDS == 255, 0, IDS + 1))
    data = open_dataset(voc, classes=["ground", "cat", "dog"], void=[0])
    assert np.array_equal(ids(data), np.where(IDS == 255, -1, IDS.astype(int) + 1))


def test_voc_masks_of_0_and_255_are_refused(voc):
    mask = Image.fromarray(np.where(IDS == 1, 255, 0).astype(np.uint8))
    mask.save(voc / "SegmentationClass" / "a.png")
    with pytest.raises(DataError, match=r"none of the 1 masks of val shows a class.*255: 1"):
        open_dataset(voc).split("val")
    data = open_dataset(voc, classes=["cell"], values={255: 1})
    assert np.array_equal(ids(data), IDS == 1)


# CVAT

LABELMAP = """# label:color_rgb:parts:actions
background:0,0,0::
cat:250,50,83::
dog:51,221,255::
ignored:9,9,9::
"""
COLOURS = {0: (0, 0, 0), 1: (250, 50, 83), 2: (51, 221, 255), 255: (9, 9, 9)}


def cvat_mask() -> Image.Image:
    table = np.zeros((256, 3), np.uint8)
    for value, colour in COLOURS.items():
        table[value] = colour
    return Image.fromarray(table[IDS])


@pytest.fixture
def cvat(tmp_path) -> Path:
    write_text(tmp_path / "labelmap.txt", LABELMAP)
    write_text(tmp_path / "ImageSets" / "Segmentation" / "default.txt", "a\n")
    write_photo(tmp_path / "JPEGImages" / "a.jpg")
    (tmp_path / "SegmentationClass").mkdir()
    cvat_mask().save(tmp_path / "SegmentationClass" / "a.png")
    return tmp_path


def zipped(root: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(root))
    return path


def test_colours_of_cvat_are_the_classes_of_its_labelmap(cvat):
    data = open_dataset(cvat)
    assert (data.classes, data.splits) == (("cat", "dog"), ("default",))
    assert np.array_equal(ids(data), KNOWN)
    # the palette of a mask does not matter, its colours do
    palette = cvat_mask().convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(cvat / "SegmentationClass" / "a.png")
    assert np.array_equal(ids(open_dataset(cvat)), KNOWN)


def test_an_archive_of_cvat_is_read_as_it_is_downloaded(cvat, cache, tmp_path_factory, caplog):
    path = zipped(cvat, tmp_path_factory.mktemp("download") / "task.zip")
    data = open_dataset(path)
    assert isinstance(data, CvatArchives)
    assert (data.classes, data.splits) == (("cat", "dog"), ("task",))
    assert np.array_equal(ids(data), KNOWN)
    assert data.split("task")[0].photo.is_relative_to(cache)
    assert "unpacking 1 file to" in caplog.text
    caplog.clear()
    assert open_dataset(path.parent) == data
    assert not caplog.text  # once is enough
    assert check_dataset(data) == []


def test_photos_may_lie_beside_an_archive(cvat, tmp_path_factory):
    place = tmp_path_factory.mktemp("download")
    (cvat / "JPEGImages" / "a.jpg").unlink()
    zipped(cvat, place / "task.zip")
    with pytest.raises(DataError, match=r"default\.txt, line 1: .*a\.jpg does not exist"):
        open_dataset(place).split("task")
    photo = write_photo(place / "images" / "task" / "a.jpg")
    assert open_dataset(place).split("task")[0].photo == photo


def test_an_archive_cannot_write_outside_of_its_folder(cvat, tmp_path_factory):
    place = tmp_path_factory.mktemp("download")
    with zipfile.ZipFile(zipped(cvat, place / "task.zip"), "a") as archive:
        archive.writestr("SegmentationClass/../../../../trap.png", b"trap")
    with pytest.raises(DataError, match=r"holds .*trap\.png, which leaves its folder"):
        open_cvat(place / "task.zip")


def test_damaged_archives_are_named(cvat, tmp_path_factory):
    path = zipped(cvat, tmp_path_factory.mktemp("download") / "task.zip")
    content = bytearray(path.read_bytes())
    place = content.find(b"labelmap.txt") + 30
    content[place : place + 40] = b"x" * 40
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"task\.zip cannot be unpacked"):
        open_cvat(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat:250,50::\n", "line 1: expected name:red,green,blue::"),
        ("cat:250,50,300::\n", "line 1: expected name:red,green,blue::"),
        ("cat:1,1,1::\ndog:1,1,1::\n", "line 2: dog has the colour of a label above it"),
        ("background:0,0,0::\n", "names no class"),
    ],
)
def test_a_labelmap_that_names_no_colours_is_refused(cvat, text, words):
    write_text(cvat / "labelmap.txt", text)
    with pytest.raises(DataError, match=rf"labelmap\.txt.*{words}"):
        open_dataset(cvat)


# LabelMe


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **more}


def labelme(path: Path, *shapes, photo="a.jpg", **more) -> Path:
    content = {
        "version": "5.4.1",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": photo,
        "imageData": None,
        "imageHeight": SIZE[0],
        "imageWidth": SIZE[1],
        **more,
    }
    return write_text(path, json.dumps(content))


TRIANGLE = [[2.5, 1.5], [13.2, 4.0], [5.0, 10.7]]


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("polygon", TRIANGLE),
        ("rectangle", [[12.0, 9.5], [3.5, 2.0]]),
        ("circle", [[8.0, 6.0], [10.0, 8.0]]),
        ("oriented_rectangle", [[2, 2], [8, 2], [8, 6], [2, 6]]),
    ],
)
def test_shapes_are_drawn_as_labelme_draws_them(kind, points):
    picture = Image.new("L", SIZE[::-1])
    draw = ImageDraw.Draw(picture)
    corners = [tuple(point) for point in points]
    if kind == "rectangle":
        draw.rectangle([(3.5, 2.0), (12.0, 9.5)], outline=1, fill=1)
    elif kind == "circle":
        radius = 8**0.5
        draw.ellipse([8 - radius, 6 - radius, 8 + radius, 6 + radius], outline=1, fill=1)
    else:
        draw.polygon(corners, outline=1, fill=1)
    drawn = shape_pixels(shape("cat", points, kind), SIZE, "a")
    assert np.array_equal(drawn, np.array(picture) == 1)
    assert drawn.any()


def as_text(pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_folder_of_labelme_is_a_data_set(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_photo(tmp_path / "b.JPG")
    inside = np.array([[1, 0, 1], [0, 1, 0]], np.uint8)
    labelme(
        tmp_path / "a.json",
        shape("dog", [[0, 0], [15, 11]], "rectangle"),
        shape("cat", [[4, 5], [6, 6]], "mask", mask=as_text(inside)),
        shape("__ignore__", [[0, 0], [15, 0]], "rectangle"),
        shape("_background_", [[0, 11], [15, 11]], "rectangle"),
    )
    labelme(tmp_path / "b.json", photo="..\\pictures\\b.JPG")
    data = open_dataset(tmp_path)
    assert (data.classes, data.splits) == (("cat", "dog"), ("all",))
    a, b = data.split("all")
    assert (a.classes, b.classes) == ((0, 1), ())
    expected = np.full(SIZE, 2)
    expected[5:7, 4:7][inside == 1] = 1  # later shapes are on top
    expected[0], expected[11] = -1, 0
    assert np.array_equal(ids(data), expected)
    assert not ids(data, place=1).any()
    write_photo(tmp_path / "c.jpg")
    assert data.describe() == (
        "the labels in the files: 2 classes (cat, dog)",
        ".: 2 files of LabelMe, drawn as LabelMe draws them; later shapes are on top; 1 photo "
        "without a file left out",
    )


def test_labels_that_differ_in_spaces_or_unicode_form_are_one_class(tmp_path):
    points = [[3, 2], [9, 2], [9, 6], [3, 6]]
    labels = ("caf\u00e9", " cafe\u0301", "caf\u00e9 ")
    labelme(tmp_path / "a.json", *(shape(label, points) for label in labels))
    write_photo(tmp_path / "a.jpg")
    data = open_dataset(tmp_path)
    assert data.classes == ("caf\u00e9",)
    assert data.split("all")[0].classes == (0,)


def test_labels_txt_gives_the_order_of_the_classes_and_folders_are_splits(tmp_path):
    write_text(tmp_path / "labels.txt", "__ignore__\n_background_\ndog\ncat\n")
    for split in ("train", "val"):
        write_photo(tmp_path / split / "a.jpg")
        labelme(tmp_path / split / "a.json", shape("cat", TRIANGLE))
    data = open_dataset(tmp_path)
    assert (data.classes, data.splits) == (("dog", "cat"), ("train", "val"))
    assert data.split("val")[0].classes == (1,)
    assert open_dataset(tmp_path, classes=["cat"]).classes == ("cat",)
    assert [finding.problem for finding in check_dataset(data)] == ["shared"]


def test_annotations_of_labelme_may_lie_beside_the_folder_of_the_photos(tmp_path):
    photo = write_photo(tmp_path / "images" / "a.jpg")
    labelme(tmp_path / "json" / "a.json", shape("cat", TRIANGLE), photo="../images/a.jpg")
    (sample,) = open_dataset(tmp_path).split("json")
    assert sample.photo.samefile(photo)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (shape("cat", [[1, 1], [2, 2]], "line"), "shape 2: a line has no area; read are polygon"),
        (shape("cat", [[1, 1]], "point"), "shape 2: a point has no area"),
        (shape("cat", [[1, 1], [2, 2]]), "shape 2: a polygon cannot have 2 points"),
        (shape("cat", [[1, "x"]]), "shape 2: its points are no pairs of numbers"),
        (shape("cat", [[1, 1], [9e9, 2], [3, 3]]), "shape 2: a polygon has points far outside"),
        (shape("cat", [[1, 1], [2, 2]], "mask", mask="!"), "shape 2: its mask is no PNG"),
        (
            shape("cat", [[14, 1], [17, 2]], "mask", mask=as_text(np.ones((2, 4), np.uint8))),
            "shape 2: its mask lies outside of the photo",
        ),
    ],
)
def test_a_shape_that_cannot_be_drawn_is_named(entry, words, tmp_path):
    write_photo(tmp_path / "a.jpg")
    labelme(tmp_path / "a.json", shape("dog", TRIANGLE), entry)
    with pytest.raises(DataError, match=rf"a\.json, {words}"):
        ids(open_labelme(tmp_path))


@pytest.mark.parametrize(
    "text", ["{", "[null]", '{"shapes": [null], "imagePath": "a"}', "[" * 9999]
)
def test_one_damaged_file_of_labelme_hides_no_other(text, tmp_path):
    for name in ("a", "b"):
        write_photo(tmp_path / f"{name}.jpg")
        labelme(tmp_path / f"{name}.json", shape("cat", TRIANGLE), photo=f"{name}.jpg")
    write_text(tmp_path / "b.json", text)
    first, second = open_dataset(tmp_path).entries("all")
    assert first.name == "a"
    assert "b.json" in str(second)


def test_a_missing_photo_of_labelme_is_named(tmp_path):
    labelme(tmp_path / "a.json", shape("cat", TRIANGLE), imageData="abcd")
    with pytest.raises(DataError, match=r"names the photo a\.jpg, which holds its data in"):
        open_dataset(tmp_path).split("all")


# YOLO


def yolo(root: Path, text: str, names="[cat, dog]", lines="train: images/train\n") -> Path:
    write_photo(root / "images" / "train" / "a.jpg")
    write_text(root / "labels" / "train" / "a.txt", text)
    write_text(root / "data.yaml", f"{lines}nc: 2\nnames: {names}\n")
    return root


def outline(left, top, right, bottom):
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return " ".join(f"{x / SIZE[1]:.6f} {y / SIZE[0]:.6f}" for x, y in corners)


@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}", "\n- cat\n- dog"])
def test_outlines_of_yolo_are_shares_of_width_and_height(names, tmp_path):
    text = f"0 {outline(3, 2, 9, 6)}\n1 {outline(10, 8, 15, 11)}\n"
    data = open_dataset(yolo(tmp_path, text, names))
    assert (data.classes, data.splits) == (("cat", "dog"), ("train",))
    assert np.array_equal(ids(data), np.where(IDS == 255, 0, IDS))
    assert data.split("train")[0].classes == (0, 1)
    assert check_dataset(data) == []


def test_of_overlapping_outlines_the_smaller_is_on_top(tmp_path):
    small, large = f"1 {outline(4, 4, 6, 6)}\n", f"0 {outline(0, 0, 16, 12)}\n"
    expected = np.full(SIZE, 1)
    expected[4:6, 4:6] = 2
    assert np.array_equal(ids(open_dataset(yolo(tmp_path, small + large))), expected)


def test_a_pixel_is_inside_if_its_centre_is():
    ring = np.array([[0.6, 0.0], [4.5, 0.0], [4.5, 2.0], [0.6, 2.0]])  # centres 1.5 to 3.5
    assert filled([ring], (3, 6)).astype(int).tolist() == [[0, 1, 1, 1, 0, 0]] * 2 + [[0] * 6]
    both = filled([ring, ring], (3, 6))
    assert not both.any()  # even-odd


def test_outlines_that_leave_the_picture_are_cut():
    ring = np.array([[-9.0, -9.0], [20.0, -9.0], [20.0, 20.0], [-9.0, 20.0]])
    assert filled([ring], (3, 6)).all()


def test_boxes_of_yolo_give_labels_only(tmp_path):
    data = open_dataset(yolo(tmp_path, f"0 {outline(3, 2, 9, 6)}\n1 0.5 0.5 0.2 0.2\n"))
    (sample,) = data.split("train")
    assert (sample.mask, sample.classes) == (None, (0, 1))


def test_classes_of_yolo_may_be_written_with_a_point(tmp_path):
    data = open_dataset(yolo(tmp_path, f"1.0 {outline(3, 2, 9, 6)}\n"))
    assert data.split("train")[0].classes == (1,)


def test_an_outline_of_yolo_outside_of_its_photo_is_an_error(tmp_path):
    data = open_dataset(yolo(tmp_path, "0 3 2 9 2 9 6 3 6\n"))  # pixels, not shares
    with pytest.raises(DataError, match=r"a\.txt, line 1: its outline lies wholly outside"):
        ids(data)


def test_label_files_of_yolo_are_described_as_what_they_hold(tmp_path):
    data = open_dataset(yolo(tmp_path, "1 0.5 0.5 0.2 0.2\n"))
    assert data.describe()[1] == (
        "images/train: 1 photo; labels/train: 1 file with boxes: labels only, no masks"
    )
    write_photo(tmp_path / "images" / "train" / "b.jpg")
    write_text(tmp_path / "labels" / "train" / "b.txt", f"0 {outline(3, 2, 9, 6)}\n")
    write_text(tmp_path / "labels" / "train" / "lost.txt", f"0 {outline(3, 2, 9, 6)}\n")
    assert data.describe()[1] == (
        "images/train: 2 photos; labels/train: 1 file of outlines; of objects that overlap, the "
        "smaller is on top; 1 file with boxes: labels only, no masks; 1 file without a photo left "
        "out, such as lost.txt"
    )


def test_a_photo_without_labels_shows_nothing_and_has_no_mask(tmp_path):
    yolo(tmp_path, f"0 {outline(3, 2, 9, 6)}\n")
    write_photo(tmp_path / "images" / "train" / "b.jpg")
    write_photo(tmp_path / "images" / "train" / "c.jpg")
    write_text(tmp_path / "labels" / "train" / "c.txt", "")
    _, b, c = open_dataset(tmp_path).split("train")
    assert (b.mask, b.classes, c.classes) == (None, (), ())
    assert not ids(open_dataset(tmp_path), place=2).any()


@pytest.mark.parametrize(
    "lines",
    [
        "path: ../elsewhere\ntrain: images/train\n",
        "train: ../images/train\n",
        "train: images/train\nval: images/train\n",
    ],
)
def test_folders_of_yolo_are_found_as_trainers_find_them(lines, tmp_path):
    data = open_dataset(yolo(tmp_path, "", lines=lines))
    assert data.splits == ("train",)


def test_a_folder_for_train_and_val_is_what_its_own_name_says(tmp_path):
    yolo(tmp_path, f"0 {outline(3, 2, 9, 6)}\n", lines="train: images/val\nval: images/val\n")
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "val")
    (tmp_path / "labels" / "train").rename(tmp_path / "labels" / "val")
    data = open_dataset(tmp_path)
    assert data.splits == ("val",)
    assert data.split("val")[0].classes == (0,)


def test_a_file_that_names_no_folders_has_the_usual_ones(tmp_path):
    data = open_dataset(yolo(tmp_path, f"0 {outline(3, 2, 9, 6)}\n", lines=""))
    assert data.splits == ("train",)


def test_splits_of_roboflow_hold_images_and_labels(tmp_path):
    write_photo(tmp_path / "train" / "images" / "a.jpg")
    write_text(tmp_path / "train" / "labels" / "a.txt", f"1 {outline(3, 2, 9, 6)}\n")
    write_text(
        tmp_path / "data.yaml", "train: ../train/images\nval: ../valid/images\nnames: [a, b]"
    )
    data = open_dataset(tmp_path / "data.yaml")
    assert np.array_equal(ids(data), np.where(IDS == 1, 2, 0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2 0.1 0.1 0.2 0.1 0.2 0.2\n", "line 1: class 2 and 6 numbers; expected a class from 0"),
        ("0 0.1 0.1 0.2 0.1 0.2\n", "line 1: class 0 and 5 numbers"),
        ("\n0 a b\n", "line 2 holds other words than numbers"),
        ("0.5 0.1 0.1 0.2 0.1 0.2 0.2\n", "line 1 holds other words than numbers"),
        ("inf 0.1 0.1 0.2 0.1 0.2 0.2\n", "line 1 holds other words than numbers"),
    ],
)
def test_a_wrong_line_of_yolo_is_named(text, words, tmp_path):
    with pytest.raises(DataError, match=rf"a\.txt, {words}"):
        open_dataset(yolo(tmp_path, text)).split("train")
    yolo(tmp_path, "0 0.1 0.1 nan 0.1 0.2 0.2\n")
    with pytest.raises(DataError, match=r"a\.txt, line 1: a polygon has points far outside"):
        ids(open_dataset(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: [a", "is no YAML"),
        ("- a\n", "must hold names and the folders"),
        ("train: images/train\n", "names no classes from 0"),
        ("train: images/train\nnames: {1: a}\n", "names no classes from 0"),
        ("train: images/train\nnames: [[a]]\n", "names no classes from 0"),
        ("train: nowhere\nkpt_shape: [17, 3]\nnames: [a]\n", "has kpt_shape, so its labels are"),
        ("train: nowhere\nnc: 3\nnames: [a, b]\n", "says nc: 3, but names 2 classes; correct"),
        ("train: nowhere\nnames: [a]\n", "names no folder of photos that is there"),
        ("names: !!python/object/apply:os.system ['touch trap']\n", "is no YAML"),
    ],
)
def test_a_data_yaml_of_something_else_is_refused(text, words, tmp_path):
    write_text(tmp_path / "data.yaml", text)
    with pytest.raises(DataError, match=rf"data\.yaml {words}"):
        open_yolo(tmp_path)


# Hugging Face


def encoded(image: Image.Image, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def rows():
    """Two rows as `datasets` stores them: photos as JPEG, masks as PNG with a palette."""
    mask = Image.fromarray(IDS)
    mask.putpalette(voc_palette())
    photo = {"bytes": encoded(Image.new("RGB", SIZE[::-1]), "JPEG"), "path": "day/a.jpg"}
    other = {"bytes": encoded(Image.new("RGB", SIZE[::-1], "red")), "path": None}
    label = {"bytes": encoded(mask), "path": None}
    return [{"image": photo, "label": label}, {"image": other, "label": label}]


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow")


def write_parquet(arrow, path: Path, table, features=None) -> None:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    content = arrow.Table.from_pylist(table)
    if features is not None:
        text = json.dumps({"info": {"features": features}})
        content = content.replace_schema_metadata({"huggingface": text})
    parquet.write_table(content, path)


def test_parquet_of_images_and_masks_is_a_data_set(arrow, tmp_path, cache, caplog):
    write_parquet(arrow, tmp_path / "data" / "train-00000-of-00001.parquet", rows())
    data = open_dataset(tmp_path)
    assert (data.classes, data.splits) == (("class 1", "class 2"), ("train",))
    first, second = data.split("train")
    assert [first.name, second.name] == ["a", "row_000001"]
    assert first.photo.read_bytes() == rows()[0]["image"]["bytes"]  # not encoded again
    assert (first.photo.suffix, second.photo.suffix) == (".jpg", ".png")
    assert first.photo.is_relative_to(cache)
    assert np.array_equal(ids(data), KNOWN)
    assert "unpacking 1 file to" in caplog.text
    caplog.clear()
    assert open_dataset(tmp_path, classes=["cat", "dog"]).classes == ("cat", "dog")
    assert not caplog.text
    assert check_dataset(data) == []


def test_changed_files_are_unpacked_again(arrow, tmp_path):
    path = tmp_path / "data" / "train.parquet"
    write_parquet(arrow, path, rows())
    assert len(open_dataset(tmp_path).split("train")) == 2
    write_parquet(arrow, path, rows()[:1])
    assert len(open_dataset(tmp_path).split("train")) == 1


@pytest.mark.parametrize(
    ("names", "classes", "zero"),
    [
        ({"0": "background", "1": "cat", "2": "dog"}, ("cat", "dog"), 0),
        ({"1": "cat", "2": "dog"}, ("cat", "dog"), 0),
        ({"0": "wall", "1": "cat", "2": "dog"}, ("wall", "cat", "dog"), 1),
    ],
)
def test_id2label_names_the_classes(arrow, tmp_path, names, classes, zero):
    write_parquet(arrow, tmp_path / "data" / "val.parquet", rows())
    write_text(tmp_path / "id2label.json", json.dumps(names))
    data = open_dataset(tmp_path)
    assert data.classes == classes
    assert np.array_equal(ids(data), np.where(IDS == 255, -1, IDS.astype(int) + zero))


@pytest.mark.parametrize("text", ['{"1": "a", "3": "b"}', "[]", "{", '{"x": "a"}'])
def test_an_id2label_with_gaps_is_refused(arrow, text, tmp_path):
    write_parquet(arrow, tmp_path / "data" / "val.parquet", rows())
    write_text(tmp_path / "id2label.json", text)
    with pytest.raises(DataError, match=r"id2label\.json (must|is not JSON)"):
        open_huggingface(tmp_path)


def test_class_labels_without_masks_are_labels(arrow, tmp_path):
    table = [{"image": row["image"], "label": place} for place, row in enumerate(rows())]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    write_parquet(arrow, tmp_path / "data" / "train.parquet", table, features)
    data = open_dataset(tmp_path)
    assert data.classes == ("cat", "dog")
    assert [(s.mask, s.classes) for s in data.split("train")] == [(None, (0,)), (None, (1,))]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([{"text": "a"}], "has the columns text; expected an image column called image"),
        ([{"image": {"bytes": b"", "path": ""}}], "has neither a column of masks"),
        (
            [{"image": {"bytes": None, "path": "gone"}, "mask": {"bytes": b"x", "path": ""}}],
            "row 1",
        ),
    ],
)
def test_tables_of_something_else_are_refused_and_leave_nothing(
    arrow, table, words, tmp_path, cache
):
    write_parquet(arrow, tmp_path / "data" / "train.parquet", table)
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path)
    assert list((cache / "datasets").iterdir()) == []


def test_a_name_in_a_table_never_leaves_the_cache(arrow, tmp_path, cache):
    table = [{**row, "name": "../../../trap"} for row in rows()]
    write_parquet(arrow, tmp_path / "data" / "train.parquet", table)
    first, second = open_dataset(tmp_path).split("train")
    assert first.photo.is_relative_to(cache)
    assert first.photo.parent == second.photo.parent
    assert first.photo != second.photo
    outside = [tmp_path, *tmp_path.parents[:2], *cache.parents[:2]]
    assert [path for folder in outside for path in folder.glob("trap*")] == []


def test_damaged_parquet_is_named(arrow, tmp_path):
    write_text(tmp_path / "data" / "train.parquet", "PAR1 nothing")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read"):
        open_dataset(tmp_path)
