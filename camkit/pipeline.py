"""wrap(model, ...): a photo goes in; seed, refined maps, mask and logits come out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from camkit.atomic import unfinished
from camkit.capture.hooks import borrowed
from camkit.capture.host import find_attention
from camkit.capture.record import Capture, required_by
from camkit.edits.protocol import Edit, KeyEdit
from camkit.manifest import environment, weights_hash
from camkit.mask import to_mask
from camkit.method import DEFAULT_REFINE, GRADIENT, PRESETS, Preset, suitable
from camkit.ops.images import resize_cam
from camkit.paint import overlay_mask, save_mask, save_picture
from camkit.photo import Photo, read_picture
from camkit.refiners.normalize import normalize_cam
from camkit.refiners.protocol import Refiner
from camkit.seeds.protocol import Seed
from camkit.seeds.targets import (
    ClassRequest,
    Targets,
    known_classes,
    name_of,
    read_targets,
    with_targets,
)
from camkit.seeds.text import TextClasses
from camkit.seeds.views import ModelRunner, MultiViewReader, Views, check_size
from camkit.tensors import RGB, Cam, Classes, Pixels
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Result:
    """Maps and mask of one photo.

    Attributes:
        photo: what went in.
        classes: the K classes asked, as vocabulary indices.
        names: their names.
        seed: the first maps, on the patch grid, in [0, 1].
        cam: the refined maps at the photo's own size, in [0, 1].
        mask: 0 background, else the value that ``legend`` names.
        legend: name of each mask value.
        logits: what the classifier returned.
        settings: every setting that led here, JSON-ready.
    """

    photo: Photo
    classes: tuple[int, ...]
    names: tuple[str, ...]
    seed: Float[Tensor, "1 k h w"]
    cam: Float[Tensor, "1 k H W"]
    mask: UInt8[Tensor, "H W"]
    legend: dict[int, str]
    logits: Float[Tensor, "1 o"]
    settings: dict[str, Any]

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """The photo at its own size, read again from its file where there is one."""
        if self.photo.path is not None:
            return read_picture(self.photo.path)
        colours = resize_cam(self.photo.rgb, self.photo.size)[0].clamp(0, 1)
        return (colours.permute(1, 2, 0) * 255).round().byte().cpu().numpy()

    def save(self, folder: str | Path) -> Path:
        """Write ``mask.png``, ``overlay.png``, ``cam.npy`` (float32, K maps) and ``manifest.json``.

        Each file appears complete or not at all, the manifest last: where it is, the rest is too.

        Returns:
            The folder, made when needed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_mask(self.mask.cpu(), folder / "mask.png")
        save_picture(overlay_mask(self.picture(), self.mask.cpu()), folder / "overlay.png")
        with unfinished(folder / "cam.npy") as draft, draft.open("wb") as file:
            np.save(file, self.cam[0].float().cpu().numpy())
        with unfinished(folder / "manifest.json") as draft:
            text = json.dumps(self.manifest(), indent=2, ensure_ascii=False)
            draft.write_text(text + "\n", encoding="utf-8")
        return folder

    def manifest(self) -> dict[str, Any]:
        """Everything but the pixels, JSON-ready."""
        probabilities = self.logits[0].float().softmax(-1)
        return {
            "photo": None if self.photo.path is None else str(self.photo.path),
            "size": list(self.photo.size),
            "model_size": list(self.photo.pixels.shape[-2:]),
            "classes": [
                {"index": index, "name": name}
                for index, name in zip(self.classes, self.names, strict=True)
            ],
            "legend": {str(value): name for value, name in self.legend.items()},
            "most_probable_output": int(probabilities.argmax()),
            **self.settings,
        }


def mask_legend(classes: tuple[int, ...], names: tuple[str, ...], known: int) -> dict[int, str]:
    """Name of each mask value: class + 1 where all known classes fit in a byte, else the slot + 1.

    >>> mask_legend((281, 207), ("tabby", "golden retriever"), 1000)
    {1: 'tabby', 2: 'golden retriever'}
    """
    values = [index + 1 for index in classes] if fits_a_byte(known) else range(1, len(classes) + 1)
    return dict(zip(values, names, strict=True))


