"""Mean-field inference in a fully connected CRF, in C++, plain torch and pydensecrf."""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.errors import CamkitError
from camkit.native.loader import load, native_state
from camkit.ops.finite import check_finite
from camkit.ops.permutohedral import Lattice, lattice, packing
from camkit.ops.similarity import check_shape

LEAST_SCORE = 1e-5  # as pydensecrf's unary_from_softmax; a score of zero would exclude a label
_LARGEST = 2.0**18  # further out, float32 coordinates do not resolve where in a simplex a point is
_CACHED_PIXELS = 2**18  # lattices of larger pictures would occupy much memory and gain little
_TOLERANCE = 1e-3  # of the sum over labels
Backend: TypeAlias = Literal["auto", "native", "torch", "pydensecrf"]


class Kernels(NamedTuple):
    """Widths (standard deviations, in pixels and grey levels) and weights of the two kernels.

    The Gaussian kernel connects near pixels, the bilateral kernel near pixels of similar colour.
    """

    gauss_sxy: float
    gauss_weight: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_weight: float


def check_kernels(kernels: Kernels) -> None:
    """Raise a ValueError if a width is not positive, or a weight negative, infinite or NaN."""
    for name, value in kernels._asdict().items():
        if name.endswith("weight"):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {value}")
        elif not 0.0 < value < math.inf:
            raise ValueError(f"`{name}` must be above 0 and finite, got {value}")


def _largest_features(kernels: Kernels, rows: int, cols: int) -> tuple[list[float], list[float]]:
    """Return bounds of x, y (Gaussian kernel) and of x, y, red, green, blue (bilateral kernel)."""
    gauss = [(cols - 1) / kernels.gauss_sxy, (rows - 1) / kernels.gauss_sxy]
    bilateral = [(cols - 1) / kernels.bilateral_sxy, (rows - 1) / kernels.bilateral_sxy]
    bilateral += 3 * [255 / kernels.bilateral_srgb]
    for names, bounds in (("gauss_sxy", gauss), ("bilateral_sxy` or `bilateral_srgb", bilateral)):
        try:
            if max(bounds) > _LARGEST:
                raise ValueError(f"{max(bounds):.0f} widths across")  # noqa: TRY301
            packing(bounds)
        except ValueError as error:
            raise ValueError(
                f"`{names}` is too small for a lattice over {rows}x{cols} pixels ({error}); "
                "widths below a pixel or a grey level connect no pixels"
            ) from error
    return gauss, bilateral


def _infer_torch(scores: Tensor, rgb: Tensor, kernels: Kernels, steps: int) -> Tensor:
    """Compute the mean field in plain torch: any device, differentiable in the scores."""
    images, _, rows, cols = scores.shape
    dtype = torch.promote_types(scores.dtype, torch.float32)
    refined = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    with torch.autocast(scores.device.type, enabled=False):
        for index in range(images):
            lattices = _lattices(rgb[index].to(scores.device), kernels)
            flat = _update(scores[index].to(dtype).flatten(1), lattices, steps)
            refined[index] = flat.unflatten(1, (rows, cols))
    return refined.to(scores.dtype)


def _update(scores: Float[Tensor, "k n"], lattices: tuple[Lattice, Lattice], steps: int) -> Tensor:
    # Filters are linear and probabilities sum to one, so the last label needs no channel: all log
    # odds are relative to it.
    logs = scores.clamp_min(LEAST_SCORE).log()
    odds = (logs[:-1] - logs[-1:]).T.contiguous()
    gauss, bilateral = lattices

    def filtered(values: Tensor) -> Tensor:
        message = gauss.filter(values)
        message += bilateral.filter(values)
        return message

    prior = odds - filtered(torch.ones_like(odds[:, :1]))
    for _ in range(steps):
        message = filtered(_probabilities(odds))
        odds = message.sum(1, keepdim=True) + prior
        odds += message
    likely = _probabilities(odds).T
    return torch.cat([likely, 1 - likely.sum(0, keepdim=True)]).clamp_min(0)


