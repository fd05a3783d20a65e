"""The classes asked of each image, in whatever form, as one padded tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.record import Capture, required_by
from camkit.seeds.protocol import Seed, check_range
from camkit.tensors import Cam, Classes, Scores
from camkit.vocabulary import Vocabulary

Activation: TypeAlias = Literal["sigmoid", "softmax"]
"""How scores become probabilities: "sigmoid" of each class for a classifier trained with several an
image; "softmax" over all of its outputs, those of a class added up, for one class an image."""


def chances(scores: Scores, outputs: Tensor, activation: Activation) -> Scores:
    """Probability of every class.

    Args:
        scores: of the classes.
        outputs: of the classifier, all of them; classes may stand for several.
        activation: see `Activation`.
    """
    if activation == "sigmoid":
        return scores.sigmoid()
    return (scores - outputs.logsumexp(1, keepdim=True)).exp()


def check_chance(threshold: float, activation: str) -> None:
    """Refuse settings of a choice by probability."""
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"`threshold` must lie in (0, 1), got {threshold}")
    if activation not in get_args(Activation):
        raise ValueError(f'`activation` must be "sigmoid" or "softmax", got {activation}')


@dataclass(frozen=True)
class PredictedClasses:
    """The classes that the classifier itself sees in each image.

    Attributes:
        threshold: probability from which a class counts as present.
        activation: see `Activation`.
        least: so many of the likeliest count as present whatever their probability, so that no
            image goes without a map; 0 lets it.
    """

    threshold: float = 0.5
    activation: Activation = "sigmoid"
    least: int = 1

    def __post_init__(self) -> None:
        check_chance(self.threshold, self.activation)
        if self.least < 0:
            raise ValueError(f"`least` must be at least 0, got {self.least}")

    def __call__(self, capture: Capture) -> Classes:
        """Classes of each image, the likeliest first, padded with -1."""
        scores = capture.scores.detach().float()
        outputs = scores if capture.outputs is None else capture.outputs.detach().float()
        chance = chances(scores, outputs, self.activation)
        ordered, order = chance.sort(dim=1, descending=True, stable=True)
        first = torch.arange(order.shape[1], device=order.device) < self.least
        kept = (ordered >= self.threshold) | first
        return order.masked_fill(~kept, -1)[:, : max(1, int(kept.sum(1).max()))]


Score: TypeAlias = Callable[[Float[Tensor, " o"]], Tensor]
"""What is to be explained: one number of the outputs of one image, as grad-cam's targets are."""

Item: TypeAlias = int | str | Score
"""One class: an index, a name, or a score of one's own."""

ClassRequest: TypeAlias = Any
"""All that `read_targets` takes."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What is asked of a batch, checked; ready before the model runs.

    Attributes:
        slots: int64, padded with -1; scores of one's own count down from -2. None where the
            capture has to tell.
        functions: the scores of one's own.
        rule: names the classes once the model has run.
    """

    slots: Classes | None
    functions: tuple[Score, ...] = ()
    rule: Callable[[Capture], Classes] | None = None

    def classes(self, capture: Capture) -> Classes:
        """The padded classes; scores of one's own are numbered from the last known class on."""
        if self.slots is None:
            likeliest = self.rule or (lambda seen: seen.scores.argmax(1, keepdim=True))
            return likeliest(capture)
        known = capture.scores.shape[1] if self.functions else 0
        slots = self.slots.to(capture.scores.device) if self.functions else self.slots
        return torch.where(slots < -1, known - 2 - slots, slots)

    def reading(self, seed: Seed) -> Callable[[Capture, Classes], Cam]:
        """The seed, made to understand the classes of `classes`."""
        if not self.functions:
            return seed
        spec = required_by(seed)
        if not (spec.gradients or spec.entering_gradients):
            raise ValueError(
                f"a score of one's own is differentiated, and {type(seed).__name__} takes no "
                "gradients; use GradientSeed or RelevanceSeed"
            )
        return WithFunctions(seed, self.functions)


@dataclass(frozen=True)
class WithFunctions:
    """A seed that also takes scores of one's own, numbered from the last known class on."""

    seed: Seed
    functions: tuple[Score, ...]

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        known = capture.scores.shape[1]
        own = classes >= known
        cam = self.seed(capture, classes.masked_fill(own, -1))
        if not own.any() or capture.outputs is None:
            return cam
        slots = classes - known
        samples = tuple(
            replace(one, outputs=None if one.outputs is None else self._longer(one.outputs, slots))
            for one in capture.samples
        )
        outputs = self._longer(capture.outputs, slots)
        longer = replace(capture, outputs=outputs, samples=samples, vocabulary=None)
        asked = (slots + capture.outputs.shape[1]).masked_fill(~own, -1)
        return cam + self.seed(longer, asked)

    def _longer(self, outputs: Tensor, slots: Tensor) -> Float[Tensor, "b p"]:
        """The outputs, and behind them the scores where they are asked."""
        rows = []
        with torch.inference_mode(mode=False), torch.enable_grad():
            for row, asked in zip(outputs, slots.tolist(), strict=True):
                values = [
                    _number(function, row) if place in asked else row.new_zeros(())
                    for place, function in enumerate(self.functions)
                ]
                rows.append(torch.cat([row, torch.stack(values)]))
            return torch.stack(rows)


def _number(function: Score, row: Tensor) -> Tensor:
    value = function(row)
    whole: Any = value  # a user's function may return anything
    if not isinstance(whole, Tensor) or whole.numel() != 1 or not whole.requires_grad:
        raise ValueError(
            f"{name_of(function)} must make one number of the outputs of an image, by torch "
            f"functions that keep the graph, got {value!r}"
        )
    return value.reshape(()).to(row.dtype)