def fits_a_byte(known: int) -> bool:
    """Whether class + 1 of every known class stays below 255, the value that means ignore."""
    return known <= 254


def wrap(  # noqa: PLR0913 - the stages, and what cannot be found in the model
    model: nn.Module,
    *,
    seed: Seed | None = None,
    edit: Edit | KeyEdit | None = None,
    edit_blocks: int | Sequence[int] | None = 3,
    views: Views | None = None,
    refine: Sequence[Refiner] = DEFAULT_REFINE,
    background_score: float | None = None,
    vocabulary: Vocabulary | None = None,
    scores: Callable[[Any], Tensor] | None = None,
) -> "Pipeline":
    """Make a pipeline around a model; the model itself stays as it is.

    Args:
        model: a Vision Transformer that returns class scores.
        seed: where the first maps come from. Without seed and edit, the first of
            `camkit.method.PRESETS` that the model bears, which the first photo tells:
            `CALIBRATED`, `GRADIENT` or `POOLED`. With an edit of your own, `GradientSeed`.
        edit: changes attention blocks while the pipeline runs the model, and only then.
        edit_blocks: which, as in `camkit.attach`; the last three are the choice of
            docs/methods.md for models that were not trained with the edit.
        views: other sizes of the photo and their mirror images that the seed is read from as well;
            None is the photo as it is given, which is also what refiners see.
        refine: refiners, applied in order.
        background_score: what a class must beat to own a pixel, in [0, 1]; None is the preset's.
        vocabulary: class names, and which classifier outputs stand behind each; without it classes
            are asked by output index.
        scores: makes ``(b, classes)`` scores of what the model returns, as in `camkit.watch`.
    """
    find_attention(model)  # a model without attention is refused here, not at the first photo
    own = seed is not None or edit is not None
    presets = PRESETS
    if own:
        blocks = edit_blocks if isinstance(edit_blocks, int | None) else tuple(edit_blocks)
        seed = GRADIENT.seed if seed is None else seed
        presets = (replace(GRADIENT, seed=seed, edit=edit, edit_blocks=blocks),)
    return Pipeline(
        model=model,
        presets=presets,
        views=views,
        refine=tuple(refine),
        background_score=background_score,
        vocabulary=vocabulary,
        scores=scores,
    )


@dataclass(frozen=True)
class Stages:
    """Maps of one batch in [0, 1], on the patch grid or finer, with what led there."""

    seed: Cam
    cam: Cam
    capture: Capture
    classes: Classes


