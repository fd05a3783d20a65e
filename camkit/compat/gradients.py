"""The methods that weight channels by gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from camkit.compat.base import CAM


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


class ShapleyCAM(CAM, weighting="gradcam"):
    """Channels weighted by their mean gradient less half a Hessian-vector product.

    The vector is the layer's output (Cai 2025, arXiv 2501.06261). Attention runs in torch's plain
    kernel, which can be differentiated twice, and the last block is computed completely.
    """

    differentiates_twice = True

    def _differentiated(self, total: Tensor, layers: Sequence[Tensor]) -> Sequence[Tensor]:
        first = torch.autograd.grad(
            total, layers, create_graph=True, allow_unused=True, materialize_grads=True
        )
        values = []
        for gradient, layer in zip(first, layers, strict=True):
            second = None
            if gradient.requires_grad:
                (second,) = torch.autograd.grad(
                    gradient, layer, layer.detach(), retain_graph=True, allow_unused=True
                )
            values.append(gradient.detach() - (0.0 if second is None else 0.5 * second))
        return values
