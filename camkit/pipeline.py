"""From a photo to a mask: `wrap` makes a `Pipeline`, and `Pipeline.stages` shows every step."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.facts import NO_FACTS, ModelFacts
from camkit.capture.host import Host
from camkit.capture.modes import borrowed
from camkit.capture.parameters import to_input
from camkit.capture.record import Capture, required_by
from camkit.capture.scores import known_classes
from camkit.edits.protocol import AnyEdit
from camkit.errors import CamkitError
from camkit.grid import Grid
from camkit.manifest import provenance
from camkit.mask import to_mask
from camkit.method import DEFAULT_REFINE, PRESETS, Method, Preset
from camkit.ops.images import resize_cam
from camkit.photo import Photo
from camkit.printing import short_repr
from camkit.refiners.normalize import normalize_cam
from camkit.refiners.protocol import Refiner
from camkit.result import Result, fits_a_byte, mask_legend
from camkit.seeds.attention import GradientSeed
from camkit.seeds.protocol import Seed
from camkit.seeds.targets import (
    ClassRequest,
    Score,
    name_of,
    read_targets,
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


def wrap(  # noqa: PLR0913 - the fields of a Method, and what a model cannot tell
    model: nn.Module,
    *,
    seed: Seed | None = None,
    edit: AnyEdit | None = None,
    edit_blocks: int | Sequence[int] | None = 3,
    views: Views | None = None,
    refine: Sequence[Refiner] = DEFAULT_REFINE,
    background_score: float | None = None,
    vocabulary: Vocabulary | None = None,
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
        refine: refiners, applied in order.
        background_score: score that a class must exceed to own a pixel, in [0, 1]; None takes the
            score of the preset, or 0.55 with a seed or edit of your own.
        vocabulary: class names, and the classifier outputs behind each; without it, classes are
            output indices.
        scores: computes ``(b, classes)`` scores from the model's output, as in `camkit.watch`.
        call: ``(model, pixels) -> output``, for a model that takes more than images; None is
            ``model(pixels)``. It is called for every view of a photo, at the size of the view.
        modules: as in `camkit.watch`.
        class_tokens: as in `camkit.watch`.
        other_tokens: as in `camkit.watch`.
        grid: as in `camkit.watch`; of every view.

    Raises:
        UnsupportedModelError: the model has no attention.
        ValueError: ``background_score`` is outside [0, 1].
    """
    shared: dict[str, Any] = {"views": views, "refine": tuple(refine)}
    if background_score is not None:
        shared["background_score"] = background_score
    method: Method | tuple[Preset, ...]
    if seed is None and edit is None:
        method = tuple(replace(p, method=replace(p.method, **shared)) for p in PRESETS)
    else:
        blocks = edit_blocks if isinstance(edit_blocks, int | None) else tuple(edit_blocks)
        seed = GradientSeed() if seed is None else seed
        method = Method(seed, edit=edit, edit_blocks=blocks, **shared)
    facts = ModelFacts.of(modules, class_tokens, other_tokens, grid)
    return Pipeline(model, method, vocabulary=vocabulary, scores=scores, call=call, facts=facts)


