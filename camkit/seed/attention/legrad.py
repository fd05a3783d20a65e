"""Seed from how the score of each block's own tokens answers to its attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.capture.record import Capture
from camkit.capture.token_scores import token_scores
from camkit.capture.tokens import TokenCall, TokenWatch
from camkit.errors import CaptureError
from camkit.seed.protocol import check_classes, keep_asked
from camkit.tensors import Cam, Classes, Scores

_ROWS = 256  # queries whose gradients exist at a time


@dataclass(frozen=True)
class LeGradSeed:
    """Positive gradients of each block's attention, from the score of the tokens it leaves.

    The mean token behind a block is scored as the model scores its pooled token, by the last norm
    and the classifier; the gradient of that score at the block's attention is averaged over heads
    and queries, negative ones counting as zero, and then over blocks. Source: LeGrad (Bousselham et
    al. 2024). A block's score reaches no other block, so the graph is cut between them.

    Attributes:
        blocks: so many of the last blocks; None is all.
    """

    blocks: int | None = None

    gradients: ClassVar[bool] = False
    tokens: ClassVar[TokenWatch] = TokenWatch(within_blocks=True)

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1 or None, got {self.blocks}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, capture.scores.shape[-1])
        calls = capture.leaving if self.blocks is None else capture.leaving[-self.blocks :]
        if not calls:
            raise CaptureError(
                "this capture does not hold the tokens that leave each block; watch the forward "
                "with camkit.watch(model, **camkit.needs(seed))"
            )
        total = torch.zeros(())
        for call in calls:
            with torch.inference_mode(mode=False), torch.enable_grad():
                scores = token_scores(capture.tail, capture.outputs, call.tokens.mean(1))
                scores = scores if capture.vocabulary is None else capture.vocabulary.score(scores)
            maps = [_map(scores, column, call) for column in classes.unbind(1)]
            total = torch.stack(maps, 1)[..., capture.patches] + total.to(maps[0])
        return keep_asked(capture.grid.fold(total / len(calls)), classes)


def _map(scores: Scores, column: Int[Tensor, " b"], call: TokenCall) -> Float[Tensor, "b s"]:
    attention = call.attention
    if attention is None or not scores.requires_grad:
        raise CaptureError("this capture holds no gradients within its blocks")
    with torch.inference_mode(mode=False), torch.enable_grad():
        chosen = scores.gather(1, column.clamp_min(0)[:, None])[:, 0]
        total = chosen.masked_fill(column < 0, 0.0).sum()
        (gradient,) = torch.autograd.grad(total, attention.watched(), retain_graph=True)
    return _positive_mean(attention, gradient)


def _positive_mean(attention: Attention, gradient: Tensor) -> Float[Tensor, "b s"]:
    """Mean over heads and queries of the map's positive gradients, some rows at a time."""
    _, heads, queries, _ = attention.shape
    total = torch.zeros(())
    for start in range(0, queries, _ROWS):
        rows = range(start, min(start + _ROWS, queries))
        positive = attention.gradient_rows(gradient, rows).detach().clamp_min_(0.0)
        total = positive.sum((1, 2)) + total.to(positive)
    return total / (heads * queries)
