"""Losses of published systems as functions of tensors, for any training script."""

from camkit.losses.text import (
    Suppression as Suppression,
    background_suppression_loss as background_suppression_loss,
    patch_text_loss as patch_text_loss,
    text_alignment_loss as text_alignment_loss,
)
from camkit.losses.toco import (
    Crops as Crops,
    class_contrast_loss as class_contrast_loss,
    patch_contrast_loss as patch_contrast_loss,
    patch_labels as patch_labels,
    uncertain_crops as uncertain_crops,
)
