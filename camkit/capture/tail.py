"""The modules behind the last block: how they turn tokens, also single ones, into scores."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.parameters import applied, is_linear, is_one_layer
from camkit.errors import UnsupportedModelError
from camkit.ops.attention import take
from camkit.printing import short_repr
from camkit.torch_internals import whole_tensor


def tokens_of(value: Any) -> Tensor | None:
    """Return the tokens in a block's input or output: a 3-d tensor, or the first of a tuple."""
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, Tensor) and first.dim() == 3 else None


@dataclass(frozen=True, eq=False)
class TailCall:
    """One call of a module after the last attention; distributed tensors as the plain ones.

    What is in parts on several processes stays as it is, and is no class score.

    Attributes:
        module: the module.
        input: its first argument, without a graph.
        output: what it returned, without a graph.
        node: what may be class scores, in their graph if there is one: the output of a classifier,
            or the input of a sigmoid or softmax.
    """

    module: nn.Module
    input: Tensor
    output: Tensor
    node: Tensor | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            with suppress(ValueError):
                object.__setattr__(self, name, whole_tensor(name, getattr(self, name)))


def patch_scores(
    tail: Sequence[TailCall],
    outputs: Float[Tensor, "b o"],
    special: Sequence[int],
    patches: Sequence[int],
    chosen: Sequence[int] | None = None,
) -> Float[Tensor, "b n C"]:
    """Score every patch as the classifier would score it alone.

    How the host pools its tokens (one special token, the mean or the maximum over patches, or a
    module of its own such as SigLIP's attention head, which is then run on the patch alone; with or
    without a norm behind it) is found by comparing with the values that went into its classifier, a
    linear layer or a 1x1 convolution (ToCo). Two classifiers that the host averages (DeiT's class
    and distillation heads) are averaged here too.

    Args:
        tail: module calls after the last block.
        outputs: what the model returned.
        special: positions of the class and distillation tokens.
        patches: positions of the patches.
        chosen: compute only these outputs of the classifier; None computes all.

    Raises:
        UnsupportedModelError: there is no such classifier, or the pooling is another.
    """
    with torch.no_grad():
        entering = entering_classifiers(tail, outputs, special, patches)
        return torch.stack([applied(head, tokens, chosen) for head, tokens in entering]).mean(0)


def entering_classifiers(
    tail: Sequence[TailCall], outputs: Tensor, special: Sequence[int], patches: Sequence[int]
) -> list[tuple[nn.Module, Float[Tensor, "b n d"]]]:
    """Return each classifier with every patch as it would enter it alone; see `patch_scores`.

    Arguments and errors are those of `patch_scores`.
    """
    spreads = [c.output for c in tail if c.output.dim() == 3 and c.output.shape[1] > max(patches)]
    heads = classifiers(tail, outputs)
    if not heads or not spreads:
        raise UnsupportedModelError(
            "the scores are not those of a linear classifier or 1x1 convolution behind the last "
            "block, so patches cannot be scored by it; use GradientSeed or RelevanceSeed"
        )
    norms = [c.module for c in tail if c.output.dim() == 2 and isinstance(c.module, nn.LayerNorm)]
    pools = pooling_calls(tail)
    entering = []
    with torch.no_grad():
        for head in heads:
            tokens = _entering_by_pool(head, pools, list(patches), norms)
            if tokens is None:
                tokens = _entering(head, spreads, list(special), list(patches), norms)
            if tokens is None:
                raise UnsupportedModelError(
                    "the classifier's input is neither a special token nor the mean or maximum of "
                    "the tokens; use GradientSeed or RelevanceSeed"
                )
            entering.append((head.module, tokens))
    return entering


def inner_patch_scores(
    tail: Sequence[TailCall],
    tokens: Float[Tensor, "b t d"],
    special: Sequence[int],
    patches: Sequence[int],
) -> Float[Tensor, "b n o"]:
    """Score every patch that leaves an inner block by the classifier that reads this block.

    The classifier is a linear layer or 1x1 convolution whose recorded input is a special token, or
    the mean or maximum, of these very tokens. A host calls it behind its last block, as ToCo does.

    Args:
        tail: module calls after the last block.
        tokens: all tokens that leave the block.
        special: positions of the class and distillation tokens.
        patches: positions of the patches.

    Raises:
        UnsupportedModelError: no such classifier ran.
    """
    pooled = len(tokens), tokens.shape[-1]
    heads = [c for c in tail if is_classifier(c.module) and c.input.flatten(1).shape == pooled]
    with torch.no_grad():
        for head in heads:
            entering = _entering(head, [tokens], list(special), list(patches), [])
            if entering is not None:
                return applied(head.module, entering)
    raise UnsupportedModelError(
        "no classifier that reads the tokens of this block ran behind the last block: expected a "
        "linear layer or 1x1 convolution of a special token, or of the mean or maximum of the "
        "tokens; use camkit.contrib.LogitLensSeed, which takes the classifier of the last block"
    )


