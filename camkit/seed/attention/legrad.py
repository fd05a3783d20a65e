"""Seed from how the score of each block's own tokens answers to its attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

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

Read = Callable[[Float[Tensor, "b d"]], Scores]
"""Makes class scores of one token an image, in a graph."""

_ROWS = 256  # queries whose gradients exist at a time


@dataclass(frozen=True)
class LeGradSeed:
    """Positive gradients of each block's attention, from the score of the tokens it leaves.

    A token behind a block is scored as the model scores its pooled token, by the last norm and the
    classifier; the gradient of that score at the block's attention is averaged over heads and
    queries, negative ones counting as zero, and then over blocks. Source: LeGrad (Bousselham et al.
    2024). A block's score reaches no other block, so the graph is cut between them. For CLIP and
    its kin there is `camkit.TextLeGradSeed`.

    Attributes:
        blocks: so many of the last blocks; None is all.
        reading: which token is scored. "mean" is the mean of all, as in the authors' code. "class"
            is the class token, as the model itself reads behind its last block; that is ours. Only
            its row of each attention matters then, which costs hardly more than the forward.
    """

    blocks: int | None = None
    reading: Literal["mean", "class"] = "mean"

    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        if self.reading not in ("mean", "class"):
            raise ValueError(f'`reading` must be "mean" or "class", got {self.reading!r}')

    @property
    def tokens(self) -> TokenWatch:
        """What has to be watched for it, besides attention."""
        if self.reading == "class":
            return TokenWatch(class_paths=True, class_query=True)
        return TokenWatch(within_blocks=True)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, capture.scores.shape[-1])

        def read(token: Tensor) -> Scores:
            scores = token_scores(capture.tail, capture.outputs, token)
            return scores if capture.vocabulary is None else capture.vocabulary.score(scores)

        found = capture.class_paths if self.reading == "class" else capture.leaving
        maps = [block_maps(call, read, classes) for call in last_calls(found, self.blocks)]
        mean = torch.stack([one[..., capture.patches] for one in maps]).mean(0)
        return keep_asked(capture.grid.fold(mean), classes)


def check_blocks(blocks: int | None) -> None:
    """Refuse a number of blocks that makes no sense."""
    if blocks is not None and blocks < 1:
        raise ValueError(f"`blocks` must be at least 1 or None, got {blocks}")


def last_calls(found: Sequence[TokenCall], blocks: int | None) -> Sequence[TokenCall]:
    """Tokens behind so many of the last blocks.

    Raises:
        CaptureError: none were watched.
    """
    if not found:
        raise CaptureError(
            "this capture does not hold the tokens that leave each block; watch the forward "
            "with camkit.watch(model, **camkit.needs(seed))"
        )
    return found if blocks is None else found[-blocks:]


def block_maps(call: TokenCall, read: Read, classes: Classes) -> Float[Tensor, "b k s"]:
    """One block's positive gradients for each class, by the score of its mean token.

    Args:
        call: the tokens that leave the block, in the graph of its attention.
        read: scores the mean token.
        classes: one row an image.
    """
    if call.attention is None:
        raise CaptureError(_NO_GRAPH)
    with torch.inference_mode(mode=False), torch.enable_grad():
        # a sum, because its gradient is one row that is known to be the same for all tokens
        scores = read(call.tokens.sum(1) / call.tokens.shape[1])
    return score_maps(scores, call.attention, classes)


def score_maps(scores: Scores, attention: Attention, classes: Classes) -> Float[Tensor, "b k s"]:
    """Positive gradients of class scores at an attention that they were made with."""
    return torch.stack([_map(scores, column, attention) for column in classes.unbind(1)], 1)


def _map(scores: Scores, column: Int[Tensor, " b"], attention: Attention) -> Float[Tensor, "b s"]:
    if not scores.requires_grad:
        raise CaptureError(_NO_GRAPH)
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


_NO_GRAPH = "this capture holds no gradients within its blocks"
