"""The classes of pytorch-grad-cam, with its names, arguments and results.

Change the import line and keep the script.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from camkit.capture.layers import Layers
from camkit.capture.parameters import to_input
from camkit.capture.scores import candidates
from camkit.errors import CaptureError
from camkit.seeds.token_gradients import principal_component, weight_tokens

Target: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClassifierOutputTarget:
    """The score of a class."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return output[..., self.category]


@dataclass(frozen=True)
class ClassifierOutputSoftmaxTarget:
    """The probability of a class."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return output.softmax(-1)[..., self.category]


@dataclass(frozen=True)
class BinaryClassifierOutputTarget:
    """The single score of a classifier of two classes, or its negative."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return output if self.category == 1 else -output


@dataclass(frozen=True)
class FinerWeightedTarget:
    """The score of a class less the scores of others, weighted by probability (Finer-CAM)."""

    main_category: int
    comparison_categories: Sequence[int]
    alpha: float = 1.0

    def __call__(self, output: Tensor) -> Tensor:
        others = list(self.comparison_categories)
        weights = output.softmax(-1)[..., others]
        own = output[..., self.main_category, None]
        return (weights * (own - self.alpha * output[..., others])).sum(-1) / (
            weights.sum(-1) + 1e-9
        )


def _scores(output: object) -> Tensor:
    """Return the scores in an output: a tensor, its logits, or its one (b, classes) tensor."""
    found = [output] if isinstance(output, Tensor) else candidates(output)
    if len({tensor.shape[-1] for tensor in found}) != 1:
        raise CaptureError(
            f"the model returned {len(found) or 'no'} (b, classes) tensors, expected logits or one "
            "such tensor; wrap the model in a module that returns its scores"
        )
    return found[0]


def _total(targets: Sequence[Target], outputs: Tensor) -> Tensor:
    """Return the sum of the targets, each of its own image."""
    if len(targets) != len(outputs):
        raise ValueError(
            f"`targets` must hold one target for each of {len(outputs)} images, got {len(targets)}"
        )
    values = []
    for target, output in zip(targets, outputs, strict=True):
        try:
            value = target(output)
        except IndexError as error:
            raise ValueError(
                f"{target!r} asks for a class that outputs of shape {tuple(output.shape)} lack"
            ) from error
        if value.numel() != 1:
            raise ValueError(
                f"{target!r} must return one number for the outputs of an image, got shape "
                f"{tuple(value.shape)}"
            )
        values.append(value.reshape(()))
    return torch.stack(values).sum()


