"""Photos in every form that users hold, prepared as a model expects them.

path, PIL image, array, tensor, file -> to_photo(..., settings) -> Photo
model -> photo_settings -> PhotoSettings
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from io import BytesIO
from math import lcm
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from camkit.capture.host import find_patch_embeddings, patch_step
from camkit.errors import CamkitError
from camkit.levels import upright_rgb, upright_rgba
from camkit.photo import (
    Photo,
    PhotoSettings,
    load_photo,
    photo_from_array,
    read_levels,
)
from camkit.seeds.views import stated_size

PhotoLike: TypeAlias = Any
"""A `Photo`; the path of a file, its bytes or an open file; a PIL image; an array (rows, cols) or
(rows, cols, channels) as in `camkit.photo_from_array`; or a tensor, channels first. `to_photo` says
more."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ROUNDING = 0.02  # how far un-normalised colours may leave [0, 1]: bicubic filters overshoot


def photo_settings(model: nn.Module, given: Any = None, *, size: int = 384) -> PhotoSettings:
    """Return how a model expects its photos.

    Mean and standard deviation come from ``given``, or else from what the model states: timm's
    ``pretrained_cfg``, open_clip's ``preprocess_cfg``, the image processor saved beside a model of
    transformers, or torchvision's weights (all of whose ViTs use the values of ImageNet). A model
    with a fixed input size keeps it. The number of channels and the patch size are read from its
    patch embedding.

    Args:
        model: a Vision Transformer.
        given: a `PhotoSettings`, which is returned as it is; an image processor of transformers; a
            transform of torchvision, timm or open_clip, of which mean and standard deviation are
            taken; or a dict with ``mean`` and ``std``, and perhaps ``size``.
        size: long side of photos in pixels, for models that take any size.

    Raises:
        CamkitError: nothing states mean and standard deviation.
        TypeError: ``given`` is none of these.
    """
    if isinstance(given, PhotoSettings):
        return given
    embedding = next(iter(find_patch_embeddings(model).values()), None)
    channels = 3 if embedding is None else embedding.in_channels
    patch = patch_step(model)
    fixed = stated_size(model) if _has_fixed_size(model) else None
    stated = _given(given) if given is not None else _stated(model)
    if stated is None or "mean" not in stated or "std" not in stated:
        raise CamkitError(
            f"{type(model).__name__} does not state how its photos are normalised; give it, such "
            "as camkit.wrap(model, photos={'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, "
            "0.225)}) for ImageNet's values, or the transform or image processor it was trained "
            "with"
        )
    return PhotoSettings(
        size=stated.get("size") or fixed or size,
        mean=_per_channel(stated["mean"], channels),
        std=_per_channel(stated["std"], channels),
        multiple=16 if patch is None else lcm(*patch),
        channels=channels,
    )


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """Return one number per channel; a grey model gets the mean of three."""
    numbers = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    if len(numbers) == channels:
        return tuple(numbers)
    if channels == 1 or len(set(numbers)) == 1:
        return (sum(numbers) / len(numbers),) * channels
    raise CamkitError(
        f"the model takes {channels} channels, but its mean and std have {len(numbers)} numbers; "
        f"give {channels} of each: camkit.wrap(model, photos={{'mean': ..., 'std': ...}})"
    )


def _given(given: Any) -> dict[str, Any]:
    """Return the mean and standard deviation in what a user gives."""
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - {"mean", "std", "size"})
        if unknown:
            raise TypeError(f"`photos` has {unknown}; it may hold mean, std and size")
        return dict(given)
    if getattr(given, "image_mean", None) is not None:  # a processor of transformers
        normalises = getattr(given, "do_normalize", True)
        return {"mean": given.image_mean, "std": given.image_std} if normalises else _UNCHANGED
    parts = getattr(given, "transforms", None)
    steps = list(parts) if isinstance(parts, Sequence) else [given]
    for step in steps:  # Compose, a preset of torchvision, Normalize itself
        mean, std = getattr(step, "mean", None), getattr(step, "std", None)
        if mean is not None and std is not None:
            return {"mean": _numbers(mean), "std": _numbers(std)}
    if parts is not None:
        return _UNCHANGED
    raise TypeError(
        "`photos` must be a camkit.photo.PhotoSettings, an image processor, a transform, or a dict "
        f"with mean and std, got {given!r}"
    )


_UNCHANGED = {"mean": (0.0,), "std": (1.0,)}  # colours in [0, 1] as they are


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in torch.as_tensor(values, dtype=torch.float64).flatten()]


