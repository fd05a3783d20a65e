"""Class requests: the forms of ``classes=``, checked and turned into one padded tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.record import Capture, required_by
from camkit.printing import short_repr
from camkit.seeds.protocol import Seed, check_classes
from camkit.seeds.text import TextClasses
from camkit.tensors import Cam, Classes, Scores
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True)
class PredictedClasses:
    """Predict the classes of each image with the model's classifier, for images without labels.

    Attributes:
        threshold: probability from which a class counts as present; for ImageNet's groups the
            discounted one of `Vocabulary.for_guesses`.
        activation: makes probabilities of scores: "sigmoid" of each class, for a classifier trained
            with several classes per image, or "softmax" over all classifier outputs, summed within
            a class, for one class per image.
        least: number of most probable classes that are always present; with 0, an image may have
            no map.
    """

    threshold: float = 0.5
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    least: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"`threshold` must lie in (0, 1), got {self.threshold}")
        if self.activation not in ("sigmoid", "softmax"):
            raise ValueError(f'`activation` must be "sigmoid" or "softmax", got {self.activation}')
        if self.least < 0:
            raise ValueError(f"`least` must be at least 0, got {self.least}")

    def __call__(self, capture: Capture) -> Classes:
        """Return the classes of each image, most probable first, padded with -1."""
        scores = scores_for_guesses(capture.scores.detach().float(), capture)
        if self.activation == "sigmoid":
            probabilities = scores.sigmoid()
        else:
            outputs = scores if capture.outputs is None else capture.outputs.detach().float()
            probabilities = (scores - outputs.logsumexp(1, keepdim=True)).exp()
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        first = torch.arange(order.shape[1], device=order.device) < self.least
        present = (ordered >= self.threshold) | first
        return order.masked_fill(~present, -1)[:, : max(1, int(present.sum(1).max()))]


def scores_for_guesses(scores: Scores, capture: Capture) -> Scores:
    """Return the scores that first guesses compare, see `Vocabulary.for_guesses`."""
    vocabulary = capture.vocabulary
    return scores if vocabulary is None else vocabulary.for_guesses(scores)


Score: TypeAlias = Callable[[Float[Tensor, " o"]], Tensor]
"""A custom score to explain: one number from the outputs of one image, like grad-cam's targets."""

Item: TypeAlias = int | np.integer[Any] | str | Score
"""One class: an index, a name, or a custom score."""

ClassRequest: TypeAlias = (
    int
    | np.integer[Any]
    | str
    | np.ndarray
    | Sequence[Item | Sequence[Item] | Tensor]
    | Tensor
    | Callable[[Capture], Classes]
    | TextClasses
    | None
)
"""The forms of ``classes=``; `read_targets` lists them."""


@dataclass(frozen=True, eq=False)
class Targets:
    """A checked class request.

    Attributes:
        slots: int64, padded with -1; custom scores count down from -2. None if ``rule`` decides.
        functions: the custom scores.
        rule: returns the classes of a capture; None takes the most probable class.
    """

    slots: Classes | None
    functions: tuple[Score, ...] = ()
    rule: Callable[[Capture], Classes] | None = None

    __repr__ = short_repr

    def classes(self, capture: Capture) -> Classes:
        """Return the padded classes; custom scores are numbered behind the last known class.

        Raises:
            ValueError: a class does not exist, or ``rule`` does not return one row per image.
        """
        known = capture.class_count
        if self.slots is not None:
            if self.functions:
                known = capture.scores.shape[1]  # an error without scores
            slots = self.slots.to(capture.device)
            classes = torch.where(slots < -1, (known or 0) - 2 - slots, slots)
        elif self.rule is not None:
            classes = self.rule(capture).to(capture.device)
        else:
            classes = scores_for_guesses(capture.scores, capture).argmax(1, keepdim=True)
        known = None if known is None else known + len(self.functions)
        check_classes(classes, capture.images, known)
        return classes


