"""Classes of pytorch-grad-cam, with its names, arguments and results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, TypeAlias

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from camkit.capture.layers import Layers
from camkit.capture.record import scores_of
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
    """The score of a class less those of others, each weighted by its probability (Finer-CAM)."""

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


def likeliest(outputs: Tensor) -> list[Target]:
    """The first guess of each image."""
    return [ClassifierOutputTarget(int(index)) for index in outputs.argmax(-1)]


def total(targets: Sequence[Target], outputs: Tensor) -> Tensor:
    """Sum of each image's own target.

    Raises:
        ValueError: there are not as many targets as images, or one asks for a class that the model
            does not have, or makes several numbers.
    """
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
                f"{target!r} asks for what outputs of shape {tuple(output.shape)} do not hold"
            ) from error
        if value.numel() != 1:
            raise ValueError(
                f"{target!r} must make one number of the outputs of an image, got shape "
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
    """Lay a map over a picture, as grad-cam does; `camkit.paint.overlay_cam` keeps the photo clear.

    The brightest value of the mixture becomes 255. Unlike in grad-cam, a map that leaves [0, 1] is
    refused, as its colours would start anew.

    Args:
        img: the picture in [0, 1].
        mask: the map in [0, 1], at the size of the picture.
        use_rgb: whether red comes first in the picture; blue does otherwise, as in OpenCV.
        colormap: one of OpenCV's.
        image_weight: of the picture, in [0, 1]; the map has the rest.
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


Reshape: TypeAlias = Callable[[Tensor], Tensor]
Chosen: TypeAlias = Sequence[Target] | Callable[[Tensor], Sequence[Target]] | None
Maps: TypeAlias = Float[np.ndarray, "b H W"]

_BRIGHTNESS = (0.9, 1.0, 1.1)  # grad-cam's own augmentation, with mirror images


