"""Seeds from the classifier: scores of single patches, and shares of patches in the class score."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.host import head_count, is_attention
from camkit.capture.intercept import scaled_weights
from camkit.capture.parameters import linear_weight, norm_weight
from camkit.capture.record import Capture, WatchSpec
from camkit.capture.tail import TailCall, classifiers, inner_patch_scores, pooling_calls
from camkit.errors import UnsupportedModelError
from camkit.seeds.protocol import above_mean, check_classes, fold_maps, leaving_tokens, pick
from camkit.tensors import Cam, Classes

Values: TypeAlias = Float[Tensor, "b n d"]
Pooled: TypeAlias = Float[Tensor, "b d"]


@runtime_checkable
class Pooling(Protocol):
    """A pooling whose result is a sum of one part per patch."""

    def pool(self, values: Values) -> Pooled:
        """Pool the patches to one vector per image."""

    def parts(self, values: Values) -> Values:
        """Return each patch's part; the parts add up to the pooled vector."""


@dataclass(frozen=True)
class MeanPooling:
    """The mean over patches: every patch adds its share."""

    def pool(self, values: Values) -> Pooled:
        return values.mean(1)

    def parts(self, values: Values) -> Values:
        return values / values.shape[1]


@dataclass(frozen=True)
class MaxPooling:
    """The maximum of each channel (ToCo), credited to the first patch that reaches it."""

    def pool(self, values: Values) -> Pooled:
        return values.amax(1)

    def parts(self, values: Values) -> Values:
        winner = F.one_hot(values.argmax(1), values.shape[1]).mT
        return values * winner.to(values.dtype)


@dataclass(frozen=True)
class GroupedGeM:
    """Generalised mean with one power for each group of channels (GGeM, Ko et al. 2022).

    The pooled value is ``(mean over patches of x^p)^(1/p)``, and the part of a patch is
    ``x^p / (n pooled^(p - 1))``. The formula is taken from the abstract and an unofficial
    implementation; the decomposition is ours. A power of 1 is the mean; large powers approach the
    maximum.

    Attributes:
        powers: one for each group; channels are split evenly, in order.
        floor: positive; smaller values count as this one, about half of those behind a layer norm.
    """

    powers: tuple[float, ...] = (3.0,)
    floor: float = 1e-6

    def __post_init__(self) -> None:
        if not self.powers or min(self.powers) <= 0.0:
            raise ValueError(f"`powers` must hold positive numbers, got {self.powers}")
        if self.floor <= 0.0:
            raise ValueError(f"`floor` must be positive, got {self.floor}")

    def pool(self, values: Values) -> Pooled:
        power = self._power(values)
        return values.clamp_min(self.floor).pow(power).mean(1).pow(1 / power)

    def parts(self, values: Values) -> Values:
        pooled = self.pool(values)[:, None]
        # (x / pooled)^p, not x^p / pooled^p: powers of small values vanish
        relative = (values.clamp_min(self.floor) / pooled).pow(self._power(values))
        return relative * pooled / values.shape[1]

    def _power(self, values: Values) -> Float[Tensor, " d"]:
        groups, channels = len(self.powers), values.shape[-1]
        if channels % groups:
            raise ValueError(
                f"the number of `powers` must divide {channels} channels evenly, got {groups}"
            )
        return values.new_tensor(self.powers).repeat_interleave(channels // groups)


@dataclass(frozen=True)
class RankPooling:
    """Mean weighted by rank (MCTformer+, Xu et al. 2024): a factor of ``decay`` per rank.

    Attributes:
        decay: 1 is the mean, small values approach the maximum; 0.996 is MCTformer+'s.
    """

    decay: float = 0.996

    def __post_init__(self) -> None:
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"`decay` must lie in (0, 1], got {self.decay}")

    def pool(self, values: Values) -> Pooled:
        return self.parts(values).sum(1)

    def parts(self, values: Values) -> Values:
        ranks = values.argsort(1, descending=True).argsort(1)
        weights = torch.pow(self.decay, torch.arange(values.shape[1], device=values.device))
        return values * (weights / weights.sum()).to(values.dtype)[ranks]


@dataclass(frozen=True)
class ClassWeightSeed:
    """The classifier's score of each patch token, as in CAM (Zhou et al. 2016).

    Attributes:
        cut: which scores count as no evidence. "mean" subtracts the image's mean patch score of the
            class and cuts there, which is our choice, because scores of a softmax classifier have
            no natural zero. "zero" cuts negative scores, as CAM and ToCo (Ru et al. 2023) do. None
            keeps them, for ``Views(join_at="image")``, which cuts them behind the resizing, as
            ToCo, SeCo and DuPL do.
        layer: index of a block, from 0 or negative from the last: score the patches that leave it
            by the classifier that reads this block, found by its recorded input. ToCo's auxiliary
            class map is -3. None scores the patches that the model's own scores are pooled from.
    """

    cut: Literal["mean", "zero"] | None = "mean"
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.cut not in ("mean", "zero", None):
            raise ValueError(f'`cut` must be "mean", "zero" or None, got {self.cut!r}')

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec(leaving=self.layer is not None)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        if self.layer is None:
            check_classes(classes, capture.images, capture.class_count)
            asked = classes.clamp_min(0).unique()
            scores = capture.patch_scores(asked.tolist())
            maps = pick(scores, torch.searchsorted(asked, classes.clamp_min(0)))
        else:
            tokens = leaving_tokens(capture, self.layer, self)
            special = (*capture.anatomy.class_tokens, *capture.anatomy.distillation_tokens)
            scores = inner_patch_scores(capture.tail, tokens, special, capture.patches)
            scores = scores if capture.vocabulary is None else capture.vocabulary.score(scores)
            check_classes(classes, len(scores), scores.shape[-1])
            maps = pick(scores, classes)
        if self.cut is not None:
            maps = above_mean(maps) if self.cut == "mean" else maps.clamp_min(0.0)
        return fold_maps(capture, maps, classes)


