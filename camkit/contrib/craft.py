"""CRAFT: concepts that recur among patches, weighted by their effect on the class score."""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from camkit.capture.record import Capture, WatchSpec
from camkit.contrib.layers import lens_scores
from camkit.printing import short_repr
from camkit.seeds.protocol import check_classes, fold_maps, leaving_tokens, pick
from camkit.tensors import Cam, Classes

Data: TypeAlias = Float[Tensor, "b n d"]
Amounts: TypeAlias = Float[Tensor, "b n r"]
Directions: TypeAlias = Float[Tensor, "b r d"]

_TINY = 1e-9
_RIDGE = 1e-6  # keeps unused and duplicate directions solvable


def semi_nmf(
    data: Data, rank: int, *, steps: int = 50, rng_seed: int = 0
) -> tuple[Amounts, Directions]:
    """Factorise ``data`` to ``amounts @ directions``, with amounts of at least 0.

    The alternating rule of Ding, Li and Jordan (2010): directions by least squares, amounts by
    their multiplicative update, which never raises the squared error. It starts from cluster
    membership plus 0.2, as theirs. Their clusters are those of k-means; here each row belongs to
    the nearest of some rows drawn far from each other, which is ours.

    Args:
        data: signed rows.
        rank: number of directions.
        steps: number of updates.
        rng_seed: of the first row drawn.
    """
    if not 1 <= rank <= data.shape[1]:
        raise ValueError(f"`rank` must lie in 1 to the {data.shape[1]} rows, got {rank}")
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    amounts = _start(data, rank, rng_seed)
    for _ in range(steps):
        amounts = _step(data, amounts, least_squares(data, amounts))
    return amounts, least_squares(data, amounts)


def amounts_of(data: Data, directions: Directions, *, steps: int = 50) -> Amounts:
    """Return the amount of each given direction in every row; at least 0.

    Args:
        data: signed rows.
        directions: of `semi_nmf`, perhaps of other data.
        steps: number of multiplicative updates, starting from equal amounts.
    """
    amounts = data.new_ones(*data.shape[:2], directions.shape[1])
    for _ in range(steps):
        amounts = _step(data, amounts, directions)
    return amounts


def least_squares(data: Data, amounts: Amounts) -> Directions:
    """Return the directions with the least squared error, given the amounts."""
    gram = amounts.mT @ amounts
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)[:, None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * eye, amounts.mT @ data)


def _step(data: Data, amounts: Amounts, directions: Directions) -> Amounts:
    towards, gram = data @ directions.mT, directions @ directions.mT
    gain = towards.clamp_min(0.0) + amounts @ (-gram).clamp_min(0.0)
    loss = (-towards).clamp_min(0.0) + amounts @ gram.clamp_min(0.0)
    return amounts * (gain / loss.clamp_min(_TINY)).sqrt()


def _start(data: Data, rank: int, rng_seed: int) -> Amounts:
    """Assign each row to the nearest of ``rank`` rows, each the farthest from those before it."""
    generator = torch.Generator().manual_seed(rng_seed)
    first = int(torch.randint(data.shape[1], (1,), generator=generator))
    centre = data[:, first : first + 1]
    distances = [(data - centre).square().sum(-1)]
    for _ in range(rank - 1):
        farthest = torch.stack(distances).amin(0).argmax(1)
        centre = data.gather(1, farthest[:, None, None].expand(-1, 1, data.shape[2]))
        distances.append((data - centre).square().sum(-1))
    nearest = torch.stack(distances, -1).argmin(-1)
    return torch.nn.functional.one_hot(nearest, rank).to(data.dtype) + 0.2


@dataclass(frozen=True, eq=False)
class ConceptBank:
    """Directions that recur among patches.

    Attributes:
        directions: one row per concept.
    """

    directions: Float[Tensor, "r d"]

    __repr__ = short_repr

    @classmethod
    def of(cls, patches: Float[Tensor, "n d"], *, rank: int = 20, steps: int = 50) -> "ConceptBank":
        """Learn concepts from the patches of many images.

        Args:
            patches: of images of one class, from the layer that a `CRAFTSeed` reads.
            rank: number of concepts; 20 is CRAFT's.
            steps: of the factorisation.
        """
        return cls(semi_nmf(patches[None].float(), rank, steps=steps)[1][0])


