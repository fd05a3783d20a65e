"""Data sets: image files with image-level labels, and masks to measure against."""

from camkit.data.camfiles import read_cam, write_cam
from camkit.data.camforms import CamFile
from camkit.data.folder import PlainFolder, open_folder
from camkit.data.imagenet import VOC_IN_IMAGENET
from camkit.data.layout import open_dataset
from camkit.data.sample import DataSet, Sample, mask_classes, read_mask
from camkit.data.shapes import SHAPE_CLASSES, draw_shapes, write_shapes
from camkit.data.voc import VOC_CLASSES, VOCFolder, open_voc

__all__ = [
    "SHAPE_CLASSES",
    "VOC_CLASSES",
    "VOC_IN_IMAGENET",
    "CamFile",
    "DataSet",
    "PlainFolder",
    "Sample",
    "VOCFolder",
    "draw_shapes",
    "mask_classes",
    "open_dataset",
    "open_folder",
    "open_voc",
    "read_cam",
    "read_mask",
    "write_cam",
    "write_shapes",
]
