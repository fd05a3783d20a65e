"""Which preset suits a model of the command line, before any image is read."""

import torch

from camkit.cli.models import OpenedModel
from camkit.preset import PRESETS, Preset, suitable
from camkit.seed import Look


def preset_of(opened: OpenedModel) -> Preset:
    """What `camkit.wrap` would take, tried on a grey picture of the size photos will have."""
    size = opened.photos.size
    rows, cols = (size, size) if isinstance(size, int) else size
    step = opened.photos.multiple
    rows, cols = (max(1, round(side / step)) * step for side in (rows, cols))
    grey = torch.linspace(0, 1, cols).expand(1, 3, rows, cols)
    return suitable(PRESETS, Look(opened.model), grey * 2 - 1, grey)
