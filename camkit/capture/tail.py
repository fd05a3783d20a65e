"""What follows the last block: how the tokens become scores, and the same for single patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class TailCall:
    """One call of a module after the last attention."""

    module: nn.Module
    input: Tensor
    output: Tensor


def tail_modules(model: nn.Module, attention: Sequence[str]) -> list[nn.Module]:
    """Leaf modules outside the blocks that hold the attention modules."""
    paths = [name.split(".") for name in attention]
    shared = 0
    while len({tuple(path[: shared + 1]) for path in paths}) == 1 and shared < len(paths[0]) - 1:
        shared += 1
    blocks = {".".join(path[: shared + 1]) for path in paths}
    return [
        module
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
        and not any(name == block or name.startswith(f"{block}.") for block in blocks)
    ]


def patch_scores(
    tail: Sequence[TailCall],
    outputs: Float[Tensor, "b o"],
    special: Sequence[int],
    patches: Sequence[int],
) -> Float[Tensor, "b n o"]:
    """Score every patch as the classifier would score it alone.

    How the host pools its tokens (one special token, or a mean, with or without a norm behind it)
    is read off the values that really went into its classifier. Two classifiers that the host
    averages (DeiT's class and distillation heads) are averaged here too.

    Args:
        tail: module calls after the last block.
        outputs: what the model returned.
        special: positions of the class and distillation tokens.
        patches: positions of the patches.

    Raises:
        UnsupportedModelError: no linear classifier, or a pooling that none of these explain.
    """
    heads = [c for c in tail if isinstance(c.module, nn.Linear) and c.output.shape == outputs.shape]
    spread = [c.output for c in tail if c.output.dim() == 3 and c.output.shape[1] > max(patches)]
    if not heads or not spread:
        raise UnsupportedModelError(
            "no linear classifier on normalised tokens was seen after the last block, so patches "
            "cannot be scored by it; use GradientSeed or RolloutSeed"
        )
    tokens = spread[-1]
    pooled = [tokens[:, list(patches)].mean(1), tokens.mean(1), *(tokens[:, p] for p in special)]
    norms = [c.module for c in tail if c.output.dim() == 2 and isinstance(c.module, nn.LayerNorm)]
    with torch.no_grad():
        scored = [_scored(head, tokens[:, list(patches)], pooled, norms) for head in heads]
        mean = torch.stack([head.output for head in heads]).mean(0)
        if not torch.allclose(mean, outputs.detach(), rtol=1e-3, atol=1e-3):
            raise UnsupportedModelError(
                "the scores are not those of the linear classifier; use GradientSeed or RolloutSeed"
            )
        return torch.stack(scored).mean(0)


def _scored(
    head: TailCall, patches: Tensor, pooled: Sequence[Tensor], norms: Sequence[nn.Module]
) -> Tensor:
    for norm in (None, *norms):
        for candidate in pooled:
            if torch.allclose(_normed(norm, candidate), head.input, rtol=1e-3, atol=1e-3):
                classifier: Any = head.module
                return F.linear(_normed(norm, patches), classifier.weight, classifier.bias)
    raise UnsupportedModelError(
        "the classifier's input is neither a special token nor the mean of the tokens; "
        "use GradientSeed or RolloutSeed"
    )


def _normed(norm: nn.Module | None, tokens: Tensor) -> Tensor:
    """The norm applied without its hooks, which belong to the user."""
    return tokens if norm is None else norm.forward(tokens)