def _probabilities(odds: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Return the softmax over odds and a last label of odds 0, which is left out."""
    if odds.shape[1] == 1:
        return odds.sigmoid()
    top = odds.detach().amax(1, keepdim=True).clamp_min_(0)  # any constant would do
    likely = (odds - top).exp_()
    return likely / (likely.sum(1, keepdim=True) + top.neg_().exp_())


def _lattices(rgb: UInt8[Tensor, "H W 3"], kernels: Kernels) -> tuple[Lattice, Lattice]:
    rows, cols = rgb.shape[:2]
    # cached lattices, and those a later backward needs, must not be inference tensors
    with torch.inference_mode(mode=False), torch.no_grad():
        make = _cached_gauss if rows * cols <= _CACHED_PIXELS else _gauss
        gauss = make(rows, cols, kernels.gauss_sxy, kernels.gauss_weight, rgb.device)
        _, largest = _largest_features(kernels, rows, cols)
        colours = _divided(rgb.reshape(-1, 3).T.float(), kernels.bilateral_srgb)
        position = _positions(rows, cols, kernels.bilateral_sxy, rgb.device)
        bilateral = lattice(torch.cat([position, colours]), largest)
        return gauss, bilateral.normalised(kernels.bilateral_weight)


def _gauss(rows: int, cols: int, sxy: float, weight: float, device: torch.device) -> Lattice:
    largest = [(cols - 1) / sxy, (rows - 1) / sxy]
    return lattice(_positions(rows, cols, sxy, device), largest).normalised(weight)


_cached_gauss = functools.lru_cache(maxsize=4)(_gauss)


def _positions(rows: int, cols: int, sxy: float, device: torch.device) -> Float[Tensor, "2 n"]:
    at = torch.arange(rows * cols, device=device)
    return _divided(torch.stack([at % cols, at // cols]).float(), sxy)


def _divided(values: Tensor, width: float) -> Tensor:
    # torch may multiply by the reciprocal of a plain number, which rounds differently
    return values / values.new_tensor([width])


def _infer_native(scores: Tensor, rgb: Tensor, kernels: Kernels, steps: int) -> Tensor:
    """Compute the mean field in compiled code: several threads, the interpreter lock released."""
    library = load("dense_crf")
    if library is None:
        raise CamkitError(
            f"backend 'native' is not there ({native_state('dense_crf')}); install a wheel of "
            "camkit for this platform or a C++ compiler, or use backend='torch'"
        )
    logs = scores.detach().float().clamp_min(LEAST_SCORE).log_().contiguous()
    rgb = rgb.contiguous()
    refined = torch.empty_like(logs)
    images, labels, rows, cols = logs.shape
    failed = library.camkit_mean_field(
        ctypes.c_void_p(logs.data_ptr()),
        ctypes.c_void_p(rgb.data_ptr()),
        *(ctypes.c_int64(size) for size in (images, labels, rows, cols)),
        (ctypes.c_float * 5)(*kernels),
        ctypes.c_int(steps),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_void_p(refined.data_ptr()),
    )
    if failed:
        raise MemoryError(f"no memory for the lattice of {images} images of {rows}x{cols} pixels")
    return refined.to(scores.dtype)


def _infer_pydensecrf(scores: Tensor, rgb: Tensor, kernels: Kernels, steps: int) -> Tensor:
    """Compute the mean field with the library the field uses, which the others must agree with."""
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise CamkitError(
            "backend 'pydensecrf' needs that library; install it with `pip install 'camkit[crf]'` "
            "(it takes g++ and the Python headers, and does not build on Python 3.13 or newer)"
        ) from error
    refined = torch.empty_like(scores, memory_format=torch.contiguous_format)
    energies = scores.detach().float().clamp_min(LEAST_SCORE).log().neg().cpu().numpy()
    for image, energy, colours in zip(refined, energies, rgb.cpu().numpy(), strict=True):
        labels, rows, cols = energy.shape
        field: Any = densecrf.DenseCRF2D(cols, rows, labels)
        field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(labels, -1)))
        field.addPairwiseGaussian(sxy=kernels.gauss_sxy, compat=kernels.gauss_weight)
        field.addPairwiseBilateral(
            sxy=kernels.bilateral_sxy,
            srgb=kernels.bilateral_srgb,
            rgbim=np.array(colours, order="C"),  # pydensecrf refuses read-only memory
            compat=kernels.bilateral_weight,
        )
        probabilities = np.array(field.inference(steps)).reshape(labels, rows, cols)
        image.copy_(torch.from_numpy(probabilities))
    return refined


def mean_field(
    scores: Float[Tensor, "b k H W"],
    rgb: UInt8[Tensor, "b H W 3"],
    kernels: Kernels,
    *,
    steps: int,
    backend: Backend = "auto",
) -> Float[Tensor, "b k H W"]:
    """Make near pixels, and near pixels of similar colour, agree on their label (dense CRF).

    Energy and updates are those of Kraehenbuehl and Koltun (2011), with Potts compatibility,
    symmetrically normalised kernels and all labels updated at once, as in pydensecrf: unary terms
    are the negative logarithms of the scores (at least 1e-5), and their softmax is the start.
    Kernels are filters on the permutohedral lattice (`camkit.ops.permutohedral`).

    All backends agree up to rounding: "native" comes compiled or is compiled on first use, runs
    images on up to ``torch.get_num_threads()`` threads and lets other Python threads run; "torch"
    runs on any device and is differentiable in the scores; "pydensecrf" is that library, if it is
    installed. "auto" is "native" for tensors on the CPU that need no gradient, if it is
    there, else "torch".

    Args:
        scores: probabilities, summing to one over k. With one label they become one.
        rgb: the picture in 0..255, red first; another order of channels gives another lattice.
        kernels: widths and weights; `camkit.refiners.crf` has those of the field.
        steps: updates, at least 1; the field runs 10.
        backend: the implementation.

    Returns:
        Probabilities in the dtype of the scores.
    """
    if not steps >= 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
    check_kernels(kernels)
    check_backend(backend)
    if rgb.dtype != torch.uint8:
        raise TypeError(
            f"`rgb` must be uint8 with colours in 0..255, got {rgb.dtype}; convert colours in "
            "[0, 1] by (rgb * 255).round().byte()"
        )
    shape = (len(scores), *scores.shape[2:], 3)
    check_shape("rgb", rgb, shape, "to match `scores`", "resize one of them; channels come last")
    if scores.shape[1] == 0:
        raise ValueError("`scores` must hold at least one label, got none")
    if scores.numel() == 0:
        return scores.clone()
    _largest_features(kernels, *scores.shape[-2:])
    _check_scores(scores.detach())
    if scores.shape[1] == 1:
        return torch.ones_like(scores)
    return _implementation(backend, scores)(scores, rgb, Kernels(*map(float, kernels)), steps)


def check_backend(backend: str) -> None:
    """Raise a ValueError if there is no backend of this name."""
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"`backend` must be one of {names}, got {backend!r}")


def _implementation(backend: str, scores: Tensor) -> Callable[..., Tensor]:
    wants_gradient = scores.requires_grad and torch.is_grad_enabled()
    on_cpu = scores.device.type == "cpu"
    if backend == "auto":
        usable = on_cpu and not wants_gradient and load("dense_crf") is not None
        return _infer_native if usable else _infer_torch
    if backend != "torch" and wants_gradient:
        raise ValueError(
            f"backend {backend!r} has no gradient, but `scores` need one; use "
            "backend='torch', or pass scores.detach()"
        )
    if backend == "native" and not on_cpu:
        raise ValueError(
            f"backend 'native' runs on the CPU, `scores` are on {scores.device}; use "
            "backend='torch', or pass scores.cpu()"
        )
    if backend == "torch":
        return _infer_torch
    return _infer_native if backend == "native" else _infer_pydensecrf


def _check_scores(scores: Tensor) -> None:
    # NaN and inf reach the sum, so one pass over the labels detects them
    low, high = (value.item() for value in scores.sum(1, dtype=torch.float32).aminmax())
    least, tolerance = scores.min().item(), max(_TOLERANCE, torch.finfo(scores.dtype).eps)
    if not (math.isfinite(low) and math.isfinite(high)):
        check_finite("scores", scores, ("image", "label"))
    if least < 0:
        raise ValueError(
            f"`scores` must be probabilities, got {least:.3g}; take a softmax of logits first"
        )
    if low < 1 - tolerance or high > 1 + tolerance:
        raise ValueError(
            f"`scores` must sum to 1 over labels, got sums from {low:.4g} to {high:.4g}; divide by "
            "scores.sum(1, keepdim=True)"
        )
