"""Normalised pixels brought back to colours."""

import torch
from torch import Tensor

from camkit.tensors import RGB, Pixels

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, each one number a channel."""

NORMALISATIONS: dict[str, Normalisation] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

SLACK = 0.02  # resizing overshoots a little


def to_rgb(pixels: Pixels, normalisation: Normalisation | None = None) -> RGB:
    """Colours in [0, 1].

    Without a normalisation, the first of `NORMALISATIONS` that puts all values of the batch in
    range, and so uses most of it, is taken; where none does, each image is stretched to its own
    range. That is our rule: it tells 0..1 images, -1..1 images and ImageNet statistics apart as
    soon as a batch holds light and dark, and colour similarities need no more.
    """
    if normalisation is None:
        normalisation = detect_normalisation(pixels)
    if normalisation is None:
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        return (pixels - low) / (high - low).clamp_min(1e-6)
    mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in normalisation)
    return (pixels * std + mean).clamp(0, 1)


def detect_normalisation(pixels: Pixels) -> Normalisation | None:
    """The known normalisation that explains a batch; none where its values fit none."""
    if pixels.numel() == 0:
        return NORMALISATIONS["none"]
    low, high = _range(pixels)
    for mean, std in NORMALISATIONS.values():
        shift, scale = low.new_tensor(mean), low.new_tensor(std)
        darkest, lightest = low * scale + shift, high * scale + shift
        if darkest.min() >= -SLACK and lightest.max() <= 1 + SLACK:
            return mean, std
    return None


def _range(pixels: Tensor) -> tuple[Tensor, Tensor]:
    channels = pixels.detach().transpose(0, 1).flatten(1).to(torch.float32)
    return channels.amin(1), channels.amax(1)
