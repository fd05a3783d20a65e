"""What a seed is, and what every seed does with the classes it is asked for."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.capture.record import Capture
from camkit.tensors import Cam, Classes

Seed: TypeAlias = Callable[[Capture, Classes], Cam]
"""``(capture, classes) -> cam``: maps of ``classes`` on the grid, at least 0, not normalised, zeros
where ``classes`` is -1. A frozen dataclass that states what it reads as ``requires`` (a
`camkit.capture.WatchSpec`), or a plain function, which may read everything."""


def check_classes(capture: Capture, classes: Classes, known: int | None) -> None:
    """Refuse classes that do not fit the capture.

    Args:
        capture: what the model showed.
        classes: int64, one row an image, padded with -1.
        known: how many classes there are; None where any number will do.
    """
    check_range(classes, capture.images, known)


def check_range(classes: Classes, images: int, known: int | None) -> None:
    """Refuse classes of another batch, or that do not exist.

    Args:
        classes: int64, one row an image, padded with -1.
        images: how many the batch has.
        known: how many classes there are; None where any number will do.
    """
    if classes.shape[0] != images:
        raise ValueError(
            f"`classes` must have one row per image ({images}), got {classes.shape[0]}"
        )
    if classes.shape[1] == 0:
        raise ValueError("`classes` must ask for at least one class, got none")
    low, high = int(classes.min()), int(classes.max())
    if low < -1 or (known is not None and high >= known):
        wrong = low if low < -1 else high
        top = "" if known is None else f" to {known - 1}"
        raise ValueError(f"`classes` must lie in 0{top} (or be -1 for none), got {wrong}")


def keep_asked(cam: Cam, classes: Classes) -> Cam:
    """Zero the maps of padded slots."""
    return cam.masked_fill((classes < 0)[:, :, None, None], 0.0)


def pick(scores: Float[Tensor, "b n C"], classes: Classes) -> Float[Tensor, "b k n"]:
    """Scores of the asked classes, class axis first."""
    index = classes.clamp_min(0)[:, None].expand(-1, scores.shape[1], -1)
    return scores.gather(2, index).mT


def class_gradients(
    capture: Capture, column: Int[Tensor, " b"], calls: Sequence[Attention]
) -> tuple[Tensor, ...]:
    """Gradient of one class score per image at the given attention calls, and nowhere else.

    Args:
        capture: a forward watched with ``gradients=True``.
        column: one class per image, -1 for none (its gradient is zero).
        calls: attention calls of the capture.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        chosen = capture.scores.gather(1, column.clamp_min(0)[:, None])[:, 0]
        total = chosen.masked_fill(column < 0, 0.0).sum()
        watched = [call.watched() for call in calls]
        return torch.autograd.grad(total, watched, retain_graph=True)
