"""grad-cam's overlay: a map laid over a picture."""

import cv2
import numpy as np
from jaxtyping import Float, UInt8


def show_cam_on_image(
    img: Float[np.ndarray, "H W 3"],
    mask: Float[np.ndarray, "H W"],
    use_rgb: bool = False,
    colormap: int = cv2.COLORMAP_JET,
    image_weight: float = 0.5,
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay a map over a picture, as grad-cam does; `camkit.paint.overlay_cam` keeps the photo clear.

    The brightest value of the mixture becomes 255. Unlike in grad-cam, a map that leaves [0, 1] is
    refused, as its colours would start anew.

    Args:
        img: the picture in [0, 1].
        mask: the map in [0, 1], at the size of the picture.
        use_rgb: whether red comes first in the picture; blue does otherwise, as in OpenCV.
        colormap: one of OpenCV's.
        image_weight: of the picture, in [0, 1]; the map has the rest.
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