class Pipeline:
    """A model and the method that segments photos with it; printing it shows the method.

    Args:
        model: a Vision Transformer; its weights, hooks, modes and gradients stay as they are.
        method: how maps are made; or presets, which are tried on the first photo: the pipeline uses
            the first that the model supports.
        vocabulary: see `wrap`.
        scores: see `wrap`.
        call: see `wrap`.
        facts: what the user states about the model.

    Raises:
        UnsupportedModelError: the model has no attention.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | Sequence[Preset] = PRESETS,
        *,
        vocabulary: Vocabulary | None = None,
        scores: Callable[[Any], Tensor] | None = None,
        call: ModelCall | None = None,
        facts: ModelFacts = NO_FACTS,
    ) -> None:
        Host.of(model, **facts.arguments())  # refuse here, not at the first photo
        self.model = model
        self.vocabulary = vocabulary
        self.scores = scores
        self.call = call
        self.facts = facts
        self._passed_over: tuple[str, ...] = ()
        self._presets = (Preset(method),) if isinstance(method, Method) else tuple(method)
        self._method = method if isinstance(method, Method) else None

    def __call__(self, photo: Photo, *, classes: ClassRequest = None) -> "Result":
        """Segment one photo.

        Args:
            photo: see `camkit.load_photo`.
            classes: the classes in the picture, by name or index; None takes the most probable one.
                docs/views.md lists the other forms, such as labels,
                `camkit.seeds.PredictedClasses` and `camkit.seeds.TextClasses`.

        Raises:
            ValueError: a class is unknown, or the size does not fit the model's patches.
            UnsupportedModelError: the model's attention cannot be read.
        """
        stages = self.stages(photo.pixels, rgb=photo.rgb, classes=classes)
        slots = [slot for slot, index in enumerate(stages.classes[0].tolist()) if index >= 0]
        chosen = tuple(int(index) for index in stages.classes[0, slots])
        method, outputs = stages.method, stages.capture.outputs
        cam = resize_cam(stages.cam, photo.size).clamp(0, 1)
        values = stages.classes if fits_a_byte(stages.known) else None
        return Result(
            photo=photo,
            classes=chosen,
            names=stages.names[0],
            seed=stages.seed[:, slots],
            cam=cam[:, slots],
            mask=to_mask(cam, values, background_score=method.background_score)[0],
            legend=mask_legend(chosen, stages.names[0], stages.known),
            logits=stages.seed.new_zeros(1, 0) if outputs is None else outputs.detach(),
            settings=self._settings(method),
            passed_over=stages.passed_over,
        )

    def stages(self, pixels: Pixels, *, rgb: RGB, classes: ClassRequest = None) -> "Stages":
        """Compute the maps of a batch; raises the errors of `__call__`.

        Args:
            pixels: normalised images of one size.
            rgb: the same pictures in [0, 1].
            classes: classes of each image, padded with -1, or any other form that
                `camkit.seeds.read_targets` takes; None takes the most probable class of each.
        """
        # 1. The classes, checked before the model runs. Texts bring their own names and scores.
        vocabulary, scores = self.vocabulary, self.scores
        if isinstance(classes, TextClasses):
            if scores is not None or vocabulary is not None:
                raise ValueError(
                    "texts bring their own scores and names; wrap the model without `scores` and "
                    "`vocabulary`"
                )
            vocabulary, scores = Vocabulary(classes.names), classes.scores
            classes = [list(range(len(classes)))] * len(pixels)
        targets = read_targets(
            classes,
            images=len(pixels),
            known=known_classes(self.model) if scores is None else None,
            vocabulary=vocabulary,
        )
        check_size(self.model, pixels)

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
        )
        with borrowed(self.model), torch.no_grad():
            capture = runner(pixels, rgb)
            indices = targets.classes(capture)

            # 4. The seed: maps on the patch grid, from this view or from several.
            if method.views is None:
                maps = seed(capture, indices).float()
            else:
                reader = MultiViewReader(runner, pixels, rgb, capture)
                maps = reader.seeds(indices, [(seed, method.views)])[seed, method.views]
            first = cam = normalize_cam(maps)

            # 5. The refiners.
            for refiner in method.refine:
                cam = refiner(cam, capture)

        known = capture.class_count
        if known is None:  # nothing tells how many classes there are
            known = int(indices.max()) + 1
        return Stages(
            seed=first,
            cam=cam,
            capture=capture,
            classes=indices,
            names=_names(indices, known, vocabulary, targets.functions),
            known=known + len(targets.functions),
            method=method,
            passed_over=passed_over,
        )

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
        return self._settings(self.method)

    def _settings(self, method: Method) -> dict[str, Any]:
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


def _stage_name(stage: object) -> str:
    return getattr(stage, "__name__", type(stage).__name__)


def _names(
    classes: Classes, known: int, vocabulary: Vocabulary | None, functions: Sequence[Score]
) -> tuple[tuple[str, ...], ...]:
    """Name the classes of each image; custom scores are numbered behind the ``known`` ones."""
    names = list(map(str, range(known))) if vocabulary is None else list(vocabulary.names)
    names += map(name_of, functions)
    return tuple(tuple(names[i] for i in row if i >= 0) for row in classes.tolist())


@dataclass(frozen=True)
class Stages:
    """The maps of one batch in [0, 1], and everything they were made from.

    Attributes:
        seed: the first maps, on the patch grid.
        cam: the refined maps, on the patch grid or finer.
        capture: of the photos as given.
        classes: index of each map, padded with -1.
        names: names of the classes of each image, without padding.
        known: number of classes of the model or vocabulary, custom scores included.
        method: the method used.
        passed_over: see `Result`.
    """

    seed: Cam
    cam: Float[Tensor, "b k H W"]
    capture: Capture
    classes: Classes
    names: tuple[tuple[str, ...], ...]
    known: int
    method: Method
    passed_over: tuple[str, ...] = ()

    __repr__ = short_repr
