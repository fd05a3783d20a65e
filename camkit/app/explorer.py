"""One photo under many methods: forwards, first maps and refined maps are kept and reused."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.modes import borrowed
from camkit.capture.parameters import to_input
from camkit.capture.record import Capture, WatchSpec, required_by
from camkit.errors import CamkitError, CaptureError, UnsupportedModelError
from camkit.inputs import PhotoLike
from camkit.method import EDITS, REFINERS, SEEDS, Method, build, read_refiners
from camkit.ops.images import resize_cam
from camkit.photo import Photo
from camkit.pipeline import Pipeline, Stages, result_of
from camkit.printing import short_repr
from camkit.refiners.normalize import scale_seed
from camkit.result import Result
from camkit.seeds.views import ModelRunner

_MOST_BYTES = 512 << 20
"""Of kept maps of one photo; the oldest are dropped first."""

_USUAL = required_by(*(kind() for kind in SEEDS.values()))
"""What a forward records: everything that a seed with its usual settings reads."""

_MOST_CAPTURES = 2
"""Forwards kept of one photo: one with the edit of the preset, one without an edit."""


@dataclass(frozen=True)
class Choice:
    """A method in words, as the command line takes it.

    Attributes:
        seed: ``NAME[:SETTINGS]``; empty takes seed and edit from the preset of the model.
        edit: the same; empty means none, or with an empty seed that of the preset.
        edit_blocks: number of last blocks that an edit of yours changes; 0 changes all.
        refine: steps, each ``NAME[:SETTINGS]``.
        background_score: score that a class must exceed to own a pixel; None takes that of the
            preset, or 0.55.
    """

    seed: str = ""
    edit: str = ""
    edit_blocks: int = 3
    refine: tuple[str, ...] = ("default",)
    background_score: float | None = None

    def method(self, preset: Method) -> Method:
        """Return the method.

        Args:
            preset: what an empty choice stands for.

        Raises:
            ValueError: a name, a setting or a value does not exist.
        """
        steps = [step for step in self.refine if step.strip()]
        refine = read_refiners(steps, REFINERS) if steps else ()
        if not self.seed.strip() and not self.edit.strip():
            method = replace(preset, refine=refine)
        else:
            method = Method(
                build(self.seed.strip() or "gradient", SEEDS, "seed"),
                edit=build(self.edit, EDITS, "edit") if self.edit.strip() else None,
                edit_blocks=self.edit_blocks or None,
                refine=refine,
            )
        if self.background_score is not None:
            method = replace(method, background_score=self.background_score)
        return method


@dataclass(frozen=True)
class Step:
    """The maps behind one step of a method.

    Attributes:
        name: of the step, as `print` shows it.
        cam: the maps in [0, 1]; on the patch grid or finer.
    """

    name: str
    cam: Float[Tensor, "1 k h w"]

    __repr__ = short_repr


@dataclass
class _Maps:
    """Maps by what made them, up to a number of bytes."""

    most: int = _MOST_BYTES
    held: "OrderedDict[tuple[Any, ...], Tensor]" = field(default_factory=OrderedDict)

    def get(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        if key not in self.held:
            self.held[key] = make().detach()
        self.held.move_to_end(key)
        while len(self.held) > 1 and sum(m.nbytes for m in self.held.values()) > self.most:
            self.held.popitem(last=False)
        return self.held[key]


class View:
    """A photo and what was computed of it.

    The first forward records what all seeds and refiners read with their usual settings, so another
    seed, other refiners or another background score need no forward. Another edit changes the
    forward and needs one; the last two are kept.

    Args:
        pipeline: of the model.
        photo: in any form that the pipeline takes.
        classes: indices of the classes to show; None takes the most probable one.

    Raises:
        CamkitError: the photo cannot be read, or the model cannot.
    """

    def __init__(
        self, pipeline: Pipeline, photo: PhotoLike, *, classes: Sequence[int] | None = None
    ) -> None:
        self.pipeline = pipeline
        self.photo: Photo = pipeline.prepare(photo)
        self.preset: Method = pipeline.decide(self.photo.pixels, self.photo.rgb)
        self.forwards = 0
        self._captures: OrderedDict[str, tuple[WatchSpec, Capture]] = OrderedDict()
        self._maps = _Maps()
        self._chosen = None if classes is None else tuple(classes)

    @property
    def classes(self) -> tuple[int, ...]:
        """Indices of the classes that are shown."""
        if self._chosen is None:
            guesses = self.guesses(1)
            self._chosen = tuple(index for index, _, _ in guesses)
        return self._chosen

    @classes.setter
    def classes(self, indices: Sequence[int]) -> None:
        if not indices:
            raise ValueError("name at least one class, got none")
        self._chosen = tuple(indices)

    def guesses(self, count: int = 6) -> list[tuple[int, str, float]]:
        """Return the most probable classes: index, name and probability.

        The order is that of first guesses (`camkit.Vocabulary.for_guesses`); probabilities are the
        softmax over the classes. Empty if the model returns no class scores.
        """
        capture = self.capture(self.preset)
        if capture.outputs is None:
            return []
        vocabulary = self.pipeline.vocabulary
        scores = capture.scores[0].detach().float()
        ranked = scores if vocabulary is None else vocabulary.for_guesses(scores)
        shares = scores.softmax(-1)
        order = ranked.argsort(descending=True)[:count].tolist()
        return [
            (index, str(index) if vocabulary is None else vocabulary.names[index], float(share))
            for index, share in zip(order, shares[order], strict=True)
            if ranked[index] > -torch.inf
        ]

    def capture(self, method: Method) -> Capture:
        """Return the record of a forward under the edit of a method.

        Raises:
            UnsupportedModelError: the model's attention cannot be read, or not edited so.
        """
        required = required_by(method.seed, *method.refine)
        key = _edit_of(method)
        known = self._captures.get(key)
        if known is None or known[0] | required != known[0]:
            required = required | (_USUAL if known is None else known[0])
            self._captures.pop(key, None)  # free it before the next forward
            self._captures[key] = self._recorded(method, required)
            while len(self._captures) > _MOST_CAPTURES:
                oldest = self._captures.popitem(last=False)[0]
                for maps in [maps for maps in self._maps.held if maps[0] == oldest]:
                    del self._maps.held[maps]
        self._captures.move_to_end(key)
        return self._captures[key][1]

    def _recorded(self, method: Method, required: WatchSpec) -> tuple[WatchSpec, Capture]:
        """Record a forward: as much as the model supports, but at least what the method reads."""
        try:
            return required, self._run(method, required)
        except (CaptureError, UnsupportedModelError):
            least = required_by(method.seed, *method.refine)
            return least, self._run(method, least)

    def _run(self, method: Method, required: WatchSpec) -> Capture:
        pipeline, model = self.pipeline, self.pipeline.model
        pixels = to_input(model, self.photo.pixels)
        runner = ModelRunner(
            model,
            requires=required,
            edit=method.edit,
            edit_blocks=method.edit_blocks,
            vocabulary=pipeline.vocabulary,
            scores=pipeline.scores,
            call=pipeline.call,
            facts=pipeline.facts,
        )
        self.forwards += 1
        keys = () if self.photo.path is None else (self.photo.path.stem,)
        with borrowed(model), torch.no_grad():
            capture = runner(pixels, self.photo.rgb.to(pixels.device))
        return replace(capture, keys=keys, sizes=(self.photo.size,))

    def steps(self, method: Method) -> list[Step]:
        """Return the maps of the seed and behind every refiner.

        Raises:
            CamkitError: the seed or a refiner does not work on this model.
        """
        if method.views is not None:
            raise CamkitError("the page reads photos as given; leave out `views`")
        capture = self.capture(method)
        indices = torch.tensor([self.classes], device=capture.device)
        key: tuple[Any, ...] = (_edit_of(method), repr(method.seed), self.classes)

        def first() -> Tensor:
            with borrowed(self.pipeline.model), torch.no_grad():
                return scale_seed(method.seed, method.seed(capture, indices).float())

        cam = self._maps.get(key, first)
        steps = [Step(repr(method.seed), cam)]
        for refiner in method.refine:
            key = (*key, repr(refiner))

            def refined(before: Tensor = cam, refiner: Any = refiner) -> Tensor:
                with borrowed(self.pipeline.model), torch.no_grad():
                    return refiner(before, capture)

            cam = self._maps.get(key, refined)
            steps.append(Step(repr(refiner), cam))
        return steps

    def result(self, method: Method) -> Result:
        """Return what the pipeline would return with a method, without another forward."""
        steps = self.steps(method)
        capture = self.capture(method)
        vocabulary = self.pipeline.vocabulary
        if vocabulary is None:
            names = tuple(str(index) for index in self.classes)
            values = tuple(index + 1 for index in self.classes)
        else:
            names = tuple(vocabulary.names[index] for index in self.classes)
            values = tuple(vocabulary.value(index) for index in self.classes)
        stages = Stages(
            seed=steps[0].cam,
            cam=steps[-1].cam,
            capture=capture,
            classes=torch.tensor([self.classes]),
            names=(names,),
            values=(values,),
            method=method,
            passed_over=self.pipeline.passed_over,
            unfitted=((),),
        )
        return result_of(self.photo, stages, 0, self.pipeline.settings_of(method))

    def at_size(self, step: Step, size: tuple[int, int]) -> Float[Tensor, "1 k H W"]:
        """Return the maps of a step at another size, for display."""
        return resize_cam(step.cam, size).clamp(0, 1)


def _edit_of(method: Method) -> str:
    """Return what tells the forwards of methods apart."""
    return repr((method.edit, method.edit_blocks if method.edit is not None else None))