def with_targets(seed: Seed, targets: Targets) -> Seed:
    """Extend a seed to the custom scores of ``targets``, if there are any.

    Raises:
        ValueError: there are custom scores, but the seed takes no gradients.
    """
    if not targets.functions:
        return seed
    spec = required_by(seed)
    if not (spec.gradients or spec.entering_gradients):
        raise ValueError(
            f"a custom score is differentiated, but {type(seed).__name__} takes no gradients; use "
            "GradientSeed or RelevanceSeed"
        )
    return _CustomScoreSeed(seed, targets.functions)


@dataclass(frozen=True)
class _CustomScoreSeed:
    """A seed that takes custom scores as classes, numbered behind the last known class."""

    seed: Seed
    functions: tuple[Score, ...]

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        known = capture.scores.shape[1]
        custom = classes >= known
        cam = self.seed(capture, classes.masked_fill(custom, -1))
        if not custom.any() or capture.outputs is None:
            return cam
        slots = classes - known
        samples = tuple(
            replace(sample, outputs=self._extended(sample.outputs, slots))
            for sample in capture.samples
        )
        outputs = self._extended(capture.outputs, slots)
        extended = replace(
            capture,
            outputs=outputs,
            samples=samples,
            vocabulary=None,
            custom=len(self.functions),
        )
        columns = (slots + capture.outputs.shape[1]).masked_fill(~custom, -1)
        return cam + self.seed(extended, columns)

    def _extended(self, outputs: Tensor | None, slots: Tensor) -> Float[Tensor, "b p"] | None:
        """Append the custom scores of each image to its outputs; zeros where not in ``slots``."""
        if outputs is None:
            return None
        rows = []
        with torch.inference_mode(mode=False), torch.enable_grad():
            for row, requested in zip(outputs, slots.tolist(), strict=True):
                values = [
                    _evaluate(function, row) if place in requested else row.new_zeros(())
                    for place, function in enumerate(self.functions)
                ]
                rows.append(torch.cat([row, torch.stack(values)]))
            return torch.stack(rows)


def _evaluate(function: Score, row: Tensor) -> Tensor:
    value: Any = function(row)  # a user's function may return anything
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ValueError(
            f"{name_of(function)} must return one number from the outputs of an image, computed by "
            f"torch functions that keep the graph, got {value!r}"
        )
    return value.reshape(()).to(row.dtype)


def read_targets(
    request: ClassRequest,
    *,
    images: int,
    known: int | None = None,
    vocabulary: Vocabulary | None = None,
    outputs: int | None = None,
) -> Targets:
    """Check a class request and turn it into `Targets`, before the model runs.

    Args:
        request: None for the most probable class; a number or a name for all images; for one image
            a list of numbers, names and custom scores (`Score`); for several images a list of such
            lists; an int64 tensor ``(b,)`` of one class each, or ``(b, k)`` padded with -1; labels
            ``(b, C)`` of bool, or of float zeros and ones; or a function of the capture, such as
            `PredictedClasses`.
        images: number of images in the batch.
        known: number of classes, if it is known before the model runs.
        vocabulary: resolves names.
        outputs: number of leading classes of the vocabulary that labels may be given for, if it has
            further ones.

    Raises:
        TypeError: the request has another form.
        ValueError: it does not fit the batch, or names a class that does not exist.
    """
    if vocabulary is not None:
        known = len(vocabulary)
    if request is None or (callable(request) and not isinstance(request, Tensor)):
        return Targets(None, rule=request)
    if isinstance(request, Tensor):
        columns = outputs if request.dim() == 2 and request.shape[1] == outputs else known
        classes = _of_tensor(request, images, columns)
        check_classes(classes, images, known)
        return Targets(classes)
    rows = _rows(request, images)
    functions = tuple(dict.fromkeys(item for row in rows for item in row if callable(item)))
    numbered = [_numbers(row, functions, vocabulary) for row in rows]
    width = max(map(len, numbered))
    slots = torch.tensor([row + [-1] * (width - len(row)) for row in numbered])
    check_classes(slots.clamp_min(-1), images, known)
    return Targets(slots, functions)


