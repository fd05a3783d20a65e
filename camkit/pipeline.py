"""wrap(model, ...): a photo goes in; seed, refined maps, mask and logits come out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from camkit.capture.record import Capture
from camkit.capture.search import find_attention, find_patch_embeddings
from camkit.capture.watcher import watch
from camkit.edit.handle import attach
from camkit.edit.protocol import Edit, KeyEdit
from camkit.manifest import environment, weights_hash
from camkit.mask import to_mask
from camkit.ops.resampling import resize_cam
from camkit.photo import Photo
from camkit.refine.normalize import Normalize, normalize_cam
from camkit.refine.propagate import Propagate
from camkit.refine.protocol import Refiner
from camkit.result import Result, fits_a_byte, mask_legend
from camkit.seed.gradient import GradientSeed
from camkit.seed.protocol import Seed, check_classes
from camkit.tensors import RGB, Cam, Classes, Pixels
from camkit.vocabulary import Vocabulary

DEFAULT_REFINE: tuple[Refiner, ...] = (
    Propagate(steps=2, blocks=6, balance=3),
    Normalize(mode="minmax"),
)
"""Chosen on the benchmark's tuning images, as was the background score (docs/benchmark.md)."""


def wrap(  # noqa: PLR0913 - the stages, and what cannot be found in the model
    model: nn.Module,
    *,
    seed: Seed | None = None,
    edit: Edit | KeyEdit | None = None,
    edit_blocks: int | Sequence[int] | None = 3,
    refine: Sequence[Refiner] = DEFAULT_REFINE,
    background_score: float = 0.55,
    vocabulary: Vocabulary | None = None,
    scores: Callable[[Any], Tensor] | None = None,
) -> "Pipeline":
    """Make a pipeline around a model; the model itself stays as it is.

    Args:
        model: a Vision Transformer that returns class scores.
        seed: where the first maps come from; None is `GradientSeed`.
        edit: changes attention blocks while the pipeline runs the model, and only then.
        edit_blocks: which, as in `camkit.attach`; the last three are the choice of
            docs/methods.md for models that were not trained with the edit.
        refine: refiners, applied in order.
        background_score: what a class must beat to own a pixel, in [0, 1].
        vocabulary: class names, and which classifier outputs stand behind each; without it classes
            are asked by output index.
        scores: makes ``(b, classes)`` scores of what the model returns, as in `camkit.watch`.
    """
    find_attention(model)  # a model without attention is refused here, not at the first photo
    return Pipeline(
        model=model,
        seed=GradientSeed() if seed is None else seed,
        edit=edit,
        edit_blocks=edit_blocks if isinstance(edit_blocks, int | None) else tuple(edit_blocks),
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
    """A model, a seed, refiners and a background score; its repr is its configuration."""

    model: nn.Module = field(repr=False)
    seed: Seed
    edit: Edit | KeyEdit | None
    refine: tuple[Refiner, ...]
    background_score: float
    vocabulary: Vocabulary | None = field(repr=False)
    scores: Callable[[Any], Tensor] | None = field(default=None, repr=False)
    edit_blocks: int | tuple[int, ...] | None = 3

    def __post_init__(self) -> None:
        if not 0.0 <= self.background_score <= 1.0:
            raise ValueError(f"`background_score` must lie in [0, 1], got {self.background_score}")

    def __call__(self, photo: Photo, *, classes: Sequence[str | int] | None = None) -> Result:
        """Segment one photo.

        Args:
            photo: see `camkit.load_photo`.
            classes: what is in the picture, by name or index; None takes the classifier's first
                guess.

        Raises:
            ValueError: a class is unknown, or the size does not fit the model's patches.
            UnsupportedModelError: the model's attention cannot be read.
        """
        asked = None if classes is None else self._resolve(classes)
        slots = None if asked is None else torch.tensor([asked], dtype=torch.int64)
        stages = self.stages(photo.pixels, rgb=photo.rgb, classes=slots)
        known = int(stages.capture.scores.shape[-1])
        chosen = tuple(int(index) for index in stages.classes[0])
        names = tuple(self._name(index) for index in chosen)
        cam = resize_cam(stages.cam, photo.size).clamp(0, 1)
        values = stages.classes if fits_a_byte(known) else None
        mask = to_mask(cam, values, background_score=self.background_score)[0]
        outputs = stages.capture.outputs
        return Result(
            photo=photo,
            classes=chosen,
            names=names,
            seed=stages.seed,
            cam=cam,
            mask=mask,
            legend=mask_legend(chosen, names, known),
            logits=stages.seed.new_zeros(1, 0) if outputs is None else outputs.detach(),
            settings=self.settings,
        )

    def stages(self, pixels: Pixels, *, rgb: RGB, classes: Classes | None = None) -> Stages:
        """Run a batch; the host's modes, flags and gradients are as before when it returns.

        Args:
            pixels: normalised images, of one size.
            rgb: the same pictures in [0, 1].
            classes: classes of each image, padded with -1; None takes the classifier's first guess.
        """
        self._check_size(pixels)
        weight = next(self.model.parameters())
        pixels, rgb = pixels.to(weight), rgb.to(weight.device)
        with self._borrowed(), torch.no_grad():
            seen = watch(
                self.model,
                gradients=self.seed.gradients,
                rgb=rgb,
                vocabulary=self.vocabulary,
                scores=self.scores,
            )
            with ExitStack() as edited, seen:
                if self.edit is not None:
                    handle = attach(self.model, self.edit, blocks=self.edit_blocks)
                    edited.enter_context(handle).rgb = rgb
                self.model(pixels.clone() if pixels.is_inference() else pixels)
            capture = seen.capture
            if classes is None:
                classes = capture.scores.argmax(1, keepdim=True)
            classes = classes.to(weight.device)
            check_classes(capture, classes, capture.scores.shape[-1])
            seed = normalize_cam(self.seed(capture, classes).float())
            cam = seed
            for refiner in self.refine:
                cam = refiner(cam, capture)
        return Stages(seed, cam, capture, classes)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting, versions and the hash of the weights, JSON-ready."""
        return {
            "seed": repr(self.seed),
            "edit": repr(self.edit),
            "edit_blocks": self.edit_blocks,
            "refine": [repr(refiner) for refiner in self.refine],
            "background_score": self.background_score,
            "model": type(self.model).__name__,
            "weights_sha256": weights_hash(self.model),
            "environment": environment(),
        }

    def _resolve(self, classes: Sequence[str | int]) -> tuple[int, ...]:
        if isinstance(classes, str):
            raise TypeError(f"`classes` must be a list of names or indices, got {classes!r}")
        if self.vocabulary is not None:
            return self.vocabulary.resolve(classes)
        named = [item for item in classes if not isinstance(item, int)]
        if named:
            raise ValueError(
                f"{named[0]!r} is a name, but the pipeline has no vocabulary; ask by output index, "
                "or give camkit.wrap a `vocabulary=`"
            )
        if not classes:
            raise ValueError("name at least one class, got none")
        indices = tuple(int(item) for item in classes)
        if min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError(f"`classes` must be indices from 0, none twice, got {list(indices)}")
        return indices

    def _name(self, index: int) -> str:
        return str(index) if self.vocabulary is None else self.vocabulary.names[index]

    def _check_size(self, pixels: Pixels) -> None:
        embedding = next(iter(find_patch_embeddings(self.model).values()), None)
        if embedding is None:
            return
        rows, cols = embedding.stride[0], embedding.stride[-1]
        height, width = pixels.shape[-2:]
        if height % rows or width % cols:
            raise ValueError(
                f"an image of {height}x{width} cannot be cut into patches of {rows}x{cols}; "
                f"use camkit.load_photo(path, multiple={rows})"
            )

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """Evaluation mode, outside inference mode; each module's own mode comes back."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.inference_mode(mode=False):
                yield
        finally:
            for module, training in modes:
                module.training = training