def read_targets(
    asked: ClassRequest,
    *,
    images: int,
    known: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> Targets:
    """Turn what is asked into `Targets`, or say what is wrong with it, before the model runs.

    Args:
        asked: None for the likeliest class; a number for all images; for one image a list of
            numbers, names and scores of one's own (`Score`); for several a list of such lists; an
            int64 tensor ``(b,)`` of one class each, or ``(b, k)`` padded with -1; labels ``(b, C)``
            of bool, or of float with zeros and ones alone; or a function of the capture, such as
            `PredictedClasses`.
        images: how many the batch has.
        known: how many classes there are, where that is known already.
        vocabulary: finds names.

    Raises:
        TypeError: it is none of these.
        ValueError: it is of another batch, or asks for what is not there.
    """
    if vocabulary is not None:
        known = len(vocabulary)
    if asked is None or (callable(asked) and not isinstance(asked, Tensor)):
        return Targets(None, rule=asked)
    if isinstance(asked, Tensor):
        classes = _of_tensor(asked, images, known)
        check_range(classes, images, known)
        return Targets(classes)
    rows = _rows(asked, images)
    functions = tuple(dict.fromkeys(item for row in rows for item in row if callable(item)))
    numbered = [_row(row, functions, vocabulary) for row in rows]
    width = max(map(len, numbered))
    slots = torch.tensor([row + [-1] * (width - len(row)) for row in numbered])
    check_range(slots.clamp_min(-1), images, known)
    return Targets(slots, functions)


def _rows(asked: Any, images: int) -> list[list[Any]]:
    """One list of items for each image."""
    if isinstance(asked, int) and not isinstance(asked, bool):
        return [[asked]] * images
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        raise TypeError(f"`classes` must be a list of names or indices, got {asked!r}")
    nested = [isinstance(item, Sequence | Tensor) and not isinstance(item, str) for item in asked]
    if any(nested):
        if not all(nested) or len(asked) != images:
            raise ValueError(
                f"`classes` must hold one list for each of {images} images, got "
                f"{sum(nested)} lists among {len(asked)} items"
            )
        return [row.tolist() if isinstance(row, Tensor) else list(row) for row in asked]
    if images > 1 and asked:
        raise ValueError(
            f"`classes` must say what is asked of which of {images} images: one list for each, "
            f"such as [[1], [4, 2]]; got {list(asked)!r}"
        )
    return [list(asked)] * images


def _row(row: list[Any], functions: Sequence[Score], vocabulary: Vocabulary | None) -> list[int]:
    """Numbers of the items of one image."""
    for item in row:
        if isinstance(item, bool) or not (isinstance(item, int | str) or callable(item)):
            raise TypeError(
                "`classes` must hold numbers, names or functions of the outputs of an image, got "
                f"{item!r}"
            )
    plain = [item for item in row if not callable(item)]
    found = iter(_indices(plain, vocabulary) if plain or not row else ())
    return [-2 - functions.index(item) if callable(item) else next(found) for item in row]


def _indices(items: list[int | str], vocabulary: Vocabulary | None) -> tuple[int, ...]:
    if vocabulary is not None:
        return vocabulary.resolve(items)
    named = [item for item in items if not isinstance(item, int)]
    if named:
        raise ValueError(
            f"{named[0]!r} is a name, but the pipeline has no vocabulary; ask by output index, "
            "or give camkit.wrap a `vocabulary=`"
        )
    if not items:
        raise ValueError("name at least one class, got none")
    indices = tuple(int(item) for item in items)
    if min(indices) < 0 or len(set(indices)) < len(indices):
        raise ValueError(f"`classes` must be indices from 0, none twice, got {list(indices)}")
    return indices


def _of_tensor(asked: Tensor, images: int, known: int | None) -> Classes:
    """Indices as they are; labels turned into indices."""
    labels = asked.dtype == torch.bool or asked.is_floating_point()
    if labels and asked.dim() == 1 and images == 1:
        asked = asked[None]
    if asked.dim() != (2 if labels or asked.dim() == 2 else 1) or len(asked) != images:
        raise ValueError(
            f"`classes` must have one row per image ({images}), got a tensor of shape "
            f"{tuple(asked.shape)}"
        )
    if not labels:
        return asked.long() if asked.dim() == 2 else asked.long()[:, None]
    if not ((asked == 0) | (asked == 1)).all():
        raise ValueError(
            "labels must be 0 or 1; for probabilities use camkit.seeds.PredictedClasses, for text "
            "embeddings camkit.seeds.TextClasses"
        )
    if known is not None and asked.shape[1] != known:
        raise ValueError(f"labels must tell of all {known} classes, got {asked.shape[1]}")
    shown = asked != 0
    order = torch.arange(asked.shape[1], device=asked.device).expand_as(shown)
    width = max(1, int(shown.sum(1).max()))
    first = order.masked_fill(~shown, asked.shape[1]).sort(1).values[:, :width]
    return first.masked_fill(first == asked.shape[1], -1)


def known_classes(model: nn.Module) -> int | None:
    """How many classes a model says it has, where one of its layers makes as many scores."""
    config: Any = getattr(model, "config", None)
    said: Any = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
    made = {
        getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return said if isinstance(said, int) and said > 0 and said in made else None


def name_of(function: Score) -> str:
    """What a score of one's own is called in results."""
    return str(getattr(function, "__name__", None) or repr(function))
