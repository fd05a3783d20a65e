"""The models of transformers that take prompts: SAM, SAM-HQ, SAM 2, SAM 3's tracker, EdgeTAM."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from camkit.errors import CamkitError
from camkit.segmenters.batched import Frame, ModelSegmenter, PromptBatch

CLASSES = ("SamModel", "SamHQModel", "Sam2Model", "Sam3TrackerModel", "EdgeTamModel")
"""The classes of transformers that are recognised, and their subclasses."""


def is_of_transformers(value: object) -> bool:
    """Whether an object is one of `CLASSES`; imports nothing."""
    return any(
        kind.__name__ in CLASSES and kind.__module__.startswith("transformers.")
        for kind in type(value).__mro__
    )


@dataclass(frozen=True, eq=False)
class _Embedding:
    """A picture as the model reads it.

    Attributes:
        arguments: of the model, each of one image.
        frame: where the picture lies in the input.
        padded: whether the processor pads pictures, also if this one needs no padding.
    """

    arguments: dict[str, Any]
    frame: Frame
    padded: bool


class TransformersSegmenter(ModelSegmenter):
    """A promptable model of transformers.

    Args:
        model: one of `CLASSES`.
        processor: the processor or image processor of the model; None looks for it where the
            weights of the model come from, without asking a hub.

    Raises:
        CamkitError: the processor is not there.
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model)
        processor = _processor_of(model) if processor is None else processor
        self._images = getattr(processor, "image_processor", processor)
        if not callable(self._images) or not hasattr(self._images, "post_process_masks"):
            raise TypeError(
                f"`processor` must be the processor of {type(model).__name__}, got {processor!r}"
            )

    def features(self, embedding: _Embedding) -> Float[Tensor, "d h w"]:
        """Return the embedding of the picture alone, without the padding."""
        return embedding.frame.covered(_last(embedding.arguments["image_embeddings"])[0].float())

    def _embed(self, picture: UInt8[np.ndarray, "H W 3"]) -> _Embedding:
        inputs = self._images(
            images=picture, return_tensors="pt", input_data_format="channels_last"
        )
        place = next(self.model.parameters())
        pixels = inputs["pixel_values"].to(place.device, place.dtype)
        canvas = (pixels.shape[-2], pixels.shape[-1])
        resized = inputs.get("reshaped_input_sizes")
        size = (picture.shape[0], picture.shape[1])
        rows, cols = canvas if resized is None else map(int, resized[0])
        embeddings = self.model.get_image_embeddings(pixels)
        arguments = {"image_embeddings": embeddings}
        if isinstance(embeddings, tuple):  # SAM-HQ
            last, intermediate = embeddings
            arguments = {"image_embeddings": last, "intermediate_embeddings": intermediate}
        return _Embedding(arguments, Frame(size, (rows, cols), canvas), resized is not None)

    def _masks(self, embedding: _Embedding, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        frame, last = embedding.frame, _last(embedding.arguments["image_embeddings"])
        given: dict[str, Tensor] = {}
        count = 0
        if batch.points is not None and batch.labels is not None:
            points = torch.from_numpy(frame.places(batch.points)).float()
            given["input_points"] = points[:, None].to(last.device)
            given["input_labels"] = torch.from_numpy(batch.labels)[:, None].to(last.device)
            count = len(points)
        if batch.boxes is not None:
            corners = frame.places(batch.boxes.reshape(-1, 2, 2)).reshape(-1, 1, 4)
            given["input_boxes"] = torch.from_numpy(corners).float().to(last.device)
            count = len(corners)
        if batch.masks is not None:
            grid = (4 * last.shape[-2], 4 * last.shape[-1])
            given["input_masks"] = frame.on_grid(batch.masks.to(last.device), grid).to(last.dtype)
        # a mask belongs to an image and not to a point, so each prompt gets an image of its own
        images = {key: _repeated(value, count) for key, value in embedding.arguments.items()}
        answer = self.model(**images, **given, multimask_output=True)
        sizes: dict[str, Any] = {"original_sizes": [frame.size]}
        if embedding.padded:
            sizes["reshaped_input_sizes"] = [frame.resized]
            sizes["pad_size"] = {"height": frame.canvas[0], "width": frame.canvas[1]}
        masks = [answer.pred_masks[:, 0].float()]
        return self._images.post_process_masks(masks, **sizes)[0], answer.iou_scores[:, 0]


def _last(embeddings: Any) -> Tensor:
    """Return the coarsest level of an embedding, which prompts attend to."""
    return embeddings if isinstance(embeddings, Tensor) else embeddings[-1]


def _repeated(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value.expand(count, *value.shape[1:])
    return [_repeated(each, count) for each in value]


def _processor_of(model: Any) -> Any:
    from transformers import AutoProcessor

    name, kind = str(getattr(model, "name_or_path", "")), type(model).__name__
    way_out = "give it as well: PromptedRefine((model, processor))"
    if not name:
        raise CamkitError(f"this {kind} does not say where its processor is; {way_out}")
    try:
        return AutoProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CamkitError(f"no processor lies beside the weights of {name}; {way_out}") from error
