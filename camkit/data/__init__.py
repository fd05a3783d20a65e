"""Data sets: image files with image-level labels, and masks to measure against."""

from camkit.data.camfiles import CamFile as CamFile, read_cam as read_cam, write_cam as write_cam
from camkit.data.check import (
    Finding as Finding,
    check_dataset as check_dataset,
    shared_images as shared_images,
)
from camkit.data.coco import (
    COCO_CLASSES as COCO_CLASSES,
    CocoFolder as CocoFolder,
    open_coco as open_coco,
)
from camkit.data.cvat import CvatArchives as CvatArchives, open_cvat as open_cvat
from camkit.data.embedded import demo_model as demo_model, demo_photos as demo_photos
from camkit.data.exporting import (
    TARGETS as TARGETS,
    ExportSummary as ExportSummary,
    Target as Target,
    export as export,
)
from camkit.data.folders import PlainFolder as PlainFolder, open_folder as open_folder
from camkit.data.huggingface import (
    HuggingFaceFolder as HuggingFaceFolder,
    open_huggingface as open_huggingface,
)
from camkit.data.imagenet import (
    OBJECTS_IN_IMAGENET as OBJECTS_IN_IMAGENET,
    VOC_IN_IMAGENET as VOC_IN_IMAGENET,
    ImageNetSFolder as ImageNetSFolder,
    imagenet_vocabulary as imagenet_vocabulary,
    open_imagenet_s as open_imagenet_s,
)
from camkit.data.labelme import LabelMeFolder as LabelMeFolder, open_labelme as open_labelme
from camkit.data.labels import ImageLabels as ImageLabels, read_labels as read_labels
from camkit.data.layouts import (
    LAYOUTS as LAYOUTS,
    Layout as Layout,
    open_dataset as open_dataset,
)
from camkit.data.mmseg import MaskFolders as MaskFolders, open_mmseg as open_mmseg
from camkit.data.proposals import (
    ProposalFolder as ProposalFolder,
    read_proposals as read_proposals,
)
from camkit.data.reading import Reading as Reading
from camkit.data.sample import (
    DataSet as DataSet,
    Described as Described,
    MaskForm as MaskForm,
    MaskReader as MaskReader,
    Sample as Sample,
    read_mask as read_mask,
)
from camkit.data.shapes import (
    SHAPE_CLASSES as SHAPE_CLASSES,
    draw_shapes as draw_shapes,
    write_shapes as write_shapes,
)
from camkit.data.targets.plan import ExportOptions as ExportOptions
from camkit.data.voc import (
    VOC_CLASSES as VOC_CLASSES,
    VOCFolder as VOCFolder,
    open_voc as open_voc,
)
from camkit.data.yolo import YoloFolder as YoloFolder, open_yolo as open_yolo
