"""What the page draws of a view: masks at the size of the page, and the table of classes."""

from collections.abc import Sequence

import numpy as np
import torch

from camkit.app.explorer import View
from camkit.mask import to_mask
from camkit.method import Method
from camkit.ops.images import resize_cam
from camkit.result import mask_bits


def short_name(name: str) -> str:
    """Return the first of the synonyms of a class."""
    return name.split(",")[0]


def title_of(method: Method) -> str:
    """Return the names of the stages of a method."""
    stages = [stage for stage in (method.seed, method.edit, *method.refine) if stage is not None]
    return ", ".join(repr(stage).partition("(")[0] for stage in stages)


def class_names(view: View) -> list[str]:
    """Return the names of the classes that a view shows."""
    vocabulary = view.pipeline.vocabulary
    return [str(i) if vocabulary is None else vocabulary.names[i] for i in view.classes]


def mask_values(view: View) -> list[int]:
    """Return the value of each of these classes in masks."""
    vocabulary = view.pipeline.vocabulary
    return [i + 1 if vocabulary is None else vocabulary.value(i) for i in view.classes]


def mask_of(view: View, method: Method, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of a method at a size for the page."""
    cam = resize_cam(view.steps(method)[-1].cam, size).clamp(0, 1)
    values = mask_values(view)
    mask = to_mask(
        cam,
        torch.tensor([values], device=cam.device) - 1,
        background_score=method.background_score,
        bits=mask_bits(values),
    )
    return mask[0].cpu().numpy()


def table_headers(methods: int, *, known: bool) -> list[str]:
    """Return the headers of the columns of `table_rows`."""
    which = [""] if methods == 1 else [" A", " B"]
    return ["class", *(f"pixels{w}" for w in which), *(f"IoU{w}" for w in which if known)]


def table_rows(view: View, methods: Sequence[Method], truth: np.ndarray | None) -> list[list[str]]:
    """Return the share and, where the truth is known, the IoU of each class and method."""
    size = view.photo.size if truth is None else (truth.shape[0], truth.shape[1])
    masks = [mask_of(view, method, size) for method in methods]
    rows = []
    for name, value in zip(class_names(view), mask_values(view), strict=True):
        row = [short_name(name), *(f"{100 * (mask == value).mean():.1f} %" for mask in masks)]
        if truth is not None:
            row += [_iou(mask, truth, value) for mask in masks]
        rows.append(row)
    return rows


def _iou(mask: np.ndarray, truth: np.ndarray, value: int) -> str:
    counted = truth >= 0
    found, true = (mask == value) & counted, (truth == value) & counted
    union = (found | true).sum()
    return "no pixel" if union == 0 else f"{100 * (found & true).sum() / union:.1f}"
