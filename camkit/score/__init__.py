"""Scores against true masks: confusion matrices, mean IoU, sweeps and how sure a gain is."""

from camkit.score.bootstrap import Gain, holm, paired_gain
from camkit.score.boundary import boundary_confusion, boundary_overlap
from camkit.score.boxes import BoxAccuracy, box_accuracy, box_hits, resize_boxes
from camkit.score.confusion import (
    ClassScore,
    Definition,
    class_iou,
    class_scores,
    class_table,
    confusion_matrix,
    mean_iou,
    percent,
    pixel_accuracy,
)
from camkit.score.sweep import (
    THRESHOLDS,
    Best,
    Curve,
    average_precision,
    best_threshold,
    sweep_confusions,
    threshold_curve,
)

__all__ = [
    "THRESHOLDS",
    "Best",
    "BoxAccuracy",
    "ClassScore",
    "Curve",
    "Definition",
    "Gain",
    "average_precision",
    "best_threshold",
    "boundary_confusion",
    "boundary_overlap",
    "box_accuracy",
    "box_hits",
    "class_iou",
    "class_scores",
    "class_table",
    "confusion_matrix",
    "holm",
    "mean_iou",
    "paired_gain",
    "percent",
    "pixel_accuracy",
    "resize_boxes",
    "sweep_confusions",
    "threshold_curve",
]
