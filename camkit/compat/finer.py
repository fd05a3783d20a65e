"""Finer-CAM, with the names, arguments and results of pytorch-grad-cam."""

from collections.abc import Sequence

from torch import Tensor, nn

from camkit.compat.gradcam import CAM, GradCAM, Maps, Reshape
from camkit.compat.targets import FinerWeightedTarget, Target


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
