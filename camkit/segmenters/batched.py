"""What the adapters of all models share: prompts batched by form, masks brought to their grid."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from camkit.capture.modes import borrowed, measurement
from camkit.capture.parameters import device_of
from camkit.manifest import weights_hash
from camkit.printing import short_repr
from camkit.segmenters.protocol import Answers, Prompt

_TOGETHER = 8  # prompts in a batch: their masks take 100 MB at 1024 x 1024


@dataclass(frozen=True)
class Frame:
    """How a picture lies in the input of a model: resized, then padded at the right and below.

    Attributes:
        size: rows and columns of the picture.
        resized: rows and columns that the picture takes in the input.
        canvas: rows and columns of the input.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    canvas: tuple[int, int]

    def places(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        """Bring pixels of the picture, columns first, to the input."""
        rows, cols = (new / old for new, old in zip(self.resized, self.size, strict=True))
        return points.astype(np.float64) * np.array([cols, rows])

    def on_grid(self, masks: Float[Tensor, "n H W"], grid: tuple[int, int]) -> Tensor:
        """Bring mask prompts to the grid of a model; the padding takes the lowest value of each."""
        resized = F.interpolate(masks[:, None], self.resized, mode="bilinear", align_corners=False)
        padded = masks.amin((1, 2))[:, None, None, None].repeat(1, 1, *self.canvas)
        padded[:, :, : self.resized[0], : self.resized[1]] = resized
        return F.interpolate(padded, grid, mode="bilinear", align_corners=False)

    def covered(self, features: Float[Tensor, "d h w"]) -> Float[Tensor, "d _ _"]:
        """Cut an embedding of the input to the part that the picture covers."""
        rows, cols = (
            max(1, round(cells * part / whole))
            for cells, part, whole in zip(
                features.shape[1:], self.resized, self.canvas, strict=True
            )
        )
        return features[:, :rows, :cols]


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of one form, in pixels of the picture: each part is there for all, or for none."""

    points: Float[np.ndarray, "n p 2"] | None
    labels: Int[np.ndarray, "n p"] | None
    boxes: Float[np.ndarray, "n 4"] | None
    masks: Float[Tensor, "n H W"] | None

    __repr__ = short_repr

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> "PromptBatch":
        first = prompts[0]
        points, labels, boxes, masks = None, None, None, None
        if len(first.points):
            points = np.stack([prompt.points for prompt in prompts])
            labels = np.stack([prompt.positive for prompt in prompts]).astype(np.int64)
        if first.box is not None:
            boxes = np.array([prompt.box for prompt in prompts], dtype=np.float64)
        if first.mask is not None:
            planes = [np.asarray(prompt.mask, np.float32) for prompt in prompts]
            masks = torch.from_numpy(np.stack(planes))
        return cls(points, labels, boxes, masks)


class ModelSegmenter(ABC):
    """A segmenter that runs a model of torch, which it borrows.

    The model runs on its own device, in evaluation mode and without gradients. Its mode, flags,
    hooks and the random numbers are as before afterwards, also after an exception.

    Args:
        model: holds the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__})"

    def identity(self) -> str:
        """Return the class of the model and the hash of its weights."""
        return f"{type(self.model).__name__}, weights_sha256={weights_hash(self.model)}"

    def version(self) -> object:
        """Return what changes when weights are written to, or brought to another type or device."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        return hash(
            tuple(
                (id(each), each.dtype, each.device, None if each.is_inference() else each._version)
                for each in weights
            )
        )

    def embed(self, picture: UInt8[np.ndarray, "H W 3"]) -> Any:
        with self._running():
            return self._embed(picture)

    def masks(self, embedding: Any, prompts: Sequence[Prompt]) -> Answers:
        groups: dict[tuple[object, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):  # padded points would change the answers
            form = len(prompt.points), prompt.box is None, prompt.mask is None
            groups.setdefault(form, []).append(place)
        answers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        with self._running():
            for places in groups.values():
                for start in range(0, len(places), _TOGETHER):
                    part = places[start : start + _TOGETHER]
                    batch = PromptBatch.of([prompts[place] for place in part])
                    masks, ious = self._masks(embedding, batch)
                    arrays = masks.cpu().numpy(), ious.float().cpu().numpy()
                    answers |= dict(zip(part, zip(*arrays, strict=True), strict=True))
        masks_of, ious_of = zip(*(answers[place] for place in range(len(prompts))), strict=True)
        return np.stack(masks_of), np.stack(ious_of)

    @contextmanager
    def _running(self) -> Iterator[None]:
        device = device_of(self.model) or torch.device("cpu")
        with borrowed(self.model), measurement(device), torch.no_grad():
            yield

    @abstractmethod
    def _embed(self, picture: UInt8[np.ndarray, "H W 3"]) -> Any: ...

    @abstractmethod
    def _masks(self, embedding: Any, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Return bool masks ``(n, m, H, W)`` and predicted IoU ``(n, m)``."""
