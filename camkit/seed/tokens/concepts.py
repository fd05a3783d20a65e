"""Seed from concepts: what recurs among the patches, weighed by what it does to the class score."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.quasirandom import SobolEngine

from camkit.capture.record import Capture
from camkit.capture.tokens import TokenWatch
from camkit.ops.factorization import amounts_of, semi_nmf
from camkit.seed.protocol import check_classes, keep_asked, pick
from camkit.seed.tokens.logit_lens import leaving_patches, lens_scores
from camkit.tensors import Cam, Classes


@dataclass(frozen=True, eq=False)
class Concepts:
    """Directions that recur among patches.

    Attributes:
        directions: one row a concept.
    """

    directions: Float[Tensor, "r d"]

    @classmethod
    def of(cls, patches: Float[Tensor, "n d"], *, rank: int = 20, steps: int = 50) -> "Concepts":
        """Learn concepts from the patches of many images.

        Args:
            patches: of images of one class, from the layer that a `ConceptSeed` reads.
            rank: how many; 20 is CRAFT's.
            steps: of the factorisation.
        """
        return cls(semi_nmf(patches[None].float(), rank, steps=steps)[1][0])


@dataclass(frozen=True)
class ConceptSeed:
    """The amount of each concept in each patch, times how much it matters to the class.

    After CRAFT (Fel et al. 2023): features are factorised into non-negative amounts of concepts, a
    concept matters by the total Sobol index of the class score when amounts are scaled by random
    masks (Jansen's estimator). Ours: ViT tokens are signed, so the factorisation is semi-NMF; masks
    are Sobol's sequence instead of Halton's; the score is the logit lens of the mean patch; a
    concept that lowers the score on average counts as zero, as the index has no sign; and without
    ``concepts`` those of each image alone are taken, where CRAFT learns them from hundreds of crops
    of one class.

    Attributes:
        concepts: learnt beforehand; None factorises each image alone.
        rank: how many concepts an image has, where they are its own.
        layer: the block whose patches are read, as in `camkit.LogitLensSeed`.
        designs: masks for each concept; 32 is CRAFT's.
    """

    concepts: Concepts | None = None
    rank: int = 8
    layer: int = -1
    designs: int = 32

    gradients: ClassVar[bool] = False
    tokens: ClassVar[TokenWatch] = TokenWatch(leaving=True)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {self.rank}")
        if self.designs < 2:
            raise ValueError(f"`designs` must be at least 2, got {self.designs}")

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, capture.scores.shape[-1])
        patches = leaving_patches(capture, self.layer, self).float()
        if self.concepts is None:
            amounts, directions = semi_nmf(patches, self.rank)
        else:
            directions = self.concepts.directions.to(patches).expand(len(patches), -1, -1)
            amounts = amounts_of(patches, directions)
        weights = self._importance(capture, classes, amounts.mean(1), directions)
        maps = torch.einsum("bkr,bnr->bkn", weights, amounts)
        return keep_asked(capture.grid.fold(maps), classes)

    def _importance(
        self,
        capture: Capture,
        classes: Classes,
        pooled: Float[Tensor, "b r"],
        directions: Float[Tensor, "b r d"],
    ) -> Float[Tensor, "b k r"]:
        """How much each concept matters to each asked class; 0 where it lowers the score."""
        first, second = sobol_pairs(pooled.shape[1], self.designs, pooled)
        masks = torch.cat([first, *swapped(first, second)])
        tokens = torch.einsum("mr,br,brd->bmd", masks, pooled, directions)
        dtype = capture.leaving[self.layer].tokens.dtype
        scores = pick(lens_scores(capture, tokens.to(dtype)), classes).float()
        base, others = scores[..., : self.designs], scores[..., self.designs :]
        others = others.unflatten(-1, (-1, self.designs))
        moved = first.T - second.T  # how much more of the concept the base design holds
        lowers = ((base[:, :, None] - others) * moved).mean(-1) < 0
        return total_sobol(base, others).masked_fill(lowers, 0.0)


def sobol_pairs(dims: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent sets of points in the unit cube, evenly spread."""
    drawn = SobolEngine(2 * dims).draw(count + 1)[1:].to(like)  # the first point is the origin
    return drawn[:, :dims], drawn[:, dims:]


def swapped(first: Float[Tensor, "m r"], second: Float[Tensor, "m r"]) -> list[Tensor]:
    """For each coordinate, the first set with that coordinate of the second."""
    found = []
    for place in range(first.shape[1]):
        changed = first.clone()
        changed[:, place] = second[:, place]
        found.append(changed)
    return found


def total_sobol(
    base: Float[Tensor, "... m"], changed: Float[Tensor, "... r m"]
) -> Float[Tensor, "... r"]:
    """Jansen's estimate of the total Sobol index of each coordinate.

    Args:
        base: values at the first set of points.
        changed: values at the sets in which one coordinate was swapped.
    """
    spread = base.var(-1, unbiased=False)[..., None].clamp_min(1e-12)
    return (base[..., None, :] - changed).square().mean(-1) / (2 * spread)