def _rows(request: Any, images: int) -> list[list[Any]]:
    """Return one list of items for each image."""
    if isinstance(request, Integral) and not isinstance(request, bool):
        return [[int(request)]] * images
    if isinstance(request, np.ndarray):
        request = request.tolist()
    if isinstance(request, str):
        return [[request]] * images
    if not isinstance(request, Sequence):
        raise TypeError(f"`classes` must be a list of names or indices, got {request!r}")
    lists = (Sequence, Tensor, np.ndarray)
    nested = [isinstance(item, lists) and not isinstance(item, str) for item in request]
    if not any(nested) and (images == 1 or not request):
        return [list(request)] * images
    if not all(nested) or len(request) != images:
        raise ValueError(
            f"`classes` must hold one list for each of {images} images, such as [[1], [4, 2]] (for "
            f"the same classes in each, [[1, 2]] * {images}); got {sum(nested)} lists among "
            f"{len(request)} items"
        )
    return [row.tolist() if isinstance(row, Tensor | np.ndarray) else list(row) for row in request]


def _numbers(
    row: list[Any], functions: Sequence[Score], vocabulary: Vocabulary | None
) -> list[int]:
    """Return the numbers of one image's items: class indices, and -2, -3, ... for functions."""
    row = [int(item) if isinstance(item, np.integer) else item for item in row]
    for item in row:
        if isinstance(item, bool) or not (isinstance(item, int | str) or callable(item)):
            raise TypeError(
                f"`classes` must hold numbers, names or functions of outputs, got {item!r}"
            )
    plain = [item for item in row if not callable(item)]
    if not plain and row:
        return [-2 - functions.index(item) for item in row]
    if vocabulary is not None:
        indices = vocabulary.resolve(plain)
    else:
        named = [item for item in plain if not isinstance(item, int)]
        if named:
            raise ValueError(
                f"{named[0]!r} is a name, but the pipeline has no vocabulary; use output indices, "
                "or pass `vocabulary=` to camkit.wrap; for CLIP, which compares images with texts, "
                "use camkit.seeds.TextClasses.from_prompts"
            )
        if not plain:
            raise ValueError("name at least one class, got none")
        indices = tuple(plain)
        if min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError(f"`classes` must be indices from 0, none twice, got {plain}")
    following = iter(indices)
    return [-2 - functions.index(item) if callable(item) else next(following) for item in row]


def _of_tensor(request: Tensor, images: int, known: int | None) -> Classes:
    """Return class indices; labels become the indices of their ones."""
    labels = request.dtype == torch.bool or request.is_floating_point()
    if labels and request.dim() == 1 and images == 1:
        request = request[None]
    if request.dim() != (2 if labels or request.dim() == 2 else 1) or len(request) != images:
        raise ValueError(
            f"`classes` must have one row per image ({images}), got a tensor of shape "
            f"{tuple(request.shape)}"
        )
    if not labels:
        return request.long() if request.dim() == 2 else request.long()[:, None]
    if not ((request == 0) | (request == 1)).all():
        raise ValueError(
            "labels must be 0 or 1; for probabilities use camkit.seeds.PredictedClasses, for text "
            "embeddings camkit.seeds.TextClasses"
        )
    if known is not None and request.shape[1] != known:
        raise ValueError(f"labels must have {known} columns, one per class, got {request.shape[1]}")
    present = request != 0
    first, order = present.byte().sort(dim=1, descending=True, stable=True)
    return order.masked_fill(first == 0, -1)[:, : max(1, int(present.sum(1).max()))]


def request_of(request: ClassRequest, images: Sequence[int]) -> ClassRequest:
    """Return the part of a request, which `read_targets` has accepted, for some of its images."""
    if isinstance(request, Tensor | np.ndarray):
        return request[list(images)]
    if isinstance(request, TextClasses) or not isinstance(request, Sequence):
        return request
    return [request[image] for image in images]


def name_of(function: Score) -> str:
    """Return the name of a custom score in results."""
    return str(getattr(function, "__name__", None) or repr(function))
