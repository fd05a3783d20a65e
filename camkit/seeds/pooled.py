"""Seeds that share a pooled class score out among the patches it came from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.host import head_count, is_attention
from camkit.capture.intercept import scaled_weights
from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.capture.tail import TailCall, classifiers, pooling_calls
from camkit.errors import UnsupportedModelError
from camkit.seeds.protocol import Seed, check_classes, keep_asked, pick
from camkit.tensors import Cam, Classes

Values: TypeAlias = Float[Tensor, "b n d"]
Pooled: TypeAlias = Float[Tensor, "b d"]


@runtime_checkable
class Pooling(Protocol):
    """A pooling whose result is a sum over patches."""

    def pool(self, values: Values) -> Pooled:
        """One vector an image."""

    def parts(self, values: Values) -> Values:
        """What each patch adds to it; the parts add up to the pooled vector."""


@dataclass(frozen=True)
class MeanPooling:
    """The mean over patches: every patch adds its share."""

    def pool(self, values: Values) -> Pooled:
        return values.mean(1)

    def parts(self, values: Values) -> Values:
        return values / values.shape[1]


@dataclass(frozen=True)
class MaxPooling:
    """The maximum of each channel (ToCo), which belongs to the first patch that reaches it."""

    def pool(self, values: Values) -> Pooled:
        return values.amax(1)

    def parts(self, values: Values) -> Values:
        winner = F.one_hot(values.argmax(1), values.shape[1]).mT
        return values * winner.to(values.dtype)


@dataclass(frozen=True)
class GroupedGeM:
    """Generalised mean with one power for each group of channels (GGeM, Ko et al. 2022).

    ``(mean over patches of x^p)^(1/p)``, where ``x^p / (n pooled^(p - 1))`` is the part of a patch.
    The formula is read from the abstract and one unofficial implementation; the decomposition is
    ours. Values below ``floor`` count as ``floor``, so half of the channels behind a layer norm are
    flat. A power of 1 is the mean, large ones approach the maximum.

    Attributes:
        powers: one for each group; channels are split evenly, in order.
        floor: least value, positive.
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
        power = self._power(values)
        pooled = self.pool(values)[:, None]
        # (x / pooled)^p, not x^p / pooled^p: powers of small values vanish
        relative = (values.clamp_min(self.floor) / pooled).pow(power)
        return relative * pooled / values.shape[1]

    def _power(self, values: Values) -> Float[Tensor, " d"]:
        groups, channels = len(self.powers), values.shape[-1]
        if channels % groups:
            raise ValueError(
                f"`powers` must be as many as divide {channels} channels evenly, got {groups}"
            )
        return values.new_tensor(self.powers).repeat_interleave(channels // groups)


@dataclass(frozen=True)
class RankPooling:
    """Weighted mean in order of size (MCTformer+, Xu et al. 2024): each rank weighs ``decay`` less.

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


def pooled_shares(
    call: TailCall,
    read: Callable[[Tensor], Tensor],
    *,
    patches: Sequence[int],
    nodes: int,
) -> Float[Tensor, "b n"]:
    """What each patch adds to a score of the pooled token.

    The score is followed while the attention weights grow from nothing to what they are, along a
    straight line, and each weight is credited with its gradient on the way (integrated gradients,
    Sundararajan et al. 2017). All shares, those of other tokens included, add up to the score less
    what it is without any patch; a head that is linear behind its attention has the same shares at
    every point, and one node is enough.

    Args:
        call: the pooling head's call.
        read: makes one score an image of what the head returns.
        patches: positions of the patches among its tokens.
        nodes: points on the line, at the places of Gauss and Legendre.
    """
    attention = next((m for m in call.module.modules() if is_attention(m)), call.module)
    shares = []
    with torch.inference_mode(mode=False), torch.enable_grad():
        tokens = call.input.clone()
        for place, weight in _gauss(nodes):
            leaves: list[Tensor] = []
            with scaled_weights(place, leaves, head_count(attention)):
                score = read(call.module.forward(tokens)).sum()
            if len(leaves) != 1 or leaves[0].shape[2] != 1:
                raise UnsupportedModelError(
                    f"{type(call.module).__name__} does not pool by the attention of one query, so "
                    "its score cannot be shared out; use ClassWeightSeed or GradientSeed"
                )
            (gradient,) = torch.autograd.grad(score, leaves)
            on_the_way = (leaves[0] * gradient)[:, :, 0].sum(1).detach()
            shares.append(weight / place * on_the_way)
    return torch.stack(shares).sum(0)[:, list(patches)]


def _gauss(nodes: int) -> list[tuple[float, float]]:
    """Places in [0, 1] and weights of Gauss-Legendre quadrature (Golub and Welsch 1969)."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    places, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return list(zip(((places + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))


@dataclass(frozen=True)
class ClassWeightSeed:
    """The classifier's score of each patch token, as in CAM (Zhou et al. 2016).

    Scores below the image's mean patch score of the class hold no evidence and become zero; the
    mean, instead of CAM's zero, is our choice, because a softmax classifier's scores have no
    natural zero.
    """

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        scores = capture.patch_scores()
        check_classes(capture, classes, scores.shape[-1])
        maps = pick(scores, classes)
        evidence = (maps - maps.mean(-1, keepdim=True)).clamp_min(0.0)
        return keep_asked(capture.grid.fold(evidence), classes)


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
        nodes: steps of the integral for attention heads (`camkit.seeds.pooled`).
    """

    pooling: Pooling | None = None
    nodes: int = 8

    requires: ClassVar[WatchSpec] = WatchSpec()

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


@dataclass(frozen=True)
class PatchHeadSeed:
    """The class maps that a head of the host makes of its patches (MCTformer-V2's patch CAM).

    It has as many channels as the host has class scores. Negative ones count as zero, as there.
    """

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        rows, cols = capture.grid.rows, capture.grid.cols
        maps = [
            call.output
            for call in capture.tail
            if call.output.dim() == 4 and call.output.shape[2:] == (rows, cols)
        ]
        if not maps:
            raise UnsupportedModelError(
                f"no layer behind the last block returns maps of {rows}x{cols} patches, so the "
                "host has no head for patches; use ClassWeightSeed"
            )
        known = maps[-1].shape[1] if capture.outputs is None else capture.outputs.shape[-1]
        fitting = [scored for scored in maps if scored.shape[1] == known]
        if not fitting:
            raise UnsupportedModelError(
                f"layers behind the last block return maps of {maps[-1].shape[1]} channels (a "
                f"decoder's, it seems), but the host scores {known} classes, so none of them is a "
                "head for patches; use ClassWeightSeed"
            )
        scores = fitting[-1].flatten(2).mT
        scores = scores if capture.vocabulary is None else capture.vocabulary.score(scores)
        check_classes(capture, classes, scores.shape[-1])
        return keep_asked(capture.grid.fold(pick(scores, classes).clamp_min(0.0)), classes)


@dataclass(frozen=True)
class ProductSeed:
    """The product of two seeds' maps: what both see.

    Class attention times patch head is MCTformer-V2's map; with ``root``, MCTformer+'s.

    Attributes:
        first: a seed.
        second: another one.
        root: take the square root, so that maps keep their scale.
    """

    first: Seed
    second: Seed
    root: bool = False

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec() | required_by(self.first, self.second)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        first = self.first(capture, classes)
        product = first * self.second(capture, classes).to(first)
        return product.sqrt() if self.root else product
