"""The model that comes with camkit: a small ViT for ImageNet, 8 bits a weight."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camkit.errors import DataError

DEMO_DEPTH = 9
"""Blocks of the model that comes with camkit; its teacher has twelve."""

DEMO_WEIGHTS = Path(__file__).parent / "vit_tiny_9_blocks_distilled.safetensors"

_SCALE = ".scale"
_LARGEST = 127.0


def demo_model() -> Any:
    """Make the model that comes with camkit; nothing is downloaded.

    It is a ViT of width 192, patch 16 and nine blocks with 1000 ImageNet outputs, trained by
    ``benchmarks/train_demo_model.py`` to do what timm's twelve-block ViT-Ti/16 of "How to train
    your ViT?" (Steiner et al., 2021) does. It is there to try camkit with: its maps come near the
    teacher's, but it often takes one thing for another; ``benchmarks/results/demo_model.json``
    says how often. Colours are normalised with mean and standard deviation 0.5, the defaults of
    `camkit.load_photo`; `imagenet_vocabulary` names the outputs.

    Returns:
        A timm ``VisionTransformer`` in evaluation mode, float32, for images of any size.

    Raises:
        DataError: the file with the weights is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = expand_rows(load_file(DEMO_WEIGHTS))
        model = blank_model()
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise DataError(f"{DEMO_WEIGHTS} cannot be read ({error}); install camkit again") from error
    return model.eval()


def blank_model() -> Any:
    """Make the model that comes with camkit with random weights, to be trained or filled."""
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=DEMO_DEPTH, dynamic_img_size=True)


def round_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round matrices and kernels to 8 bits with one scale a row, all else to half precision.

    Args:
        weights: a state dict of floats.

    Returns:
        int8 rows under their own names, their scales (float32) under ``name.scale``; float16 for
        biases, norms, positions and special tokens.
    """
    packed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not name.endswith("weight") or weight.ndim < 2:
            packed[name] = weight.half()
            continue
        rows = weight.float().flatten(1)
        scale = (rows.abs().amax(dim=1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        steps = (rows / scale[:, None]).round().clamp(-_LARGEST, _LARGEST)
        packed[name] = steps.to(torch.int8).view_as(weight)
        packed[name + _SCALE] = scale
    return packed


def expand_rows(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `round_rows`, but for the rounding.

    Returns:
        A state dict, float32.
    """
    weights = {}
    for name, values in packed.items():
        if name.endswith(_SCALE):
            continue
        weights[name] = values.float()
        if values.dtype == torch.int8:
            shape = (-1,) + (1,) * (values.ndim - 1)
            weights[name] *= packed[name + _SCALE].view(shape)
    return weights
