"""One mean field, three ways: compiled, in plain torch, and in pydensecrf."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.errors import CamkitError
from camkit.native import load
from camkit.ops.crf_kernels import Kernels, largest_features
from camkit.ops.permutohedral import Lattice, lattice

LEAST_SCORE = 1e-5  # as pydensecrf's unary_from_softmax; a score of zero would rule a label out
Infer = Callable[[Float[Tensor, "b k H W"], UInt8[Tensor, "b H W 3"], Kernels, int], Tensor]


def infer_torch(scores: Tensor, rgb: Tensor, kernels: Kernels, steps: int) -> Tensor:
    """The specification: any device, differentiable in the scores, one image after the other."""
    images, _, rows, cols = scores.shape
    dtype = torch.promote_types(scores.dtype, torch.float32)
    refined = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    with torch.autocast(scores.device.type, enabled=False):
        for index in range(images):
            lattices = _lattices(rgb[index].to(scores.device), kernels)
            flat = _update(scores[index].to(dtype).flatten(1), lattices, steps)
            refined[index] = flat.unflatten(1, (rows, cols))
    return refined.to(scores.dtype)


def _update(scores: Float[Tensor, "k n"], lattices: Sequence[Lattice], steps: int) -> Tensor:
    # Filters are linear and probabilities sum to one: the last label's message follows from the
    # others' and needs no channel. Everything counts from the last label.
    logs = scores.clamp_min(LEAST_SCORE).log()
    odds = (logs[:-1] - logs[-1:]).T.contiguous()
    prior = odds - _filtered(lattices, torch.ones_like(odds[:, :1]))
    for _ in range(steps):
        message = _filtered(lattices, _probabilities(odds))
        odds = message.sum(1, keepdim=True) + prior
        odds += message
    likely = _probabilities(odds).T
    return torch.cat([likely, 1 - likely.sum(0, keepdim=True)]).clamp_min(0)


def _filtered(lattices: Sequence[Lattice], values: Tensor) -> Tensor:
    first, *others = lattices
    message = first.filter(values)
    for kernel in others:
        message += kernel.filter(values)
    return message


def _probabilities(odds: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Softmax with a last label of odds 0, which is left out."""
    if odds.shape[1] == 1:
        return odds.sigmoid()
    top = odds.detach().amax(1, keepdim=True).clamp_min_(0)  # any constant would do
    likely = (odds - top).exp_()
    return likely / (likely.sum(1, keepdim=True) + top.neg_().exp_())


def _lattices(rgb: UInt8[Tensor, "H W 3"], kernels: Kernels) -> tuple[Lattice, Lattice]:
    rows, cols = rgb.shape[:2]
    # what is kept, or wanted by a later backward, must not be an inference tensor
    with torch.inference_mode(mode=False), torch.no_grad():
        make = _kept_gauss if rows * cols <= _KEPT_PIXELS else _gauss
        gauss = make(rows, cols, kernels.gauss_sxy, kernels.gauss_weight, rgb.device)
        _, largest = largest_features(kernels, rows, cols)
        colours = _divided(rgb.reshape(-1, 3).T.float(), kernels.bilateral_srgb)
        position = _positions(rows, cols, kernels.bilateral_sxy, rgb.device)
        bilateral = lattice(torch.cat([position, colours]), largest)
        return gauss, bilateral.normalised(kernels.bilateral_weight)


def _gauss(rows: int, cols: int, sxy: float, weight: float, device: torch.device) -> Lattice:
    largest = [(cols - 1) / sxy, (rows - 1) / sxy]
    return lattice(_positions(rows, cols, sxy, device), largest).normalised(weight)


_KEPT_PIXELS = 2**18  # larger pictures would hold on to much memory and gain little
_kept_gauss = functools.lru_cache(maxsize=4)(_gauss)


def _positions(rows: int, cols: int, sxy: float, device: torch.device) -> Float[Tensor, "2 n"]:
    at = torch.arange(rows * cols, device=device)
    return _divided(torch.stack([at % cols, at // cols]).float(), sxy)


def _divided(values: Tensor, width: float) -> Tensor:
    return values / values.new_tensor([width])  # a plain number may be multiplied as its reciprocal


def infer_native(scores: Tensor, rgb: Tensor, kernels: Kernels, steps: int) -> Tensor:
    """Compiled: images on several threads, the lock of the interpreter released."""
    library = load("dense_crf")
    if library is None:
        raise CamkitError(
            "backend 'native' needs a C++ compiler (g++ or clang++, or its name in CXX) and "
            "CAMKIT_NATIVE other than 0; the log of 'camkit' at INFO tells what failed, and "
            "backend='torch' needs neither"
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


def infer_pydensecrf(scores: Tensor, rgb: Tensor, kernels: Kernels, steps: int) -> Tensor:
    """The library that the field uses, one image after the other; the others must agree with it."""
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise CamkitError(
            "backend 'pydensecrf' needs that library; install it with `pip install 'camkit[crf]'` "
            "(Python below 3.13, g++ and the Python headers)"
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
            rgbim=np.array(colours, order="C"),  # it refuses memory that cannot be written
            compat=kernels.bilateral_weight,
        )
        found = np.array(field.inference(steps)).reshape(labels, rows, cols)
        image.copy_(torch.from_numpy(found))
    return refined
