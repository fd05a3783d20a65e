"""Data sets: image files with image-level labels, and masks to measure against."""

from camkit.data.camfiles import CamFile, read_cam, write_cam
from camkit.data.check import Finding, check_dataset, shared_images
from camkit.data.coco import (
    COCO_CLASSES,
    COCO_IDS,
    VOC_IN_COCO,
    CocoFolder,
    CocoIds,
    coco_form,
    open_coco,
)
from camkit.data.embedded import DEMO_CLASSES, DemoPhotos, demo_model, demo_photos
from camkit.data.folders import PlainFolder, open_dataset, open_folder
from camkit.data.imagenet import (
    IMAGENET_S_FORM,
    VOC_IN_IMAGENET,
    ImageNetSFolder,
    imagenet_vocabulary,
    open_imagenet_s,
)
from camkit.data.labels import LabelFile, read_label_names, read_label_vectors
from camkit.data.sample import VOC_FORM, DataSet, MaskForm, Sample, mask_classes, read_mask
from camkit.data.shapes import SHAPE_CLASSES, draw_shapes, write_shapes
from camkit.data.voc import VOC_CLASSES, VOCFolder, open_voc

__all__ = [
    "COCO_CLASSES",
    "COCO_IDS",
    "DEMO_CLASSES",
    "IMAGENET_S_FORM",
    "SHAPE_CLASSES",
    "VOC_CLASSES",
    "VOC_FORM",
    "VOC_IN_COCO",
    "VOC_IN_IMAGENET",
    "CamFile",
    "CocoFolder",
    "CocoIds",
    "DataSet",
    "DemoPhotos",
    "Finding",
    "ImageNetSFolder",
    "LabelFile",
    "MaskForm",
    "PlainFolder",
    "Sample",
    "VOCFolder",
    "check_dataset",
    "coco_form",
    "demo_model",
    "demo_photos",
    "draw_shapes",
    "imagenet_vocabulary",
    "mask_classes",
    "open_coco",
    "open_dataset",
    "open_folder",
    "open_imagenet_s",
    "open_voc",
    "read_cam",
    "read_label_names",
    "read_label_vectors",
    "read_mask",
    "shared_images",
    "write_cam",
    "write_shapes",
]