@dataclass(frozen=True)
class Pipeline:
    """A model, a seed, refiners and a background score; its repr is its configuration.

    `wrap` makes it, and tells what each setting means.

    Attributes:
        presets: seeds, and edits they are read under; the first that the model bears is taken.
    """

    model: nn.Module = field(repr=False)
    presets: tuple[Preset, ...]
    refine: tuple[Refiner, ...]
    background_score: float | None = None
    vocabulary: Vocabulary | None = field(default=None, repr=False)
    scores: Callable[[Any], Tensor] | None = field(default=None, repr=False)
    views: Views | None = None
    _settled: list["Pipeline"] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        score = self.background_score
        if score is not None and not 0.0 <= score <= 1.0:
            raise ValueError(f"`background_score` must lie in [0, 1], got {score}")

    def __call__(self, photo: Photo, *, classes: ClassRequest = None) -> Result:
        """Segment one photo.

        Args:
            photo: see `camkit.load_photo`.
            classes: what is in the picture, by name or index; None takes the classifier's first
                guess. docs/views.md lists the other forms, such as labels,
                `camkit.seeds.PredictedClasses` and `camkit.seeds.TextClasses`.

        Raises:
            ValueError: a class is unknown, or the size does not fit the model's patches.
            UnsupportedModelError: the model's attention cannot be read.
        """
        targets, spoken = self._targets(classes, photo.pixels, photo.rgb)
        stages = spoken._run(targets, photo.pixels, photo.rgb)
        known = int(stages.capture.scores.shape[-1])
        slots = [slot for slot, index in enumerate(stages.classes[0].tolist()) if index >= 0]
        chosen = tuple(int(index) for index in stages.classes[0, slots])
        names = tuple(
            spoken._name(index) if index < known else name_of(targets.functions[index - known])
            for index in chosen
        )
        known += len(targets.functions)
        cam = resize_cam(stages.cam, photo.size).clamp(0, 1)
        values = stages.classes if fits_a_byte(known) else None
        mask = to_mask(cam, values, background_score=spoken._background_score)[0]
        outputs = stages.capture.outputs
        return Result(
            photo=photo,
            classes=chosen,
            names=names,
            seed=stages.seed[:, slots],
            cam=cam[:, slots],
            mask=mask,
            legend=mask_legend(chosen, names, known),
            logits=stages.seed.new_zeros(1, 0) if outputs is None else outputs.detach(),
            settings=spoken.settings,
        )

    def stages(self, pixels: Pixels, *, rgb: RGB, classes: ClassRequest = None) -> Stages:
        """Run a batch; the host's modes, flags and gradients are as before when it returns.

        Args:
            pixels: normalised images, of one size.
            rgb: the same pictures in [0, 1].
            classes: classes of each image, padded with -1, or any other form that
                `camkit.seeds.read_targets` takes, such as a function of the
                capture; None takes the classifier's first guess.
        """
        targets, spoken = self._targets(classes, pixels, rgb)
        return spoken._run(targets, pixels, rgb)

    def _targets(self, asked: ClassRequest, pixels: Pixels, rgb: RGB) -> "tuple[Targets, Pipeline]":
        """What is asked, and the pipeline that understands it: texts bring scores of their own."""
        spoken, images = self, len(pixels)
        if isinstance(asked, TextClasses):
            if self.scores is not None or self.vocabulary is not None:
                raise ValueError(
                    "texts bring scores and names of their own; wrap the model without `scores` "
                    "and `vocabulary`"
                )
            spoken = replace(self, scores=asked.scores, vocabulary=Vocabulary(asked.names))
            asked = [list(range(len(asked)))] * images
        known = known_classes(self.model) if spoken.scores is None else None
        targets = read_targets(asked, images=images, known=known, vocabulary=spoken.vocabulary)
        check_size(self.model, pixels)
        if len(self.presets) == 1:
            return targets, spoken
        if spoken is not self or targets.functions:
            others = tuple(one for one in self.presets if not one.classifier)
            return targets, replace(spoken, presets=others)
        if not self._settled:
            look = ModelRunner(self.model, vocabulary=self.vocabulary, scores=self.scores)
            images = 1 if self.scores is None else len(pixels)  # scores may know how many there are
            preset = suitable(self.presets, look, pixels[:images], rgb[:images])
            self._settled.append(replace(self, presets=(preset,)))
        return targets, self._settled[0]

    def _run(self, targets: Targets, pixels: Pixels, rgb: RGB) -> Stages:
        reader = with_targets(self._preset.seed, targets)
        weight = next(self.model.parameters())
        pixels, rgb = pixels.to(weight), rgb.to(weight.device)
        look = ModelRunner(
            self.model,
            requires=required_by(self._preset.seed, *self.refine),
            edit=self._preset.edit,
            edit_blocks=self._preset.edit_blocks,
            vocabulary=self.vocabulary,
            scores=self.scores,
        )
        views = self.views or Views()
        with borrowed(self.model), torch.no_grad():
            capture = look(pixels, rgb)
            classes = targets.classes(capture)
            seeds = MultiViewReader(look, pixels, rgb, capture).seeds(classes, [(reader, views)])
            seed = cam = normalize_cam(seeds[reader, views])
            for refiner in self.refine:
                cam = refiner(cam, capture)
        return Stages(seed, cam, capture, classes)

    @property
    def _preset(self) -> Preset:
        return self.presets[0]

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting, versions and the hash of the weights, JSON-ready."""
        return {
            "seed": repr(self._preset.seed),
            "edit": repr(self._preset.edit),
            "edit_blocks": self._preset.edit_blocks,
            "views": repr(self.views),
            "refine": [repr(refiner) for refiner in self.refine],
            "background_score": self._background_score,
            "model": type(self.model).__name__,
            "weights_sha256": weights_hash(self.model),
            "environment": environment(),
        }

    @property
    def _background_score(self) -> float:
        own = self.background_score
        return self._preset.background_score if own is None else own

    def _name(self, index: int) -> str:
        return str(index) if self.vocabulary is None else self.vocabulary.names[index]