class CAM:
    """What all methods share.

    Unlike grad-cam's, hooks are on the model during a call only, its mode and the gradients of its
    parameters stay as they are, no graph outlives the call, and errors come out.

    Args:
        model: any module that is called with images; frozen, compiled or in half precision, too.
        target_layers: layers to look at; None is the norm before the last attention.
        reshape_transform: makes ``(b, channels, h, w)`` of a layer's output; None reads the layout
            of tokens off the model.
    """

    method: ClassVar[str] = ""
    uses_gradients: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
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
    ) -> Maps:
        """Maps in [0, 1] at the size of the images.

        Args:
            input_tensor: the images, as the model takes them.
            targets: one for each image; None is the model's first guess.
            aug_smooth: average over mirror images and three brightnesses.
            eigen_smooth: first principal component instead of the sum over channels.
        """
        if not aug_smooth:
            return self.forward(input_tensor, targets, eigen_smooth).cpu().numpy()
        found = []
        for mirrored in (False, True):
            for factor in _BRIGHTNESS:
                pixels = input_tensor.flip(-1) if mirrored else input_tensor
                maps = self.forward(pixels * factor, targets, eigen_smooth)
                found.append(maps.flip(-1) if mirrored else maps)
        return torch.stack(found).mean(0).cpu().numpy()

    def __enter__(self) -> "CAM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing has to be given back, and no error is swallowed."""

    def forward(
        self, pixels: Tensor, targets: Chosen, eigen_smooth: bool
    ) -> Float[Tensor, "b H W"]:
        pixels = pixels.to(next(self.model.parameters()).device)
        run = self._layers(pixels, gradients=self.uses_gradients)
        outputs = run.output if isinstance(run.output, Tensor) else scores_of(run.output)
        if outputs is None:
            raise CaptureError("the model returned no scores: neither a tensor nor logits")
        self.outputs = outputs.detach()
        gradients: Sequence[Tensor | None] = [None] * len(run.layers)
        if self.uses_gradients:
            with torch.inference_mode(mode=False), torch.enable_grad():
                chosen = targets(self.outputs) if callable(targets) else targets
                asked = total(likeliest(self.outputs) if chosen is None else chosen, outputs)
                gradients = _gradients(asked, run.layers)
        with torch.no_grad():
            maps = []
            for name, layer, slopes in zip(self._layers.names, run.layers, gradients, strict=True):
                tokens, size = self._places(layer.detach(), pixels.shape[-2:])
                gradient = tokens if slopes is None else self._places(slopes, pixels.shape[-2:])[0]
                if self.uses_gradients and not gradient.any():
                    raise CaptureError(self._dead(name))
                found = self._map(tokens, gradient, eigen_smooth).clamp_min(0.0)
                maps.append(_scaled(found.unflatten(1, size), pixels.shape[-2:]))
            return _scaled(torch.stack(maps).mean(0))

    def _map(self, tokens: Tensor, gradient: Tensor, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        weighted = weight_tokens(self.method, tokens, gradient[None])
        return principal_component(weighted) if eigen_smooth else weighted.sum(-1)

    def _places(self, output: Tensor, image: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
        """A layer's output as ``(b, places, channels)``, and rows and columns of places."""
        planes = output if self.reshape_transform is None else self.reshape_transform(output)
        if planes.dim() == 3 and self.reshape_transform is None:
            positions, grid = self._layers.patches(planes.shape[1], image)
            return planes[:, positions].float(), (grid.rows, grid.cols)
        if planes.dim() != 4:
            raise ValueError(
                "`reshape_transform` must make (b, channels, h, w) of the output of a layer, got "
                f"shape {tuple(planes.shape)}"
            )
        return planes.flatten(2).mT.float(), (planes.shape[2], planes.shape[3])

    def _dead(self, name: str) -> str:
        right = self._layers.right_layer()
        use = "a layer before the last attention" if right in (None, name) else f"`{right}`"
        return (
            f"the scores do not depend on what {name} makes of the patches: every gradient there "
            f"is zero, and so would be every map; use {use}"
        )


class GradCAM(CAM):
    """Channels weighted by their mean gradient."""

    method = "gradcam"


class GradCAMPlusPlus(CAM):
    """Channels weighted by their positive gradients, place by place."""

    method = "gradcam++"


class HiResCAM(CAM):
    """Gradient times activation."""

    method = "hirescam"


class XGradCAM(CAM):
    """Channels weighted by gradient times share of the activation."""

    method = "xgradcam"


class LayerCAM(CAM):
    """Positive gradient times activation."""

    method = "layercam"


class GradCAMElementWise(CAM):
    """What is positive of gradient times activation."""

    method = "elementwise"


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


def _gradients(asked: Tensor, layers: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradient at each layer's output, and nowhere else."""
    if not asked.requires_grad:
        return [torch.zeros_like(layer) for layer in layers]
    return torch.autograd.grad(asked, layers, allow_unused=True, materialize_grads=True)


def _scaled(maps: Float[Tensor, "b h w"], size: Sequence[int] = ()) -> Float[Tensor, "b H W"]:
    """Each map from 0 to 1, resized or not; the small number is grad-cam's."""
    lowest = maps.amin((1, 2), keepdim=True)
    spread = (maps - lowest).amax((1, 2), keepdim=True)
    maps = (maps - lowest) / (spread + 1e-7)
    if not size:
        return maps
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


class FinerCAM:
    """Any of the others, on what tells a class from those that score most like it.

    Args:
        model: as for the others.
        target_layers: as for the others.
        reshape_transform: as for the others.
        base_method: the class of the map.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
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
    ) -> Maps:
        """Maps in [0, 1] at the size of the images.

        Args:
            input_tensor: the images.
            targets: one for each image, instead of all that follows.
            eigen_smooth: as for the others.
            alpha: strength of what is taken off.
            comparison_categories: ranks by likeness of score, 1 being the class most alike.
            target_idx: the class; None is the model's first guess.
        """
        ranks = (1, 2, 3) if comparison_categories is None else tuple(comparison_categories)

        def contrasts(outputs: Tensor) -> list[Target]:
            own = outputs.amax(-1) if target_idx is None else outputs[:, target_idx]
            order = (outputs - own[:, None]).abs().argsort(dim=-1, stable=True).tolist()
            kept = [rank for rank in ranks if rank < outputs.shape[-1]]
            return [FinerWeightedTarget(row[0], [row[r] for r in kept], alpha) for row in order]

        cam = self.base_cam
        asked = contrasts if targets is None else (lambda _: list(targets))
        return cam.forward(input_tensor, asked, eigen_smooth).cpu().numpy()

    def __enter__(self) -> "FinerCAM":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing has to be given back, and no error is swallowed."""