@dataclass(frozen=True)
class PatchHeadSeed:
    """The class maps of the model's own head for patches (MCTformer-V2's patch CAM).

    The head has as many channels as the model has class scores.

    Attributes:
        cut: "zero" cuts negative scores. None keeps them, for refiners that spread signed maps, as
            in TransCAM (Li et al. 2023).
    """

    cut: Literal["zero"] | None = "zero"

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        if self.cut not in ("zero", None):
            raise ValueError(f'`cut` must be "zero" or None, got {self.cut!r}')

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        size = (capture.grid.rows, capture.grid.cols)
        outputs = [call.output for call in capture.tail if call.output.dim() == 4]
        maps = [output for output in outputs if output.shape[2:] == size]
        known = None if capture.outputs is None else capture.outputs.shape[-1]
        heads = [output for output in maps if known in (None, output.shape[1])]
        if not heads:
            channels = sorted({output.shape[1] for output in maps})
            raise UnsupportedModelError(
                "the model has no head for patches: expected a layer behind its last block that "
                f"returns a {size[0]}x{size[1]} map for each class, got maps of {channels or 'no'} "
                f"channels for {known} classes; use ClassWeightSeed"
            )
        scores = heads[-1].flatten(2).mT
        scores = scores if capture.vocabulary is None else capture.vocabulary.score(scores)
        check_classes(classes, len(scores), scores.shape[-1])
        picked = pick(scores, classes)
        return fold_maps(capture, picked if self.cut is None else picked.clamp_min(0.0), classes)


