"""The class scores in what a host returns: which tensor they are, and what was applied to them."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from camkit.capture.host import layer_widths
from camkit.capture.tail import TailCall, classifiers, fitting_classifiers
from camkit.errors import CaptureError
from camkit.printing import short_repr

ACTIVATIONS = (nn.Sigmoid, nn.Softmax)
"""Modules that turn class scores into probabilities."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda scores: scores.softmax(-1),
}


@dataclass(frozen=True)
class FoundScores:
    """Class scores before softmax or sigmoid.

    Attributes:
        scores: ``(b, classes)``; None if they are not known.
        activation: what the host applies to them before it returns them; empty for nothing.
        why_not: why they are not known.
    """

    scores: Tensor | None = None
    activation: str = ""
    why_not: str = ""

    __repr__ = short_repr


def candidates(output: Any) -> list[Tensor]:
    """List the tensors in an output that may be ``(b, classes)`` scores, in order.

    If a dictionary or an object names its logits, they are the only ones in it.
    """
    return list({id(tensor): tensor for tensor in _two_dimensional(output)}.values())


def _two_dimensional(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.dim() == 2 and output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _two_dimensional(output.get("logits"))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _two_dimensional(part)
    elif hasattr(output, "logits"):
        yield from _two_dimensional(output.logits)


def checked_scores(scores: Any) -> Tensor:
    """Check what the user's ``scores=`` returned.

    Raises:
        CaptureError: it is not one row of scores for each image.
    """
    if isinstance(scores, Tensor) and scores.dim() == 2 and scores.is_floating_point():
        return scores
    shape = getattr(scores, "shape", None)
    got = type(scores).__name__ if shape is None else f"shape {tuple(shape)}"
    raise CaptureError(
        f"the class scores must be floating-point numbers of shape (images, classes), got {got}; "
        "if the model returns an embedding for each token, pick or pool them: "
        "`scores=lambda output: ... output[:, 0]`"
    )


def find_scores(
    output: Any,
    tail: Sequence[TailCall],
    class_tokens: Sequence[int],
    *,
    images: int | None = None,
    stated: int | None = None,
) -> FoundScores:
    """Find the class scores in what a host returned.

    An embedding has the same form, and the gradient of its third number means nothing. So a tensor
    must be what a classifier returned, or have a number for each of several class tokens. Of a
    chain of linear layers the last one is the classifier. Probabilities are replaced by the scores
    they were computed from.

    Args:
        output: of the host.
        tail: module calls after the last attention.
        class_tokens: their positions.
        images: how many, if it is known; projections of crops (ToCo) have other numbers of rows.
        stated: number of classes that the host states, if it does.
    """
    found = [c for c in candidates(output) if images in (None, len(c))]
    owned = [c for c in found if 1 < len(class_tokens) == c.shape[-1]]
    if owned:
        return _of_class_tokens(owned, list(_means(tail, class_tokens)), stated)
    proven = _of_classifiers(found, tail)
    if proven:
        return _single(proven, stated)
    return _unproven([c for c in found if fitting_classifiers(tail, c)], stated)


def _of_class_tokens(
    owned: Sequence[Tensor], means: Sequence[Tensor], stated: int | None
) -> FoundScores:
    """Choose among tensors with one number for each of several class tokens."""
    for candidate in owned:
        if any(_same(mean, candidate) for mean in means):
            return FoundScores(candidate)
    for candidate, (name, apply) in product(owned, _FUNCTIONS.items()):
        if any(_same(apply(mean), candidate) for mean in means):
            return FoundScores(why_not=_PROBABILITIES.format(name=f"the {name} of its scores"))
    return _unproven(owned, stated)


def _of_classifiers(found: Sequence[Tensor], tail: Sequence[TailCall]) -> list[FoundScores]:
    """Return the scores that the last of a chain of classifiers made, or their probabilities."""
    proven: list[tuple[TailCall, FoundScores]] = []
    for candidate in found:
        made = classifiers(tail, candidate)
        if made:
            proven.append((made[-1], FoundScores(candidate)))
        else:
            proven.extend(_before_activation(candidate, tail))
    calls = [call for call, _ in proven]
    return [each for call, each in proven if not any(_feeds(call, o, tail) for o in calls)]


def _unproven(found: Sequence[Tensor], stated: int | None) -> FoundScores:
    choice = _single([FoundScores(candidate) for candidate in found], stated)
    scores = choice.scores
    if scores is not None and bool(((scores > 0) & (scores < 1)).all()):
        return FoundScores(why_not=_PROBABILITIES.format(name="numbers between 0 and 1"))
    return choice


_PROBABILITIES = (
    "the model returns {name} instead of its class scores; compute them with `scores=`: "
    "`lambda output: output.logit(1e-6)` behind a sigmoid, `lambda output: output.log()` behind a "
    "softmax"
)


def _single(found: Sequence[FoundScores], stated: int | None) -> FoundScores:
    """Return the first of several that agree on the number of classes, or say that they do not."""
    widths = [each.scores.shape[-1] for each in found if each.scores is not None]
    if stated in widths:
        return found[widths.index(stated)]
    if len(set(widths)) < 2:
        return found[0] if found else FoundScores()
    listed = " and ".join(f"(b, {width})" for width in dict.fromkeys(widths))
    return FoundScores(
        why_not=f"the model returns tensors of {listed}, and each may be its class scores; choose "
        "with `scores=lambda output: output[...]`"
    )


def _before_activation(
    probabilities: Tensor, tail: Sequence[TailCall]
) -> Iterator[tuple[TailCall, FoundScores]]:
    """Yield the scores that probabilities were computed from, with the call that made them."""
    for call in tail:
        if isinstance(call.module, ACTIVATIONS) and _same(call.output, probabilities):
            name = type(call.module).__name__.lower()
            yield call, FoundScores(call.input if call.node is None else call.node, name)
            return
    fitting = fitting_classifiers(tail, probabilities)
    for group in (*([call] for call in fitting), fitting):
        for name, apply in _FUNCTIONS.items():
            if group and _same(apply(_mean_of(group, in_graph=False).float()), probabilities):
                yield group[-1], FoundScores(_mean_of(group, in_graph=True), name)
                return


def _mean_of(group: Sequence[TailCall], *, in_graph: bool) -> Tensor:
    parts = [call.node if in_graph and call.node is not None else call.output for call in group]
    flat = [part.flatten(1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.stack(flat).mean(0)


def _means(tail: Sequence[TailCall], class_tokens: Sequence[int]) -> Iterator[Tensor]:
    """Yield the mean of each class token over its channels, as MCTformer scores classes."""
    for call in tail:
        tokens = call.output
        if tokens.dim() == 3 and tokens.shape[1] >= len(class_tokens):
            yield tokens[:, list(class_tokens)].mean(-1)


def _feeds(call: TailCall, other: TailCall, tail: Sequence[TailCall]) -> bool:
    """Whether the output of one call is the input of another, perhaps through calls between."""
    if call is other:
        return False
    reached = [call.output.flatten(1)]
    for later in tail[list(tail).index(call) + 1 :]:
        entered = later.input.flatten(1)
        if any(_same(entered, value) for value in reached):
            if later is other:
                return True
            reached.append(later.output.flatten(1))
    return False


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of their types."""
    if one.shape != other.shape:
        return False
    tolerance = max(1e-5, *(4 * torch.finfo(each.dtype).eps for each in (one, other)))
    return torch.allclose(one.float(), other.detach().float(), rtol=tolerance, atol=1e-6)


def known_classes(model: nn.Module, widths: Set[int] | None = None) -> int | None:
    """Return the number of classes a model states, if one of its layers has as many outputs.

    None where a layer has one output less: the model may count the background (ToCo).

    Args:
        model: in any mode.
        widths: numbers of outputs of its layers, if they are known.
    """
    config: Any = getattr(model, "config", None)
    stated: Any = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    widths = layer_widths(model) if widths is None else widths
    return stated if stated in widths and stated - 1 not in widths else None
