"""A model lent for one call: evaluation mode, outside inference mode, and back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, outside inference mode; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(mode=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
