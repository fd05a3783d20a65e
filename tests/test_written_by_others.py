"""Data sets that other libraries write, read by camkit; each test needs the library that writes."""

import warnings

import numpy as np
import pytest

from camkit.data import SHAPE_CLASSES, open_dataset, write_shapes
from camkit.data.sample import mask_ids

SIZE = (48, 64)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), 8, size=SIZE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "cache"))


def ids_of(data, split):
    count = len(data.classes)
    return {
        sample.name: mask_ids(sample.mask, size=SIZE, num_classes=count, form=sample.form)
        for sample in data.split(split)
    }


def equal_share(shapes, data, split):
    """The share of equal pixels; classes are compared by name."""
    table = np.array([0, *(data.classes.index(name) + 1 for name in SHAPE_CLASSES)])
    found = ids_of(data, split)
    shares = [np.mean(found[name] == table[ids]) for name, ids in ids_of(shapes, "train").items()]
    return np.mean(shares)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("several", [True, False])
def test_datasets_saved_to_disk(shapes, tmp_path, several):
    datasets = pytest.importorskip("datasets", reason="writes Arrow files")
    samples = shapes.split("train")
    table = {
        "image": [str(sample.photo) for sample in samples],
        "annotation": [str(sample.mask) for sample in samples],
        "name": [sample.name for sample in samples],
    }
    image, text = datasets.Image(), datasets.Value("string")
    features = datasets.Features({"image": image, "annotation": image, "name": text})
    written = datasets.Dataset.from_dict(table, features=features)
    if several:
        written = datasets.DatasetDict(train=written)
    written.save_to_disk(tmp_path / "saved")
    data = open_dataset(tmp_path / "saved", classes=SHAPE_CLASSES)
    assert equal_share(shapes, data, "train" if several else "all") == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["coco", "yolo"])
def test_polygons_of_supervision(shapes, tmp_path, layout):
    pytest.importorskip("pycocotools")
    supervision = pytest.importorskip("supervision", reason="writes COCO and YOLO")
    found = {}
    for sample in shapes.split("train"):
        ids = ids_of(shapes, "train")[sample.name]
        values = [value for value in np.unique(ids) if value > 0]
        masks = np.array([ids == value for value in values])
        found[str(sample.photo)] = supervision.Detections(
            xyxy=supervision.mask_to_xyxy(masks).astype(float),
            mask=masks,
            class_id=np.array(values) - 1,
        )
    written = supervision.DetectionDataset(list(SHAPE_CLASSES), list(found), found)
    if layout == "coco":
        written.as_coco(str(tmp_path / "images"), str(tmp_path / "annotations.json"))
    else:
        folders = (str(tmp_path / folder / "train") for folder in ("images", "labels"))
        written.as_yolo(*folders, str(tmp_path / "data.yaml"))
    data = open_dataset(tmp_path)
    # its outlines go through the centres of pixels, so they lose half a pixel on each side
    assert equal_share(shapes, data, data.splits[0]) > 0.95


@pytest.mark.parametrize(
    ("format_name", "options", "split"),
    [
        ("voc_segmentation", {"apply_colormap": True, "label_map": "source"}, "train"),
        ("coco_instances", {}, "train"),
    ],
)
def test_masks_of_datumaro_whose_formats_are_those_of_cvat(
    shapes, tmp_path, format_name, options, split
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datumaro = pytest.importorskip("datumaro", reason="writes CVAT's formats")
        from datumaro.components.media import Image

        labels = ["background", *SHAPE_CLASSES]
        colours = dict(enumerate([(0, 0, 0), (250, 50, 83), (51, 221, 255), (36, 179, 83)]))
        categories = {
            datumaro.AnnotationType.label: datumaro.LabelCategories.from_iterable(labels),
            datumaro.AnnotationType.mask: datumaro.MaskCategories(colours),
        }
        items = []
        for sample in shapes.split("train"):
            ids = ids_of(shapes, "train")[sample.name]
            masks = [
                datumaro.Mask(ids == value, label=int(value), id=number, group=number)
                for number, value in enumerate(np.unique(ids))
                if value > 0
            ]
            photo = Image.from_file(path=str(sample.photo))
            item = datumaro.DatasetItem(sample.name, subset="train", annotations=masks, media=photo)
            items.append(item)
        written = datumaro.Dataset.from_iterable(items, categories=categories, media_type=Image)
        written.export(str(tmp_path / "out"), format_name, save_media=True, **options)
    assert equal_share(shapes, open_dataset(tmp_path / "out"), split) == 1
