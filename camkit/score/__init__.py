"""Scores against true masks: confusion matrices, mean IoU, sweeps and how sure a gain is."""

from camkit.score.bootstrap import Gain, paired_gain
from camkit.score.confusion import Definition, class_iou, confusion_matrix, mean_iou
from camkit.score.sweep import THRESHOLDS, Best, best_threshold, sweep_confusions

__all__ = [
    "THRESHOLDS",
    "Best",
    "Definition",
    "Gain",
    "best_threshold",
    "class_iou",
    "confusion_matrix",
    "mean_iou",
    "paired_gain",
    "sweep_confusions",
]