def _stated(model: nn.Module) -> dict[str, Any] | None:
    """Return the mean and standard deviation that a model states, or None."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(cfg, Mapping) and cfg.get("mean") is not None:  # timm
        return {"mean": cfg["mean"], "std": cfg["std"]}
    towers: tuple[Any, ...] = (model, getattr(model, "visual", None))  # open_clip
    for tower in towers:
        preprocess = getattr(tower, "preprocess_cfg", None)
        if isinstance(preprocess, Mapping) and preprocess.get("mean") is not None:
            return {"mean": preprocess["mean"], "std": preprocess["std"]}
        if getattr(tower, "image_mean", None) is not None:
            return {"mean": tower.image_mean, "std": tower.image_std}
    if type(model).__module__.startswith("torchvision."):
        return {"mean": _IMAGENET_MEAN, "std": _IMAGENET_STD}
    processor = _processor(getattr(getattr(model, "config", None), "_name_or_path", None))
    return None if processor is None else _given(processor)


def _processor(name: Any) -> Any:
    """Return the image processor saved beside a model of transformers, without any network."""
    if not isinstance(name, str) or not name:
        return None
    try:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(name, local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError, TypeError):
        return None  # none is saved there, or this version does not read it


def _has_fixed_size(model: nn.Module) -> bool:
    """Return whether a model takes images of one size only, as far as its library shows it."""
    if getattr(model, "dynamic_img_size", False):
        return False
    if getattr(getattr(model, "patch_embed", None), "strict_img_size", False):  # timm
        return True
    if type(model).__module__.startswith("torchvision."):
        return True
    towers: tuple[Any, ...] = (model, getattr(model, "visual", None))  # open_clip
    if any(hasattr(tower, "preprocess_cfg") or hasattr(tower, "image_mean") for tower in towers):
        return True
    # transformers: other sizes need an argument of the call
    return any("interpolate_pos_encoding" in _parameters(module) for module in model.modules())


def _parameters(module: nn.Module) -> Sequence[str]:
    try:
        return list(signature(module.forward).parameters)
    except (TypeError, ValueError):  # compiled code has none
        return ()


def as_photos(value: PhotoLike) -> list[PhotoLike] | None:
    """Return the photos in a list, tuple, or batch of arrays or tensors; None for a single one."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 4:
        return list(value)
    return None


def to_photo(value: PhotoLike, settings: PhotoSettings) -> Photo:
    """Prepare one photo for a model.

    Args:
        value: a `Photo`, which is returned as it is; the path of an image file, its bytes or an
            open file; a PIL image; an array, as in `camkit.photo_from_array`; or a tensor
            ``(channels, H, W)`` or ``(H, W)`` of uint8 or of floats in [0, 1]. A float tensor with
            other values must be pixels that were normalised with the model's mean and standard
            deviation, at a size that the model takes; they are used as they are.
        settings: size, mean, standard deviation and channels that the model expects.

    Raises:
        DataError: a file is missing or cannot be decoded.
        TypeError: ``value`` is no picture.
        ValueError: its values or its size do not suit.
    """
    if isinstance(value, Photo):
        return value
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(f"{value} is an address; download the photo first and give its path")
    arguments = settings.arguments()
    if isinstance(value, str | Path):
        return load_photo(value, **arguments)
    if isinstance(value, Image.Image):
        picture = upright_rgba(value) if settings.channels == 4 else upright_rgb(value)
        return photo_from_array(picture, **arguments)
    if isinstance(value, bytes | bytearray) or hasattr(value, "read"):
        return _from_bytes(value, settings)
    if isinstance(value, np.ndarray):
        return photo_from_array(value, **arguments)
    if isinstance(value, Tensor):
        return _from_tensor(value, settings)
    raise TypeError(
        "a photo must be a path, a PIL image, an array, a tensor or a camkit.Photo, or a list of "
        f"these, got {type(value).__name__}"
    )


def _from_bytes(value: Any, settings: PhotoSettings) -> Photo:
    file = BytesIO(value.read() if hasattr(value, "read") else value)
    read = read_levels(file, "the image", opacity=settings.channels == 4)
    for note in read.notes:
        warnings.warn(f"the image: {note}", stacklevel=3)
    return photo_from_array(read.levels, **settings.arguments())


def _from_tensor(tensor: Tensor, settings: PhotoSettings) -> Photo:
    tensor = tensor.detach().cpu()
    planes = tensor[None] if tensor.dim() == 2 else tensor
    if planes.dim() != 3:
        raise ValueError(
            f"a tensor must have shape (channels, H, W), got {tuple(tensor.shape)}; give several "
            "photos as a list, or as one tensor (b, channels, H, W)"
        )
    planes = planes.float() if planes.is_floating_point() else planes
    if planes.is_floating_point() and planes.numel() and not _in_unit_interval(planes, 0.0):
        return _from_pixels(planes, settings)
    array = planes.permute(1, 2, 0).contiguous().numpy()
    return photo_from_array(array, **settings.arguments())


def _from_pixels(pixels: Tensor, settings: PhotoSettings) -> Photo:
    """Take normalised pixels as they are, if the model's mean and std bring them to [0, 1]."""
    wrong = (
        f"a float tensor must hold colours in [0, 1], or {settings.channels} channels normalised "
        f"with the model's mean {settings.mean} and std {settings.std}; got shape "
        f"{tuple(pixels.shape)} from {float(pixels.min()):.3g} to {float(pixels.max()):.3g}"
    )
    if len(pixels) != settings.channels or not bool(pixels.isfinite().all()):
        raise ValueError(wrong)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (settings.mean, settings.std))
    colours = pixels * std + mean
    if not _in_unit_interval(colours, _ROUNDING):
        raise ValueError(wrong)
    size = (pixels.shape[1], pixels.shape[2])
    array = colours.clamp(0, 1).permute(1, 2, 0).contiguous().numpy()
    photo = photo_from_array(array, **(settings.arguments() | {"size": None, "multiple": 1}))
    return replace(photo, pixels=pixels[None], size=size)


def _in_unit_interval(values: Tensor, tolerance: float) -> bool:
    low, high = values.aminmax()
    return bool(low >= -tolerance) and bool(high <= 1 + tolerance)