@dataclass(frozen=True)
class ContributionSeed:
    """Each patch's contribution to the class score; negative contributions count as zero.

    `contributions` keeps the sign. Its sum over the patches is the class score, less the
    classifier's bias, the offset of a norm behind the pooling (whose scale is held at the image's),
    and the contributions of special tokens if these are pooled too. For mean and maximum pooling
    this is CAM (Zhou et al. 2016); for other poolings the decomposition is ours.

    Attributes:
        pooling: how the model pools its patches: `GroupedGeM`, `RankPooling`, or your own. It is
            compared with the classifier's recorded input. Not needed for the mean, the maximum, and
            heads with one attention query (SigLIP).
        nodes: points of the integral along the attention weights of such a head; 1 is exact where
            everything behind the attention is linear.
    """

    pooling: Pooling | None = None
    nodes: int = 8

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"`nodes` must be at least 1, got {self.nodes}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        return fold_maps(capture, self.contributions(capture, classes).clamp_min(0.0), classes)

    def contributions(self, capture: Capture, classes: Classes) -> Float[Tensor, "b k n"]:
        """Return the signed contributions of the patches to the scores of ``classes``.

        The score of a class with several classifier outputs is their logsumexp. Its contributions
        are those of its outputs, weighted by their softmax within the class, and add up to the
        weighted mean of the outputs.

        Raises:
            UnsupportedModelError: the patches are not pooled, or in an unknown way.
        """
        scores = capture.scores
        check_classes(classes, len(scores), scores.shape[-1])
        outputs: Any = capture.outputs  # not None, as there are scores
        outputs = outputs.detach()
        weights = (_output_weights(capture, outputs, column) for column in classes.unbind(1))
        return torch.stack([self._of_outputs(capture, outputs, w) for w in weights], 1)

    def _of_outputs(
        self, capture: Capture, outputs: Tensor, weights: Float[Tensor, "b o"]
    ) -> Float[Tensor, "b n"]:
        """Return contributions to ``(outputs * weights).sum(1)``."""
        rules = (MeanPooling(), MaxPooling()) if self.pooling is None else (self.pooling,)
        heads = classifiers(capture.tail, outputs)
        shares = [self._before_classifier(capture, head, weights, rules) for head in heads]
        explained = [share for share in shares if share is not None]
        if heads and len(explained) == len(heads):
            return torch.stack(explained).mean(0)
        for call in reversed(capture.tail):  # or the model pools the scores of its patches
            scores = call.output.flatten(2).mT if call.output.dim() == 4 else call.output
            if scores.shape == (len(outputs), capture.grid.size, outputs.shape[1]):
                for rule in rules:
                    if _same(rule.pool(scores), outputs):
                        return torch.einsum("bnc,bc->bn", rule.parts(scores), weights.to(scores))
        raise UnsupportedModelError(
            "the class scores are not computed from patches pooled by "
            f"{' or '.join(map(repr, rules))}, so patches have no exact share in them; name the "
            "`pooling`, or use ClassWeightSeed (a class token sees the patches through attention "
            "alone)"
        )

    def _before_classifier(
        self, capture: Capture, head: TailCall, weights: Tensor, rules: Sequence[Pooling]
    ) -> Float[Tensor, "b n"] | None:
        """Return contributions through a linear classifier, if its input is pooled patches."""
        entered = head.input.flatten(1)
        direction = weights @ linear_weight(head.module, entered).detach().to(weights)
        vectors = [call for call in capture.tail if call.output.dim() == 2]
        norms = [None, *(c.module for c in vectors if isinstance(c.module, nn.LayerNorm))]
        for call in pooling_calls(capture.tail):
            for norm in norms:
                if _same(_normed(norm, call.output), entered):
                    return self._integrated(capture, call, norm, direction)
        for tokens, patches in _token_sequences(capture):
            for rule in rules:
                pooled = rule.pool(tokens)
                for norm in norms:
                    if _same(_normed(norm, pooled), entered):
                        parts = _parts_of_norm(norm, rule.parts(tokens), pooled)
                        return torch.einsum("bnd,bd->bn", parts[:, patches], direction.to(parts))
        return None

    def _integrated(
        self, capture: Capture, call: TailCall, norm: nn.Module | None, direction: Tensor
    ) -> Float[Tensor, "b n"]:
        """Return contributions to a score of an attention head's pooled token.

        Integrated gradients (Sundararajan et al. 2017): the attention weights are scaled from zero
        to their values, and each is credited with its mean gradient, by Gauss-Legendre quadrature.
        The shares of all tokens add up to the score less the score without any patch.
        """
        attention = next((m for m in call.module.modules() if is_attention(m)), call.module)
        heads, total = head_count(attention), torch.zeros(())
        with torch.inference_mode(mode=False), torch.enable_grad():
            tokens = call.input.clone()
            for node, weight in zip(*np.polynomial.legendre.leggauss(self.nodes), strict=True):
                place = float(node + 1) / 2  # from [-1, 1] to [0, 1]
                leaves: list[Tensor] = []
                with scaled_weights(place, leaves, heads):
                    pooled = call.module.forward(tokens)
                    score = (_normed(norm, pooled) * direction).sum()
                if len(leaves) != 1 or leaves[0].shape[2] != 1:
                    raise UnsupportedModelError(
                        f"{type(call.module).__name__} does not pool by the attention of one "
                        "query, so its score has no shares of patches; use ClassWeightSeed or "
                        "GradientSeed"
                    )
                (gradient,) = torch.autograd.grad(score, leaves)
                share = (leaves[0] * gradient)[:, :, 0].sum(1).detach()
                total = float(weight) / 2 / place * share + total.to(share)
        pools_patches_alone = tokens.shape[1] <= max(capture.patches)
        return total if pools_patches_alone else total[:, capture.patches]


def _output_weights(capture: Capture, outputs: Tensor, column: Tensor) -> Float[Tensor, "b o"]:
    """Return the weight of each classifier output in one class per image."""
    members = None if capture.vocabulary is None else capture.vocabulary.members
    count = outputs.shape[-1]
    if members is None:
        return F.one_hot(column.clamp_min(0), count).to(outputs.dtype)
    belongs = torch.zeros(len(members), count, dtype=torch.bool, device=outputs.device)
    for index, group in enumerate(members):
        belongs[index, list(group)] = True
    chosen = belongs[column.clamp_min(0)]
    return outputs.masked_fill(~chosen, float("-inf")).softmax(-1)


def _token_sequences(capture: Capture) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield tokens that may have been pooled, and the positions of the patches among them."""
    patches, alone = capture.patches, list(range(len(capture.patches)))
    for call in reversed(capture.tail):
        tokens = call.output
        if tokens.dim() == 3 and len(tokens) == capture.images:
            if tokens.shape[1] > max(patches):
                yield tokens[:, patches], alone
                yield tokens, patches
            elif tokens.shape[1] == len(patches):
                yield tokens, alone


def _normed(norm: nn.Module | None, tokens: Tensor) -> Tensor:
    """Apply a norm without its hooks, which belong to the user."""
    return tokens if norm is None else norm.forward(tokens)


def _parts_of_norm(norm: nn.Module | None, parts: Values, pooled: Pooled) -> Values:
    """Turn parts of the pooled vector into parts of its layer norm, without the norm's offset."""
    if not isinstance(norm, nn.LayerNorm):
        return parts
    deviation = pooled.var(-1, unbiased=False, keepdim=True).add(norm.eps).sqrt()
    parts = (parts - parts.mean(-1, keepdim=True)) / deviation[:, None]
    weight = norm_weight(norm, parts)
    return parts if weight is None else parts * weight.detach()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.to(b), b, rtol=1e-3, atol=1e-3)
