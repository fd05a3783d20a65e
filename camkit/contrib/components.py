"""Maps read from the tokens alone: the kernel principal component, and tokens above k sigma."""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float

from camkit.capture.record import Capture, WatchSpec
from camkit.seeds.protocol import check_classes, fold_maps
from camkit.seeds.token_gradients import Tokens, entering_tokens
from camkit.tensors import Cam, Classes

Kernel: TypeAlias = Literal["linear", "poly", "rbf", "sigmoid", "cosine"]


def kernel_component(
    tokens: Tokens, kernel: Kernel = "sigmoid", gamma: float | None = None
) -> Float[torch.Tensor, "b n"]:
    """Project each token on the first kernel principal component of the tokens of its image.

    Kernels, their defaults and the sign (the larger extreme is positive) are those of
    scikit-learn's KernelPCA, on centred tokens.

    Args:
        tokens: of each image.
        kernel: similarity of two tokens.
        gamma: factor of the inner product or distance; None is one over the number of channels.
    """
    x = (tokens - tokens.mean(1, keepdim=True)).double()
    scale = 1.0 / x.shape[-1] if gamma is None else gamma
    similar = x @ x.mT
    match kernel:
        case "poly":
            similar = (scale * similar + 1.0) ** 3
        case "rbf":
            similar = (-scale * torch.cdist(x, x).square()).exp()
        case "sigmoid":
            similar = (scale * similar + 1.0).tanh()
        case "cosine":
            length = x.norm(dim=-1).clamp_min(1e-12)
            similar = similar / (length[:, :, None] * length[:, None])
        case _:
            pass
    across = similar.mean(1, keepdim=True)
    centred = similar - across - across.mT + across.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh(centred)
    along = vectors[..., -1] * values[..., -1:].clamp_min(0.0).sqrt()
    negative = along.amin(1, keepdim=True).abs() > along.amax(1, keepdim=True)
    return torch.where(negative, -along, along).to(tokens.dtype)


def above_sigma(tokens: Tokens, k: float = 2.0) -> Tokens:
    """Weight channels by the share of tokens that exceed their mean by ``k`` standard deviations.

    Summed over channels this is the map of FEM (Fuad et al. 2020).
    """
    deviation = tokens.std(1, correction=0, keepdim=True)
    rare = tokens > tokens.mean(1, keepdim=True) + k * deviation
    return tokens * rare.to(tokens.dtype).mean(1, keepdim=True)


@dataclass(frozen=True)
class KernelPCASeed:
    """The first kernel principal component of the patch tokens; the same map for every class.

    KPCA-CAM (Karmani et al. 2024), at the tokens that enter the last attention.

    Attributes:
        kernel: similarity of two tokens, as in `kernel_component`.
        gamma: its factor.
    """

    kernel: Kernel = "sigmoid"
    gamma: float | None = None

    requires: ClassVar[WatchSpec] = WatchSpec(entering=1, last_patches=False)

    def __post_init__(self) -> None:
        check_kernel(self.kernel)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        maps = kernel_component(_patches(capture, self), self.kernel, self.gamma)
        return _for_every_class(capture, maps, classes)


@dataclass(frozen=True)
class FEMSeed:
    """Tokens weighted by how rarely their channels exceed k sigma; the same map for every class.

    FEM (Fuad et al. 2020), at the tokens that enter the last attention.

    Attributes:
        k: how many standard deviations above its mean a channel must be.
    """

    k: float = 2.0

    requires: ClassVar[WatchSpec] = WatchSpec(entering=1, last_patches=False)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        maps = above_sigma(_patches(capture, self), self.k).sum(-1)
        return _for_every_class(capture, maps, classes)


def check_kernel(kernel: str) -> None:
    """Check the name of a kernel."""
    if kernel not in get_args(Kernel):
        raise ValueError(f"`kernel` must be one of {', '.join(get_args(Kernel))}; got {kernel!r}")


def _patches(capture: Capture, seed: KernelPCASeed | FEMSeed) -> Tokens:
    (call,) = entering_tokens(capture, seed)
    return call.tokens.detach()[:, capture.patches].float()


def _for_every_class(capture: Capture, maps: Float[torch.Tensor, "b n"], classes: Classes) -> Cam:
    check_classes(classes, capture.images, None)
    return fold_maps(capture, maps.clamp_min(0.0)[:, None].expand(*classes.shape, -1), classes)
