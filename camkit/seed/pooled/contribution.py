"""Seed from what each patch adds to the score, exactly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.record import Capture
from camkit.capture.tail import TailCall, classifiers, pooling_calls
from camkit.errors import UnsupportedModelError
from camkit.seed.pooled.attention_pool import pooled_shares
from camkit.seed.pooled.pooling import MaxPooling, MeanPooling, Pooling
from camkit.seed.protocol import check_classes, keep_asked
from camkit.tensors import Cam, Classes


@dataclass(frozen=True)
class ContributionSeed:
    """What each patch adds to the class score; what it takes away counts as zero.

    `contributions` keeps the sign, and adds up to the score: less the classifier's bias, the offset
    of a norm behind the pooling (whose scale is held at the image's), and what special tokens add
    where they are pooled too. Which pooling the host has is not believed but checked against what
    really went into its classifier. For mean and maximum pooling this is CAM (Zhou et al. 2016);
    for other poolings the decomposition is ours.

    Attributes:
        pooling: how the host pools its patches, where it is neither by mean, nor by maximum, nor by
            a head with one attention query (SigLIP): `GroupedGeM`, `RankPooling`, or your own.
        nodes: steps of the integral for attention heads (`camkit.seed.pooled.attention_pool`).
    """

    pooling: Pooling | None = None
    nodes: int = 8

    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"`nodes` must be at least 1, got {self.nodes}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        maps = self.contributions(capture, classes).clamp_min(0.0)
        return keep_asked(capture.grid.fold(maps), classes)

    def contributions(self, capture: Capture, classes: Classes) -> Float[Tensor, "b k n"]:
        """Signed contributions of the patches to the scores of ``classes``.

        A class of several classifier outputs is the logsumexp of them: its contributions are those
        of its outputs, weighted by their shares in it, and add up to the mean of their scores.

        Raises:
            UnsupportedModelError: patches are not pooled, or in a way that is not known.
        """
        check_classes(capture, classes, capture.scores.shape[-1])
        outputs: Any = capture.outputs  # there are some, as there are scores
        shared = [
            self._shared(capture, outputs.detach(), _weights(capture, outputs, column))
            for column in classes.unbind(1)
        ]
        return torch.stack(shared, 1)

    def _shared(self, capture: Capture, outputs: Tensor, asked: Tensor) -> Tensor:
        """Contributions to the scores ``(outputs * asked).sum(1)``."""
        heads = classifiers(capture.tail, outputs)
        found = [self._behind(capture, head, asked) for head in heads]
        if found and all(shares is not None for shares in found):
            return torch.stack([shares for shares in found if shares is not None]).mean(0)
        for scores in _score_maps(capture, outputs):
            for rule in self._rules():
                if _same(rule.pool(scores), outputs):
                    return torch.einsum("bnc,bc->bn", rule.parts(scores), asked.to(scores))
        raise UnsupportedModelError(
            "the class scores are made of no patches that are pooled by "
            f"{' or '.join(repr(rule) for rule in self._rules())}, so no patch has an exact share "
            "in them; name the `pooling`, or use ClassWeightSeed (a class token sees the patches "
            "through attention alone)"
        )

    def _behind(self, capture: Capture, head: TailCall, asked: Tensor) -> Tensor | None:
        """Contributions by way of a linear classifier behind the pooling."""
        entered = head.input.flatten(1)
        layer: Any = head.module
        direction = asked @ layer.weight.detach().flatten(1).to(asked)
        norms = [None, *_norms(capture.tail)]
        for call in pooling_calls(capture.tail):
            for norm in norms:
                if _same(_normed(norm, call.output), entered):
                    return self._through_head(capture, call, norm, direction)
        for tokens, keep in _spreads(capture):
            for rule in self._rules():
                pooled = rule.pool(tokens)
                for norm in norms:
                    if _same(_normed(norm, pooled), entered):
                        parts = _behind_norm(norm, rule.parts(tokens), pooled)
                        return torch.einsum("bnd,bd->bn", parts[:, keep], direction.to(parts))
        return None

    def _through_head(
        self, capture: Capture, call: TailCall, norm: nn.Module | None, direction: Tensor
    ) -> Tensor:
        def read(token: Tensor) -> Tensor:
            return (_normed(norm, token) * direction).sum(-1)

        positions = capture.patches
        if call.input.shape[1] <= max(positions):
            positions = list(range(call.input.shape[1]))
        return pooled_shares(call, read, patches=positions, nodes=self.nodes)

    def _rules(self) -> Sequence[Pooling]:
        return (MeanPooling(), MaxPooling()) if self.pooling is None else (self.pooling,)


def _weights(capture: Capture, outputs: Tensor, column: Tensor) -> Float[Tensor, "b o"]:
    """How much each classifier output counts in one class per image."""
    members = None if capture.vocabulary is None else capture.vocabulary.members
    count = outputs.shape[-1]
    if members is None:
        return F.one_hot(column.clamp_min(0), count).to(outputs.dtype)
    belongs = torch.zeros(len(members), count, dtype=torch.bool, device=outputs.device)
    for index, group in enumerate(members):
        belongs[index, list(group)] = True
    chosen = belongs[column.clamp_min(0)]
    return outputs.detach().masked_fill(~chosen, float("-inf")).softmax(-1)


def _spreads(capture: Capture) -> Iterator[tuple[Tensor, list[int]]]:
    """Token sequences that may have been pooled, and the places of the patches in them."""
    patches = capture.patches
    for call in reversed(capture.tail):
        tokens = call.output
        if tokens.dim() == 3 and len(tokens) == capture.images:
            if tokens.shape[1] > max(patches):
                yield tokens[:, patches], list(range(len(patches)))
                yield tokens, patches
            elif tokens.shape[1] == len(patches):
                yield tokens, list(range(len(patches)))


def _score_maps(capture: Capture, outputs: Tensor) -> Iterator[Tensor]:
    """Scores of every patch that the host itself made, ``(b, n, o)``."""
    for call in reversed(capture.tail):
        scores = call.output.flatten(2).mT if call.output.dim() == 4 else call.output
        if scores.shape == (len(outputs), capture.grid.size, outputs.shape[1]):
            yield scores


def _norms(tail: Sequence[TailCall]) -> list[nn.Module]:
    return [c.module for c in tail if c.output.dim() == 2 and isinstance(c.module, nn.LayerNorm)]


def _normed(norm: nn.Module | None, tokens: Tensor) -> Tensor:
    found: Tensor = tokens if norm is None else norm.forward(tokens)
    return found


def _behind_norm(norm: nn.Module | None, parts: Tensor, pooled: Tensor) -> Tensor:
    """Parts of the pooled vector as parts of its layer norm, whose offset belongs to none."""
    if not isinstance(norm, nn.LayerNorm):
        return parts
    spread = pooled.var(-1, unbiased=False, keepdim=True).add(norm.eps).sqrt()
    parts = (parts - parts.mean(-1, keepdim=True)) / spread[:, None]
    weight: Tensor | None = norm.weight
    return parts if weight is None else parts * weight.detach()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-3)
