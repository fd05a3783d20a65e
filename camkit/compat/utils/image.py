"""grad-cam's functions on pictures: preparing them, and laying maps over them."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from jaxtyping import Float, Real, UInt8
from torch import Tensor

from camkit.compat.missing import stand_in


def preprocess_image(
    img: Real[np.ndarray, "H W 3"],
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> Float[Tensor, "1 3 H W"]:
    """Turn a picture into the model's input.

    Args:
        img: the picture, floating-point in [0, 1] or uint8 in 0 to 255.
        mean: subtracted from each channel. grad-cam's default is 0.5; give the model's.
        std: each channel is divided by it.
    """
    values = torch.from_numpy(img.transpose(2, 0, 1).copy())[None]
    if values.dtype == torch.uint8:
        values = values / 255
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):  # NaN fails both
        raise ValueError(
            f"`img` must be uint8, or lie in [0, 1], got {img.dtype} from {low:g} to {high:g}"
        )
    centre, spread = (torch.tensor(each)[:, None, None] for each in (mean, std))
    return (values.float() - centre) / spread


def deprocess_image(img: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Turn gradients of pixels into a picture around grey: their mean is 0.5, their spread 0.1."""
    scaled = (img - img.mean()) / (img.std() + 1e-5) * 0.1 + 0.5
    return (scaled.clip(0.0, 1.0) * 255).astype(np.uint8)


def scale_cam_image(
    cam: Real[np.ndarray, "b h w"], target_size: tuple[int, int] | None = None
) -> Float[np.ndarray, "b H W"]:
    """Stretch each map to [0, 1], and resize it.

    Args:
        cam: maps of any scale.
        target_size: width and height; None leaves the size.
    """
    scaled = []
    for values in cam:
        stretched = values - values.min()
        stretched = (stretched / (1e-7 + stretched.max())).astype(np.float32)
        scaled.append(stretched if target_size is None else cv2.resize(stretched, target_size))
    return np.stack(scaled)


def show_cam_on_image(
    img: Float[np.ndarray, "H W 3"],
    mask: Float[np.ndarray, "H W"],
    use_rgb: bool = False,
    colormap: int = cv2.COLORMAP_JET,
    image_weight: float = 0.5,
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay a map over a picture, as grad-cam does (`camkit.paint.overlay_cam` is camkit's own).

    The brightest value of the mixture becomes 255. Unlike in grad-cam, a map outside [0, 1] is an
    error, because its colours would wrap around.

    Args:
        img: the picture in [0, 1].
        mask: the map in [0, 1], at the size of the picture.
        use_rgb: whether red is the first channel of the picture; otherwise blue is, as in OpenCV.
        colormap: a colour map of OpenCV.
        image_weight: weight of the picture, in [0, 1]; the map has the rest.
    """
    if not 0.0 <= image_weight <= 1.0:
        raise ValueError(f"`image_weight` must lie in [0, 1], got {image_weight}")
    if img.shape[:2] != mask.shape:
        raise ValueError(
            f"`mask` must have the size of the picture, {img.shape[0]}x{img.shape[1]}, got shape "
            f"{mask.shape}"
        )
    for name, values in (("img", img), ("mask", mask)):
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # NaN fails both
            raise ValueError(f"`{name}` must lie in [0, 1], got {low:g} to {high:g}")
    colours = cv2.applyColorMap((mask * 255).astype(np.uint8), colormap)
    colours = colours[:, :, ::-1] if use_rgb else colours
    mixed = image_weight * img + (1 - image_weight) * (colours.astype(np.float32) / 255)
    return (mixed / max(mixed.max(), 1e-7) * 255).astype(np.uint8)


def __getattr__(name: str) -> type:
    return stand_in(__name__, name)
