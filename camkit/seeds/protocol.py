"""What a seed is, and what every seed does with the classes it is asked for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.capture.record import Capture, TokenWatch, joined
from camkit.tensors import Cam, Classes


@runtime_checkable
class Seed(Protocol):
    """Turns a capture into the first class maps."""

    @property
    def gradients(self) -> bool:
        """Whether the forward must be watched with ``gradients=True``."""

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        """Maps of ``classes`` on the grid, at least 0, not normalised; zeros where padded."""


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


class Needs(TypedDict):
    """Settings of `camkit.watch`."""

    gradients: bool
    tokens: TokenWatch | None


@runtime_checkable
class TokenSeed(Seed, Protocol):
    """A seed that reads tokens, and says which."""

    @property
    def tokens(self) -> TokenWatch:
        """What must be kept of them."""


def needs(*seeds: Seed, class_query: bool = False) -> Needs:
    """Settings of `camkit.watch` with which one forward shows what each seed needs.

    Args:
        seeds: to be read from the capture.
        class_query: where every seed is content with it, evaluate the last block of a class-token
            model for the class query only; refiners that read patch embeddings then have none.

    Example:
        >>> seed = camkit.GradCAMSeed("layercam")  # doctest: +SKIP
        >>> with camkit.watch(model, **camkit.needs(seed)) as seen:  # doctest: +SKIP
        ...     model(pixels)
    """
    gradients = any(seed.gradients for seed in seeds)
    tokens = joined(seed.tokens for seed in seeds if isinstance(seed, TokenSeed))
    if tokens is not None:
        content = class_query and all(isinstance(seed, TokenSeed) for seed in seeds)
        tokens = replace(tokens, class_query=tokens.class_query and content)
    return Needs(gradients=gradients, tokens=tokens)
