"""Mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun 2011)."""

import math
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.native import load
from camkit.ops.crf_backends import Infer, infer_native, infer_pydensecrf, infer_torch
from camkit.ops.crf_kernels import Kernels as Kernels, check_kernels, largest_features

Backend: TypeAlias = Literal["auto", "native", "torch", "pydensecrf"]
_INFER: dict[str, Infer] = {
    "native": infer_native,
    "torch": infer_torch,
    "pydensecrf": infer_pydensecrf,
}
_TOLERANCE = 1e-3  # of the sum over labels


def mean_field(
    scores: Float[Tensor, "b k H W"],
    rgb: UInt8[Tensor, "b H W 3"],
    kernels: Kernels,
    *,
    steps: int,
    backend: Backend = "auto",
) -> Float[Tensor, "b k H W"]:
    """Make pixels that are near, or near and of like colour, agree on their label.

    Energy and updates are the paper's, with Potts compatibility, symmetrically normalised kernels
    and all labels updated at once, as in pydensecrf: unary terms are the negative logarithms of the
    scores (no less than 1e-5), their softmax is where it starts. Kernels are filters on the
    permutohedral lattice (`camkit.ops.permutohedral`).

    All backends give the same up to rounding: "native" is compiled on first use (`camkit.native`),
    takes images on up to ``torch.get_num_threads()`` threads and lets other Python threads run;
    "torch" runs on any device and is differentiable in the scores; "pydensecrf" is that library, if
    installed. "auto" is "native" for tensors on the CPU that need no gradient and where it can be
    had, else "torch".

    Args:
        scores: probabilities, summing to one over k. With one label there is nothing to decide.
        rgb: the picture in 0..255, red first: the lattice is not the same for all orders.
        kernels: widths and weights; `camkit.refine.crf_presets` has those of the field.
        steps: updates, at least 1; the field runs 10.
        backend: which implementation.

    Returns:
        Probabilities in the dtype of the scores.
    """
    if not steps >= 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    check_kernels(kernels)
    check_backend(backend)
    _check_rgb(scores, rgb)
    if scores.shape[1] == 0:
        raise ValueError("`scores` must hold at least one label, got none")
    if scores.numel() == 0:
        return scores.clone()
    largest_features(kernels, *scores.shape[-2:])
    _check_scores(scores.detach())
    if scores.shape[1] == 1:
        return torch.ones_like(scores)
    kernels = Kernels(*map(float, kernels))
    return _chosen(backend, scores)(scores, rgb, kernels, steps)


def check_backend(backend: str) -> None:
    """Refuse a name that is none of a backend."""
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"`backend` must be one of {names}, got {backend!r}")


def _chosen(backend: str, scores: Tensor) -> Infer:
    wants_gradient = scores.requires_grad and torch.is_grad_enabled()
    on_cpu = scores.device.type == "cpu"
    if backend == "auto":
        usable = on_cpu and not wants_gradient and load("dense_crf") is not None
        return infer_native if usable else infer_torch
    if backend != "torch" and wants_gradient:
        raise ValueError(
            f"backend {backend!r} gives no gradient, and `scores` ask for one; use "
            "backend='torch', or pass scores.detach()"
        )
    if backend == "native" and not on_cpu:
        raise ValueError(
            f"backend 'native' runs on the CPU, `scores` are on {scores.device}; use "
            "backend='torch', or pass scores.cpu()"
        )
    return _INFER[backend]


def _check_rgb(scores: Tensor, rgb: Tensor) -> None:
    if rgb.dtype != torch.uint8:
        raise TypeError(
            f"`rgb` must be uint8 with colours in 0..255, got {rgb.dtype}; colours in [0, 1] "
            "become that by (rgb * 255).round().byte()"
        )
    images, _, rows, cols = scores.shape
    if rgb.shape != (images, rows, cols, 3):
        raise ValueError(
            f"`rgb` must be {images}x{rows}x{cols}x3 to match `scores`, got "
            f"{'x'.join(map(str, rgb.shape))}; resize one of them, red, green and blue come last"
        )


def _check_scores(scores: Tensor) -> None:
    # NaN and inf reach the sum, so one pass over all labels finds them
    low, high = (value.item() for value in scores.sum(1, dtype=torch.float32).aminmax())
    least = scores.min().item()
    rounding = torch.finfo(scores.dtype).eps
    tolerance = max(_TOLERANCE, rounding)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            "`scores` must be finite, got NaN or inf, which a dense CRF would spread to every pixel"
        )
    if least < 0:
        raise ValueError(
            f"`scores` must be probabilities, got {least:.3g}; take a softmax of logits first"
        )
    if low < 1 - tolerance or high > 1 + tolerance:
        raise ValueError(
            f"`scores` must sum to 1 over labels, got sums from {low:.4g} to {high:.4g}; divide by "
            "scores.sum(1, keepdim=True)"
        )
