"""LeGrad: the gradient of each block's own score at its attention, for classes and for texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camkit.capture.attention import Attention, ExplicitAttention
from camkit.capture.intercept import scaled_weights
from camkit.capture.record import Capture, TokenCall, WatchSpec
from camkit.capture.tail import token_scores
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds.protocol import check_classes, keep_asked
from camkit.seeds.text import TextClasses
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
    its kin there is `camkit.seeds.TextLeGradSeed`.

    Attributes:
        blocks: so many of the last blocks; None is all.
        reading: which token is scored. "mean" is the mean of all, as in the authors' code. "class"
            is the class token, as the model itself reads behind its last block; that is ours. Only
            its row of each attention matters then, which costs hardly more than the forward.
    """

    blocks: int | None = None
    reading: Literal["mean", "class"] = "mean"

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        if self.reading not in ("mean", "class"):
            raise ValueError(f'`reading` must be "mean" or "class", got {self.reading!r}')

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        if self.reading == "class":
            return WatchSpec(class_paths=True, last_patches=False)
        return WatchSpec(within_blocks=True)

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
            "with camkit.watch(model, requires=seed.requires)"
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


@dataclass(frozen=True)
class TextLeGradSeed:
    """`camkit.seeds.LeGradSeed` for CLIP and its kin: a block's token is scored by its
    likeness to texts.

    Source: LeGrad (Bousselham et al. 2024). The token goes the way of the host's own pooled token:
    last norm, projection, and the host's scale of cosines, which the authors' code leaves at one.

    Attributes:
        text: the classes.
        blocks: so many of the last blocks; None is all.
        reading: which token is scored. "mean" and "class" are those of
        `camkit.seeds.LeGradSeed`. "pool"
            is for a host whose head pools by attention (SigLIP): the head is run on the tokens that
            leave a block, and the gradient is that at the head's own attention, as in the authors'
            code; there tokens do not pass the last norm, here they do, as in the host.
    """

    text: TextClasses
    blocks: int | None = None
    reading: Literal["mean", "class", "pool"] = "mean"

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        if self.reading not in ("mean", "class", "pool"):
            raise ValueError(f'`reading` must be "mean", "class" or "pool", got {self.reading!r}')
        if (self.reading == "pool") != self.text.known_space().pools:
            fits = '"pool"' if self.text.known_space().pools else '"mean" or "class"'
            raise ValueError(
                f'`reading="pool"` is for hosts whose head pools by attention, and no other is for '
                f"them; with these texts use {fits}, got {self.reading!r}"
            )

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        if self.reading == "pool":
            return WatchSpec(leaving=True)
        return WatchSpec(class_paths=self.reading == "class", within_blocks=self.reading == "mean")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, len(self.text))
        found = capture.class_paths if self.reading == "class" else capture.leaving
        maps = [self._maps(capture, call, classes) for call in last_calls(found, self.blocks)]
        mean = torch.stack([one[..., capture.patches] for one in maps]).mean(0)
        return keep_asked(capture.grid.fold(mean), classes)

    def _maps(self, capture: Capture, call: TokenCall, classes: Classes) -> Float[Tensor, "b k s"]:
        if self.reading != "pool":
            return block_maps(call, self._read, classes)
        leaves: list[Tensor] = []
        heads = capture.pooling[0].attention.shape[1] if capture.pooling else 1
        with torch.inference_mode(mode=False), scaled_weights(1.0, leaves, heads):
            tokens = call.tokens.detach().clone()
            embedded = self.text.known_space().pooled(tokens, gradients=True)
        if len(leaves) != 1 or leaves[0].shape[2:] != (1, tokens.shape[1]):
            raise UnsupportedModelError(
                "the head of this model does not pool its tokens by the attention of one query; "
                "use TextSimilaritySeed"
            )
        with torch.enable_grad():
            scores = self.text.logits(embedded)
        return score_maps(scores, ExplicitAttention(leaves[0]), classes)

    def _read(self, token: Float[Tensor, "b d"]) -> Scores:
        embedded = self.text.known_space().embed(token[:, None], gradients=True)
        return self.text.logits(embedded[:, 0])
