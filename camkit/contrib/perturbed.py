"""Score-CAM and Ablation-CAM: channels weighted by forwards of changed images or tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from camkit.capture.hooks import Hooks
from camkit.capture.layers import undisturbed
from camkit.capture.record import NO_PATCH_TOKENS, Capture, TokenCall, WatchSpec
from camkit.capture.scores import candidates
from camkit.capture.tail import tokens_of
from camkit.errors import CaptureError
from camkit.seeds.protocol import check_classes, fold_maps
from camkit.seeds.token_gradients import entering_tokens
from camkit.seeds.views import ModelCall, ModelRunner
from camkit.tensors import Cam, Classes

Image: TypeAlias = Float[Tensor, "c H W"]
Run: TypeAlias = Callable[[Tensor], Tensor]
"""``images (n, c, H, W) -> (n, k)`` scores."""


def masked_scores(
    run: Run, image: Image, planes: Float[Tensor, "d h w"], batch_size: int
) -> Float[Tensor, "d k"]:
    """Score an image under each channel of a layer as a mask, stretched to [0, 1]."""
    scores = []
    for part in planes.float().split(checked_batch_size(batch_size)):
        size = (image.shape[-2], image.shape[-1])
        masks = F.interpolate(part[:, None], size, mode="bilinear", align_corners=True)
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        masks = (masks - low) / (high - low + 1e-8)
        scores.append(_finite(run(image * masks.to(image))))
    return torch.cat(scores)


def without_channels(
    output: Float[Tensor, "1 ..."], axis: int, value: float, batch_size: int
) -> Iterator[Tensor]:
    """Yield batches of copies of an image's activations, each with one channel set to a value.

    Args:
        output: of a layer.
        axis: of the channels.
        value: that a channel is set to at every place.
        batch_size: copies in a batch.
    """
    channels = torch.arange(output.shape[axis], device=output.device)
    for part in channels.split(checked_batch_size(batch_size)):
        changed = output.expand(len(part), *output.shape[1:]).clone()
        changed.movedim(axis, 1)[torch.arange(len(part), device=part.device), part] = value
        yield changed


def ablated_scores(
    run: Run,
    image: Image,
    batches: Iterator[Tensor],
    hook: Callable[[Hooks, Tensor], None],
    run_one: Run | None = None,
) -> Float[Tensor, "d k"]:
    """Score an image with each batch of changed activations in place of the model's own.

    All that runs before these activations is the same for a batch. So if two channels have the
    same scores when the model is given the image once, and changed activations take the place of
    those of one image in the middle, all channels are scored that way.

    Args:
        run: scores images.
        image: as the model takes it.
        batches: of `without_channels`.
        hook: registers hooks that put a batch in.
        run_one: scores a batch that joins a forward of one image; None is ``run``.
    """
    run_one, scores = run_one or run, []
    joins_late: bool | None = None
    for changed in batches:
        if joins_late is None:
            joins_late = _can_join_late(run, run_one, image, changed[:2], hook)
        with _put_in(hook, changed):
            whole = image.expand(len(changed), -1, -1, -1)
            scores.append(_finite(run_one(image[None]) if joins_late else run(whole)))
    return torch.cat(scores)


@contextmanager
def _put_in(hook: Callable[[Hooks, Tensor], None], changed: Tensor) -> Iterator[None]:
    hooks = Hooks()
    try:
        hook(hooks, changed)
        yield
    finally:
        hooks.remove()


def _can_join_late(
    run: Run, run_one: Run, image: Image, pair: Tensor, hook: Callable[[Hooks, Tensor], None]
) -> bool:
    """Whether a batch that joins a forward of one image has the scores of a whole batch."""
    if len(pair) < 2:
        return False
    with _put_in(hook, pair):
        expected = run(image.expand(2, -1, -1, -1))
        try:
            scores = run_one(image[None])
        except Exception:  # noqa: BLE001 - whatever the host raises: it does not broadcast
            return False
    tolerance = 1e-4 * float(expected.abs().max())
    same = scores.shape == expected.shape
    return same and torch.allclose(scores, expected, rtol=0.0, atol=tolerance)


def checked_batch_size(batch_size: object) -> int:
    """Return the number of images in a forward, or refuse it."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}")
    return batch_size


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise CaptureError("the scores of changed images are not finite; run the model in float32")
    return scores.float()