def classifiers(tail: Sequence[TailCall], outputs: Tensor) -> list[TailCall]:
    """Return the calls that computed the class scores: a single one, or several they average."""
    fitting = fitting_classifiers(tail, outputs)
    for group in (*([call] for call in fitting), fitting):
        if group:
            mean = torch.stack([call.output.flatten(1) for call in group]).mean(0)
            if torch.allclose(mean.to(outputs), outputs.detach(), rtol=1e-3, atol=1e-3):
                return group
    return []


def fitting_classifiers(tail: Sequence[TailCall], outputs: Tensor) -> list[TailCall]:
    """Return the calls of classifiers whose output has the form of the class scores."""
    return [
        call
        for call in tail
        if is_classifier(call.module) and call.output.dim() > 1
        if not hasattr(call.output, "device_mesh")  # in parts on several processes
        if call.output.flatten(1).shape == outputs.shape
    ]


def pooling_calls(tail: Sequence[TailCall]) -> list[TailCall]:
    """Return the calls that turned a sequence of tokens into one token."""
    return [c for c in tail if c.input.dim() == 3 and c.output.dim() == 2]


def is_classifier(module: nn.Module) -> bool:
    """Whether a module may score single tokens: a linear layer or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return is_linear(module)


def _entering_by_pool(
    head: TailCall, pools: Sequence[TailCall], patches: list[int], norms: Sequence[nn.Module]
) -> Tensor | None:
    """Pass single patches through a module of the host that pools them."""
    for call in pools:
        for norm in (None, *norms):
            if _same(_normed(norm, call.output), head.input.flatten(1)):
                own = call.input[:, patches] if call.input.shape[1] > max(patches) else call.input
                pooled: Tensor = call.module.forward(own.flatten(0, 1)[:, None])
                if pooled.shape[1:] == call.output.shape[1:]:  # it pools any number of tokens
                    return _normed(norm, pooled).unflatten(0, own.shape[:2])
    return None


def _entering(
    head: TailCall,
    spreads: Sequence[Tensor],
    special: list[int],
    patches: list[int],
    norms: Sequence[nn.Module],
) -> Tensor | None:
    """Return single patches as they enter the classifier, if a way of pooling gives its input."""
    entered = head.input.flatten(1)
    for tokens in reversed(spreads):
        own = take(tokens, patches, 1)
        pooled = [own.mean(1), own.amax(1), tokens.mean(1), *(tokens[:, p] for p in special)]
        for norm in (None, *norms):
            if any(_same(_normed(norm, candidate), entered) for candidate in pooled):
                return _normed(norm, own)
        beside = [torch.cat([tokens[:, p], own.mean(1)], -1) for p in special]  # DINOv2's, linear
        if any(_same(candidate, entered) for candidate in beside):
            return torch.cat([own, own], -1)
    return None


def _same(tokens: Tensor, expected: Tensor) -> bool:
    same_shape = tokens.shape == expected.shape
    return same_shape and torch.allclose(tokens.to(expected), expected, rtol=1e-3, atol=1e-3)


def _normed(norm: nn.Module | None, tokens: Tensor) -> Tensor:
    """Apply a norm without its hooks, which belong to the user."""
    return tokens if norm is None else norm.forward(tokens)


def token_scores(
    tail: Sequence[TailCall], outputs: Tensor | None, token: Float[Tensor, "b d"]
) -> Float[Tensor, "b o"]:
    """Pass one token per image through the modules behind the last block: norms, then classifier.

    Args:
        tail: module calls after the last block.
        outputs: what the model returned.
        token: in a graph or not; the scores are in the same graph.

    Raises:
        UnsupportedModelError: the scores are not those of a linear classifier of single tokens.
    """
    heads = [] if outputs is None else classifiers(tail, outputs)
    if not heads or any(head.input.flatten(1).shape[1] != token.shape[-1] for head in heads):
        raise UnsupportedModelError(
            "the scores are not those of a linear classifier of one pooled token, so the tokens of "
            "inner blocks cannot be scored by it; use GradientSeed or RelevanceSeed"
        )
    passed = {head.module for head in heads}
    for call in tail:
        keeps_shape = call.input.shape == call.output.shape and call.input.dim() in (2, 3)
        if is_one_layer(call.module) and keeps_shape and call.module not in passed:
            token = call.module.forward(token)  # without its hooks, which belong to the user
        passed.add(call.module)
    return torch.stack([applied(head.module, token) for head in heads]).mean(0)
