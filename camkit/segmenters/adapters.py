"""Any promptable segmenter as a `Segmenter`, found by what the object is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from camkit.errors import CamkitError
from camkit.segmenters.hugging_face import CLASSES, TransformersSegmenter, is_of_transformers
from camkit.segmenters.predictors import (
    SAM2PredictorSegmenter,
    SamPredictorSegmenter,
    is_sam2_predictor,
    is_sam_predictor,
)
from camkit.segmenters.protocol import Answers, Prompt, Segmenter

AskSegmenter: TypeAlias = Callable[[UInt8[np.ndarray, "H W 3"], Sequence[Prompt]], Any]
"""A function of your own: ``(picture, prompts) -> (masks, predicted IoU)``."""


class CallableSegmenter:
    """A function ``(picture, prompts) -> (masks, predicted IoU)``, which keeps no embedding.

    Args:
        ask: see `AskSegmenter`; shapes and types are those of `camkit.segmenters.Answers`.
    """

    def __init__(self, ask: AskSegmenter) -> None:
        self.ask = ask

    def __repr__(self) -> str:
        named = getattr(self.ask, "__qualname__", None)  # the repr of a function has an address
        return f"CallableSegmenter({named or repr(self.ask)})"

    def embed(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        return picture

    def masks(self, embedding: UInt8[np.ndarray, "H W 3"], prompts: Sequence[Prompt]) -> Answers:
        # a copy, because a function may draw on its picture
        return _arrays(self.ask(embedding.copy(), prompts), self)


def as_segmenter(value: Any) -> Segmenter:
    """Return a segmenter for a model, a predictor, an object with its methods, or a function.

    Args:
        value: a model of transformers (`SamModel`, `SamHQModel`, `Sam2Model`, `Sam3TrackerModel`,
            `EdgeTamModel`) whose processor lies beside its weights, or ``(model, processor)``;
            ``segment_anything.SamPredictor``; ``sam2.sam2_image_predictor.SAM2ImagePredictor``; a
            `Segmenter`; or a function as `AskSegmenter` says.

    Raises:
        CamkitError: the processor of the model is not there.
        TypeError: it is something else.
    """
    if isinstance(value, tuple | list) and len(value) == 2 and is_of_transformers(value[0]):
        return TransformersSegmenter(*value)
    if is_of_transformers(value):
        return TransformersSegmenter(value)
    if is_sam_predictor(value):
        return SamPredictorSegmenter(value)
    if is_sam2_predictor(value):
        return SAM2PredictorSegmenter(value)
    if isinstance(value, type):
        raise TypeError(f"`segmenter` must be an object, got the class {value.__name__}")
    if isinstance(value, Segmenter):
        return value
    if callable(value) and not isinstance(value, nn.Module):
        return CallableSegmenter(value)
    shown = _shown(value)
    raise TypeError(
        f"`segmenter` must be one of {', '.join(CLASSES)} of transformers, a SamPredictor, a "
        "SAM2ImagePredictor, an object with the methods of camkit.segmenters.Segmenter, or a "
        f"function (picture, prompts) -> (masks, ious), got {shown}; "
        'camkit.segmenters.PretrainedSegmenter("facebook/sam-vit-base") opens a model by its name'
    )


def _shown(value: Any) -> str:
    """Return a short text for an object; the repr of a model has a line for each module."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(each).__name__ for each in value)}"
    return repr(value) if isinstance(value, str | None) else f"{type(value).__name__}(...)"


def identity_of(segmenter: Segmenter) -> str:
    """Return a text that changes with the weights of a segmenter, as far as it says."""
    own = getattr(segmenter, "identity", None)
    return str(own()) if callable(own) else repr(segmenter)


@contextmanager
def errors_of(segmenter: Segmenter) -> Iterator[None]:
    """Name the segmenter in the errors of torch that it raises, but for a lack of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CamkitError(f"{segmenter!r} failed: {error}") from error


def ask(
    segmenter: Segmenter, embedding: Any, prompts: Sequence[Prompt], size: tuple[int, int]
) -> Answers:
    """Return the answers of a segmenter, checked.

    Raises:
        ValueError: masks or predicted IoU have another shape or type than `Answers`.
        CamkitError: the segmenter failed.
    """
    with errors_of(segmenter):
        answers = segmenter.masks(embedding, prompts)
    masks, ious = _arrays(answers, segmenter)
    wanted = (len(prompts), *size)
    if masks.ndim != 4 or (len(masks), *masks.shape[2:]) != wanted or not masks.shape[1]:
        raise ValueError(
            f"{segmenter!r} must return masks of shape ({wanted[0]} prompts, masks of each, "
            f"{size[0]} rows, {size[1]} columns), got {masks.shape}"
        )
    if masks.dtype != bool and not np.isin(masks, (0, 1)).all():
        raise ValueError(
            f"{segmenter!r} must return masks of 0 and 1, got {masks.dtype} up to "
            f"{masks.max():.4g}; compare logits with 0, or probabilities with 0.5"
        )
    if ious.shape != masks.shape[:2]:
        raise ValueError(
            f"{segmenter!r} must return a predicted IoU for each of {masks.shape[:2]} masks, got "
            f"{ious.shape}"
        )
    return masks.astype(bool), ious.astype(np.float64)


def _arrays(answers: Any, segmenter: Segmenter) -> tuple[np.ndarray, np.ndarray]:
    """Return masks and predicted IoU as arrays; tensors are welcome too."""
    if not isinstance(answers, tuple | list) or len(answers) != 2:
        count = f" of {len(answers)}" if isinstance(answers, tuple | list) else ""
        raise TypeError(
            f"{segmenter!r} must return masks and their predicted IoU, (masks, ious), got "
            f"{type(answers).__name__}{count}"
        )
    masks, ious = (
        _widened(each).cpu().numpy() if isinstance(each, torch.Tensor) else np.asarray(each)
        for each in answers
    )
    return masks, ious


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that numpy can hold: it has no bfloat16."""
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