@dataclass(frozen=True)
class _PerturbationSeed(ABC):
    """Runs the model again for every channel of the tokens that enter the last attention.

    Attributes:
        model: that the capture is of. It is run in evaluation mode and left as it was; an edit of
            the method is not applied.
        call: calls the model with images, as in `camkit.wrap`.
        batch_size: channels in a forward.
    """

    model: nn.Module = field(repr=False)
    call: ModelCall | None = field(default=None, repr=False)
    batch_size: int = 16

    requires: ClassVar[WatchSpec] = WatchSpec(entering=1, pixels=True, last_patches=False)

    def __post_init__(self) -> None:
        checked_batch_size(self.batch_size)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        scores = capture.scores.detach()
        check_classes(classes, len(scores), scores.shape[-1])
        (call,) = entering_tokens(capture, self)
        if capture.pixels is None:
            raise CaptureError(
                "this capture does not hold the images; watch one forward of the model with "
                "camkit.watch(model, requires=seed.requires)"
            )
        tokens = call.tokens.detach()[:, capture.patches].float()
        weights = []
        with undisturbed(self.model):
            for place, image in enumerate(capture.pixels):
                columns = classes[place].clamp_min(0)
                changed = self._changed(capture, call, place, image, columns)
                weights.append(self._weights(scores[place, columns].float(), changed))
        maps = torch.einsum("bnd,bdk->bkn", tokens, torch.stack(weights)).clamp_min(0.0)
        return fold_maps(capture, maps, classes)

    @abstractmethod
    def _changed(
        self,
        capture: Capture,
        call: TokenCall,
        place: int,
        image: Image,
        columns: Int[Tensor, " k"],
    ) -> Float[Tensor, "d k"]:
        """Return the scores of an image's classes for each changed channel."""

    @abstractmethod
    def _weights(
        self, own: Float[Tensor, " k"], changed: Float[Tensor, "d k"]
    ) -> Float[Tensor, "d k"]:
        """Return the weights of the channels, given the scores of the image as it is."""

    def _run(self, capture: Capture, columns: Int[Tensor, " k"]) -> Run:
        vocabulary = capture.vocabulary
        runner = ModelRunner(
            self.model, requires=NO_PATCH_TOKENS, vocabulary=vocabulary, call=self.call
        )
        return lambda images: runner(images).scores[:, columns]


@dataclass(frozen=True)
class ScoreCAMSeed(_PerturbationSeed):
    """Channels weighted by the class scores of the image under each channel as a mask.

    Score-CAM (Wang et al. 2020), with tokens in place of convolutions' channels. The classes of an
    image share the forwards, of which there are as many as channels.
    """

    def _changed(
        self,
        capture: Capture,
        call: TokenCall,
        place: int,
        image: Image,
        columns: Int[Tensor, " k"],
    ) -> Float[Tensor, "d k"]:
        tokens = call.tokens.detach()[place, capture.patches]
        planes = tokens.mT.unflatten(-1, (capture.grid.rows, capture.grid.cols))
        return masked_scores(self._run(capture, columns), image, planes, self.batch_size)

    def _weights(
        self, own: Float[Tensor, " k"], changed: Float[Tensor, "d k"]
    ) -> Float[Tensor, "d k"]:
        del own  # the softmax does not change with a score that all have in common
        return changed.softmax(0)


@dataclass(frozen=True)
class AblationCAMSeed(_PerturbationSeed):
    """Channels weighted by what the class score loses when they are zero at every token.

    Ablation-CAM (Desai and Ramaswamy 2020). The paper divides by the score, which only scales a
    map, and would turn its sign where the score is negative; here this step is left out. The
    classes of an image share the forwards, of which there are as many as channels.
    """

    def _changed(
        self,
        capture: Capture,
        call: TokenCall,
        place: int,
        image: Image,
        columns: Int[Tensor, " k"],
    ) -> Float[Tensor, "d k"]:
        attention = self.model.get_submodule(call.name)

        def hook(hooks: Hooks, changed: Tensor) -> None:
            node = call.batch_first(changed)  # swaps the same axes back
            hooks.before(attention, lambda _, args, kwargs: _with_tokens(args, kwargs, node))

        own = call.tokens.detach()[place : place + 1]
        batches = without_channels(own, -1, 0.0, self.batch_size)

        def run_one(images: Tensor) -> Tensor:  # a watch would look for the scores of one image
            output = self.model(images) if self.call is None else self.call(self.model, images)
            outputs, known = candidates(output)[0], capture.vocabulary
            return (outputs if known is None else known.score(outputs))[:, columns]

        return ablated_scores(self._run(capture, columns), image, batches, hook, run_one)

    def _weights(
        self, own: Float[Tensor, " k"], changed: Float[Tensor, "d k"]
    ) -> Float[Tensor, "d k"]:
        return own - changed


def _with_tokens(
    args: Sequence[Any], kwargs: dict[str, Any], node: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an attention module with other tokens."""
    tokens = next(v for v in (*args, *kwargs.values()) if tokens_of(v) is v)
    named = {name: node if value is tokens else value for name, value in kwargs.items()}
    return tuple(node if value is tokens else value for value in args), named
