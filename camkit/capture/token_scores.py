"""What the classifier would say of any token, were it the pooled one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.tail import TailCall, classifiers
from camkit.errors import UnsupportedModelError


def token_scores(
    tail: Sequence[TailCall], outputs: Tensor | None, token: Float[Tensor, "b d"]
) -> Float[Tensor, "b o"]:
    """Put one token per image through what follows the last block: norms, then the classifier.

    Args:
        tail: module calls after the last block.
        outputs: what the model returned.
        token: in a graph or not; the scores then are, too.

    Raises:
        UnsupportedModelError: the scores are not those of a linear classifier of single tokens.
    """
    heads = [] if outputs is None else classifiers(tail, outputs)
    if not heads or any(head.input.flatten(1).shape[1] != token.shape[-1] for head in heads):
        raise UnsupportedModelError(
            "the scores are not those of a linear classifier of one pooled token, so the tokens of "
            "inner blocks cannot be scored by it; use GradientSeed or RolloutSeed"
        )
    made = {head.module for head in heads}
    for module in dict.fromkeys(call.module for call in tail):
        between = module not in made and not any(True for _ in module.children())
        if between and _keeps_width(module, tail):
            token = module.forward(token)  # without its hooks, which belong to the user
    return torch.stack([_classified(head.module, token) for head in heads]).mean(0)


def _classified(classifier: Any, token: Tensor) -> Tensor:
    weight = classifier.weight.flatten(1)  # a 1x1 convolution is linear in each place
    return F.linear(token, weight, classifier.bias)


def _keeps_width(module: nn.Module, tail: Sequence[TailCall]) -> bool:
    """Whether a module made tokens of tokens, or a token of a token."""
    call = next(call for call in tail if call.module is module)
    return call.input.shape == call.output.shape and call.input.dim() in (2, 3)
