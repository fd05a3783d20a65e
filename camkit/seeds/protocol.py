"""Seed: the first class maps of a capture, and functions that seeds share."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.capture.record import NO_PATCH_TOKENS, Capture, WatchSpec
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.ops.scaling import rounding_of
from camkit.tensors import Cam, Classes, Scores

Seed: TypeAlias = Callable[[Capture, Classes], Cam]
"""``(capture, classes) -> cam``: one map for each class on the patch grid, at least 0, of any
scale, zero where ``classes`` is -1. Either a plain function, or a frozen dataclass whose
``requires`` (a `camkit.capture.WatchSpec`) states what it reads. A seed may be set to keep negative
scores (`camkit.seeds.ClassWeightSeed`); all that scale or combine maps count them as zero."""


HeadWeights: TypeAlias = Callable[[Capture], Tensor]
"""``capture -> (b, blocks, heads)``: a weight for each head of each watched block and each image,
such as those that WeakTr learns. It reads them from the capture, or from wherever the model left
them during the forward. If it reads more than a plain watch records, its ``requires`` says so."""


def required_by_weights(head_weights: HeadWeights | None) -> WatchSpec:
    """Return what a forward must be watched for so that the function can read its capture."""
    if head_weights is None:
        return NO_PATCH_TOKENS
    spec: WatchSpec = getattr(head_weights, "requires", WatchSpec())
    return spec


def read_head_weights(
    head_weights: HeadWeights, capture: Capture, calls: Sequence[Attention]
) -> Float[Tensor, "b l a"]:
    """Return the weights of the heads of some attention calls, detached.

    Raises:
        ValueError: there is no finite weight for each image, call and head.
    """
    weights = head_weights(capture).detach()
    heads = sorted({call.shape[1] for call in calls})
    expected = (capture.images, len(calls), heads[0])
    if tuple(weights.shape) != expected or len(heads) > 1:
        raise ValueError(
            "`head_weights` must return a weight for each image, watched block and head, of shape "
            f"{expected}, got {tuple(weights.shape)}"
            + (f"; the blocks have different numbers of heads: {heads}" if heads[1:] else "")
        )
    if not weights.isfinite().all():
        raise ValueError("`head_weights` must return finite weights, got NaN or inf")
    return weights


def check_classes(classes: Classes, images: int, known: int | None) -> None:
    """Check that ``classes`` has a row per image and names existing classes.

    ``known`` is the number of classes; None accepts any index.
    """
    if classes.shape[0] != images:
        raise ValueError(
            f"`classes` must have one row per image ({images}), got {classes.shape[0]}"
        )
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise TypeError(
            f"`classes` must hold indices of an integer dtype, got {classes.dtype}; "
            "camkit.seeds.read_targets turns labels into indices"
        )
    if classes.shape[1] == 0:
        raise ValueError("`classes` must ask for at least one class, got none")
    low, high = int(classes.min()), int(classes.max())
    if low < -1 or (known is not None and high >= known):
        wrong = low if low < -1 else high
        top = "" if known is None else f" to {known - 1}"
        raise ValueError(f"`classes` must lie in 0{top} (or be -1 for none), got {wrong}")


def fold_maps(capture: Capture, maps: Float[Tensor, "b k n"], classes: Classes) -> Cam:
    """Put patch scores on the grid, with zeros where ``classes`` is -1."""
    return capture.grid.fold(maps).masked_fill((classes < 0)[:, :, None, None], 0.0)


def pick(scores: Float[Tensor, "b n C"], classes: Classes) -> Float[Tensor, "b k n"]:
    """Select the scores of ``classes``, class axis first."""
    index = classes.clamp_min(0)[:, None].expand(-1, scores.shape[1], -1)
    return scores.gather(2, index).mT


def leaving_tokens(capture: Capture, layer: int, seed: object) -> Float[Tensor, "b t d"]:
    """Return all tokens that leave a block, detached.

    Raises:
        CaptureError: they were not recorded.
        ValueError: there is no such block.
    """
    if not capture.leaving:
        raise CaptureError(
            f"this capture does not hold the tokens that leave each block, which "
            f"{type(seed).__name__} reads; watch the forward with "
            "camkit.watch(model, requires=seed.requires). If you did, the model has no module that "
            "holds a block with its attention; use another seed"
        )
    count = len(capture.leaving)
    if not -count <= layer < count:
        raise ValueError(f"`layer` must lie in {-count} to {count - 1}, got {layer}")
    return capture.leaving[layer].tokens.detach()


def above_mean(maps: Float[Tensor, "b k n"]) -> Float[Tensor, "b k n"]:
    """Subtract each map's mean; scores below it, and flat maps, become zero."""
    above = (maps - maps.mean(-1, keepdim=True)).clamp_min(0.0)
    return above * (above.amax(-1, keepdim=True) > rounding_of(maps, (-1,)))


def score_gradients(total: Tensor, nodes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Differentiate a sum of class scores with respect to tensors of the forward.

    Raises:
        UnsupportedModelError: no gradient reaches one of them.
        CaptureError: FSDP2 dropped weights that the gradient needs.
    """
    gradients: Sequence[Tensor | None] = [None]
    try:
        if total.requires_grad:
            gradients = torch.autograd.grad(total, nodes, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("setStorage", "not allocated")):
            raise
        raise CaptureError(
            "weights that the gradient needs were dropped by an earlier backward; in FSDP2, call "
            "model.set_reshard_after_backward(False) before the seed, or ask for one class"
        ) from error
    found = tuple(gradient for gradient in gradients if gradient is not None)
    if len(found) < len(nodes):
        raise UnsupportedModelError(
            "no gradient of the class scores reaches the attention: layers with quantised "
            "activations pass none, nor does code that detaches; use ClassWeightSeed or "
            "ClassAttentionSeed, which need no gradient"
        )
    return found


def class_score(scores: Scores, column: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Sum the scores of one class per image; -1 adds nothing."""
    chosen = scores.gather(1, column.clamp_min(0)[:, None])[:, 0]
    return chosen.masked_fill(column < 0, 0.0).sum()