def show_cam_on_image(
    img: Float[np.ndarray, "H W 3"],
    mask: Float[np.ndarray, "H W"],
    use_rgb: bool = False,
    colormap: int = cv2.COLORMAP_JET,
    image_weight: float = 0.5,
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay a map over a picture, as grad-cam does (`camkit.paint.overlay_cam` is camkit's own).

    The brightest value of the mixture becomes 255. Unlike in grad-cam, a map outside [0, 1] is an
    error, because its colours would wrap around.

    Args:
        img: the picture in [0, 1].
        mask: the map in [0, 1], at the size of the picture.
        use_rgb: whether red is the first channel of the picture; otherwise blue is, as in OpenCV.
        colormap: a colour map of OpenCV.
        image_weight: weight of the picture, in [0, 1]; the map has the rest.
    """
    if not 0.0 <= image_weight <= 1.0:
        raise ValueError(f"`image_weight` must lie in [0, 1], got {image_weight}")
    if img.shape[:2] != mask.shape:
        raise ValueError(
            f"`mask` must have the size of the picture, {img.shape[0]}x{img.shape[1]}, got shape "
            f"{mask.shape}"
        )
    for name, values in (("img", img), ("mask", mask)):
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # NaN fails both
            raise ValueError(f"`{name}` must lie in [0, 1], got {low:g} to {high:g}")
    colours = cv2.applyColorMap((mask * 255).astype(np.uint8), colormap)
    colours = colours[:, :, ::-1] if use_rgb else colours
    mixed = image_weight * img + (1 - image_weight) * (colours.astype(np.float32) / 255)
    return (mixed / max(mixed.max(), 1e-7) * 255).astype(np.uint8)


_Reshape: TypeAlias = Callable[[Tensor], Tensor]
_Maps: TypeAlias = Float[np.ndarray, "b H W"]


class CAM(AbstractContextManager["CAM"]):
    """Base of all methods; a subclass names its weighting in `camkit.seeds.token_gradients`.

    Unlike grad-cam's classes, these put hooks on the model during a call only, leave its mode and
    the gradients of its parameters as they are, keep no graph after the call, and raise errors.

    Args:
        model: any module that takes images; it may be frozen, compiled or in half precision.
        target_layers: layers to read; None is the norm before the last attention.
        reshape_transform: turns a layer's output into ``(b, channels, h, w)``; None derives the
            layout of tokens from the model.
    """

    weighting: ClassVar[str] = ""
    uses_gradients: ClassVar[bool] = True

    def __init_subclass__(cls, weighting: str = "") -> None:
        cls.weighting = weighting or cls.weighting

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: _Reshape | None = None,
    ) -> None:
        self.model = model
        self.reshape_transform = reshape_transform
        self.outputs: Tensor | None = None
        self._layers = Layers(model, target_layers)

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> _Maps:
        """Return maps in [0, 1] at the size of the images.

        Args:
            input_tensor: the images, as the model takes them.
            targets: one for each image; None takes the most probable class.
            aug_smooth: average over mirror images and three brightnesses, as grad-cam does.
            eigen_smooth: take the first principal component instead of the sum over channels.
        """
        if not aug_smooth:
            return self.forward(input_tensor, targets, eigen_smooth).cpu().numpy()
        views = []
        for mirrored in (False, True):
            for factor in (0.9, 1.0, 1.1):
                pixels = input_tensor.flip(-1) if mirrored else input_tensor
                maps = self.forward(pixels * factor, targets, eigen_smooth)
                views.append(maps.flip(-1) if mirrored else maps)
        return torch.stack(views).mean(0).cpu().numpy()

    def __exit__(self, *_: object) -> None:
        """Do nothing: the hooks are off already. Errors are not swallowed."""

    def forward(
        self,
        pixels: Tensor,
        targets: Sequence[Target] | Callable[[Tensor], Sequence[Target]] | None,
        eigen_smooth: bool,
    ) -> Float[Tensor, "b H W"]:
        pixels = to_input(self.model, pixels)
        run = self._layers(pixels, gradients=self.uses_gradients)
        outputs = _scores(run.output)
        self.outputs = outputs.detach()
        gradients: Sequence[Tensor | None] = [None] * len(run.layers)
        if self.uses_gradients:
            with torch.inference_mode(mode=False), torch.enable_grad():
                chosen = targets(self.outputs) if callable(targets) else targets
                if chosen is None:
                    indices = self.outputs.argmax(-1).tolist()
                    chosen = [ClassifierOutputTarget(index) for index in indices]
                score = _total(chosen, outputs)
                gradients = [torch.zeros_like(layer) for layer in run.layers]
                if score.requires_grad:
                    gradients = torch.autograd.grad(
                        score, run.layers, allow_unused=True, materialize_grads=True
                    )
        with torch.no_grad():
            maps = []
            for name, layer, slopes in zip(self._layers.names, run.layers, gradients, strict=True):
                tokens, size = self._places(layer.detach(), pixels.shape[-2:])
                gradient = tokens if slopes is None else self._places(slopes, pixels.shape[-2:])[0]
                if self.uses_gradients and not gradient.any():
                    right = self._layers.right_layer()
                    earlier = "a layer before the last attention"
                    raise CaptureError(
                        f"the scores do not depend on the patches in the output of {name}: every "
                        "gradient there is zero, and so would be every map; use "
                        f"{earlier if right in (None, name) else f'`{right}`'}"
                    )
                cam = self._map(tokens, gradient, eigen_smooth).clamp_min(0.0)
                maps.append(_scaled(cam.unflatten(1, size), pixels.shape[-2:]))
            return _scaled(torch.stack(maps).mean(0))

    def _map(self, tokens: Tensor, gradient: Tensor, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        weighted = weight_tokens(self.weighting, tokens, gradient[None])
        return principal_component(weighted) if eigen_smooth else weighted.sum(-1)

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
        return planes.flatten(2).mT.float(), (planes.shape[2], planes.shape[3])


class GradCAM(CAM, weighting="gradcam"):
    """Channels weighted by their mean gradient."""


class GradCAMPlusPlus(CAM, weighting="gradcam++"):
    """Channels weighted by their positive gradients, place by place."""


class HiResCAM(CAM, weighting="hirescam"):
    """Gradient times activation."""


class XGradCAM(CAM, weighting="xgradcam"):
    """Channels weighted by gradient times share of the activation."""


class LayerCAM(CAM, weighting="layercam"):
    """Positive gradient times activation."""


class GradCAMElementWise(CAM, weighting="elementwise"):
    """Positive part of gradient times activation."""


class EigenCAM(CAM):
    """First principal component of the activations, its larger extreme positive.

    grad-cam leaves the sign to its linear algebra, so its map may be the negative of this one.
    """

    uses_gradients = False

    def _map(self, tokens: Tensor, gradient: Tensor, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        del gradient, eigen_smooth
        return principal_component(tokens)


class EigenGradCAM(CAM):
    """First principal component of gradient times activation, its larger extreme positive."""

    def _map(self, tokens: Tensor, gradient: Tensor, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        del eigen_smooth
        return principal_component(tokens * gradient)


def _scaled(maps: Float[Tensor, "b h w"], size: Sequence[int] = ()) -> Float[Tensor, "b H W"]:
    """Stretch each map to [0, 1] with grad-cam's epsilon, and resize it if a size is given."""
    lowest = maps.amin((1, 2), keepdim=True)
    spread = (maps - lowest).amax((1, 2), keepdim=True)
    maps = (maps - lowest) / (spread + 1e-7)
    if not size:
        return maps
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


class FinerCAM(AbstractContextManager["FinerCAM"]):
    """Another method (``base_method``) applied to the contrast of a class with similar classes.

    Similar classes are those with the nearest scores. `CAM` explains the other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: _Reshape | None = None,
        base_method: type[CAM] = GradCAM,
    ) -> None:
        self.base_cam = base_method(model, target_layers, reshape_transform)

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        eigen_smooth: bool = False,
        alpha: float = 1.0,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
    ) -> _Maps:
        """Return maps in [0, 1] at the size of the images.

        Args:
            input_tensor: the images.
            targets: one for each image; they replace the last three arguments.
            eigen_smooth: take the first principal component instead of the sum over channels.
            alpha: factor of the subtracted scores.
            comparison_categories: ranks by similarity of score; 1 is the most similar class.
            target_idx: the class; None takes the most probable one.
        """
        ranks = (1, 2, 3) if comparison_categories is None else tuple(comparison_categories)

        def contrasts(outputs: Tensor) -> list[Target]:
            own = outputs.amax(-1) if target_idx is None else outputs[:, target_idx]
            order = (outputs - own[:, None]).abs().argsort(dim=-1, stable=True).tolist()
            kept = [rank for rank in ranks if rank < outputs.shape[-1]]
            return [FinerWeightedTarget(row[0], [row[r] for r in kept], alpha) for row in order]

        chosen = contrasts if targets is None else targets
        return self.base_cam.forward(input_tensor, chosen, eigen_smooth).cpu().numpy()

    def __exit__(self, *_: object) -> None:
        """Do nothing: the hooks are off already. Errors are not swallowed."""
