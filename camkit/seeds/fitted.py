"""Seed with a read-out fitted over a folder, which tells background from objects."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.ops.scaling import scaled_to_max
from camkit.readout import Readout
from camkit.seeds.protocol import Seed, above_mean, fold_maps
from camkit.tensors import Cam, Classes

FITTED_SCORE = 0.5
"""Background score of fitted maps: where half of the evidence is for the object."""

_STEEPNESS = 10.0  # of the logistic function of a margin; ours
_BLOCKS = 4  # whose class attention pools the patches of a photo


@dataclass(frozen=True)
class FittedSeed:
    """The maps of a seed, refined, and averaged with what a read-out says of every patch (ours).

    The read-out's margin m of each patch becomes evidence, ``sigmoid(10 m)``, which is spread once
    and averaged with the refined map of the seed. If the read-out has a classifier from image
    labels, its scores of the patches, times class attention, first join the maps of the seed, if it
    knows all classes of the photo.

    A class that the read-out does not know (`camkit.readout.Readout.knows`) keeps its unfitted map.
    Beside other classes, a patch belongs to the class whose unfitted map is the strongest there:
    evidence tells objects from background, and the unknown object looks like one, too. So where the
    unknown class is the stronger, the other map stays unfitted, and where it is the weaker, its map
    is lowered with that of the other.

    Attributes:
        seed: the seed of the first maps.
        readout: fitted on the same seed and refiners.
        refine: refiners of the first maps that stay on the patch grid and end in [0, 1].
        spread: spreads the evidence, on the patch grid.
        unfitted_score: background score that suits the first maps; unfitted maps are stretched, so
            that 0.5 suits them too.
    """

    seed: Seed
    readout: Readout
    refine: tuple[Callable[[Cam, Capture], Cam], ...]
    spread: Callable[[Cam, Capture], Cam]
    unfitted_score: float

    absolute: ClassVar[bool] = True

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        return WatchSpec() | required_by(self.seed, *self.refine, self.spread)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        names = names_of(capture, classes)
        tokens = capture.patch_embeddings().detach().float()
        known = self._known(names, tokens)
        first = self._first(capture, classes, names, known)
        margins = self.readout.margins(tokens, names)
        evidence = capture.grid.fold((_STEEPNESS * margins).sigmoid())
        fitted = (first + self.spread(evidence, capture).clamp(0.0, 1.0)) / 2
        absent = (classes < 0)[:, :, None, None]
        unfitted = _stretched(first, self.unfitted_score)
        cam = contested(fitted, unfitted, known, ~known & ~absent)
        return cam.masked_fill(absent, 0.0)

    def unfitted(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the classes that keep their unfitted map."""
        return tuple(name for name in names if not self.readout.knows(name))

    def _first(
        self,
        capture: Capture,
        classes: Classes,
        names: list[list[str]],
        known: Bool[Tensor, "b k 1 1"],
    ) -> Cam:
        cam = scaled_to_max(self.seed(capture, classes).float().clamp_min(0.0))
        whole = (known[..., 0] | (classes < 0)[..., None]).all(1, keepdim=True)
        if self.readout.by_class and bool(whole.any()):
            tokens = capture.patch_embeddings().detach().float()
            scores = above_mean(self.readout.class_scores(tokens, names)) * whole
            evidence = scaled_to_max(scores, (-1,)) * class_attention(capture)[:, None]
            cam = scaled_to_max(cam + scaled_to_max(fold_maps(capture, evidence, classes)))
        for refiner in self.refine:
            cam = refiner(cam, capture)
        return cam

    def _known(self, names: list[list[str]], like: Tensor) -> Bool[Tensor, "b k 1 1"]:
        flags = [[self.readout.knows(name) for name in row] for row in names]
        return torch.tensor(flags, device=like.device)[:, :, None, None]


def names_of(capture: Capture, classes: Classes) -> list[list[str]]:
    """Return the names of the classes of each image; indices as text if nothing names them."""
    names = None if capture.vocabulary is None else capture.vocabulary.names
    return [
        ["" if index < 0 else str(index) if names is None else names[index] for index in row]
        for row in classes.tolist()
    ]


def class_attention(capture: Capture) -> Float[Tensor, "b n"]:
    """Return the attention of class tokens to patches; even where a model has none."""
    if not capture.anatomy.class_tokens and not capture.pooling:
        return torch.ones(capture.images, len(capture.patches), device=capture.device)
    return capture.class_to_patch(_BLOCKS).detach().float().mean(1)


def pooled_tokens(capture: Capture) -> Float[Tensor, "b d"]:
    """Return the mean of the final patch tokens, weighted by class attention."""
    weights = class_attention(capture)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
    return torch.einsum("bn,bnd->bd", weights, capture.patch_embeddings().detach().float())


def contested(
    fitted: Cam, unfitted: Cam, known: Bool[Tensor, "b k 1 1"], unknown: Bool[Tensor, "b k 1 1"]
) -> Cam:
    """Join fitted maps of known classes and unfitted maps of others, which decide between them."""
    rival = unfitted.masked_fill(~unknown, -1.0).amax(1, keepdim=True)
    fitted = torch.where(rival > unfitted, unfitted, fitted)
    best, slot = unfitted.masked_fill(~known, -1.0).max(1, keepdim=True)
    lowered = (fitted.gather(1, slot) / best.clamp_min(1e-6)).clamp_max(1.0)
    others = torch.where(best > unfitted, unfitted * lowered, unfitted)
    return torch.where(known, fitted, others)


def _stretched(cam: Cam, score: float) -> Cam:
    """Move ``score`` to the background score of fitted maps, 0 and 1 staying in place."""
    low = cam / max(score, 1e-6) * FITTED_SCORE
    high = FITTED_SCORE + (cam - score) / max(1.0 - score, 1e-6) * (1.0 - FITTED_SCORE)
    return torch.where(cam <= score, low, high).clamp(0.0, 1.0)