@dataclass(frozen=True)
class CRAFTSeed:
    """The amount of each concept in each patch, times the concept's importance to the class.

    After CRAFT (Fel et al. 2023): features are factorised into non-negative amounts of concepts. A
    concept's importance is the total Sobol index of the class score when amounts are scaled by
    random masks (Jansen's estimator). Ours: ViT tokens are signed, so the factorisation is
    semi-NMF; masks are Sobol's sequence instead of Halton's; the score is the logit lens of the
    mean patch; a concept that lowers the score on average counts as zero, as the index has no sign;
    and without ``concepts`` each image is factorised by itself, where CRAFT learns concepts from
    hundreds of crops of one class.

    Attributes:
        concepts: learnt beforehand; None factorises each image by itself.
        rank: number of concepts of an image, if ``concepts`` is None.
        layer: the block whose patches are read, as in `camkit.contrib.LogitLensSeed`.
        designs: number of masks for each concept; 32 is CRAFT's.
    """

    concepts: ConceptBank | None = None
    rank: int = 8
    layer: int = -1
    designs: int = 32

    requires: ClassVar[WatchSpec] = WatchSpec(leaving=True)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {self.rank}")
        if self.designs < 2:
            raise ValueError(f"`designs` must be at least 2, got {self.designs}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        scores = capture.scores
        check_classes(classes, len(scores), scores.shape[-1])
        patches = leaving_tokens(capture, self.layer, self)[:, capture.patches].float()
        if self.concepts is None:
            amounts, directions = semi_nmf(patches, self.rank)
        else:
            directions = self.concepts.directions.to(patches).expand(len(patches), -1, -1)
            amounts = amounts_of(patches, directions)
        weights = self._importance(capture, classes, amounts.mean(1), directions)
        maps = torch.einsum("bkr,bnr->bkn", weights, amounts)
        return fold_maps(capture, maps, classes)

    def _importance(
        self,
        capture: Capture,
        classes: Classes,
        pooled: Float[Tensor, "b r"],
        directions: Float[Tensor, "b r d"],
    ) -> Float[Tensor, "b k r"]:
        """Return the importance of each concept to each class; 0 if it lowers the score."""
        first, second = sobol_pairs(pooled.shape[1], self.designs, pooled)
        masks = torch.cat([first, *swapped(first, second)])
        tokens = torch.einsum("mr,br,brd->bmd", masks, pooled, directions)
        dtype = capture.leaving[self.layer].tokens.dtype
        scores = pick(lens_scores(capture, tokens.to(dtype)), classes).float()
        base, others = scores[..., : self.designs], scores[..., self.designs :]
        others = others.unflatten(-1, (-1, self.designs))
        moved = first.T - second.T  # surplus of the concept in the base design
        lowers = ((base[:, :, None] - others) * moved).mean(-1) < 0
        return total_sobol(base, others).masked_fill(lowers, 0.0)


def sobol_pairs(dims: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Draw two independent sets of evenly spread points in the unit cube."""
    drawn = SobolEngine(2 * dims).draw(count + 1)[1:].to(like)  # the first point is the origin
    return drawn[:, :dims], drawn[:, dims:]


def swapped(first: Float[Tensor, "m r"], second: Float[Tensor, "m r"]) -> list[Tensor]:
    """Return, for each coordinate, the first set with that coordinate of the second."""
    sets = []
    for coordinate in range(first.shape[1]):
        changed = first.clone()
        changed[:, coordinate] = second[:, coordinate]
        sets.append(changed)
    return sets


def total_sobol(
    base: Float[Tensor, "... m"], changed: Float[Tensor, "... r m"]
) -> Float[Tensor, "... r"]:
    """Estimate the total Sobol index of each coordinate (Jansen).

    Args:
        base: values at the first set of points.
        changed: values at the sets in which one coordinate was swapped.
    """
    spread = base.var(-1, unbiased=False)[..., None].clamp_min(1e-12)
    return (base[..., None, :] - changed).square().mean(-1) / (2 * spread)
