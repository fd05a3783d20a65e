"""The predictors of segment-anything and sam2, and of packages with the same interface."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from camkit.segmenters.batched import Frame, ModelSegmenter, PromptBatch


def is_sam_predictor(value: object) -> bool:
    """Whether an object is used as ``segment_anything.SamPredictor`` is."""
    return _has(value, "set_image", "predict_torch", "transform", "model")


def is_sam2_predictor(value: object) -> bool:
    """Whether an object is used as ``sam2.sam2_image_predictor.SAM2ImagePredictor`` is."""
    return _has(value, "set_image", "predict", "_transforms", "_orig_hw", "model")


def _has(value: object, *names: str) -> bool:
    return not isinstance(value, type) and all(hasattr(value, name) for name in names)


@dataclass(frozen=True, eq=False)
class _Embedding:
    """The state of a predictor after ``set_image``, and where the picture lies in its input."""

    state: Mapping[str, Any]
    frame: Frame


class _PredictorSegmenter(ModelSegmenter):
    """A segmenter around a predictor, whose current image is the same afterwards.

    Args:
        predictor: holds the model.
    """

    def __init__(self, predictor: Any) -> None:
        super().__init__(predictor.model)
        self.predictor = predictor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.predictor).__name__})"

    def _embed(self, picture: UInt8[np.ndarray, "H W 3"]) -> _Embedding:
        with self._state(None):
            self.predictor.set_image(picture)
            return _Embedding(_values(self.predictor), self._frame(picture))

    @contextmanager
    def _state(self, state: Mapping[str, Any] | None) -> Iterator[None]:
        """Give the predictor a state for a while."""
        own = vars(self.predictor)
        before = dict(own)
        try:
            own.update(state or {})
            yield
        finally:
            own.clear()
            own.update(before)

    def _frame(self, picture: UInt8[np.ndarray, "H W 3"]) -> Frame:
        raise NotImplementedError


class SamPredictorSegmenter(_PredictorSegmenter):
    """``segment_anything.SamPredictor``, and others with its interface."""

    def features(self, embedding: _Embedding) -> Float[Tensor, "d h w"]:
        """Return the embedding of the picture alone, without the padding."""
        return embedding.frame.covered(embedding.state["features"][0].float())

    def _frame(self, picture: UInt8[np.ndarray, "H W 3"]) -> Frame:
        side = self.model.image_encoder.img_size
        rows, cols = self.predictor.input_size
        return Frame((picture.shape[0], picture.shape[1]), (rows, cols), (side, side))

    def _masks(self, embedding: _Embedding, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        size, transform = embedding.frame.size, self.predictor.transform
        given: dict[str, Tensor | None] = dict.fromkeys(
            ("point_coords", "point_labels", "boxes", "mask_input")
        )
        device = self.predictor.device
        if batch.points is not None:
            places = transform.apply_coords(batch.points, size)
            given["point_coords"] = torch.as_tensor(places, dtype=torch.float, device=device)
            given["point_labels"] = torch.as_tensor(batch.labels, dtype=torch.int, device=device)
        if batch.boxes is not None:
            boxes = transform.apply_boxes(batch.boxes, size)
            given["boxes"] = torch.as_tensor(boxes, dtype=torch.float, device=device)
        if batch.masks is not None:
            grid = tuple(self.model.prompt_encoder.mask_input_size)
            given["mask_input"] = embedding.frame.on_grid(batch.masks.to(device), grid)
        with self._state(embedding.state):
            masks, ious, _ = self.predictor.predict_torch(**given, multimask_output=True)
        return masks, ious


class SAM2PredictorSegmenter(_PredictorSegmenter):
    """``sam2.sam2_image_predictor.SAM2ImagePredictor``."""

    def features(self, embedding: _Embedding) -> Float[Tensor, "d h w"]:
        """Return the embedding of the picture."""
        return embedding.state["_features"]["image_embed"][0].float()

    def _frame(self, picture: UInt8[np.ndarray, "H W 3"]) -> Frame:
        side = self.model.image_size  # the picture is stretched to a square
        return Frame((picture.shape[0], picture.shape[1]), (side, side), (side, side))

    def _masks(self, embedding: _Embedding, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        mask_input = None
        if batch.masks is not None:
            grid = tuple(self.model.sam_prompt_encoder.mask_input_size)
            mask_input = embedding.frame.on_grid(batch.masks, grid).numpy()
        with self._state(embedding.state):
            masks, ious, _ = self.predictor.predict(
                batch.points, batch.labels, batch.boxes, mask_input, multimask_output=True
            )
        ious = np.atleast_2d(ious)  # the predictor drops the axis of a single prompt
        masks = masks.reshape(*ious.shape, *masks.shape[-2:])
        return torch.from_numpy(masks) > 0, torch.from_numpy(ious)


def _values(predictor: Any) -> dict[str, Any]:
    """Return the attributes of a predictor that are no modules."""
    return {k: v for k, v in vars(predictor).items() if not isinstance(v, nn.Module)}
