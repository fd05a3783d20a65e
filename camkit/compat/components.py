"""The methods that read the structure of the tokens: components, rare channels, random weights."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.compat.base import CAM, LayerEvidence, Reshape
from camkit.contrib.components import Kernel, above_sigma, check_kernel, kernel_component
from camkit.seeds.token_gradients import principal_component
from camkit.seeds.views import ModelCall


class EigenCAM(CAM):
    """First principal component of the activations, its larger extreme positive.

    grad-cam leaves the sign to its linear algebra, so its map may be the negative of this one.
    """

    uses_gradients = False
    uses_targets = False

    def _map(self, evidence: LayerEvidence, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        del eigen_smooth
        return principal_component(evidence.tokens)


class EigenGradCAM(CAM, weighting="hirescam"):
    """First principal component of gradient times activation, its larger extreme positive."""

    def _map(self, evidence: LayerEvidence, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        del eigen_smooth
        return super()._map(evidence, eigen_smooth=True)


class SegEigenCAM(EigenGradCAM):
    """First principal component of absolute gradient times activation (Chung and Ying 2025)."""

    def _weighted(self, evidence: LayerEvidence) -> Float[Tensor, "b n c"]:
        if evidence.gradients is None:
            return evidence.tokens
        return evidence.tokens * evidence.gradients.abs()


class KPCA_CAM(CAM):  # noqa: N801 - grad-cam's name
    """First kernel principal component of the activations.

    Args:
        model: as in `CAM`.
        target_layers: as in `CAM`.
        reshape_transform: as in `CAM`.
        kernel: as in `camkit.contrib.KernelPCASeed`.
        gamma: as in `camkit.contrib.KernelPCASeed`.
        call: as in `CAM`.
    """

    uses_gradients = False
    uses_targets = False

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
        kernel: Kernel = "sigmoid",
        gamma: float | None = None,
        *,
        call: ModelCall | None = None,
    ) -> None:
        check_kernel(kernel)
        super().__init__(model, target_layers, reshape_transform, call=call)
        self.kernel: Kernel = kernel
        self.gamma = gamma

    def _map(self, evidence: LayerEvidence, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        del eigen_smooth
        return kernel_component(evidence.tokens, self.kernel, self.gamma)


class FEM(CAM):
    """Channels weighted by the share of places above k sigma.

    Args:
        model: as in `CAM`.
        target_layers: as in `CAM`.
        reshape_transform: as in `CAM`.
        k: as in `camkit.contrib.FEMSeed`.
        call: as in `CAM`.
    """

    uses_gradients = False
    uses_targets = False

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Reshape | None = None,
        k: float = 2.0,
        *,
        call: ModelCall | None = None,
    ) -> None:
        super().__init__(model, target_layers, reshape_transform, call=call)
        self.k = k

    def _map(self, evidence: LayerEvidence, eigen_smooth: bool) -> Float[Tensor, "b n"]:
        del eigen_smooth
        return above_sigma(evidence.tokens, self.k).sum(-1)


class RandomCAM(CAM):
    """Channels weighted by random numbers from -1 to 1, of torch's generator (a control)."""

    uses_gradients = False
    uses_targets = False

    def _weighted(self, evidence: LayerEvidence) -> Float[Tensor, "b n c"]:
        images, _, channels = evidence.tokens.shape
        drawn = torch.rand(images, 1, channels) * 2 - 1
        return evidence.tokens * drawn.to(evidence.tokens)
