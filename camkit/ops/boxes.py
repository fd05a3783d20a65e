"""Boxes around the strong parts of class maps."""

import cv2
import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from camkit.tensors import Cam


def component_boxes(cam: Cam, share: float) -> Bool[Tensor, "b k h w"]:
    """Where the upright boxes around the connected strong parts of each map lie.

    Parts join along sides and corners. The boxes are those of CLIP-ES (Lin et al. 2023), which
    takes them at 0.4; ours reach the last row and column, of which it leaves out any box that
    touches them. A map without a positive score has no box.

    Args:
        cam: class scores.
        share: a score above this share of the map's largest is strong, in [0, 1).
    """
    check_share(share)
    top = cam.detach().amax((-2, -1), keepdim=True) if cam.numel() else cam.detach()
    strong = ((cam.detach() > share * top) & (top > 0)).flatten(0, 1).cpu().numpy()
    inside = np.zeros_like(strong)
    for plane, filled in zip(strong.astype(np.uint8), inside, strict=True):
        _, _, parts, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
        for left, up, width, height, _ in parts[1:]:  # the first is what is not strong
            filled[up : up + height, left : left + width] = True
    return torch.from_numpy(inside).view(cam.shape).to(cam.device)


def check_share(share: float) -> None:
    """Refuse a share that `component_boxes` cannot use."""
    if not 0.0 <= share < 1.0:
        raise ValueError(f"`boxes` must lie in [0, 1), got {share}")
