"""Scores against true masks: confusion matrices, mean IoU, sweeps and significance of a gain."""

from camkit.score.bootstrap import (
    FEW_IMAGES as FEW_IMAGES,
    Gain as Gain,
    few_images as few_images,
    holm as holm,
    paired_gain as paired_gain,
)
from camkit.score.boxes import (
    BoxAccuracy as BoxAccuracy,
    box_accuracy as box_accuracy,
    box_hits as box_hits,
    resize_boxes as resize_boxes,
)
from camkit.score.confusion import (
    ClassScore as ClassScore,
    Definition as Definition,
    ScoreWarning as ScoreWarning,
    boundary_confusion as boundary_confusion,
    class_iou as class_iou,
    class_scores as class_scores,
    class_table as class_table,
    confusion_matrix as confusion_matrix,
    mean_iou as mean_iou,
    percent as percent,
    pixel_accuracy as pixel_accuracy,
)
from camkit.score.sweep import (
    THRESHOLDS as THRESHOLDS,
    Best as Best,
    Curve as Curve,
    average_precision as average_precision,
    best_threshold as best_threshold,
    sweep_confusions as sweep_confusions,
    threshold_curve as threshold_curve,
)
