"""Losses for hosts that are trained: small functions of tensors, whatever the host."""

from camkit.losses.background import (
    Suppression as Suppression,
    background_suppression_loss as background_suppression_loss,
)
from camkit.losses.class_token import (
    Crops as Crops,
    class_contrast_loss as class_contrast_loss,
    uncertain_crops as uncertain_crops,
)
from camkit.losses.patch_token import (
    patch_contrast_loss as patch_contrast_loss,
    patch_labels as patch_labels,
)
from camkit.losses.text import (
    patch_text_loss as patch_text_loss,
    text_alignment_loss as text_alignment_loss,
)
