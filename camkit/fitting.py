"""Fit a read-out over a folder of photos with image-level labels, without masks."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from camkit.inputs import PhotoLike
from camkit.method import origin_of, split_refine
from camkit.photo import Photo
from camkit.pipeline import Pipeline, Stages, wrap
from camkit.readout import Form, ImageMoments, Moments, Origin, Readout
from camkit.screen import progress
from camkit.seeds import FittedSeed, PredictedClasses, TextClasses
from camkit.seeds.fitted import pooled_tokens
from camkit.tensors import RGB, Pixels

PhotoLabels: TypeAlias = Sequence[str | int] | None
"""The classes of a photo by name or index; empty for none of them, None if they are not known."""

GUESSES = PredictedClasses(0.5, "softmax", least=0)
"""The classes that count for photos without labels; none if the classifier is not confident."""

_BATCH = 8  # photos of one size that share a forward
_SURE = 0.1  # distance from the background score at which a patch becomes an example; ours


def fit(
    model: nn.Module | Pipeline,
    photos: Iterable[PhotoLike],
    labels: Iterable[PhotoLabels] | None = None,
    *,
    vocabulary: Any = None,
    form: Form = "auto",
    guesses: PredictedClasses = GUESSES,
) -> Readout:
    """Fit a read-out that tells the objects of these photos from their background.

    The model runs once on each photo, and memory does not grow with their number. Label every class
    of a photo that the vocabulary has: an object without a label is learnt as background. The model
    stays as it is.

    Args:
        model: a model as for `camkit.wrap`, or the pipeline that it returns, for settings of your
            own. Refiners that follow the edges of the picture are left out.
        photos: in the forms that a pipeline takes.
        labels: the classes of each photo: a list of names or indices, or None for the confident
            guesses of the classifier. None alone stands for no labels at all.
        vocabulary: as in `camkit.wrap`; or `camkit.seeds.TextClasses` for CLIP.
        form: see `camkit.Readout`.
        guesses: how classes are guessed.

    Raises:
        ValueError: photos and labels differ in number, a class is unknown, no photo has a class, or
            the pipeline has a read-out or views.
        CamkitError, DataError, TypeError, UnsupportedModelError: as when a pipeline is called.
    """
    texts = vocabulary if isinstance(vocabulary, TextClasses) else None
    if isinstance(model, Pipeline):
        if vocabulary is not None and texts is None:
            raise ValueError("a pipeline has its vocabulary; leave out `vocabulary`")
        pipeline = model
    else:
        pipeline = wrap(model, vocabulary=None if texts is not None else vocabulary)
    listed = list(photos)
    rows = [None] * len(listed) if labels is None else list(labels)
    if len(rows) != len(listed):
        raise ValueError(
            f"`labels` must hold the classes of each of the {len(listed)} photos, got {len(rows)}"
        )
    fitter = Fitter(pipeline, texts=texts, guesses=guesses)
    waiting: dict[tuple[Any, ...], list[tuple[Photo, PhotoLabels]]] = {}
    for photo, row in progress(list(zip(listed, rows, strict=True)), desc="fitting"):
        if row is not None and not len(row):
            continue  # a photo without classes shows no object to learn from
        prepared = pipeline.prepare(photo)
        key = (tuple(prepared.pixels.shape), row is None)
        group = waiting.setdefault(key, [])
        group.append((prepared, row))
        if len(group) == _BATCH:
            fitter.add_photos(waiting.pop(key))
    for group in waiting.values():
        fitter.add_photos(group)
    return fitter.readout(form)


class Fitter:
    """Sums up what batches of photos teach; `fit` and bulk runs share it.

    Args:
        pipeline: makes the first maps.
        texts: the classes of CLIP.
        guesses: see `fit`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        texts: TextClasses | None = None,
        guesses: PredictedClasses = GUESSES,
    ) -> None:
        self._pipeline, self._texts, self._guesses = pipeline, texts, guesses
        self._background: Moments | None = None
        self._patches: dict[str, Moments] = {}
        self._order: dict[str, int] = {}
        self._vectors: Moments | None = None
        self._labelled: dict[str, Moments] = {}
        self._origin: Origin | None = None
        self._photos = 0

    def add_photos(self, group: Sequence[tuple[Photo, PhotoLabels]]) -> None:
        """Add photos of one size, all with labels or all without."""
        pixels = torch.cat([photo.pixels for photo, _ in group])
        rgb = torch.cat([photo.rgb for photo, _ in group])
        labels = [row for _, row in group if row is not None]
        self.add(pixels, rgb, labels or None)

    def add(
        self, pixels: Pixels, rgb: RGB, labels: Sequence[Sequence[str | int]] | None = None
    ) -> None:
        """Add a batch, as `Pipeline.stages` takes it; ``labels`` are not empty, None guesses."""
        stages, rows = self._stages(pixels, rgb, labels)
        if self._origin is None:
            if isinstance(stages.method.seed, FittedSeed) or stages.method.views is not None:
                raise ValueError("a read-out is fitted on a pipeline without read-out and views")
            self._origin = origin_of(stages.method, self._pipeline.model)
        first, edges = split_refine(stages.method.refine)
        cam = stages.cam
        if edges:
            cam = stages.seed
            for refiner in first:
                cam = refiner(cam, stages.capture)
        grid = stages.capture.grid
        if cam.shape[-2:] != (grid.rows, grid.cols):
            raise ValueError(
                "the first maps of a read-out must stay on the patch grid, got maps of "
                f"{tuple(cam.shape[-2:])} for {grid.rows}x{grid.cols} patches; leave out refiners "
                "that change the size"
            )
        tokens = stages.capture.patch_embeddings().detach().float()
        pooled = pooled_tokens(stages.capture)
        score = stages.method.background_score
        for image, row in enumerate(rows):
            if row:
                maps = cam[image, list(row)].flatten(1)
                self._add_image(tokens[image], pooled[image], maps, list(row.values()), score)

    def _stages(
        self, pixels: Pixels, rgb: RGB, labels: Sequence[Sequence[str | int]] | None
    ) -> tuple[Stages, list[dict[int, str]]]:
        """Make the maps of a batch; return the slots and names of the classes of each image."""
        if self._texts is not None:
            stages = self._pipeline.stages(pixels, rgb=rgb, classes=self._texts)
            names = self._texts.names
            if labels is None:
                present = self._guesses(stages.capture).tolist()
            else:
                present = [[names.index(c) if isinstance(c, str) else c for c in r] for r in labels]
            rows = [{index: names[index] for index in row if index >= 0} for row in present]
        else:
            request: Any = self._guesses if labels is None else [list(row) for row in labels]
            stages = self._pipeline.stages(pixels, rgb=rgb, classes=request)
            rows = []
            for image, row in enumerate(stages.classes.tolist()):
                slots = [slot for slot, index in enumerate(row) if index >= 0]
                rows.append(dict(zip(slots, stages.names[image], strict=True)))
        for image, row in enumerate(rows):
            for slot, name in row.items():
                self._order.setdefault(name, int(stages.classes[image, slot]))
        return stages, rows

    def _add_image(
        self,
        tokens: Float[Tensor, "n d"],
        pooled: Float[Tensor, " d"],
        maps: Float[Tensor, "k n"],
        names: Sequence[str],
        score: float,
    ) -> None:
        """Add the sure patches of one photo, and its pooled token."""
        self._photos += 1
        self._vectors = _sum(self._vectors, Moments.of(pooled[None]))
        for name in names:
            self._labelled[name] = _sum(self._labelled.get(name), Moments.of(pooled[None]))
        groups = sure_patches(maps, score)
        for slot, name in enumerate(names):
            if (groups == slot).any():
                found = Moments.of(tokens[groups == slot])
                self._patches[name] = _sum(self._patches.get(name), found)
        if (groups == _BACKGROUND).any():
            self._background = _sum(self._background, Moments.of(tokens[groups == _BACKGROUND]))

    def readout(self, form: Form = "auto") -> Readout:
        """Return the read-out of everything added so far.

        Raises:
            ValueError: nothing was added, or no photo had a class.
        """
        if self._origin is None or self._vectors is None:
            raise ValueError(
                "no photo has a class to learn from: give `labels`, or photos that the classifier "
                "is confident about"
            )
        width = self._vectors.total.shape[1]
        names = tuple(sorted(self._labelled, key=lambda name: (self._order[name], name)))
        patches = Moments.none(len(names) + 1, width)
        groups = [self._background, *(self._patches.get(name) for name in names)]
        for row, group in enumerate(groups):
            if group is not None:
                patches = patches + group.spread_to([row], len(names) + 1)
        held = [self._labelled[name] for name in names]
        images = ImageMoments(
            self._vectors,
            torch.cat([each.total for each in held]),
            torch.cat([each.count for each in held]),
        )
        return Readout(names, patches, images, self._photos, self._origin, form)


_BACKGROUND = -1


def sure_patches(maps: Float[Tensor, "k n"], score: float) -> Int[Tensor, " n"]:
    """Return the class of patches whose strongest map lies well above the background score.

    Patches well below it are background, -1; the others -2. If a map has no patch well above, its
    object may be anywhere, and no patch is background.

    >>> sure_patches(torch.tensor([[0.9, 0.5, 0.1], [0.0, 0.7, 0.2]]), 0.5).tolist()
    [0, 1, -1]
    """
    strongest, slots = maps.max(0)
    groups = torch.full_like(slots, -2)
    if bool((maps.amax(1) > score + _SURE).all()):
        groups[strongest < score - _SURE] = _BACKGROUND
    above = strongest > score + _SURE
    groups[above] = slots[above]
    return groups


def _sum(before: Moments | None, more: Moments) -> Moments:
    return more if before is None else before + more
