"""Methods on top of another method: contrasts of classes, products of layers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from camkit.compat.base import CAM, Maps, Reshape, smoothed, stretched
from camkit.compat.gradients import GradCAM, GradCAMPlusPlus
from camkit.compat.utils.model_targets import FinerWeightedTarget, Target
from camkit.seeds.views import ModelCall


class FinerCAM(AbstractContextManager["FinerCAM"]):
    """Another method (``base_method``) applied to the contrast of a class with similar classes.

    Similar classes are those with the nearest scores. `CAM` explains the other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
        base_method: type[CAM] = GradCAM,
        *,
        call: ModelCall | None = None,
    ) -> None:
        self.base_cam = base_method(model, target_layers, reshape_transform, call=call)

    def __call__(  # noqa: PLR0913 - the signature is grad-cam's
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        eigen_smooth: bool = False,
        alpha: float = 1.0,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
        *,
        aug_smooth: bool = False,
    ) -> Maps:
        """Return maps in [0, 1] at the size of the images.

        Args:
            input_tensor: the images.
            targets: one for each image; they replace the last three arguments.
            eigen_smooth: take the first principal component instead of the sum over channels.
            alpha: factor of the subtracted scores.
            comparison_categories: ranks by similarity of score; 1 is the most similar class.
            target_idx: the class; None takes the most probable one.
            aug_smooth: as in `CAM`; grad-cam has it only there.
        """
        ranks = (1, 2, 3) if comparison_categories is None else tuple(comparison_categories)

        def contrasts(outputs: Tensor) -> list[Target]:
            own = outputs.amax(-1) if target_idx is None else outputs[:, target_idx]
            order = (outputs - own[:, None]).abs().argsort(dim=-1, stable=True).tolist()
            kept = [rank for rank in ranks if rank < outputs.shape[-1]]
            return [FinerWeightedTarget(row[0], [row[r] for r in kept], alpha) for row in order]

        chosen = contrasts if targets is None else targets
        return smoothed(
            lambda pixels: self.base_cam.forward(pixels, chosen, eigen_smooth),
            input_tensor,
            aug_smooth,
        )

    def __exit__(self, *_: object) -> None:
        """Do nothing: the hooks are off already. Errors are not swallowed."""


class RefineCAM(AbstractContextManager["RefineCAM"]):
    """The product of the maps of several layers, each by another method (``base_method``).

    Source: arXiv 2605.14641. All layers share one forward. ``settings`` are those of the method;
    `CAM` explains the other arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
        base_method: type[CAM] = GradCAMPlusPlus,
        **settings: Any,
    ) -> None:
        self.base_cam = base_method(model, target_layers, reshape_transform, **settings)

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        eigen_smooth: bool = False,
        *,
        aug_smooth: bool = False,
    ) -> Maps:
        """Return maps in [0, 1] at the size of the images; the arguments are those of `CAM`."""

        def forward(pixels: Tensor) -> Tensor:
            layers = self.base_cam.layer_maps(pixels, targets, eigen_smooth)
            product = stretched(layers.flatten(0, 1)).unflatten(0, layers.shape[:2]).prod(0)
            return stretched(product)

        return smoothed(forward, input_tensor, aug_smooth)

    def __exit__(self, *_: object) -> None:
        """Do nothing: the hooks are off already. Errors are not swallowed."""
