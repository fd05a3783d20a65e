"""From a photo to a mask: `wrap` makes a `Pipeline`, and `Pipeline.stages` shows every step."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.facts import NO_FACTS, ModelFacts
from camkit.capture.host import Host
from camkit.capture.modes import borrowed, exclusive
from camkit.capture.parameters import to_input
from camkit.capture.record import Capture, required_by
from camkit.capture.scores import known_classes
from camkit.checks import as_blocks, check_function, check_model
from camkit.edits.protocol import AnyEdit
from camkit.errors import CamkitError
from camkit.grid import Grid
from camkit.inputs import PhotoLike, as_photos, photo_settings, to_photo
from camkit.manifest import provenance
from camkit.mask import to_mask
from camkit.method import (
    DEFAULT_REFINE,
    PRESETS,
    Method,
    Preset,
    read_refine,
    split_refine,
    with_readout,
)
from camkit.names import read_vocabulary, vocabulary_of
from camkit.ops.images import resize_cam
from camkit.photo import Photo, PhotoSettings, keys_of
from camkit.printing import short_repr
from camkit.readout import Readout
from camkit.refiners.flat import warn_of_flat_maps
from camkit.refiners.normalize import scale_seed
from camkit.refiners.protocol import Refiner
from camkit.result import Result, mask_bits
from camkit.seeds.attention import GradientSeed
from camkit.seeds.fitted import FittedSeed
from camkit.seeds.protocol import Seed
from camkit.seeds.targets import (
    ClassRequest,
    Score,
    Targets,
    name_of,
    read_targets,
    request_of,
    with_targets,
)
from camkit.seeds.text import TextClasses
from camkit.seeds.views import (
    ModelCall,
    ModelRunner,
    MultiViewReader,
    Views,
    check_size,
)
from camkit.tensors import RGB, Cam, Classes, Pixels
from camkit.vocabulary import Vocabulary

_BATCH = 8  # photos of a list that share a forward


def wrap(  # noqa: PLR0913 - the fields of a Method, and what a model cannot tell
    model: nn.Module,
    *,
    seed: Seed | None = None,
    edit: AnyEdit | None = None,
    edit_blocks: int | Sequence[int] | None = 3,
    views: Views | None = None,
    refine: Refiner | Sequence[Refiner] = DEFAULT_REFINE,
    background_score: float | None = None,
    readout: Readout | str | Path | None = None,
    vocabulary: Vocabulary | Sequence[str] | Mapping[Any, Any] | None = None,
    photos: Any = None,
    scores: Callable[[Any], Tensor] | None = None,
    call: ModelCall | None = None,
    modules: Iterable[str] | None = None,
    class_tokens: Sequence[int] | None = None,
    other_tokens: Sequence[int] | None = None,
    grid: Grid | tuple[int, int] | None = None,
) -> "Pipeline":
    """Make a pipeline around a model; the model itself stays as it is.

    Args:
        model: a Vision Transformer. It need not return class scores if the seed reads none and
            ``classes`` are named.
        seed: makes the first maps. Without seed and edit, the pipeline takes both from the first of
            `camkit.method.PRESETS` that the model supports: `CALIBRATED`, `GRADIENT` or `POOLED`.
            With an edit alone, the seed is `GradientSeed`.
        edit: see `Method`, also for `edit_blocks`, `views` and `refine`.
        edit_blocks: the attention blocks to edit.
        views: other sizes and mirror images to read the seed from.
        refine: refiners, applied in order; or a single one.
        background_score: score that a class must exceed to own a pixel, in [0, 1]; None takes the
            score of the preset, or 0.55 with a seed or edit of your own.
        readout: a read-out that `camkit.fit` made for this model, or the path of a saved one. It
            improves the maps of the first refiners; those that follow edges come behind it. Give
            the same ``seed``, ``edit`` and ``refine`` as to `camkit.fit`.
        vocabulary: the class names: a list with the name of each output, some of the names that the
            model states itself, a dict, or a `Vocabulary` (`Vocabulary.of` has the forms). None
            takes the names that the model states (`camkit.names.vocabulary_of`), such as those of
            ImageNet; if it states none, classes are output indices.
        photos: how the model expects photos: an image processor, a transform, a dict with ``mean``
            and ``std``, or a `camkit.photo.PhotoSettings`. None reads it from the model
            (`camkit.inputs.photo_settings`).
        scores: computes ``(b, classes)`` scores from the model's output, as in `camkit.watch`.
        call: ``(model, pixels) -> output``, for a model that takes more than images; None is
            ``model(pixels)``. It is called for every view of a photo, at the size of the view.
        modules: as in `camkit.watch`.
        class_tokens: as in `camkit.watch`.
        other_tokens: as in `camkit.watch`.
        grid: as in `camkit.watch`; of every view.

    Raises:
        UnsupportedModelError: the model has no attention.
        TypeError: an argument is of another kind.
        ValueError: ``background_score`` is outside [0, 1], the vocabulary does not suit, or the
            read-out was fitted on another model or other first maps.
        DataError: the file of the read-out cannot be used.
    """
    check_model(model)
    shared: dict[str, Any] = {"views": views, "refine": read_refine(refine)}
    if background_score is not None and readout is None:
        shared["background_score"] = background_score
    method: Method | tuple[Preset, ...]
    if seed is None and edit is None:
        method = tuple(replace(p, method=replace(p.method, **shared)) for p in PRESETS)
    else:
        blocks = as_blocks("edit_blocks", edit_blocks)
        seed = GradientSeed() if seed is None else seed
        method = Method(seed, edit=edit, edit_blocks=blocks, **shared)
    if readout is not None:
        candidates = [method] if isinstance(method, Method) else [p.method for p in method]
        loaded = readout if isinstance(readout, Readout) else Readout.load(readout)
        method = with_readout(candidates, loaded, model)
        if background_score is not None:
            method = replace(method, background_score=background_score)
    facts = ModelFacts.of(modules, class_tokens, other_tokens, grid)
    return Pipeline(
        model,
        method,
        vocabulary=vocabulary,
        photos=photos,
        scores=scores,
        call=call,
        facts=facts,
    )


class Pipeline:
    """A model and the method that segments photos with it; printing it shows the method.

    Args:
        model: a Vision Transformer; its weights, hooks, modes and gradients stay as they are.
        method: how maps are made; or presets, which are tried on the first photo: the pipeline uses
            the first that the model supports.
        vocabulary: see `wrap`.
        photos: see `wrap`.
        scores: see `wrap`.
        call: see `wrap`.
        facts: what the user states about the model.

    Raises:
        UnsupportedModelError: the model has no attention.
    """

    def __init__(  # noqa: PLR0913 - what a model cannot tell
        self,
        model: nn.Module,
        method: Method | Sequence[Preset] = PRESETS,
        *,
        vocabulary: Vocabulary | Sequence[str] | Mapping[Any, Any] | None = None,
        photos: Any = None,
        scores: Callable[[Any], Tensor] | None = None,
        call: ModelCall | None = None,
        facts: ModelFacts = NO_FACTS,
    ) -> None:
        check_model(model)
        check_function("scores", scores)
        check_function("call", call)
        self._host = (Host.of(model, **facts.arguments()), facts)  # refuse here, not at a photo
        self.model = model
        self._names_given = vocabulary is not None
        self.vocabulary: Vocabulary | None = None
        if scores is not None:  # then the classes are not the model's own
            self.vocabulary = None if vocabulary is None else Vocabulary.of(vocabulary)
        elif vocabulary is None:
            self.vocabulary = vocabulary_of(model)
        else:
            self.vocabulary = read_vocabulary(vocabulary, model)
        self._photos = None if photos is None else photo_settings(model, photos)
        self.scores = scores
        self.call = call
        self.facts = facts
        self._passed_over: tuple[str, ...] = ()
        self._presets = (Preset(method),) if isinstance(method, Method) else tuple(method)
        self._method = method if isinstance(method, Method) else None

    def _current_host(self) -> Host:
        """The parts of the model, found again if it was changed."""
        host, facts = self._host
        if host.model is not self.model or facts != self.facts or not host.is_current():
            host = Host.of(self.model, **self.facts.arguments())
            self._host = host, self.facts
        return host

    @property
    def photos(self) -> PhotoSettings:
        """How the model expects photos; raises `CamkitError` if neither it nor the user says."""
        if self._photos is None:
            self._photos = photo_settings(self.model)
        return self._photos

    @overload
    def __call__(
        self, photo: list[Any] | tuple[Any, ...], *, classes: ClassRequest = None
    ) -> "list[Result]": ...

    @overload
    def __call__(self, photo: PhotoLike, *, classes: ClassRequest = None) -> "Result": ...

    def __call__(self, photo: PhotoLike, *, classes: ClassRequest = None) -> Any:
        """Segment a photo, or each photo of a list.

        Args:
            photo: a path, PIL image, array, tensor or `camkit.Photo` (`camkit.inputs.to_photo` says
                which values they may hold), or a list of these. Photos of a list that have one size
                share forwards, of at most 8 photos each.
            classes: the classes in the picture, by name or index; None takes the most probable one,
                where sister classes of one object count as one (`camkit.data.OBJECTS_IN_IMAGENET`).
                For a list of photos, one list for each. docs/views.md lists the other forms, such
                as labels, `camkit.seeds.PredictedClasses` and `camkit.seeds.TextClasses`.

        Returns:
            A `Result`; for a list of photos, a list of them in its order.

        Raises:
            CamkitError: the photo must be prepared, but nothing says how.
            DataError: a photo cannot be read.
            TypeError: ``photo`` is no picture.
            ValueError: a class is unknown, or the size does not fit the model's patches.
            UnsupportedModelError: the model's attention cannot be read.
        """
        several = as_photos(photo)
        if several is None:
            return self._segment([self.prepare(photo)], classes)[0]
        if not isinstance(classes, TextClasses):
            host = self._current_host()
            # wrong requests fail before any photo is read
            self._targets(classes, len(several), host)
        results: dict[int, Result] = {}
        waiting: dict[tuple[int, ...], list[tuple[int, Photo]]] = {}
        for place, each in enumerate(several):
            prepared = self.prepare(each)
            group = waiting.setdefault(tuple(prepared.pixels.shape), [])
            group.append((place, prepared))
            if len(group) == _BATCH:
                results |= self._segment_group(waiting.pop(tuple(prepared.pixels.shape)), classes)
        for group in waiting.values():
            results |= self._segment_group(group, classes)
        return [results[place] for place in range(len(several))]

    def prepare(self, photo: PhotoLike) -> Photo:
        """Return a photo at the model's size, normalised; a `camkit.Photo` as it is."""
        return photo if isinstance(photo, Photo) else to_photo(photo, self.photos)

    def _segment_group(
        self, group: Sequence[tuple[int, Photo]], classes: ClassRequest
    ) -> "dict[int, Result]":
        places = [place for place, _ in group]
        results = self._segment([photo for _, photo in group], request_of(classes, places))
        return dict(zip(places, results, strict=True))

    def _segment(self, photos: Sequence[Photo], classes: ClassRequest) -> "list[Result]":
        """Segment photos of one size in one forward."""
        stages = self.stages(
            torch.cat([photo.pixels for photo in photos]),
            rgb=torch.cat([photo.rgb for photo in photos]),
            classes=classes,
            keys=keys_of(photos),
            sizes=[photo.size for photo in photos],
        )
        _warn_of_unfitted(stages.unfitted)
        settings = self.settings_of(stages.method)  # reads all weights, so once for all photos
        return [
            result_of(photo, stages, place, copy.deepcopy(settings))
            for place, photo in enumerate(photos)
        ]

    def _targets(self, classes: ClassRequest, images: int, host: Host) -> Targets:
        """Check a request for the classes of the model, other than texts."""
        known = known_classes(self.model, host.widths) if self.scores is None else None
        return read_targets(
            classes,
            images=images,
            known=known,
            vocabulary=self.vocabulary,
            outputs=None if self._names_given else known,
        )

    def stages(
        self,
        pixels: Pixels,
        *,
        rgb: RGB,
        classes: ClassRequest = None,
        keys: Sequence[str] = (),
        sizes: Sequence[tuple[int, int]] = (),
    ) -> "Stages":
        """Compute the maps of a batch; raises the errors of `__call__`.

        Args:
            pixels: normalised images of one size.
            rgb: the same pictures in [0, 1].
            classes: classes of each image, padded with -1, or any other form that
                `camkit.seeds.read_targets` takes; None takes the most probable class of each.
            keys: names of the photos, for refiners that read files of them; see `camkit.Capture`.
            sizes: rows and columns of the photos themselves, for the same refiners.
        """
        with exclusive(self.model):  # its modes and hooks are those of all threads
            return self._stages(pixels, rgb, classes, keys, sizes)

    def _stages(
        self,
        pixels: Pixels,
        rgb: RGB,
        classes: ClassRequest,
        keys: Sequence[str],
        sizes: Sequence[tuple[int, int]],
    ) -> "Stages":
        # 1. The classes, checked before the model runs. Texts bring their own names and scores.
        vocabulary, scores, host = self.vocabulary, self.scores, self._current_host()
        if isinstance(classes, TextClasses):
            if scores is not None or self._names_given:
                raise ValueError(
                    "texts bring their own scores and names; wrap the model without `scores` and "
                    "`vocabulary`"
                )
            vocabulary, scores = Vocabulary(classes.names), classes.scores
            every = [list(range(len(classes)))] * len(pixels)
            targets = read_targets(every, images=len(pixels), vocabulary=vocabulary)
        else:
            targets = self._targets(classes, len(pixels), host)
        check_size(host, pixels)

        # 2. The method. The model's classifier cannot explain texts and custom scores.
        if len(self._presets) > 1 and (scores is not self.scores or targets.functions):
            method = self._without_classifier()
            reason = "it explains the model's own classifier, not texts or custom scores"
            passed_over = tuple(f"{p}: {reason}" for p in self._presets if p.classifier)
        else:
            method, passed_over = self.decide(pixels, rgb), self._passed_over
        seed = with_targets(method.seed, targets)

        # 3. One forward, watched for what the seed and the refiners read.
        pixels = to_input(self.model, pixels)
        rgb = rgb.to(pixels.device)
        runner = ModelRunner(
            self.model,
            requires=required_by(method.seed, *method.refine),
            edit=method.edit,
            edit_blocks=method.edit_blocks,
            vocabulary=vocabulary,
            scores=scores,
            call=self.call,
            facts=self.facts,
            host=host,
        )
        with borrowed(self.model), torch.no_grad():
            capture = replace(runner(pixels, rgb), keys=tuple(keys), sizes=tuple(sizes))
            indices = targets.classes(capture)

            # 4. The seed: maps on the patch grid, from this view or from several.
            if method.views is None:
                maps = seed(capture, indices).float()
            else:
                reader = MultiViewReader(runner, pixels, rgb, capture)
                maps = reader.seeds(indices, [(seed, method.views)])[seed, method.views]
            first = cam = scale_seed(seed, maps)

            # 5. The refiners.
            for refiner in method.refine:
                cam = refiner(cam, capture)

        known = capture.class_count
        if known is None:  # nothing tells how many classes there are
            known = int(indices.max()) + 1
        legends = [
            _legend([index for index in row if index >= 0], known, vocabulary, targets.functions)
            for row in indices.tolist()
        ]
        names = tuple(tuple(legend.values()) for legend in legends)
        warn_of_flat_maps(maps, cam, indices, names)
        fitted = method.seed if isinstance(method.seed, FittedSeed) else None
        return Stages(
            seed=first,
            cam=cam,
            capture=capture,
            classes=indices,
            names=names,
            values=tuple(tuple(legend) for legend in legends),
            method=method,
            passed_over=passed_over,
            unfitted=tuple(() if fitted is None else fitted.unfitted(each) for each in names),
        )

    def without_edges(self) -> "Pipeline":
        """Return a pipeline of this model without the refiners that follow edges, and what follows.

        Its maps are on the patch grid, unless another refiner changes their size.
        """
        other = copy.copy(self)
        other._presets = tuple(replace(p, method=_without_edges(p.method)) for p in self._presets)
        other._method = None if self._method is None else _without_edges(self._method)
        return other

    def decide(self, pixels: Pixels, rgb: RGB) -> Method:
        """Return the method for this model; the first call decides it, by trying the presets.

        The arguments are those of `stages`.
        """
        if self._method is None:
            runner = ModelRunner(
                self.model,
                vocabulary=self.vocabulary,
                scores=self.scores,
                call=self.call,
                facts=self.facts,
                host=self._current_host(),
            )
            if self.scores is None:  # otherwise `scores` may depend on the batch size
                pixels, rgb = pixels[:1], rgb[:1]
            passed_over: list[str] = []
            for preset in self._presets:
                reason = preset.why_not(runner, pixels, rgb)
                if reason is None:
                    self._method = preset.method
                    break
                passed_over.append(f"{preset}: {reason}")
            # if the model supports none, the errors of the least demanding preset explain why
            self._method = self._method or self._without_classifier()
            self._passed_over = tuple(passed_over)
        return self._method

    def _without_classifier(self) -> Method:
        return next(preset.method for preset in self._presets if not preset.classifier)

    @property
    def method(self) -> Method:
        """The method in use; raises `CamkitError` until the first photo has decided it."""
        if self._method is None:
            raise CamkitError(
                "the method is decided at the first photo; call the pipeline on a photo first, or "
                "`decide(pixels, rgb)`"
            )
        return self._method

    @property
    def passed_over(self) -> tuple[str, ...]:
        """The presets before the one in use, each with the reason that this model cannot use it."""
        return self._passed_over

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting, versions and the hash of the weights, JSON-ready; raises like `method`."""
        return self.settings_of(self.method)

    def settings_of(self, method: Method) -> dict[str, Any]:
        """Return what `settings` would be with another method."""
        return method.settings() | {"model": type(self.model).__name__} | provenance(self.model)

    def __repr__(self) -> str:
        """Return one line that names the stages; `print` shows every setting."""
        name, method = type(self.model).__name__, self._method
        if method is None:
            return f"Pipeline({name}, method decided at the first photo)"
        stages = (method.seed, method.edit, *method.refine)
        words = [_stage_name(stage) for stage in stages if stage is not None]
        return f"Pipeline({name}, {', '.join(words)}, background_score={method.background_score})"

    def __str__(self) -> str:
        name = type(self.model).__name__
        if self._method is not None:
            reasons = "".join(f"\n  not {reason}" for reason in self._passed_over)
            return f"Pipeline({name}, {self._method}){reasons}"
        candidates = "".join(f"\n  {preset.method!r}" for preset in self._presets)
        choice = "method decided at the first photo: the first of these that the model supports"
        return f"Pipeline({name}, {choice}{candidates})"


def result_of(photo: Photo, stages: "Stages", place: int, settings: dict[str, Any]) -> Result:
    """Return the result of one photo of a batch.

    Args:
        photo: the photo.
        stages: of the batch.
        place: of the photo in it.
        settings: of the method and the model, for the manifest.
    """
    row = stages.classes[place].tolist()
    slots = [slot for slot, index in enumerate(row) if index >= 0]
    values, names = stages.values[place], stages.names[place]
    bits, outputs = mask_bits(values), stages.capture.outputs
    cam = resize_cam(stages.cam[place : place + 1, slots], photo.size).clamp(0, 1)
    mask = torch.zeros(photo.size, dtype=torch.uint8 if bits == 8 else torch.int32)
    if slots:
        numbers = torch.tensor([values], device=cam.device) - 1
        score = stages.method.background_score
        mask = to_mask(cam, numbers, background_score=score, bits=bits)[0]
    return Result(
        photo=photo,
        classes=tuple(row[slot] for slot in slots),
        names=names,
        seed=stages.seed[place : place + 1, slots],
        cam=cam,
        mask=mask,
        legend=dict(zip(values, names, strict=True)),
        logits=cam.new_zeros(1, 0) if outputs is None else outputs[place : place + 1].detach(),
        settings=settings,
        passed_over=stages.passed_over,
        unfitted=stages.unfitted[place],
    )


def _warn_of_unfitted(unfitted: tuple[tuple[str, ...], ...]) -> None:
    """Warn of the classes of each image that a read-out does not know."""
    if found := list(dict.fromkeys(name for row in unfitted for name in row)):
        listed = ", ".join(f'"{name}"' for name in found)
        warnings.warn(
            f"the read-out does not know {listed}, so the unfitted maps are used; fit photos with "
            "these classes and add the read-outs",
            UnfittedClassWarning,
            stacklevel=3,
        )


class UnfittedClassWarning(UserWarning):
    """A class of a photo is not known to the read-out."""


def _stage_name(stage: object) -> str:
    return getattr(stage, "__name__", type(stage).__name__)


def _legend(
    classes: Sequence[int], known: int, vocabulary: Vocabulary | None, functions: Sequence[Score]
) -> dict[int, str]:
    """Return the mask value and the name of classes; custom scores follow the ``known`` ones."""
    largest = known
    if vocabulary is not None and vocabulary.values is not None:
        largest = max(vocabulary.values)
    legend: dict[int, str] = {}
    for index in classes:
        if index >= known:
            legend[largest + 1 + index - known] = name_of(functions[index - known])
        elif vocabulary is None:
            legend[index + 1] = str(index)
        else:
            legend[vocabulary.value(index)] = vocabulary.names[index]
    return legend


@dataclass(frozen=True)
class Stages:
    """The maps of one batch in [0, 1], and everything they were made from.

    Attributes:
        seed: the first maps, on the patch grid.
        cam: the refined maps, on the patch grid or finer.
        capture: of the photos as given.
        classes: index of each map, padded with -1.
        names: names of the classes of each image, without padding.
        values: their values in masks.
        method: the method used.
        passed_over: see `Result`.
        unfitted: see `Result`; of each image.
    """

    seed: Cam
    cam: Float[Tensor, "b k H W"]
    capture: Capture
    classes: Classes
    names: tuple[tuple[str, ...], ...]
    values: tuple[tuple[int, ...], ...]
    method: Method
    passed_over: tuple[str, ...] = ()
    unfitted: tuple[tuple[str, ...], ...] = ()

    __repr__ = short_repr


def _without_edges(method: Method) -> Method:
    return replace(method, refine=split_refine(method.refine)[0])
