"""The base of grad-cam's classes: layers of a model, read as maps at the size of the images."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from camkit.capture.layers import LayerRun, Layers
from camkit.capture.parameters import to_input
from camkit.capture.scores import candidates
from camkit.compat.utils.model_targets import (
    ClassifierOutputTarget,
    Target,
    apply_target,
    check_targets,
)
from camkit.errors import CaptureError
from camkit.printing import short_repr
from camkit.seeds.token_gradients import principal_component, weight_tokens
from camkit.seeds.views import ModelCall

Reshape: TypeAlias = Callable[[Tensor], Tensor]
Maps: TypeAlias = Float[np.ndarray, "b H W"]
Targets: TypeAlias = Sequence[Target] | Callable[[Tensor], Sequence[Target]] | None


@dataclass(frozen=True, eq=False)
class LayerEvidence:
    """What a method reads of one layer.

    Attributes:
        tokens: the layer's output at each place.
        gradients: of the targets, at each place; None if the method uses none.
        size: rows and columns of places.
        module: the layer.
        output: of the layer, as the model lays it out.
        pixels: the images.
        scores: of the model, for each image.
        targets: one for each image; none if the method uses none.
    """

    tokens: Float[Tensor, "b n c"]
    gradients: Float[Tensor, "b n c"] | None
    size: tuple[int, int]
    module: nn.Module
    output: Tensor
    pixels: Float[Tensor, "b d H W"]
    scores: Tensor
    targets: Sequence[Target]

    __repr__ = short_repr


class CAM(AbstractContextManager["CAM"]):
    """Base of all methods; a subclass names its weighting in `camkit.seeds.token_gradients`.

    Unlike grad-cam's classes, these put hooks on the model during a call only, leave its mode and
    the gradients of its parameters as they are, keep no graph after the call, and raise errors.

    Args:
        model: any module that takes images; it may be frozen, compiled or in half precision.
        target_layers: layers to read; None is the norm before the last attention.
        reshape_transform: turns a layer's output into ``(b, channels, h, w)``; None derives the
            layout of tokens from the model, and that of planes from the proportions of the images.
        call: calls a model that takes more than images, as in `camkit.wrap`.
    """

    weighting: ClassVar[str] = ""
    uses_gradients: ClassVar[bool] = True
    uses_targets: ClassVar[bool] = True
    differentiates_twice: ClassVar[bool] = False

    def __init_subclass__(cls, weighting: str = "") -> None:
        cls.weighting = weighting or cls.weighting

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
        *,
        call: ModelCall | None = None,
    ) -> None:
        layers: object = target_layers
        if isinstance(layers, nn.Module):
            raise TypeError(f"`target_layers` must be a list of layers, got {type(layers)}")
        self.model = model
        self.reshape_transform = reshape_transform
        self.outputs: Tensor | None = None
        self._layers = Layers(model, target_layers, call)

    @property
    def target_layers(self) -> list[nn.Module]:
        """The layers that are read."""
        return list(self._layers.modules)

    def __getattr__(self, name: str) -> NoReturn:
        if name == "activations_and_grads":
            raise AttributeError(
                "there is nothing to release: the hooks are off after each call; "
                "camkit.watch records what inner layers compute"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> Maps:
        """Return maps in [0, 1] at the size of the images.

        Args:
            input_tensor: the images, as the model takes them.
            targets: one for each image; None takes the most probable class.
            aug_smooth: average over mirror images and three brightnesses, as grad-cam does.
            eigen_smooth: take the first principal component instead of the sum over channels.
        """
        return smoothed(
            lambda pixels: self.forward(pixels, targets, eigen_smooth), input_tensor, aug_smooth
        )

    def __exit__(self, *_: object) -> None:
        """Do nothing: the hooks are off already. Errors are not swallowed."""

    def forward(
        self, pixels: Tensor, targets: Targets, eigen_smooth: bool
    ) -> Float[Tensor, "b H W"]:
        """Return the mean of the layers' maps, in [0, 1]; it stays on the model's device."""
        return stretched(self.layer_maps(pixels, targets, eigen_smooth).mean(0))

    def layer_maps(
        self, pixels: Tensor, targets: Targets, eigen_smooth: bool
    ) -> Float[Tensor, "l b H W"]:
        """Return the map of each layer, in [0, 1].

        Args:
            pixels: the images.
            targets: one for each image, or a function of the outputs that returns them.
            eigen_smooth: as in the call.

        Raises:
            CaptureError: the targets do not depend on a layer.
        """
        given: object = pixels
        if not isinstance(given, Tensor) or given.dim() != 4:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"`input_tensor` must be a tensor of (b, channels, H, W), got {got}")
        pixels = to_input(self.model, pixels)
        twice = self.differentiates_twice
        run = self._layers(pixels, gradients=self.uses_gradients, twice=twice)
        outputs = model_scores(run.output)
        self.outputs = outputs.detach()
        chosen = _chosen(targets, self.outputs) if self.uses_targets else []
        gradients = self._gradients(run, outputs, chosen) if self.uses_gradients else None
        maps = []
        with torch.no_grad():
            for index, layer in enumerate(run.layers):
                tokens, size = self._places(layer.detach(), pixels.shape[-2:])
                slopes = None
                if gradients is not None:
                    slopes, _ = self._places(gradients[index], pixels.shape[-2:])
                    self._check_gradients(slopes, self._layers.names[index])
                evidence = LayerEvidence(
                    tokens=tokens,
                    gradients=slopes,
                    size=size,
                    module=self._layers.modules[index],
                    output=layer.detach(),
                    pixels=pixels,
                    scores=self.outputs,
                    targets=chosen,
                )
                cam = self._map(evidence, eigen_smooth).clamp_min(0.0)
                maps.append(stretched(cam.unflatten(1, size), pixels.shape[-2:]))
        return torch.stack(maps)

    def run(self, pixels: Tensor) -> Any:
        """Call the model with images."""
        call = self._layers.call
        return self.model(pixels) if call is None else call(self.model, pixels)

    def _gradients(
        self, run: LayerRun, outputs: Tensor, targets: Sequence[Target]
    ) -> Sequence[Tensor]:
        """Return the gradients of the targets' sum at each layer."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            pairs = zip(targets, outputs, strict=True)
            total = torch.stack([apply_target(target, output) for target, output in pairs]).sum()
            if not total.requires_grad:
                return [torch.zeros_like(layer) for layer in run.layers]
            return self._differentiated(total, run.layers)

    def _differentiated(self, total: Tensor, layers: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(total, layers, allow_unused=True, materialize_grads=True)

    def _check_gradients(self, gradients: Tensor, name: str) -> None:
        if gradients.any():
            return
        right = self._layers.right_layer()
        earlier = "a layer before the last attention"
        raise CaptureError(
            f"the scores do not depend on the patches in the output of {name}: every gradient "
            "there is zero, and so would be every map; use "
            f"{earlier if right in (None, name) else f'`{right}`'}"
        )

    def _map(self, evidence: LayerEvidence, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        weighted = self._weighted(evidence)
        return principal_component(weighted) if eigen_smooth else weighted.sum(-1)

    def _weighted(self, evidence: LayerEvidence) -> Float[Tensor, "b n c"]:
        """Return the tokens weighted; the sum over their channels is the map."""
        if evidence.gradients is None:
            return evidence.tokens
        return weight_tokens(self.weighting, evidence.tokens, evidence.gradients[None])

    def _places(self, output: Tensor, image: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """Return a layer's output as ``(b, places, channels)``, with rows and columns of places."""
        planes = output if self.reshape_transform is None else self.reshape_transform(output)
        if planes.dim() == 3 and self.reshape_transform is None:
            positions, grid = self._layers.patches(planes.shape[1], image)
            return planes[:, positions].float(), (grid.rows, grid.cols)
        if planes.dim() != 4:
            raise ValueError(
                "`reshape_transform` must return (b, channels, h, w) for a layer's output, got "
                f"shape {tuple(planes.shape)}"
            )
        if self.reshape_transform is None and _channels_last(planes.shape, image):
            planes = planes.movedim(-1, 1)
        return planes.flatten(2).mT.float(), (planes.shape[2], planes.shape[3])


def smoothed(
    forward: Callable[[Tensor], Float[Tensor, "b H W"]], pixels: Tensor, aug_smooth: bool
) -> Maps:
    """Return maps, or their mean over mirror images and three brightnesses."""
    if not aug_smooth:
        return forward(pixels).cpu().numpy()
    views = []
    for mirrored in (False, True):
        for factor in (0.9, 1.0, 1.1):
            maps = forward((pixels.flip(-1) if mirrored else pixels) * factor)
            views.append(maps.flip(-1) if mirrored else maps)
    return torch.stack(views).mean(0).cpu().numpy()


def model_scores(output: object) -> Tensor:
    """Return the scores in an output: a tensor, its logits, or its one (b, classes) tensor."""
    found = [output] if isinstance(output, Tensor) else candidates(output)
    if len({tensor.shape[-1] for tensor in found}) != 1:
        raise CaptureError(
            f"the model returned {len(found) or 'no'} (b, classes) tensors, expected logits or one "
            "such tensor; wrap the model in a module that returns its scores"
        )
    return found[0]


def _channels_last(shape: Sequence[int], image: Sequence[int]) -> bool:
    """Whether the second and third axes, not the last two, have the proportions of the images."""

    def misfit(rows: int, cols: int) -> float:
        return abs(math.log(rows * image[1] / (cols * image[0])))

    second, last = misfit(*shape[1:3]), misfit(*shape[2:4])
    return last > math.log(1.5) and second < last  # convolutions may trim a few rows


def _chosen(targets: Targets, outputs: Tensor) -> Sequence[Target]:
    """Return one target for each image; by default the class with the highest score."""
    given = targets(outputs) if callable(targets) else targets
    if given is not None:
        return check_targets(given, len(outputs))
    if outputs.dim() != 2:
        raise ValueError(
            "`targets` must be given for a model that returns more than one row of scores for an "
            "image, such as SemanticSegmentationTarget; its output has shape "
            f"{tuple(outputs.shape)}"
        )
    return [ClassifierOutputTarget(index) for index in outputs.argmax(-1).tolist()]


def stretched(maps: Float[Tensor, "b h w"], size: Sequence[int] = ()) -> Float[Tensor, "b H W"]:
    """Stretch each map to [0, 1] with grad-cam's epsilon, and resize it if a size is given."""
    lowest = maps.amin((1, 2), keepdim=True)
    spread = (maps - lowest).amax((1, 2), keepdim=True)
    maps = (maps - lowest) / (spread + 1e-7)
    if not size:
        return maps
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]
