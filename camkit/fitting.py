"""Fit a read-out over a folder of photos with image-level labels, without masks."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from camkit.inputs import PhotoLike
from camkit.method import origin_of
from camkit.photo import Photo
from camkit.pipeline import Pipeline, Stages, wrap
from camkit.readout import Form, ImageMoments, Moments, Origin, Readout
from camkit.screen import progress
from camkit.seeds import FittedSeed, PredictedClasses, TextClasses
from camkit.seeds.fitted import pooled_tokens
from camkit.tensors import RGB, Cam, Pixels

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
    fitter, sums = Fitter(pipeline, texts=texts, guesses=guesses), Sums()
    waiting: dict[tuple[Any, ...], list[tuple[Photo, PhotoLabels]]] = {}
    for photo, row in progress(list(zip(listed, rows, strict=True)), desc="fitting"):
        if row is not None and not len(row):
            continue  # a photo without classes shows no object to learn from
        prepared = pipeline.prepare(photo)
        key = (tuple(prepared.pixels.shape), row is None)
        group = waiting.setdefault(key, [])
        group.append((prepared, row))
        if len(group) == _BATCH:
            sums.add(fitter.of_photos(waiting.pop(key)))
    for group in waiting.values():
        sums.add(fitter.of_photos(group))
    return sums.readout(form, order=fitter.names)


class Fitter:
    """Makes the read-out of each batch of photos; `fit` and bulk runs share it.

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
        self._pipeline = pipeline.without_edges()  # they would be computed for nothing
        self._texts, self._guesses = texts, guesses
        self._origin: Origin | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The classes in their order; empty if indices name them."""
        if self._texts is not None:
            return self._texts.names
        vocabulary = self._pipeline.vocabulary
        return () if vocabulary is None else vocabulary.names

    def of_photos(self, group: Sequence[tuple[Photo, PhotoLabels]]) -> Readout | None:
        """Return the read-out of photos of one size, all with labels or all without."""
        pixels = torch.cat([photo.pixels for photo, _ in group])
        rgb = torch.cat([photo.rgb for photo, _ in group])
        labels = [row for _, row in group if row is not None]
        return self.of(pixels, rgb, labels or None)

    def of(
        self,
        pixels: Pixels,
        rgb: RGB,
        labels: Sequence[Sequence[str | int]] | None = None,
        *,
        counted: Sequence[bool] | None = None,
    ) -> Readout | None:
        """Return the read-out of a batch; None if no photo of it has a class.

        Args:
            pixels: as `Pipeline.stages` takes them.
            rgb: the same pictures in [0, 1].
            labels: classes of each photo, not empty; None guesses.
            counted: the photos that count; the others only keep the batch as it was.
        """
        stages, rows = self._stages(pixels, rgb, labels)
        if self._origin is None:
            if isinstance(stages.method.seed, FittedSeed) or stages.method.views is not None:
                raise ValueError("a read-out is fitted on a pipeline without read-out and views")
            self._origin = origin_of(stages.method, self._pipeline.model)
        cam = _first_maps(stages)
        photos = [i for i, row in enumerate(rows) if row and (counted is None or counted[i])]
        names = list(dict.fromkeys(name for photo in photos for name in rows[photo].values()))
        if not names:
            return None
        tokens = stages.capture.patch_embeddings().detach().float()[photos]
        groups = torch.empty(tokens.shape[:2], dtype=torch.int64)
        present = torch.zeros(len(photos), len(names), dtype=torch.float64)
        for place, photo in enumerate(photos):
            numbers = torch.tensor([names.index(name) for name in rows[photo].values()])
            present[place, numbers] = 1.0
            maps = cam[photo, list(rows[photo])].flatten(1)
            sure = sure_patches(maps, stages.method.background_score).cpu()
            groups[place] = torch.where(sure < 0, sure, numbers[sure.clamp_min(0)])
        groups = groups.to(tokens.device)
        patches = Moments.joined_from(
            [Moments.of(tokens[groups == group]) for group in (_BACKGROUND, *range(len(names)))]
        )
        pooled = pooled_tokens(stages.capture)[photos]
        labelled = present.mT @ pooled.double().cpu()
        images = ImageMoments(Moments.of(pooled), labelled, present.sum(0))
        return Readout(tuple(names), patches, images, len(photos), self._origin)

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
            return stages, [{index: names[index] for index in row if index >= 0} for row in present]
        request: Any = self._guesses if labels is None else [list(row) for row in labels]
        stages = self._pipeline.stages(pixels, rgb=rgb, classes=request)
        rows = []
        for image, row in enumerate(stages.classes.tolist()):
            slots = [slot for slot, index in enumerate(row) if index >= 0]
            rows.append(dict(zip(slots, stages.names[image], strict=True)))
        return stages, rows


def _first_maps(stages: Stages) -> Cam:
    """Return the maps, which must be on the patch grid, or raise a ValueError."""
    cam, grid = stages.cam, stages.capture.grid
    if cam.shape[-2:] != (grid.rows, grid.cols):
        raise ValueError(
            "the first maps of a read-out must stay on the patch grid, got maps of "
            f"{tuple(cam.shape[-2:])} for {grid.rows}x{grid.cols} patches; leave out refiners "
            "that change the size"
        )
    return cam


class Sums:
    """Running sums of read-outs; memory grows with their classes, not with their number.

    Sums are added in place and in the order of the calls, so the same calls give the same bits.
    """

    def __init__(self) -> None:
        self._origin: Origin | None = None
        self._photos = 0
        self._classes: dict[str | None, tuple[Tensor, ...]] = {}  # None: of the background
        self._vectors: tuple[Tensor, ...] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was added that a photo with a class taught."""
        return self._vectors is None

    def add(self, more: Readout | None) -> None:
        """Add a read-out; None adds nothing.

        Raises:
            ValueError: it belongs to another model, other weights or other first maps.
        """
        if more is None:
            return
        self._origin = self._origin or more.origin
        reason = self._origin.why_not(more.origin)
        if reason is not None:
            raise ValueError(f"read-outs of different origin do not add up: {reason}")
        self._photos += more.photos
        patches, images = more.patches, more.images
        for row, name in enumerate((None, *more.classes)):
            parts = [patches.count[row], patches.total[row], patches.product[row]]
            if row:
                parts += [images.labelled[row - 1], images.photos[row - 1]]
            self._classes[name] = _added(self._classes.get(name), parts)
        vectors = images.vectors
        self._vectors = _added(self._vectors, (vectors.count, vectors.total, vectors.product))

    def readout(self, form: Form = "auto", *, order: Sequence[str] = ()) -> Readout:
        """Return the read-out of everything added so far.

        Args:
            form: see `camkit.Readout`.
            order: names of classes in the order that they get; classes without names, which are
                numbers, have theirs.

        Raises:
            ValueError: no photo had a class.
        """
        if self._origin is None or self._vectors is None:
            raise ValueError(
                "no photo has a class to learn from: give `labels`, or photos that the classifier "
                "is confident about"
            )
        places = {name: place for place, name in enumerate(order)}
        held = [name for name in self._classes if name is not None]
        names = sorted(held, key=lambda name: (places.get(name, len(places)), len(name), name))
        own = [self._classes[name] for name in names]
        patches = zip(self._classes[None], *(parts[:3] for parts in own), strict=True)
        labelled, photos = (torch.stack([parts[place] for parts in own]) for place in (3, 4))
        return Readout(
            tuple(names),
            Moments(*(torch.stack(parts) for parts in patches)),
            ImageMoments(Moments(*map(Tensor.clone, self._vectors)), labelled, photos),
            self._photos,
            self._origin,
            form,
        )


def _added(before: tuple[Tensor, ...] | None, more: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if before is None:
        return tuple(map(Tensor.clone, more))
    for mine, its in zip(before, more, strict=True):
        mine.add_(its)
    return before


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
