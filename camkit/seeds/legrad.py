"""LeGrad: positive gradients of each block's attention, for classes and for texts."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention, ExplicitAttention
from camkit.capture.intercept import scaled_weights
from camkit.capture.record import Capture, TokenCall, WatchSpec
from camkit.capture.tail import token_scores
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds.protocol import check_classes, class_score, fold_maps, score_gradients
from camkit.seeds.text import TextClasses
from camkit.tensors import Cam, Classes, Scores

_ROWS = 256  # queries whose gradients exist at a time
_NO_GRAPH = "this capture holds no gradients within its blocks; see `requires` of the seed"


@dataclass(frozen=True)
class LeGradSeed:
    """Positive gradients of each block's attention, for the score of the tokens that leave it.

    Tokens that leave a block are scored as the model scores its pooled token: by the last norm and
    the classifier or, with ``text``, by the last norm, the projection and the cosine with texts.
    The gradient of that score with respect to the block's attention is clamped at zero and averaged
    over heads and queries, then over blocks (LeGrad, Bousselham et al. 2024). Ours: cosines are
    scaled by the model's own logit scale; the authors' code leaves it at one.

    Attributes:
        blocks: how many of the last blocks to average; None is all.
        token: the token to score. "mean" is the mean of all tokens, as in the authors' code.
            "class" is the class token, which is ours; only its row of each attention matters then,
            so it costs hardly more than the forward. "pool" is for ``text`` of a model whose head
            pools by attention (SigLIP): the gradient is that of the head's own attention, as in the
            authors' code; tokens pass the last norm first, as in the model, but not in that code.
        text: the classes, for CLIP and similar models; None takes the model's classifier.
    """

    blocks: int | None = None
    token: Literal["mean", "class", "pool"] = "mean"
    text: TextClasses | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1 or None, got {self.blocks}")
        pools = self.text is not None and self.text.known_space().pools
        if self.token not in (("pool",) if pools else ("mean", "class")):
            fitting = '"pool", as the head pools by attention' if pools else '"mean" or "class"'
            given = "without `text`" if self.text is None else "with this `text`"
            raise ValueError(f"{given} `token` must be {fitting}, got {self.token!r}")

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        if self.token == "class":
            return WatchSpec(class_paths=True, last_patches=self.text is not None)
        return WatchSpec(within_blocks=self.token == "mean", leaving=self.token == "pool")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        known = capture.scores.shape[-1] if self.text is None else len(self.text)
        check_classes(classes, capture.images, known)
        calls = capture.class_paths if self.token == "class" else capture.leaving
        if not calls:
            raise CaptureError(
                "this capture does not hold the tokens that leave each block; watch the forward "
                "with camkit.watch(model, requires=seed.requires)"
            )
        maps = []
        for call in calls if self.blocks is None else calls[-self.blocks :]:
            if self.token == "pool":
                scores, attention = self._by_head(capture, call)
            else:
                scores, attention = self._by_token(capture, call)
            maps.append(_positive_gradients(scores, attention, classes)[..., capture.patches])
        return fold_maps(capture, torch.stack(maps).mean(0), classes)

    def _by_token(self, capture: Capture, call: TokenCall) -> tuple[Scores, Attention]:
        """Return scores of the mean or class token, and the attention of the block it leaves."""
        if call.attention is None:
            raise CaptureError(_NO_GRAPH)
        with torch.inference_mode(mode=False), torch.enable_grad():
            # a sum, because its gradient is one row that is known to be the same for all tokens
            token = call.tokens.sum(1) / call.tokens.shape[1]
            if self.text is not None:
                embedded = self.text.known_space().embed(token[:, None], gradients=True)
                return self.text.logits(embedded[:, 0]), call.attention
            scores = token_scores(capture.tail, capture.outputs, token)
            if capture.vocabulary is not None:
                scores = capture.vocabulary.score(scores)
            return scores, call.attention

    def _by_head(self, capture: Capture, call: TokenCall) -> tuple[Scores, Attention]:
        """Return scores of the tokens pooled by the head, and the head's attention."""
        if self.text is None:
            raise ValueError('`token="pool"` needs `text`')
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
            return self.text.logits(embedded), ExplicitAttention(leaves[0])


def _positive_gradients(
    scores: Scores, attention: Attention, classes: Classes
) -> Float[Tensor, "b k s"]:
    """Average the positive gradients of the attention over heads and queries, for each class."""
    if not scores.requires_grad:
        raise CaptureError(_NO_GRAPH)
    _, heads, queries, _ = attention.shape
    maps = []
    for column in classes.unbind(1):
        with torch.inference_mode(mode=False), torch.enable_grad():
            total = class_score(scores, column)
            (gradient,) = score_gradients(total, [attention.watched()])
        mean = torch.zeros(())
        for start in range(0, queries, _ROWS):  # the whole map of gradients is never held
            rows = range(start, min(start + _ROWS, queries))
            positive = attention.gradient_rows(gradient, rows).detach().clamp_min_(0.0)
            mean = positive.sum((1, 2)) + mean.to(positive)
        maps.append(mean / (heads * queries))
    return torch.stack(maps, 1)
